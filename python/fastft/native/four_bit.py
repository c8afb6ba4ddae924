"""NF4 and FP4: quantize, dequantize, and the state that lies between, as bitsandbytes has it and writes it.

Bit for bit what bitsandbytes' CPU backend makes (checked against 0.50.2), and by its formula where that backend is
wrong (last dimension no multiple of the block size). Layout of files: bitsandbytes `QuantState.as_dict(packed=True)`.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from fastft import _native
from fastft.convert.bitsandbytes_layout import BLOCKSIZES
from fastft.convert.json_file import parse_object
from fastft.convert.mean import mean
from fastft.errors import ArrayError, CheckpointError
from fastft.native.array import FLOATS, Array, Kind, Memory, Same, dtype_name, empty, floats, is_torch, memory, target

if TYPE_CHECKING:
    from numpy.typing import NDArray

QuantType = Literal["nf4", "fp4"]

_NESTED_BLOCKSIZE = 256
_SUFFIX = "quant_state.bitsandbytes__"
# Companions of a quantized weight in a file, without the last one, whose name ends in the code book's.
_COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
# Longest JSON of a state that is read; a real one has some 200 bytes.
_MOST_JSON_BYTES = 65536


@dataclass(frozen=True, slots=True, eq=False)
class QuantState:
    """What belongs to packed 4-bit numbers to make them numbers again.

    Attributes:
        quant_type: the code book, nf4 or fp4.
        blocksize: numbers that share a scale.
        dtype: of the numbers before, and of those that come back: float32, float16 or bfloat16.
        shape: of the array before.
        absmax: the scales, f32 (num_blocks); u8 (num_blocks) codes with double quantization.
        nested_absmax: with double quantization the scales of the codes, f32 (num_blocks / nested_blocksize).
        nested_blocksize: codes that share a scale; 256 with double quantization.
        offset: with double quantization the mean of the scales, an f32.
    """

    quant_type: QuantType
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    absmax: Array
    nested_absmax: Array | None = None
    nested_blocksize: int | None = None
    offset: float | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_nested(self) -> bool:
        return self.nested_absmax is not None

    def to_bitsandbytes(self) -> Any:
        """Give bitsandbytes' own state; its tensors share the memory of this one's.

        Raises:
            ImportError: bitsandbytes is not installed.
        """
        import torch
        from bitsandbytes.functional import QuantState as Theirs

        nested = None
        if self.nested_absmax is not None:
            nested = Theirs(
                absmax=_as_torch(self.nested_absmax),
                blocksize=self.nested_blocksize,
                code=torch.tensor(_native.nested_map()),
                dtype=torch.float32,
            )
        return Theirs(
            absmax=_as_torch(self.absmax),
            shape=torch.Size(self.shape),
            code=torch.tensor(_native.code_book(self.quant_type)),
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=getattr(torch, self.dtype),
            offset=None if self.offset is None else torch.tensor(self.offset),
            state2=nested,
        )

    @classmethod
    def from_bitsandbytes(cls, state: Any) -> "QuantState":
        """Take over bitsandbytes' state; its tensors, which must be on the CPU, are not copied.

        Raises:
            ArrayError: a part is missing, on another device, or not as bitsandbytes makes it.
        """
        if getattr(state, "packing_format_for_cpu", False):
            raise ArrayError(
                "QuantState.from_bitsandbytes: the state was repacked for the CPU's own product by a forward pass;"
                " take it before the first forward, or from the file"
            )
        nested = state.state2
        return _checked(
            cls(
                quant_type=state.quant_type,
                blocksize=state.blocksize,
                dtype=str(state.dtype).removeprefix("torch."),
                shape=tuple(state.shape),
                absmax=state.absmax,
                nested_absmax=None if nested is None else nested.absmax,
                nested_blocksize=None if nested is None else nested.blocksize,
                offset=None if nested is None else float(state.offset),
            ),
            "QuantState.from_bitsandbytes",
        )

    def to_tensors(self, name: str) -> dict[str, Array]:
        """Give the tensors that stand beside the packed weight `name` in a file, as bitsandbytes names and writes them.

        Args:
            name: of the weight, such as `model.layers.0.mlp.up_proj.weight`.

        Returns:
            `name.absmax`, `name.quant_map` and so on, of the kind of `absmax`; the last is JSON as u8.
        """
        kind: Kind = "torch" if is_torch(self.absmax) else "numpy"
        found: dict[str, Array] = {
            f"{name}.absmax": self.absmax,
            f"{name}.quant_map": _of_kind(np.array(_native.code_book(self.quant_type), np.float32), kind),
        }
        said: dict[str, object] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": self.dtype,
            "shape": self.shape,
        }
        if self.nested_absmax is not None:
            found[f"{name}.nested_absmax"] = self.nested_absmax
            found[f"{name}.nested_quant_map"] = _of_kind(np.array(_native.nested_map(), np.float32), kind)
            said |= {
                "nested_blocksize": self.nested_blocksize,
                "nested_dtype": "float32",
                "nested_offset": self.offset,
            }
        text = np.frombuffer(bytearray(json.dumps(said).encode()), np.uint8)
        found[f"{name}.{_SUFFIX}{self.quant_type}"] = _of_kind(text, kind)
        return found

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, Array]) -> "QuantState":
        """Read the state of the weight `name` from the tensors of a file; the scales are not copied.

        Args:
            name: of the weight.
            tensors: those of the file, or any mapping that has them.

        Raises:
            CheckpointError: one is missing, or they do not fit together.
        """
        where = f"QuantState.from_tensors: {name}"
        kinds = [kind for kind in ("nf4", "fp4") if f"{name}.{_SUFFIX}{kind}" in tensors]
        if len(kinds) != 1:
            raise CheckpointError(f"{where}: exactly one of {_SUFFIX}nf4 and {_SUFFIX}fp4 is needed, not {len(kinds)}")
        said = _parsed(memory(tensors[f"{name}.{_SUFFIX}{kinds[0]}"], where), where)
        nested = "nested_blocksize" in said
        for part in _COMPANIONS:
            there, needed = f"{name}.{part}" in tensors, nested or not part.startswith("nested")
            if there != needed:
                raise CheckpointError(f"{where}: {part} is {'missing' if needed else 'there, and the text has none'}")
        state = cls(
            quant_type=_said(said, "quant_type", str, where),
            blocksize=_said(said, "blocksize", int, where),
            dtype=_said(said, "dtype", str, where),
            shape=tuple(_said(said, "shape", list, where)),
            absmax=tensors[f"{name}.absmax"],
            nested_absmax=tensors[f"{name}.nested_absmax"] if nested else None,
            nested_blocksize=_said(said, "nested_blocksize", int, where) if nested else None,
            offset=float(_said(said, "nested_offset", (int, float), where)) if nested else None,
        )
        if state.quant_type != kinds[0]:
            raise CheckpointError(f"{where}: the text says {state.quant_type!r}, its name {kinds[0]!r}")
        try:
            _checked(state, where)
            _check_map(tensors[f"{name}.quant_map"], _native.code_book(state.quant_type), f"{where}: quant_map")
            if nested:
                _check_map(tensors[f"{name}.nested_quant_map"], _native.nested_map(), f"{where}: nested_quant_map")
        except ArrayError as problem:
            raise CheckpointError(str(problem)) from problem
        return state


def quantize_4bit(
    x: Same,
    *,
    quant_type: QuantType = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    dtype: str | None = None,
    out: Same | None = None,
    check_finite: bool = True,
    threads: int | None = None,
) -> tuple[Same, QuantState]:
    """Quantize an array to 4 bit by blocks of consecutive numbers, as bitsandbytes does on a CPU.

    With double quantization the scales are quantized around their mean, which is torch's to the last bit, as in
    bitsandbytes, whether torch is installed or not.

    Args:
        x: float32, float16 or bfloat16, any shape, contiguous.
        quant_type: the code book.
        blocksize: numbers that share a scale: 32, 64, 128 ... 4096.
        double_quant: quantize the scales to 8 bit too.
        dtype: "bfloat16" where `x` is its bits in uint16.
        out: u8 (ceil(n / 2), 1), written to and given back instead of a new array.
        check_finite: refuse NaN and infinite numbers; without it they give what bitsandbytes gives (a NaN spoils its
            whole block).
        threads: all cores by default.

    Returns:
        packed: u8 (ceil(n / 2), 1), two numbers to a byte, the first in the upper half; and what belongs to it.

    Raises:
        ArrayError: an argument is not as said here.
    """
    what = "quantize_4bit"
    source = floats(x, f"{what}: x", dtype)
    shape = ((source.numel + 1) // 2, 1)
    packed = cast("Same", empty(source.kind, "uint8", shape, what)) if out is None else out
    written = target(packed, f"{what}: out", "uint8", shape)
    check_blocksize(what, blocksize)
    absmax = np.empty(-(-source.numel // blocksize), np.float32)
    finite = _native.quantize_4bit(
        source.data, source.dtype, written.data, absmax, quant_type=quant_type, blocksize=blocksize, threads=threads
    )
    if not finite and (check_finite or double_quant):
        place = int(np.argmin(np.isfinite(absmax)))
        raise ArrayError(
            f"{what}: x holds NaN or infinite numbers, the first in block {place}"
            f" (numbers {place * blocksize} to {min((place + 1) * blocksize, source.numel) - 1})"
        )
    if not double_quant:
        scales = _of_kind(absmax, source.kind)
        return packed, QuantState(quant_type, blocksize, source.dtype, source.shape, scales)
    offset = _mean(absmax)
    codes = np.empty(len(absmax), np.uint8)
    nested = np.empty(-(-len(absmax) // _NESTED_BLOCKSIZE), np.float32)
    _native.quantize_scales(absmax, offset, codes, nested, threads=threads)
    return packed, QuantState(
        quant_type,
        blocksize,
        source.dtype,
        source.shape,
        _of_kind(codes, source.kind),
        _of_kind(nested, source.kind),
        _NESTED_BLOCKSIZE,
        offset,
    )


def dequantize_4bit(
    packed: Same,
    state: QuantState,
    *,
    dtype: object = None,
    out: Same | None = None,
    threads: int | None = None,
) -> Same:
    """Give the numbers of a 4-bit array: code book times scale, one product in f32, rounded once.

    Args:
        packed: the bytes, any shape of u8; other dtypes are taken for the same bytes (quant_storage).
        state: from `quantize_4bit`, bitsandbytes or a file.
        dtype: of the result: float32, float16 or bfloat16; that of `state` by default.
        out: of that dtype (bfloat16 may be its bits in uint16) and of `state`'s shape, written to and given back
            instead of a new array.
        threads: all cores by default.

    Raises:
        ArrayError: an argument is not as said here.
    """
    what = "dequantize_4bit"
    source = memory(packed, f"{what}: packed")
    _checked(state, f"{what}: state")
    wanted = state.dtype if dtype is None else dtype_name(dtype, f"{what}: dtype")
    if wanted not in FLOATS:
        raise ArrayError(f"{what}: dtype {wanted} is not allowed; use {', '.join(FLOATS)}")
    if len(source.data) != (state.numel + 1) // 2:
        raise ArrayError(
            f"{what}: packed has {len(source.data)} bytes, and {state.numel} numbers of shape {state.shape} have"
            f" {(state.numel + 1) // 2}"
        )
    result = cast("Same", empty(source.kind, wanted, state.shape, what)) if out is None else out
    written = target(result, f"{what}: out", wanted, state.shape)
    _native.dequantize_4bit(
        source.data,
        _scales(state, threads),
        written.data,
        wanted,
        quant_type=state.quant_type,
        blocksize=state.blocksize,
        threads=threads,
    )
    return result


def _scales(state: QuantState, threads: int | None) -> "NDArray[np.float32]":
    """Give the scales in f32; codes are taken back to scales."""
    absmax = memory(state.absmax, "absmax")
    if state.nested_absmax is None or state.offset is None:
        return absmax.data.view(np.float32)
    found = np.empty(absmax.numel, np.float32)
    nested = memory(state.nested_absmax, "nested_absmax").data.view(np.float32)
    _native.dequantize_scales(absmax.data, nested, state.offset, found, threads=threads)
    return found


def check_blocksize(what: str, blocksize: object) -> None:
    """Refuse a block size that bitsandbytes does not have."""
    if blocksize not in BLOCKSIZES or isinstance(blocksize, bool | float):
        raise ArrayError(f"{what}: blocksize {blocksize!r} is not allowed; use {', '.join(map(str, BLOCKSIZES))}")


def _checked(state: QuantState, where: str) -> QuantState:
    """Hold the parts of a state against each other.

    Raises:
        ArrayError: naming what does not fit.
    """
    if not isinstance(state, QuantState):
        raise ArrayError(
            f"{where}: a QuantState of fastft.native is needed, not {type(state).__name__};"
            " for bitsandbytes' own use QuantState.from_bitsandbytes"
        )
    if state.quant_type not in ("nf4", "fp4"):
        raise ArrayError(f"{where}: quant_type {state.quant_type!r} is not allowed; use nf4 or fp4")
    check_blocksize(where, state.blocksize)
    if state.dtype not in FLOATS:
        raise ArrayError(f"{where}: dtype {state.dtype!r} is not allowed; use {', '.join(FLOATS)}")
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in state.shape):
        raise ArrayError(f"{where}: shape {state.shape!r} is no shape")
    parts = (state.nested_absmax is None, state.nested_blocksize is None, state.offset is None)
    if len(set(parts)) != 1:
        raise ArrayError(f"{where}: nested_absmax, nested_blocksize and offset belong together; some are missing")
    num_blocks = -(-state.numel // state.blocksize)
    _check_scales(memory(state.absmax, f"{where}: absmax"), "absmax", num_blocks, where, nested=state.is_nested)
    if state.nested_absmax is not None:
        if state.nested_blocksize != _NESTED_BLOCKSIZE:
            raise ArrayError(f"{where}: nested_blocksize {state.nested_blocksize!r} is not allowed; it is 256")
        if not isinstance(state.offset, float) or not math.isfinite(state.offset):
            raise ArrayError(f"{where}: offset {state.offset!r} is no finite number")
        nested = memory(state.nested_absmax, f"{where}: nested_absmax")
        _check_scales(nested, "nested_absmax", -(-num_blocks // _NESTED_BLOCKSIZE), where, nested=False)
    return state


def _check_scales(scales: Memory, name: str, count: int, where: str, *, nested: bool) -> None:
    dtype = "uint8" if nested else "float32"
    if scales.dtype != dtype or scales.numel != count:
        raise ArrayError(f"{where}: {name} has {scales.numel} {scales.dtype}, and {count} {dtype} are needed")


def _mean(absmax: "NDArray[np.float32]") -> float:
    """Mean of the scales as an f32."""
    if not len(absmax):
        raise ArrayError("quantize_4bit: double quantization of an empty array has no mean; quantize it without")
    return mean(absmax)


def _of_kind(array: "NDArray[Any]", kind: Kind) -> Array:
    return cast("Array", sys.modules["torch"].from_numpy(array)) if kind == "torch" else array


def _as_torch(array: Array) -> Any:
    import torch

    if isinstance(array, torch.Tensor):
        return array
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _parsed(text: Memory, where: str) -> dict[str, Any]:
    if text.dtype != "uint8" or len(text.data) > _MOST_JSON_BYTES:
        raise CheckpointError(f"{where}: quant_state is no short text")
    return parse_object(text.data.tobytes(), f"{where}: quant_state")


def _said(said: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = said.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CheckpointError(f"{where}: quant_state has {key} = {value!r}")
    return value


def _check_map(found: Array, expected: "list[float]", where: str) -> None:
    """Refuse a file that was made with another code book; the sign of a zero does not matter."""
    values = memory(found, where)
    if values.dtype != "float32" or not np.array_equal(values.data.view(np.float32), np.array(expected, np.float32)):
        raise ArrayError(f"{where} is not the code book of bitsandbytes that is built in here")
