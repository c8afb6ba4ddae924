"""Merging a low-rank update into one weight: LoRA, DoRA, and their transposed kinds.

The arithmetic of PEFT's merge with one rounding (DESIGN section 6): `W' = round(f32(W) + scale * (B A))`, products and
sums in f32. For a Linear or convolution it is PEFT's result bit for bit in bfloat16 and float16, but for the order of
the sum; DoRA takes its norms in torch's own order.
"""

import math
from typing import TYPE_CHECKING, cast

import numpy as np

from fastft import _native
from fastft.errors import ArrayError
from fastft.native.array import (
    FLOATS,
    Array,
    Memory,
    Same,
    dtype_name,
    empty,
    floats,
    memory,
    refuse_overlap,
    target,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST_F32 = 3.4028234663852886e38


def merge_lora(
    W: Same,
    A: Array,
    B: Array,
    scale: float,
    *,
    magnitude: Array | None = None,
    transposed: bool = False,
    out: Same | None = None,
    dtype: object = None,
    threads: int | None = None,
) -> Same:
    """Give W with a low-rank update added, rounded once.

    Args:
        W: float32, float16 or bfloat16 (O, I), or (O, I, kh, kw) of a convolution without groups.
        A: (R, I) or (R, I, kh, kw), one of the same dtypes.
        B: (O, R) or (O, R, 1, 1).
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA; used as an f32.
        magnitude: of DoRA, (O) in any shape: each row of W + scale * B A gets this norm.
        transposed: W is stored (I, O), as in transformers' Conv1D and in embeddings (A is (R, V) and B (D, R) then).
        out: an array for the result; W itself to merge in place. A failure leaves it half written.
        dtype: of the result; that of W by default. "bfloat16" where W is its bits in uint16: the result is such bits.
        threads: all cores by default.

    Returns:
        `out`, or a new array of W's shape and kind.

    Raises:
        ArrayError: shapes or dtypes do not fit, A, B or the magnitude is not finite, or a finite weight would not stay
            finite (with DoRA: any weight that is not).
    """
    what = "merge_lora"
    wanted = None if dtype is None else dtype_name(dtype, f"{what}: dtype")
    bits = wanted == "bfloat16" and memory(W, f"{what}: W").dtype == "uint16"
    base = floats(W, f"{what}: W", "bfloat16" if bits else None)
    a, b = floats(A, f"{what}: A"), floats(B, f"{what}: B")
    wanted = wanted or base.dtype
    if wanted not in FLOATS:
        raise ArrayError(f"{what}: dtype {wanted} is not allowed; use {', '.join(FLOATS)}")
    if not math.isfinite(scale) or abs(scale) > _MOST_F32:
        raise ArrayError(f"{what}: scale {scale!r} is no finite f32")
    _check_shapes(base, a, b, transposed=transposed)
    result = cast("Same", empty(base.kind, "uint16" if bits else wanted, base.shape, what)) if out is None else out
    written = target(result, f"{what}: out", wanted, base.shape)
    in_place = written.dtype == base.dtype and written.data.ctypes.data == base.data.ctypes.data
    read = {"A": a, "B": b} if in_place else {"W": base, "A": a, "B": b}
    m = None if magnitude is None else _magnitude(magnitude, base.shape[1] if transposed else base.shape[0])
    refuse_overlap(written, f"{what}: out", **read)
    kept = _native.merge_low_rank(
        None if in_place else base.data,
        base.dtype,
        written.data,
        wanted,
        (base.shape[0], base.numel // base.shape[0]),
        a.data,
        a.dtype,
        b.data,
        b.dtype,
        a.shape[0],
        scale,
        magnitude=m,
        transposed=transposed,
        threads=threads,
    )
    if not kept:
        zero = "" if m is None else ", or a row of W + scale * B A is zero and has no direction"
        raise ArrayError(f"{what}: a weight would become infinite or NaN in {wanted}; use bfloat16 or float32{zero}")
    return result


def _check_shapes(base: Memory, a: Memory, b: Memory, *, transposed: bool) -> None:
    """Refuse what does not multiply; the text shows all three shapes."""
    shapes = f"W {base.shape}, A {a.shape}, B {b.shape}"
    if len(base.shape) < 2 or len(a.shape) < 2 or len(b.shape) < 2 or 0 in base.shape or a.shape[0] == 0:
        raise ArrayError(f"merge_lora: {shapes}: matrices with at least one row and column are needed")
    outputs, inputs = base.shape[0], base.shape[1:]
    if transposed:
        if len(base.shape) != 2:
            raise ArrayError(f"merge_lora: {shapes}: only a matrix can be stored transposed")
        outputs, inputs = base.shape[1], base.shape[:1]
    fits = (
        a.shape[1:] == inputs
        and b.shape[:2] == (outputs, a.shape[0])
        and len(b.shape) in (2, len(base.shape))
        and set(b.shape[2:]) <= {1}
    )
    if not fits:
        stored = "(I, O), A (R, I), B (O, R)" if transposed else "(O, I), A (R, I), B (O, R)"
        raise ArrayError(f"merge_lora: {shapes}: do not fit; needed are W {stored}")


def _magnitude(magnitude: Array, count: int) -> "NDArray[np.float32]":
    """Give DoRA's magnitudes as f32; a copy, they are few."""
    found = floats(magnitude, "merge_lora: magnitude")
    if found.numel != count:
        raise ArrayError(f"merge_lora: magnitude has {found.numel} numbers, and {count} are needed")
    wide = np.empty(count, np.float32)
    _native.cast(found.data, found.dtype, wide.view(np.uint8), "float32")
    if not np.isfinite(wide).all():
        raise ArrayError("merge_lora: magnitude holds a value that is not finite")
    return wide
