"""Arrays of numpy and torch as what the native module takes: a flat view of their bytes, a dtype and a shape.

Nothing is copied. torch is only imported where it is loaded already: whoever hands over a tensor has it.
"""

import sys
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, Union

import numpy as np

from fastft.convert.source import DTYPE_BYTES
from fastft.errors import ArrayError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

Array: TypeAlias = Union["NDArray[Any]", "torch.Tensor"]
"""What is taken and given: a numpy array or a torch tensor on the CPU."""

Same = TypeVar("Same", "NDArray[Any]", "torch.Tensor")
"""A result of the kind that came in."""

Kind = Literal["numpy", "torch"]

FLOATS = ("float32", "float16", "bfloat16")

# numpy's and torch's name of a dtype to that of safetensors, and back; bytes of a number.
SAFETENSORS = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
NAMES = {safetensors: name for name, safetensors in SAFETENSORS.items()}
SIZES = {name: DTYPE_BYTES[safetensors] for name, safetensors in SAFETENSORS.items()}

# numpy has no such numbers; `ml_dtypes` adds them.
_OF_ML_DTYPES = frozenset(name for name in SAFETENSORS if name.startswith(("bfloat", "float8")))


@dataclass(frozen=True, slots=True)
class Memory:
    """An array as it lies in memory: contiguous, row-major, little-endian, on the CPU.

    Attributes:
        kind: whose array it is.
        dtype: a key of `SAFETENSORS`.
        shape: sizes of the dimensions.
        data: its bytes, u8 (nbytes), a view.
    """

    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    data: "Bytes"

    @property
    def numel(self) -> int:
        return prod(self.shape)


def is_torch(array: object) -> bool:
    """Tell whether it is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def memory(array: object, what: str, dtype: str | None = None) -> Memory:
    """Look at an array.

    Args:
        array: a numpy array or a torch tensor.
        what: function and argument, for the error ("merge_lora: W").
        dtype: what the bits are, where the array has none of its own dtype for it: bfloat16 in uint16, float8 in uint8.

    Raises:
        ArrayError: it is something else, on another device, not contiguous, or of a dtype that is not known.
    """
    found = _of_torch(array, what) if is_torch(array) else _of_numpy(array, what)
    if dtype is not None and dtype != found.dtype:
        if dtype not in SAFETENSORS:
            raise ArrayError(f"{what}: dtype {dtype!r} is not known; known are {', '.join(SAFETENSORS)}")
        if not found.dtype.startswith(("uint", "int")) or SIZES[dtype] != SIZES[found.dtype]:
            raise ArrayError(
                f"{what}: {found.dtype} numbers cannot be taken for the bits of {dtype}; give uint{SIZES[dtype] * 8}"
            )
        found = Memory(found.kind, dtype, found.shape, found.data)
    if found.dtype not in SAFETENSORS:
        raise ArrayError(f"{what}: dtype {found.dtype} is not known; known are {', '.join(SAFETENSORS)}")
    return found


def floats(array: object, what: str, dtype: str | None = None) -> Memory:
    """As `memory`, for an array of float32, float16 or bfloat16."""
    found = memory(array, what, dtype)
    if found.dtype not in FLOATS:
        hint = '; give dtype="bfloat16" if these are its bits' if found.dtype in ("uint16", "int16") else ""
        raise ArrayError(f"{what}: dtype {found.dtype} is not allowed; use {', '.join(FLOATS)}{hint}")
    return found


def target(array: object, what: str, dtype: str, shape: tuple[int, ...]) -> Memory:
    """Look at an array that is to be written to: numbers of `dtype` or its bare bits, of this very shape.

    Raises:
        ArrayError: as `memory`; or dtype or shape are others, it is read-only, or autograd keeps track of it.
    """
    found = memory(array, what)
    bits = f"uint{SIZES[dtype] * 8}" if dtype in _OF_ML_DTYPES else dtype
    if found.dtype not in (dtype, bits):
        raise ArrayError(f"{what}: dtype is {found.dtype}, and {dtype} is written; give an array of that dtype")
    if found.shape != shape:
        raise ArrayError(f"{what}: shape is {_text(found.shape)}, and {_text(shape)} is needed")
    if getattr(array, "requires_grad", False):
        raise ArrayError(f"{what}: the tensor requires grad; give its .data or .detach()")
    if not found.data.flags.writeable:
        raise ArrayError(f"{what}: the array is read-only")
    return Memory(found.kind, dtype, shape, found.data)


def refuse_overlap(out: Memory, what: str, **others: Memory) -> None:
    """Refuse a target that shares memory with what is read.

    Raises:
        ArrayError: naming the two.
    """
    for name, other in others.items():
        # Both are contiguous, so their bounds tell all.
        if np.may_share_memory(out.data, other.data):
            raise ArrayError(f"{what}: shares memory with {name}; give an array of its own")


def empty(kind: Kind, dtype: str, shape: tuple[int, ...], what: str) -> Array:
    """Make an array whose values are not set yet.

    Raises:
        ArrayError: numpy has no such dtype by itself and ml_dtypes is not installed.
    """
    if kind == "torch":
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype))
    return np.empty(shape, numpy_dtype(dtype, what))


def numpy_dtype(dtype: str, what: str) -> "np.dtype[Any]":
    """Give numpy's dtype of this name.

    Raises:
        ArrayError: it is one of ml_dtypes', which is not installed.
    """
    if dtype not in _OF_ML_DTYPES:
        return np.dtype(dtype)
    try:
        import ml_dtypes
    except ImportError:
        raise ArrayError(
            f"{what}: numpy has no {dtype}; install ml_dtypes, ask for another dtype, or take the bits"
            f" (uint{SIZES[dtype] * 8})"
        ) from None
    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, dtype))
    return found


def dtype_name(dtype: object, what: str) -> str:
    """Read a dtype as people give it: a name, a numpy dtype or scalar type, a torch dtype; gives a key of `SAFETENSORS`.

    Raises:
        ArrayError: anything else.
    """
    name = dtype if isinstance(dtype, str) else str(dtype)
    name = name.removeprefix("torch.")
    if name not in SAFETENSORS and isinstance(dtype, type):
        name = dtype.__name__
    if name not in SAFETENSORS:
        raise ArrayError(f"{what}: dtype {dtype!r} is not known; known are {', '.join(SAFETENSORS)}")
    return name


def _of_numpy(array: object, what: str) -> Memory:
    if not isinstance(array, np.ndarray):
        raise ArrayError(f"{what}: a numpy array or a torch tensor is needed, not {type(array).__name__}")
    if isinstance(array, np.ma.MaskedArray):
        raise ArrayError(f"{what}: a masked array would lose its mask; fill it first")
    if not array.flags.c_contiguous:
        raise ArrayError(f"{what}: the array is not contiguous; give numpy.ascontiguousarray of it")
    if array.dtype.hasobject or not (array.dtype.isnative or array.dtype.itemsize == 1):
        raise ArrayError(f"{what}: dtype {array.dtype} is not allowed; little-endian numbers are")
    flat = np.asarray(array).reshape(-1)
    if array.dtype.name not in SAFETENSORS:
        return Memory("numpy", array.dtype.name, array.shape, np.empty(0, np.uint8))
    return Memory("numpy", array.dtype.name, array.shape, flat.view(np.uint8))


def _of_torch(array: Any, what: str) -> Memory:
    torch: Any = sys.modules["torch"]
    dtype = str(array.dtype).removeprefix("torch.")
    if array.device.type != "cpu":
        raise ArrayError(f"{what}: the tensor is on {array.device}; give .cpu() of it")
    if array.layout != torch.strided or array.is_quantized:
        raise ArrayError(f"{what}: a sparse or quantized tensor is not allowed; give a dense one")
    if not array.is_contiguous():
        raise ArrayError(f"{what}: the tensor is not contiguous; give .contiguous() of it")
    if array.is_neg() or array.is_conj():
        raise ArrayError(
            f"{what}: the tensor is a lazy negative or conjugate; give .resolve_neg().resolve_conj() of it"
        )
    shape = tuple(array.shape)
    if dtype not in SAFETENSORS:
        return Memory("torch", dtype, shape, np.empty(0, np.uint8))
    return Memory("torch", dtype, shape, array.detach().reshape(-1).view(torch.uint8).numpy())


def _text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
