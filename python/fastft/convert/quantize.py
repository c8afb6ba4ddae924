"""`fastft convert quantize` and `dequantize`: a model folder to bitsandbytes 4 bit, as transformers saves it, and back."""

from collections.abc import Sequence
from pathlib import Path

from fastft.convert import quantized
from fastft.convert.bitsandbytes_layout import config_block
from fastft.convert.folder import Checkpoint, read_checkpoint
from fastft.convert.four_bit import FourBit
from fastft.convert.merge import output_dtype
from fastft.convert.model_config import ConfigEdits
from fastft.convert.plan import OutputTensor, natural_order, taken_over
from fastft.convert.rewrite import RewritePlan
from fastft.convert.sidefiles import side_files
from fastft.convert.size import DEFAULT_MAX_SHARD_SIZE_BYTES
from fastft.convert.source import FLOATS
from fastft.convert.tied import find_tied
from fastft.errors import PlanError


def plan_quantize(
    model: Path,
    four_bit: FourBit,
    *,
    skip: Sequence[str] = (),
    max_shard_size_bytes: int = DEFAULT_MAX_SHARD_SIZE_BYTES,
) -> RewritePlan:
    """Plan a 4-bit copy of a model; reads config files and headers, writes nothing.

    Args:
        model: folder of plain weights.
        four_bit: how the linear layers are held.
        skip: modules that stay as they are, beside those that transformers leaves.
        max_shard_size_bytes: greedy limit of a file of the result.

    Raises:
        FileError, CheckpointError, PlanError: what is missing, broken, or could not be loaded again.
        UsageError: `skip` names something that is no linear layer.
    """
    base = read_checkpoint(model)
    if base.quantization is not None:
        raise PlanError(f"{base.folder}: is in 4 bit already; `fastft convert dequantize` is the way back")
    chosen = quantized.layers(base, skip)
    dtypes = {base.tensors[name].dtype for name in chosen.tensors}
    dtype = dtypes.pop() if len(dtypes) == 1 else "BF16"
    tensors = quantized.quantized(_all(base, None), chosen.tensors, four_bit)
    edits = ConfigEdits(quantization=config_block(four_bit, dtype if dtype in FLOATS else "BF16", chosen.skip))
    return _plan(
        base,
        tensors,
        edits,
        max_shard_size_bytes=max_shard_size_bytes,
        changed=frozenset(chosen.tensors),
        notes=chosen.notes,
        verb="quantiz",
    )


def plan_dequantize(
    model: Path, *, dtype: str = "auto", max_shard_size_bytes: int = DEFAULT_MAX_SHARD_SIZE_BYTES
) -> RewritePlan:
    """Plan a plain copy of a 4-bit model.

    Args:
        model: folder in bitsandbytes 4 bit.
        dtype: of the result: auto (what the weights had before), bf16, fp16 or fp32.
        max_shard_size_bytes: greedy limit of a file of the result.

    Raises:
        FileError, CheckpointError, PlanError: what is missing or broken, or is no 4-bit model.
    """
    base = read_checkpoint(model)
    if base.quantization is None:
        raise PlanError(
            f"{base.folder}: config.json says nothing of bitsandbytes 4 bit; there is nothing to dequantize"
        )
    changed = frozenset(name for name, source in base.tensors.items() if source.lens is not None)
    edits = ConfigEdits(output_dtype(dtype))
    return _plan(
        base,
        _all(base, output_dtype(dtype)),
        edits,
        max_shard_size_bytes=max_shard_size_bytes,
        changed=changed,
        notes=(),
        verb="dequantiz",
    )


def _all(base: Checkpoint, dtype: str | None) -> list[OutputTensor]:
    """Take over every tensor; a head that is tied to the embedding is no tensor of its own."""
    tied = find_tied(base.config, base.tensors)
    return [
        taken_over(name, source, dtype) for name, source in base.tensors.items() if tied is None or name != tied.head
    ]


def _plan(
    base: Checkpoint,
    tensors: Sequence[OutputTensor],
    edits: ConfigEdits,
    *,
    max_shard_size_bytes: int,
    changed: frozenset[str],
    notes: Sequence[str],
    verb: str,
) -> RewritePlan:
    return RewritePlan(
        base,
        (),
        tuple(sorted(tensors, key=lambda tensor: natural_order(tensor.name))),
        max_shard_size_bytes,
        changed,
        edits,
        side_files(base.folder),
        tuple(notes),
        f"{verb}ed",
        f"{verb}ing",
    )
