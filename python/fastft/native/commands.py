"""The commands that write model folders as functions: progress for the caller instead of stderr, and a report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from fastft import console
from fastft.convert.size import DEFAULT_MAX_SHARD_SIZE_BYTES, parse_size
from fastft.errors import ArrayError
from fastft.native.four_bit import QuantType, check_blocksize

if TYPE_CHECKING:
    from fastft.convert.rewrite import RewritePlan

Dtype = Literal["auto", "bf16", "fp16", "fp32"]

Progress: TypeAlias = Callable[[str, int, int], object]
"""Called with (what is done, bytes done, bytes in all), in the thread of the caller; what it raises stops the work."""


@dataclass(frozen=True, slots=True)
class Report:
    """How the writing of a model folder went.

    Attributes:
        folder: the result.
        num_bytes: of its tensors.
        num_tensors: in all.
        num_changed: weights that an adapter or the quantization changed.
        num_checked: that were computed a second time and compared.
        duration_s: wall time.
        notes: what a person should know, a sentence each.
    """

    folder: Path
    num_bytes: int
    num_tensors: int
    num_changed: int
    num_checked: int
    duration_s: float
    notes: tuple[str, ...]


def merge_checkpoint(
    base: str | PathLike[str],
    adapter: str | PathLike[str] | Sequence[tuple[str | PathLike[str], float]],
    save_path: str | PathLike[str],
    *,
    dtype: Dtype = "auto",
    model_class: str | None = None,
    key_map: Sequence[str] = (),
    is_clip: bool = False,
    match_peft: bool = False,
    base_is_residual: bool = False,
    dequantized_base: Literal["auto", "none", "nf4", "fp4"] = "auto",
    quantize: QuantType | None = None,
    double_quant: bool = False,
    blocksize: int = 64,
    skip: Sequence[str] = (),
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE_BYTES,
    device: Literal["cpu", "cuda"] = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Merge an adapter into a model folder: `fastft convert merge` as a function.

    Args:
        base: folder of the base model.
        adapter: folder of the adapter; or several, each with the weight that multiplies its update.
        save_path: folder to be made; it holds the whole result afterwards, or is as it was before.
        dtype: of the written weights; auto: each keeps the base's.
        model_class: class of transformers that the adapter was trained on, where config.json names another.
        key_map: REGEX=REPLACEMENT, done on the adapter's names one after the other.
        is_clip: the adapter is of a CLIPVisionModel; only the vision tower of the CLIP is merged and written.
        match_peft: round where PEFT's merge rounds, twice in embeddings and experts.
        base_is_residual: the base is what the start of the training (PiSSA, OLoRA, ...) left of the original.
        dequantized_base: start from what a QLoRA training saw; auto: if the adapter's fastft_training.json says so.
        quantize: write the linear layers in 4 bit.
        double_quant: for `dequantized_base` nf4 and fp4: the scales were quantized too; for `quantize`: quantize them.
        blocksize: with `quantize`: numbers that share a scale.
        skip: with `quantize`: layers that stay as they are.
        max_shard_size: greatest size of a file, in bytes or as text ("2GB").
        device: where the arithmetic runs; the bits are the same.
        force: replace a folder of models that is there.
        progress: told how far the work is, some 20 times a second.

    Raises:
        FastftError: PlanError, CheckpointError or FileError: what is missing, broken, or cannot be merged right.
    """
    check_blocksize("merge_checkpoint", blocksize)

    def plan() -> "RewritePlan":
        from fastft.convert import merge
        from fastft.convert.four_bit import FourBit
        from fastft.convert.matching import NameOptions, parse_key_map

        adapters = [(adapter, 1.0)] if isinstance(adapter, str | PathLike) else adapter
        return merge.plan(
            Path(base),
            [(Path(folder), weight) for folder, weight in adapters],
            dtype=dtype,
            max_shard_size_bytes=_size("merge_checkpoint", max_shard_size),
            names=NameOptions(model_class, parse_key_map(key_map), is_clip),
            four_bit=merge.four_bit_base(dequantized_base, double_quant=double_quant),
            match_peft=match_peft,
            quantize=None if quantize is None else FourBit(quantize, double_quant, blocksize),
            skip=skip,
            base_is_residual=base_is_residual,
        )

    return _carried_out(plan, save_path, force=force, progress=progress, on_gpu=device == "cuda")


def quantize_checkpoint(
    model: str | PathLike[str],
    save_path: str | PathLike[str],
    *,
    quant_type: QuantType = "nf4",
    double_quant: bool = False,
    blocksize: int = 64,
    skip: Sequence[str] = (),
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE_BYTES,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write a model folder in bitsandbytes' 4 bit: `fastft convert quantize` as a function.

    Args:
        model: folder of plain weights.
        save_path: folder to be made.
        quant_type: the code book.
        double_quant: quantize the scales too.
        blocksize: numbers that share a scale: 32, 64, 128 ... 4096.
        skip: layers that stay as they are, beside the head and what else transformers leaves.
        max_shard_size: as in `merge_checkpoint`, as are the rest.
        force: replace a folder of models that is there.
        progress: told how far the work is.

    Raises:
        FastftError: what is missing, broken, or cannot be quantized.
    """
    check_blocksize("quantize_checkpoint", blocksize)
    if quant_type not in ("nf4", "fp4"):
        raise ArrayError(f"quantize_checkpoint: quant_type {quant_type!r} is not allowed; use nf4 or fp4")

    def plan() -> "RewritePlan":
        from fastft.convert.four_bit import FourBit
        from fastft.convert.quantize import plan_quantize

        limit = _size("quantize_checkpoint", max_shard_size)
        four_bit = FourBit(quant_type, double_quant, blocksize)
        return plan_quantize(Path(model), four_bit, skip=skip, max_shard_size_bytes=limit)

    return _carried_out(plan, save_path, force=force, progress=progress)


def dequantize_checkpoint(
    model: str | PathLike[str],
    save_path: str | PathLike[str],
    *,
    dtype: Dtype = "auto",
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE_BYTES,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write a 4-bit model folder with plain weights: `fastft convert dequantize` as a function.

    Args:
        model: folder in bitsandbytes 4 bit.
        save_path: folder to be made.
        dtype: of the written weights; auto: what they had before they were quantized.
        max_shard_size: as in `merge_checkpoint`, as are the rest.
        force: replace a folder of models that is there.
        progress: told how far the work is.

    Raises:
        FastftError: what is missing, broken, or is no 4-bit model.
    """

    def plan() -> "RewritePlan":
        from fastft.convert.quantize import plan_dequantize

        limit = _size("dequantize_checkpoint", max_shard_size)
        return plan_dequantize(Path(model), dtype=dtype, max_shard_size_bytes=limit)

    return _carried_out(plan, save_path, force=force, progress=progress)


def _carried_out(
    plan: "Callable[[], RewritePlan]",
    save_path: str | PathLike[str],
    *,
    force: bool,
    progress: Progress | None,
    on_gpu: bool = False,
) -> Report:
    """Plan and execute with everything that would be shown going to the caller."""
    from fastft.convert import rewrite

    listener = _Listener(progress)
    with console.heard_by(listener):
        report = rewrite.execute(plan(), Path(save_path), force=force, on_gpu=on_gpu)
    return Report(
        report.folder,
        report.num_bytes,
        report.num_tensors,
        report.num_changed,
        report.num_checked,
        report.duration_s,
        tuple(listener.notes),
    )


def _size(what: str, max_shard_size: int | str) -> int:
    limit = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    if limit < 1:
        raise ArrayError(f"{what}: max_shard_size {limit} is not allowed; give at least 1 byte")
    return limit


class _Listener:
    """Hands progress on and keeps the notes."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.notes: list[str] = []

    def progress(self, what: str, done: float, total: float) -> None:
        if self._progress is not None:
            self._progress(what, int(done), int(total))

    def note(self, text: str) -> None:
        self.notes.append(text)
