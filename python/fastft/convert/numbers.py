"""Numbers of 16 and 32 bit in numpy, which knows no bf16: for the checks that recompute what the stream wrote."""

from typing import TYPE_CHECKING

from fastft.convert.source import Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]
    Bits = NDArray[np.uint16] | NDArray[np.uint32]


def as_float32(content: bytes, source: Source) -> "Float32":
    """Read the bytes of (whole rows of) an F32, F16 or BF16 tensor.

    Returns:
        f32, of `source`'s shape with as many rows as there are bytes for.
    """
    import numpy as np

    if source.dtype == "BF16":
        numbers = (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        numbers = np.frombuffer(content, "<f4" if source.dtype == "F32" else "<f2").astype(np.float32)
    return numbers.reshape(-1, *source.shape[1:]) if source.shape else numbers.reshape(())


def rounded(numbers: "Float32", dtype: str) -> "Bits":
    """Round f32 to nearest even and give the bits (u16 for F16 and BF16, u32 for F32)."""
    import numpy as np

    if dtype == "F32":
        return numbers.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return numbers.astype(np.float16).view(np.uint16)
    bits = numbers.view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)


def bits_of(content: bytes, dtype: str) -> "Bits":
    """Give the stored bits of a float tensor, flat."""
    import numpy as np

    return np.frombuffer(content, "<u4") if dtype == "F32" else np.frombuffer(content, "<u2")


def values_of(bits: "Bits", dtype: str) -> "Float32":
    """Widen stored bits to f32, in their shape."""
    import numpy as np

    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float32 if dtype == "F32" else np.float16).astype(np.float32)


def ulp_distance(one: "Bits", other: "Bits") -> "NDArray[np.int64]":
    """Count the representable numbers between two of the same dtype, given by their bits; -0 and +0 are one."""
    import numpy as np

    sign = np.int64(1) << np.int64(one.dtype.itemsize * 8 - 1)

    def place(bits: "Bits") -> "NDArray[np.int64]":
        wide = bits.astype(np.int64)
        return np.where(wide & sign, sign - wide, wide)

    distance: NDArray[np.int64] = np.abs(place(one) - place(other))
    return distance
