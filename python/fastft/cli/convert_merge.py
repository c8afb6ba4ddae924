"""`fastft convert merge`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastft import console
from fastft.cli.job import Job
from fastft.errors import UsageError

if TYPE_CHECKING:
    from fastft.convert.matching import NameOptions


def merge(
    llm: str,
    adapter_path: str,
    save_path: str,
    *,
    adapter: tuple[str, ...] = (),
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    max_shard_size: str = "2GB",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    is_clip: bool = False,
    visual_encoder: str | None = None,
    model_class: str | None = None,
    key_map: tuple[str, ...] = (),
    dequantized_base: Literal["auto", "none", "nf4", "fp4"] = "auto",
    double_quant: bool = False,
    match_peft: bool = False,
    base_is_residual: bool = False,
    quantize: Literal["none", "nf4", "fp4"] = "none",
    blocksize: int = 64,
    skip: tuple[str, ...] = (),
    dry_run: bool = False,
    json: bool = False,
    force: bool = False,
    safe_serialization: bool = True,
) -> Job:
    """Merge an adapter into its base; write a model folder.

    Args:
        llm: folder or hub id of the base model
        adapter_path: folder of the adapter, or of a LLaVA's parts (RUN/llava): one folder is made of all
        save_path: folder to write; must not exist
        adapter: another adapter as DIR or DIR:WEIGHT; may be given several times
        dtype: of the written weights; auto keeps the base's
        max_shard_size: largest file, e.g. 2GB (2*10^9 bytes), 2GiB; a bare number is GB
        device: where the arithmetic runs; auto and cpu need no GPU, cuda gives the same bits
        is_clip: the adapter is of a CLIPVisionModel; only the vision tower of the CLIP is merged and written
        visual_encoder: with a LLaVA's parts: folder or hub id of the vision tower, where they do not say it
        model_class: class of transformers that the adapter was trained on, where config.json names another
        key_map: REGEX=REPLACEMENT done on the adapter's names; may be given several times
        dequantized_base: start from what QLoRA saw: the linear layers in 4 bit and back; auto: if the adapter says so
        double_quant: with --dequantized-base nf4 or fp4: the scales were quantized too; with --quantize: quantize them
        match_peft: round as PEFT's merge does, twice in embeddings and experts
        base_is_residual: the base is what the start of the training (PiSSA, OLoRA, ...) left of the original
        quantize: write the linear layers in 4 bit, as bitsandbytes does
        blocksize: with --quantize: numbers that share a scale
        skip: with --quantize: a layer that stays as it is; may be given several times
        dry_run: print the plan, write nothing
        json: with --dry-run: print the plan as JSON
        force: replace save_path if it exists
        safe_serialization: accepted for XTuner's scripts; safetensors is always written
    """
    if json and not dry_run:
        raise UsageError("convert merge: --json belongs to --dry-run")
    if double_quant and dequantized_base in ("auto", "none") and quantize == "none":
        raise UsageError("convert merge: --double-quant belongs to --dequantized-base nf4 or fp4, or to --quantize")
    if quantize == "none" and (skip or blocksize != 64):
        raise UsageError("convert merge: --skip and --blocksize belong to --quantize")
    if not safe_serialization:
        raise UsageError("convert merge: --safe-serialization=false: fastft writes safetensors only")

    others = {
        "--adapter": adapter,
        "--is-clip": is_clip,
        "--model-class": model_class,
        "--key-map": key_map,
        "--match-peft": match_peft,
        "--base-is-residual": base_is_residual,
        "--quantize": quantize != "none",
        "--json": json,
        "--device cuda": device == "cuda",
    }

    def run() -> None:
        from fastft.convert import merge as merging
        from fastft.convert import size
        from fastft.convert.four_bit import FourBit
        from fastft.hub import locate

        if is_llava(Path(adapter_path), [option for option, given in others.items() if given], visual_encoder):
            from fastft.convert import llava, llava_result

            parts, num_tokens, write_processor = llava_result.parts(
                llava_result.find(locate.model_called(llm), Path(adapter_path), visual_encoder)
            )
            together = llava.plan_llava(
                parts,
                num_tokens=num_tokens,
                dtype=dtype,
                max_shard_size_bytes=size.parse_size(max_shard_size),
                four_bit=merging.four_bit_base(dequantized_base, double_quant=double_quant),
            )
            if dry_run:
                console.result(llava.as_table(together))
            else:
                console.result(llava.execute(together, Path(save_path), write_processor, force=force).line())
            return
        plan = merging.plan(
            locate.model_called(llm),
            [(Path(adapter_path), 1.0), *[with_weight(text) for text in adapter]],
            dtype=dtype,
            max_shard_size_bytes=size.parse_size(max_shard_size),
            names=name_options(model_class, key_map, is_clip=is_clip),
            four_bit=merging.four_bit_base(dequantized_base, double_quant=double_quant),
            match_peft=match_peft,
            base_is_residual=base_is_residual,
            quantize=None if quantize == "none" else FourBit(quantize, double_quant, checked_blocksize(blocksize)),
            skip=skip,
        )
        if dry_run:
            console.result(plan.as_json() if json else plan.as_table())
            return
        console.result(merging.execute(plan, Path(save_path), force=force, on_gpu=device == "cuda").line())

    return Job(run)


def is_llava(folder: Path, others: Sequence[str], visual_encoder: str | None) -> bool:
    """Tell whether a folder holds the parts of a LLaVA.

    Args:
        folder: what is merged.
        others: options that are given and have no meaning for a LLaVA.
        visual_encoder: which has a meaning for a LLaVA only.

    Raises:
        UsageError: an option that has no meaning.
    """
    if (folder / "projector" / "config.json").is_file():
        if others:
            raise UsageError(f"{others[0]}: {folder} holds the parts of a LLaVA, for which it is not built")
        return True
    if visual_encoder is not None:
        raise UsageError(f"--visual-encoder is for the parts of a LLaVA; {folder} has no projector/")
    return False


def checked_blocksize(blocksize: int) -> int:
    """Refuse a block size that bitsandbytes does not have."""
    from fastft.convert.bitsandbytes_layout import BLOCKSIZES

    if blocksize not in BLOCKSIZES:
        raise UsageError(f"--blocksize {blocksize} is not allowed; use {', '.join(map(str, BLOCKSIZES))}")
    return blocksize


def name_options(model_class: str | None, key_map: tuple[str, ...], *, is_clip: bool) -> "NameOptions":
    """Read the options that say how names are found; `convert verify` has them too."""
    from fastft.convert.matching import NameOptions, parse_key_map

    if is_clip and model_class is not None:
        raise UsageError(f"--is-clip and --model-class {model_class} say two things; give one")
    return NameOptions(model_class, parse_key_map(key_map), is_clip)


def with_weight(text: str) -> tuple[Path, float]:
    """`DIR:WEIGHT` or `DIR`."""
    folder, separator, weight = text.rpartition(":")
    if not separator or Path(text).is_dir():
        return Path(text), 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"convert merge: --adapter {text}: `{weight}` is not a weight; write DIR:0.5")
    return Path(folder), number
