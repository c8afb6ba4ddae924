"""What a conversion writes, as plain data: for each output tensor its name, dtype, shape and how it is made.

Built by merge, pth and layout; printed by plan_table; run by stream, which hands it to the native code as JSON.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

from fastft import _native
from fastft.convert.folder import INDEX, SINGLE
from fastft.convert.four_bit import FourBit
from fastft.convert.source import FLOATS, Joined, Packed, Source, num_bytes, pieces
from fastft.errors import PlanError


@dataclass(frozen=True, slots=True)
class Copy:
    """The bytes as they are."""

    source: Source


@dataclass(frozen=True, slots=True)
class Cast:
    """The same numbers in the output's dtype, rounded to nearest even."""

    source: Source


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `start` to `start + count` of a tensor."""

    source: Source
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows (dimension 0) gathered from one or more tensors, in order."""

    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """A low-rank update scale * B A.

    Attributes:
        a: (rank, in).
        b: (out, rank).
        scale: multiplies the product, in f32.
        transposed: the weight is stored as (in, out), the transposed product is added.
        rows: (row of the weight, row of the product, count) where the weight fuses several projections; None: all.
        magnitude: (out,), DoRA's norm of each row of the updated weight; None without DoRA.
        b_columns: (first, step): the columns of `b` that make the factor (one expert of many); None: all.
        rounded_by_peft: PEFT rounds the product to the base's dtype before it adds it (embeddings, experts).
    """

    a: Source
    b: Source
    scale: float
    transposed: bool = False
    rows: tuple[tuple[int, int, int], ...] | None = None
    magnitude: Source | None = None
    b_columns: tuple[int, int] | None = None
    rounded_by_peft: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Merge:
    """f32(W) plus the sum of the deltas, rounded once.

    Attributes:
        source: W.
        deltas: the updates.
        round_delta: their sum is rounded to the output's dtype before it is added, as PEFT does in some layers.
    """

    source: Source
    deltas: tuple[Delta, ...]
    round_delta: bool = False


@dataclass(frozen=True, slots=True)
class Dora:
    """W + D with each row scaled to its trained magnitude (each column where the delta is transposed).

    Where a delta names rows, only those are scaled; a row belongs to one delta.
    """

    source: Source
    deltas: tuple[Delta, ...]


@dataclass(frozen=True, slots=True)
class Addend:
    """A vector that is added to a bias: scale * source, on rows as in `Delta`."""

    source: Source
    scale: float
    rows: tuple[tuple[int, int, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class Shift:
    """f32(b) plus the sum of vectors, rounded once."""

    source: Source
    addends: tuple[Addend, ...]


@dataclass(frozen=True, slots=True)
class PeftModule:
    """One module of the base with what an adapter that is no LoRA does to it; PEFT's own classes compute it.

    Attributes:
        adapter: its folder, for messages.
        kind: PEFT's name of it, a key of `peft_kinds.KINDS`.
        path: the module's path in the model that was trained.
        layer: class of the module: Linear, Conv1D (weight stored as (in, out)), Embedding, Conv1d, Conv2d or Conv3d.
        groups: of a convolution.
        weight: of the base.
        bias: of the base; None without.
        tensors: the module's tensors in the adapter, and those that all modules share, by PEFT's names.
        settings: of adapter_config.json, as JSON.
        dtype: compute in this dtype, the base's, as PEFT does; None: in f32 with one rounding.
    """

    adapter: Path
    kind: str
    path: str
    layer: str
    groups: int
    weight: Source
    bias: Source | None
    tensors: tuple[tuple[str, Source], ...]
    settings: str
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class PeftLayer:
    """The weight or the bias of a module after PEFT's merge. `peft_layers` computes it before the stream begins."""

    module: PeftModule
    part: Literal["weight", "bias"] = "weight"

    @property
    def source(self) -> Source:
        """The base's tensor."""
        if self.part == "weight":
            return self.module.weight
        assert self.module.bias is not None
        return self.module.bias


Numbers = Copy | Cast | Rows | Merge | Dora | Shift | PeftLayer


@dataclass(frozen=True, slots=True)
class Quantize:
    """The 4-bit codes of what another operation makes, U8 (n/2 rounded up, 1); its scales are `ScalesOf` it.

    Attributes:
        of: makes the numbers.
        dtype: they are rounded to it before they are quantized.
        shape: of the numbers.
        four_bit: how they are quantized.
        transposed: the transpose is (GPT-2's Conv1D, whose weight is stored as (in, out)).
        offset: with double quantization the mean of the scales; None: not known yet (`offsets.found`).
    """

    of: Numbers
    dtype: str
    shape: tuple[int, ...]
    four_bit: FourBit
    transposed: bool = False
    offset: float | None = None


@dataclass(frozen=True, slots=True)
class ScalesOf:
    """The scales of a quantized tensor: F32, or U8 codes with double quantization.

    Attributes:
        tensor: its name.
        nested: the F32 scales of the codes of the scales instead.
    """

    tensor: str
    nested: bool = False


@dataclass(frozen=True, slots=True)
class Bytes:
    """Given bytes."""

    content: bytes = field(repr=False)


Operation = Numbers | Quantize | ScalesOf | Bytes


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the result."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    operation: Operation

    @property
    def nbytes(self) -> int:
        return num_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file of the result."""

    file_name: str
    tensors: tuple[OutputTensor, ...]


def taken_over(name: str, source: Source, dtype: str | None) -> OutputTensor:
    """A tensor that keeps its values: copied, or cast when `dtype` is another floating dtype.

    Raises:
        PlanError: a floating dtype that cannot be cast (F64, F8).
    """
    if dtype is None or dtype == source.dtype or source.dtype[0] not in "FB" or source.dtype == "BOOL":
        return OutputTensor(name, source.dtype, source.shape, Copy(source))
    if source.dtype not in FLOATS:
        raise PlanError(f"tensor {name!r}: {source.dtype} cannot be cast to {dtype}; use --dtype auto to keep it")
    return OutputTensor(name, dtype, source.shape, Cast(source))


def into_shards(tensors: Sequence[OutputTensor], max_shard_size_bytes: int, single: str = SINGLE) -> tuple[Shard, ...]:
    """Distribute tensors over files as huggingface_hub does: greedy, in order.

    One file is called `single`; more are called `model-00001-of-0000N.safetensors`.
    """
    groups = _native.split_into_shards([tensor.nbytes for tensor in tensors], max_shard_size_bytes)
    if len(groups) <= 1:
        return (Shard(single, tuple(tensors)),)
    return tuple(
        Shard(shard_name(single, number, len(groups)), tuple(tensors[index] for index in group))
        for number, group in enumerate(groups, 1)
    )


def shard_name(single: str, number: int, count: int) -> str:
    """Name file `number` (from 1) of `count` that one file called `single` was split into."""
    return f"{single.removesuffix('.safetensors')}-{number:05d}-of-{count:05d}.safetensors"


def index_text(shards: Sequence[Shard]) -> str:
    """Write the index of a sharded checkpoint."""
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    return weight_index(
        {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors},
        sum(prod(tensor.shape) for tensor in tensors),
        sum(tensor.nbytes for tensor in tensors),
    )


def weight_index(files: Mapping[str, str], num_parameters: int, num_bytes: int) -> str:
    """Write an index from tensor names to files, the very text of transformers 5 (spec/formats.md 6.1)."""
    metadata = {"total_parameters": num_parameters, "total_size": num_bytes}
    return json.dumps({"metadata": metadata, "weight_map": dict(files)}, indent=2, sort_keys=True) + "\n"


def index_name(single: str = SINGLE) -> str:
    """Name of the index that belongs to shards of `single`."""
    return INDEX if single == SINGLE else f"{single}.index.json"


def with_sources(
    operation: Operation, changed: Mapping[Source, Source] | None = None
) -> tuple[Operation, list[Source]]:
    """Give the sources that an operation reads numbers from, and the operation with those in `changed` replaced.

    The factors of an adapter are not among them.
    """
    changed = changed or {}
    match operation:
        case ScalesOf() | Bytes() | PeftLayer():
            return operation, []
        case Quantize(of):
            inner, sources = with_sources(of, changed)
            assert not isinstance(inner, Quantize | ScalesOf | Bytes)
            return replace(operation, of=inner), sources
        case Rows(parts):
            new = tuple(replace(part, source=changed.get(part.source, part.source)) for part in parts)
            return Rows(new), [part.source for part in parts]
        case Copy(source) | Cast(source) | Merge(source) | Dora(source) | Shift(source):
            return replace(operation, source=changed.get(source, source)), [source]


def natural_order(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts layer 2 before layer 10."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split("."))


def native_json(shards: Iterable[Shard], folder: Path, *, finite: bool = False) -> str:
    """Write the plan as `_native.run_plan` reads it, with the files to be written in `folder`.

    Args:
        shards: what is written.
        folder: where.
        finite: a written weight that is infinite or undefined is an error.
    """
    files: dict[str, int] = {}

    def side(source: Source) -> dict[str, Any]:
        number = files.setdefault(str(source.file), len(files))
        found = {"file": number, "offset": source.offset, "dtype": source.dtype, "shape": source.shape}
        lens = source.lens
        if lens is None:
            return found
        if isinstance(lens, Joined):
            raise PlanError(
                f"{source.file}: a tensor in {len(lens.parts)} pieces can be copied and cast, not computed with;"
                " convert the checkpoint to a folder first"
            )
        through: dict[str, Any] = {
            "quant_type": lens.quant_type,
            "blocksize": lens.blocksize,
            "transposed": lens.transposed,
        }
        if isinstance(lens, Packed):
            nested = lens.nested
            through["absmax"] = side(lens.absmax)
            through["nested"] = None if nested is None else {"absmax": side(nested.absmax), "offset": nested.offset}
            return {**found, "packed": through}
        assert not lens.double_quant or lens.offset is not None, "offsets.found comes before"
        return {**found, "seen": {**through, "stored": lens.stored, "offset": lens.offset}}

    plan = [
        {
            "path": str(folder / shard.file_name),
            "metadata": {"format": "pt"},
            "tensors": [
                {
                    "name": tensor.name,
                    "dtype": tensor.dtype,
                    "shape": tensor.shape,
                    "op": _operation(tensor.operation, side),
                }
                for tensor in shard.tensors
            ],
        }
        for shard in shards
    ]
    return json.dumps({"files": list(files), "shards": plan, "finite": finite})


def _operation(operation: Operation, side: Callable[[Source], dict[str, Any]]) -> dict[str, Any]:
    match operation:
        case Copy(Source(lens=Joined()) as source) | Cast(Source(lens=Joined()) as source):
            return {"kind": "join", "parts": [side(part) for part in pieces(source)]}
        case Copy(source):
            return {"kind": "copy", "source": side(source)}
        case Cast(source):
            return {"kind": "cast", "source": side(source)}
        case Rows(parts) if any(isinstance(part.source.lens, Joined) for part in parts):
            return {"kind": "join", "parts": [side(piece) for part in parts for piece in _row_pieces(part)]}
        case Rows(parts):
            return {
                "kind": "rows",
                "parts": [{"source": side(part.source), "start": part.start, "count": part.count} for part in parts],
            }
        case Shift(source, addends):
            return {
                "kind": "shift",
                "source": side(source),
                "addends": [
                    {"source": side(addend.source), "scale": addend.scale, "rows": addend.rows} for addend in addends
                ],
            }
        case PeftLayer():
            raise AssertionError("peft_layers.materialized makes copies of these")
        case Bytes(content):
            return {"kind": "bytes", "hex": content.hex()}
        case ScalesOf(tensor, nested):
            return {"kind": "nested_absmax_of" if nested else "absmax_of", "tensor": tensor}
        case Quantize(of, numbers_dtype, shape, four_bit, transposed, offset):
            assert not four_bit.double_quant or offset is not None, "offsets.found comes before"
            return {
                "kind": "quantize",
                "of": _operation(of, side),
                "dtype": numbers_dtype,
                "shape": shape,
                "quant_type": four_bit.type,
                "blocksize": four_bit.blocksize,
                "offset": offset,
                "transposed": transposed,
            }
        case Merge(source, deltas, round_delta):
            return {
                "kind": "merge",
                "source": side(source),
                "round_delta": round_delta,
                "deltas": [_delta(delta, side) for delta in deltas],
            }
        case Dora(source, deltas):
            return {"kind": "dora", "source": side(source), "deltas": [_delta(delta, side) for delta in deltas]}


def _row_pieces(part: Part) -> list[Source]:
    """The pieces that hold some rows of a tensor."""
    row = prod(part.source.shape[1:])
    return pieces(part.source, part.start * row, part.count * row)


def _delta(delta: Delta, side: Callable[[Source], dict[str, Any]]) -> dict[str, Any]:
    return {
        "a": side(delta.a),
        "b": side(delta.b),
        "scale": delta.scale,
        "transposed": delta.transposed,
        "rows": delta.rows,
        "b_columns": delta.b_columns,
        "magnitude": None if delta.magnitude is None else side(delta.magnitude),
    }
