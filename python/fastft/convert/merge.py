"""`fastft convert merge`: one folder of plain weights out of a base and its adapters.

`plan` reads headers only and refuses everything that cannot be right; `execute` (of `rewrite`) runs the plan.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from fastft.convert import classifier, offsets, peft_layers, quantized
from fastft.convert.adapter import Adapter, read_adapter
from fastft.convert.bitsandbytes_layout import BLOCKSIZES, CONV1D_MODELS, config_block
from fastft.convert.folder import Checkpoint, read_checkpoint
from fastft.convert.four_bit import FourBit
from fastft.convert.matching import NameOptions
from fastft.convert.model_config import ConfigEdits
from fastft.convert.names import BaseNames, Joined, TokenRows, join
from fastft.convert.plan import (
    Cast,
    Copy,
    Delta,
    Dora,
    Merge,
    OutputTensor,
    Part,
    PeftLayer,
    Rows,
    Shift,
    natural_order,
    taken_over,
    with_sources,
)
from fastft.convert.rewrite import RewritePlan, execute
from fastft.convert.sidefiles import side_files
from fastft.convert.size import DEFAULT_MAX_SHARD_SIZE_BYTES, readable
from fastft.convert.source import CONFIG_DTYPES, DTYPES, FLOATS, Seen, Source, read_bytes
from fastft.convert.tied import Tied, find_tied, is_embedding
from fastft.errors import PlanError, UsageError

__all__ = [
    "RewritePlan",
    "as_trained",
    "base_notes",
    "execute",
    "four_bit_base",
    "output_dtype",
    "plan",
    "planned_tensors",
    "read_base",
]


def plan(
    llm: Path,
    adapters: Sequence[tuple[Path, float]],
    *,
    dtype: str = "auto",
    max_shard_size_bytes: int = DEFAULT_MAX_SHARD_SIZE_BYTES,
    names: NameOptions | None = None,
    four_bit: FourBit | Literal["auto"] | None = "auto",
    match_peft: bool = False,
    quantize: FourBit | None = None,
    skip: Sequence[str] = (),
    base_is_residual: bool = False,
) -> RewritePlan:
    """Plan a merge; reads config files and headers, writes nothing.

    Args:
        llm: folder of the base model.
        adapters: adapter folders, each with the weight that multiplies its update (1.0 is the plain merge); the
            updates are summed before the one rounding.
        dtype: auto (each tensor keeps the base's), bf16, fp16 or fp32 (all floating tensors).
        max_shard_size_bytes: greedy limit of a file of the result.
        names: how names are found where they are not equal, and what of the base is meant.
        four_bit: merge onto the linear layers as a QLoRA training saw them, quantized like this and back; auto: as the
            fastft_training.json beside the adapter says, if there is one; None: onto the weights as they are.
        match_peft: round where PEFT's merge rounds, more than once in some layers.
        quantize: write the linear layers of the result in 4 bit.
        skip: with `quantize`: further modules that stay as they are.
        base_is_residual: the base is what the start of the training (PiSSA, OLoRA, ...) left of the original.

    Raises:
        FileError, CheckpointError, PlanError: what is missing, broken, or cannot be merged right.
    """
    if not adapters:
        raise UsageError("merge: no adapter given")
    base = read_base(llm, names)
    read = tuple((read_adapter(folder, base_is_residual=base_is_residual), weight) for folder, weight in adapters)
    base = classifier.as_trained(base, read)
    tied = find_tied(base.config, base.tensors)
    joined = _joined(base, tied, read, names, match_peft=match_peft)
    tensors, untied = _output_tensors(base, joined, tied, output_dtype(dtype), read)
    if match_peft:
        tensors = [_rounded_as_peft(tensor) for tensor in tensors]
    seen = as_trained(base, read) if four_bit == "auto" else four_bit
    if seen is not None:
        tensors = _onto_four_bit(tensors, base, seen, read)
    peft_layers.check(tensors)
    notes = [
        *base_notes(base, read, seen, quantize, asked=four_bit != "auto"),
        *_peft_notes(read, match_peft=match_peft),
        *classifier.notes(base, read),
    ]
    if untied:
        notes.append(
            f"the head and the embedding shared one tensor and differ now: both are written"
            f" (+{readable(base.tensors[tied.embedding].nbytes if tied else 0)}) and tie_word_embeddings becomes false"
        )
    is_clip = names is not None and names.is_clip
    block = None
    if quantize is not None:
        layers = quantized.layers(base, skip)
        block = config_block(quantize, _dtype_of(tensors, layers.tensors), layers.skip)
        tensors = quantized.quantized(tensors, layers.tensors, quantize)
        notes += layers.notes
    edits = ConfigEdits(output_dtype(dtype), untied, _vocab_size(base, joined), vision_only=is_clip, quantization=block)
    return RewritePlan(
        base,
        read,
        tuple(sorted(tensors, key=lambda tensor: natural_order(tensor.name))),
        max_shard_size_bytes,
        frozenset(joined.changed),
        edits,
        side_files(base.folder, [adapter.folder for adapter, _ in read], vision_only=is_clip),
        tuple(notes),
    )


def output_dtype(dtype: str) -> str | None:
    """Read `--dtype`: None is auto.

    Raises:
        UsageError: another word.
    """
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is not allowed; use auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def planned_tensors(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    dtype: str | None,
    names: NameOptions | None = None,
    four_bit: FourBit | Literal["auto"] | None = "auto",
    *,
    match_peft: bool = False,
) -> list[OutputTensor]:
    """Plan the tensors only, in the order of the base's files; for `verify`."""
    base = classifier.as_trained(base, adapters)
    tied = find_tied(base.config, base.tensors)
    joined = _joined(base, tied, adapters, names, match_peft=match_peft)
    tensors = _output_tensors(base, joined, tied, dtype, adapters)[0]
    if match_peft:
        tensors = [_rounded_as_peft(tensor) for tensor in tensors]
    seen = as_trained(base, adapters) if four_bit == "auto" else four_bit
    return tensors if seen is None else offsets.found(_onto_four_bit(tensors, base, seen, adapters))


def four_bit_base(
    dequantized_base: Literal["auto", "none", "nf4", "fp4"], *, double_quant: bool
) -> FourBit | Literal["auto"] | None:
    """Read `--dequantized-base` and its `--double-quant` for `plan` and `verify`."""
    if dequantized_base == "auto":
        return "auto"
    return None if dequantized_base == "none" else FourBit(dequantized_base, double_quant)


def as_trained(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> FourBit | None:
    """How the trainings held the base, by the fastft_training.json beside each adapter; None: as it is in the folder.

    Raises:
        PlanError: they held it differently, or what is said is not known.
    """
    if base.quantization is not None or _fused_scales(base, adapters):
        return None
    said = {_four_bit_of(adapter) for adapter, _ in adapters}
    if len(said) > 1:
        raise PlanError(
            "the adapters were trained on the base held in different ways (fastft_training.json); say with"
            " --dequantized-base none, nf4 or fp4 which one to merge onto"
        )
    return said.pop() if said else None


def _fused_scales(base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> bool:
    """Whether the scales of a training with double quantization go across what InternLM2's own files fuse."""
    return base.config.get("model_type") == "internlm2" and any(
        (four_bit := _four_bit_of(adapter)) is not None and four_bit.double_quant for adapter, _ in adapters
    )


def _four_bit_of(adapter: Adapter) -> FourBit | None:
    said = _quantization(adapter)
    if not said:
        return None
    quant_type, blocksize = said.get("type"), said.get("blocksize", 64)
    if quant_type not in ("nf4", "fp4") or blocksize not in BLOCKSIZES:
        raise PlanError(
            f"{adapter.folder}: its fastft_training.json says the base was held in {quant_type!r} with blocks of"
            f" {blocksize!r}, which is not known; say --dequantized-base none, nf4 or fp4"
        )
    weights_dtype = said.get("weights_dtype")
    known = {word: dtype for dtype, word in CONFIG_DTYPES.items()}
    if weights_dtype is not None and weights_dtype not in known:
        raise PlanError(
            f"{adapter.folder}: its fastft_training.json says the weights were unpacked to {weights_dtype!r}, which is"
            " not known; say --dequantized-base none, nf4 or fp4"
        )
    dtype = None if weights_dtype is None else known[weights_dtype]
    return FourBit(quant_type, bool(said.get("double_quant")), blocksize, dtype)


def _rounded_as_peft(tensor: OutputTensor) -> OutputTensor:
    """Let the updates of embeddings and experts be rounded before they are added (spec/formats.md 2.1)."""
    operation = tensor.operation
    if not isinstance(operation, Merge) or not any(delta.rounded_by_peft for delta in operation.deltas):
        return tensor
    return replace(tensor, operation=replace(operation, round_delta=True))


def _onto_four_bit(
    tensors: Sequence[OutputTensor],
    base: Checkpoint,
    four_bit: FourBit,
    adapters: Sequence[tuple[Adapter, float]],
) -> list[OutputTensor]:
    """Let each linear layer that a QLoRA training held in 4 bit start from what it saw there.

    transformers quantizes every linear layer but the head; which ones stayed as they were is in the `skip` list of
    fastft_training.json. Fused experts and their routers stay too (spec/formats.md 4.5).
    """
    if four_bit.double_quant and base.config.get("model_type") == "internlm2":
        raise PlanError(
            f"{base.folder}: with double quantization the fused wqkv of InternLM2's own files cannot be taken back to"
            " 4 bit as the training did; merge onto the folder in Llama's layout"
        )
    if base.quantization is not None:
        raise PlanError(
            f"{base.folder}: its weights are in 4 bit already, and are merged as the training saw them; leave"
            " --dequantized-base out"
        )
    skipped = {name for adapter, _ in adapters for name in _quantization(adapter).get("skip") or ()}
    transposed = base.config.get("model_type") in CONV1D_MODELS
    by_class = quantized.held_in_training(base, skipped)
    changed: list[OutputTensor] = []
    for tensor in tensors:
        held = _is_linear(tensor, skipped) if by_class is None else tensor.name in by_class
        is_float = tensor.name in base.tensors and base.tensors[tensor.name].dtype in FLOATS
        if not held or not is_float or classifier.is_brought(tensor.name, base):
            changed.append(tensor)
            continue
        if isinstance(tensor.operation, PeftLayer):
            raise PlanError(
                f"{tensor.name!r}: a {tensor.operation.module.kind} onto a 4-bit base is not built; merge onto the 16-bit"
                " base"
            )
        # What the adapter replaces whole has another source, and stays as it is.
        source = base.tensors[tensor.name]
        lens = Seen(four_bit.type, four_bit.blocksize, source.dtype, four_bit.double_quant, transposed=transposed)
        seen = replace(source, lens=lens, dtype=four_bit.weights_dtype or source.dtype)
        operation, _ = with_sources(tensor.operation, {source: seen})
        if isinstance(operation, Copy) and operation.source.dtype != tensor.dtype:
            operation = Cast(operation.source)
        changed.append(replace(tensor, operation=operation))
    return changed


def _is_linear(tensor: OutputTensor, skipped: Collection[str]) -> bool:
    """Tell by its name whether a tensor is a linear layer that was held in 4 bit."""
    return (
        len(tensor.shape) == 2
        and tensor.name.endswith(".weight")
        and not is_embedding(tensor.name)
        and not tensor.name.endswith(("lm_head.weight", "output.weight"))
        and ".experts." not in tensor.name
        and tensor.name.removesuffix(".weight") not in skipped
    )


def _dtype_of(tensors: Sequence[OutputTensor], names: Mapping[str, bool]) -> str:
    """Give the dtype of the weights that will be quantized, which is that of the products, too."""
    return next(tensor.dtype for tensor in tensors if tensor.name in names)


def read_base(folder: Path, names: NameOptions | None) -> Checkpoint:
    """Read the base; with `--is-clip` its vision tower only."""
    base = read_checkpoint(folder)
    if names is None or not names.is_clip:
        return base
    from fastft.convert.clip import vision_tower

    return vision_tower(base)


def _joined(
    base: Checkpoint,
    tied: Tied | None,
    adapters: Sequence[tuple[Adapter, float]],
    options: NameOptions | None,
    *,
    match_peft: bool,
) -> Joined:
    """Join every adapter with the base."""
    names = BaseNames(base, tied, options)
    return _summed(
        [(adapter, join(adapter, base, tied, weight, names, match_peft=match_peft)) for adapter, weight in adapters]
    )


def _summed(parts: Sequence[tuple[Adapter, Joined]]) -> Joined:
    """Put what several adapters do into one."""
    total = Joined()
    for adapter, part in parts:
        for name, deltas in part.deltas.items():
            known = total.deltas.setdefault(name, [])
            if known and any(delta.magnitude is not None for delta in (*known, *deltas)):
                raise PlanError(f"{adapter.folder}: {name!r} is changed by two adapters, one of them DoRA; merge one")
            known.extend(deltas)
        for name, addends in part.shifts.items():
            total.shifts.setdefault(name, []).extend(addends)
        for name in [*part.replaced, *part.token_rows, *part.layers]:
            if name in total.replaced or name in total.token_rows or name in total.layers:
                raise PlanError(f"{adapter.folder}: replaces {name!r}, which another adapter replaces too; merge one")
        total.replaced.update(part.replaced)
        total.token_rows.update(part.token_rows)
        total.layers.update(part.layers)
    for name in total.token_rows:
        if name in total.deltas or name in total.replaced:
            raise PlanError(f"{name!r}: gets new token rows and another update at once; that is not built")
    for name, layer in total.layers.items():
        if any(name in others for others in (total.deltas, total.shifts, total.replaced, total.token_rows)):
            raise PlanError(
                f"{name!r}: gets a {layer.module.kind} and another update at once; merge one after the other"
            )
    return total


def _output_tensors(
    base: Checkpoint,
    joined: Joined,
    tied: Tied | None,
    dtype: str | None,
    adapters: Sequence[tuple[Adapter, float]],
) -> tuple[list[OutputTensor], bool]:
    """Plan each tensor of the base exactly once; a tied head becomes a tensor where it differs from the embedding."""
    tensors = [
        _output_tensor(name, source, joined, dtype or classifier.head_dtype(name, base))
        for name, source in base.tensors.items()
        if tied is None or name != tied.head
    ]
    if tied is None:
        return tensors, False
    touched = {*joined.deltas, *joined.replaced, *joined.layers} & {tied.embedding, tied.head}
    if not touched or _same_update(joined, tied, adapters):
        rest = base.tensors.get(tied.head)
        if rest is None or touched:
            return tensors, False
        return [*tensors, _output_tensor(tied.head, rest, joined, dtype)], False
    if tied.head in base.tensors and _differ(base.tensors[tied.head], base.tensors[tied.embedding]):
        raise PlanError(
            f"{base.folder}: config.json ties {tied.head!r} to {tied.embedding!r}, but the files hold two different"
            " tensors; set tie_word_embeddings to what is true"
        )
    head = _output_tensor(tied.head, base.tensors[tied.embedding], joined, dtype)
    embedding_rows = next(tensor.shape[0] for tensor in tensors if tensor.name == tied.embedding)
    if head.shape[0] != embedding_rows:
        raise PlanError(
            f"the adapter gives the embedding {embedding_rows} rows, and the head that was tied to it"
            f" {head.shape[0]}; save both from the training"
        )
    return [*tensors, head], True


def _output_tensor(name: str, source: Source, joined: Joined, dtype: str | None) -> OutputTensor:
    """Plan one tensor of the base."""
    kept_dtype = source.dtype if dtype is None or source.dtype not in FLOATS else dtype
    source_or_new = joined.replaced.get(name, source)
    deltas = joined.deltas.get(name)
    rows = joined.token_rows.get(name)
    if (deltas or rows or name in joined.replaced or name in joined.shifts) and source.dtype not in FLOATS:
        raise PlanError(f"{name!r} of the base is {source.dtype}; only {', '.join(FLOATS)} can be changed")
    if deltas:
        dora = any(delta.magnitude is not None for delta in deltas)
        operation = (Dora if dora else Merge)(_as_rows(source_or_new, deltas), tuple(deltas))
        return OutputTensor(name, kept_dtype, source_or_new.shape, operation)
    if name in joined.layers:
        return OutputTensor(name, kept_dtype, joined.layers[name].source.shape, joined.layers[name])
    if name in joined.shifts:
        return OutputTensor(name, kept_dtype, source_or_new.shape, Shift(source_or_new, tuple(joined.shifts[name])))
    if rows is not None:
        return OutputTensor(name, kept_dtype, source.shape, _with_rows(source, rows))
    return taken_over(name, source_or_new, dtype if name not in joined.replaced else kept_dtype)


def _as_rows(source: Source, deltas: Sequence[Delta]) -> Source:
    """See a weight of more than two dimensions as the matrix that its updates are products for.

    The experts of a (experts, rows, columns) weight stand one after the other (their updates name rows); the kernels of
    a convolution are one row each.
    """
    if len(source.shape) < 3:
        return source
    if any(delta.rows is not None for delta in deltas):
        num_experts, num_rows, num_columns = source.shape
        return replace(source, shape=(num_experts * num_rows, num_columns))
    return replace(source, shape=(source.shape[0], prod(source.shape[1:])))


def _with_rows(source: Source, new: TokenRows) -> Rows:
    """Gather a table of which some rows come from elsewhere."""
    parts: list[Part] = []
    position = 0
    for row, place in sorted((row, place) for place, row in enumerate(new.indices)):
        if row > position:
            parts.append(Part(source, position, row - position))
        parts.append(Part(new.source, place, 1))
        position = row + 1
    if position < source.shape[0]:
        parts.append(Part(source, position, source.shape[0] - position))
    return Rows(tuple(parts))


def _same_update(joined: Joined, tied: Tied, adapters: Sequence[tuple[Adapter, float]]) -> bool:
    """Tell whether embedding and head stay equal: both replaced by the same bytes, or tied in the training."""
    names = (tied.embedding, tied.head)
    if any(name in joined.layers for name in names):
        return False
    if any((name in joined.replaced) != (tied.embedding in joined.replaced) for name in names):
        return False
    if tied.embedding in joined.replaced and _differ(joined.replaced[tied.embedding], joined.replaced[tied.head]):
        return False
    on_embedding, on_head = (joined.deltas.get(name, []) for name in names)
    if len(on_embedding) != len(on_head):
        return False
    if not on_embedding:
        return True
    if not any(adapter.config.get("ensure_weight_tying") for adapter, _ in adapters):
        return False
    return all(_same_delta(one, other) for one, other in zip(on_embedding, on_head, strict=True))


def _same_delta(embedding: Delta, head: Delta) -> bool:
    """Tell whether the transposed product of one equals the product of the other, factor by factor."""
    import numpy as np

    from fastft.convert.numbers import as_float32

    if not embedding.transposed or head.transposed or embedding.scale != head.scale:
        return False
    same = [
        np.array_equal(as_float32(read_bytes(one), one), as_float32(read_bytes(other), other).T)
        if one.shape == other.shape[::-1]
        else False
        for one, other in ((embedding.b, head.a), (embedding.a, head.b))
    ]
    return all(same)


def _differ(one: Source, other: Source) -> bool:
    if (one.dtype, one.shape, one.lens) != (other.dtype, other.shape, other.lens) or one.lens is not None:
        return one != other
    step = 16 * 1024 * 1024
    return any(
        read_bytes(one, start, min(step, one.nbytes - start)) != read_bytes(other, start, min(step, one.nbytes - start))
        for start in range(0, one.nbytes, step)
    )


def _vocab_size(base: Checkpoint, joined: Joined) -> int | None:
    """Give the new number of rows where an adapter brings a resized embedding."""
    brought = {**joined.replaced, **{name: layer.source for name, layer in joined.layers.items()}}
    sizes = {
        source.shape[0]
        for name, source in brought.items()
        if len(source.shape) == 2 and name in base.tensors and source.shape[0] != base.tensors[name].shape[0]
    }
    if len(sizes) > 1:
        raise PlanError(f"the adapter gives embedding and head different numbers of rows: {sorted(sizes)}")
    return sizes.pop() if sizes else None


def base_notes(
    base: Checkpoint,
    adapters: Sequence[tuple[Adapter, float]],
    four_bit: FourBit | None,
    quantize: FourBit | None,
    *,
    asked: bool,
) -> list[str]:
    """Say what is known about the right base; `asked`: the user chose it."""
    if base.quantization is not None:
        notes = [f"{base.folder.name} is in 4 bit: its weights are dequantized on the way"]
        if quantize is not None:
            notes.append("and quantized again, which costs about as much precision as the first time")
        return notes
    notes = []
    for adapter, _ in adapters:
        quantization = _quantization(adapter)
        if quantization and four_bit is None:
            why = "" if asked else "; what double quantization made of the fused wqkv of these files cannot be known"
            notes.append(
                f"{adapter.folder.name} was trained on a {_kind(quantization)} copy of the base (QLoRA); it is merged"
                f" onto the weights as they are in the base folder{why}"
            )
    if four_bit is not None:
        double = " with double quantization" if four_bit.double_quant else ""
        how = "" if asked else " (fastft_training.json; --dequantized-base none merges onto the folder's own weights)"
        notes.append(
            f"the linear layers start from what {four_bit.type}{double} made of them, as the training saw them{how}"
        )
    return notes


def _peft_notes(adapters: Sequence[tuple[Adapter, float]], *, match_peft: bool) -> list[str]:
    """Say which adapters PEFT's own classes merge, and which PEFT."""
    from importlib.metadata import version

    notes = []
    for adapter, _ in adapters:
        if adapter.peft_tensors:
            saved_by = adapter.config.get("peft_version")
            notes.append(
                f"{adapter.folder.name} is a {adapter.kind}: PEFT {version('peft')} merges it, one module at a time,"
                f" {'rounding as PEFT does' if match_peft else 'in f32 with one rounding'}"
                + (f" (it was saved by PEFT {saved_by})" if saved_by else "")
            )
    return notes


def _quantization(adapter: Adapter) -> Mapping[str, Any]:
    """Give the `quantization` of fastft_training.json, empty where there is none."""
    quantization = (adapter.training or {}).get("quantization")
    if quantization is not None and not isinstance(quantization, dict):
        raise PlanError(
            f"{adapter.folder}: its fastft_training.json says quantization = {quantization!r}, and an object is expected;"
            " say --dequantized-base none, nf4 or fp4"
        )
    return quantization or {}


def _kind(quantization: Mapping[str, Any]) -> str:
    return str(quantization.get("type") or "quantized")
