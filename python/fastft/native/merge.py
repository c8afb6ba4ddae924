"""Merging a low-rank update into one weight: LoRA, DoRA, and their transposed kinds.

The arithmetic of PEFT's merge with one rounding (DESIGN section 6): `W' = round(f32(W) + scale * (B A))`, products and
sums in f32. For a Linear or convolution it is PEFT's result bit for bit in bfloat16 and float16, but for the order of
the sum.
"""

import math
from dataclasses import dataclass, replace
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
    from collections.abc import Iterator

    from numpy.typing import NDArray

# Numbers of a block of rows that DoRA works on at once: 4 MiB of f32.
_BLOCK = 1 << 20
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
        ArrayError: shapes or dtypes do not fit, A or B is not finite, or a finite weight would not stay finite.
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
    others = {"A": a, "B": b} if in_place else {"W": base, "A": a, "B": b}
    update = _Update(base, a, b, scale, transposed, threads)
    if magnitude is None:
        refuse_overlap(written, f"{what}: out", **others)
        kept = update.into(written, in_place=in_place)
    else:
        m = floats(magnitude, f"{what}: magnitude")
        refuse_overlap(written, f"{what}: out", **others, magnitude=m)
        kept = _dora(update, m, written)
    if not kept:
        raise ArrayError(f"{what}: a finite weight would become infinite or NaN in {wanted}; use bfloat16 or float32")
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


@dataclass(frozen=True, slots=True)
class _Update:
    """W and the low-rank product that is added to it; shapes are checked.

    Attributes:
        base: W.
        a: (R, ...).
        b: (O, R).
        scale: of the product.
        transposed: W is (I, O).
        threads: that the kernel uses.
    """

    base: Memory
    a: Memory
    b: Memory
    scale: float
    transposed: bool
    threads: int | None

    @property
    def columns(self) -> int:
        return self.base.numel // self.base.shape[0]

    def into(self, written: Memory, *, in_place: bool) -> bool:
        """Have the kernel write W + D, rounded; whether every finite weight stayed finite."""
        return _native.merge_low_rank(
            None if in_place else self.base.data,
            self.base.dtype,
            written.data,
            written.dtype,
            (self.base.shape[0], self.columns),
            self.a.data,
            self.a.dtype,
            self.b.data,
            self.b.dtype,
            self.a.shape[0],
            self.scale,
            transposed=self.transposed,
            threads=self.threads,
        )

    def rows(self, start: int, count: int) -> "_Update":
        """Give the update of some rows of W."""
        a, b = self.a, self.b
        if self.transposed:
            # The columns of A that belong to these rows.
            table = a.data.reshape(a.shape[0], -1)
            size = table.shape[1] // a.shape[1]
            chosen = np.ascontiguousarray(table[:, start * size : (start + count) * size]).reshape(-1)
            a = Memory(a.kind, a.dtype, (a.shape[0], count), chosen)
        else:
            b = _rows(b, start, count)
        return replace(self, base=_rows(self.base, start, count), a=a, b=b)

    def blocks(self) -> "Iterator[tuple[int, NDArray[np.float32]]]":
        """Give V = W + D in f32, some rows at a time: (first row, V (rows, columns)).

        Raises:
            ArrayError: a finite weight would become infinite.
        """
        num_rows = self.base.shape[0]
        step = max(1, _BLOCK // self.columns)
        for start in range(0, num_rows, step):
            V = np.empty((min(step, num_rows - start), self.columns), np.float32)
            if not self.rows(start, len(V)).into(memory(V, "V"), in_place=False):
                raise ArrayError("merge_lora: DoRA: a finite weight would become infinite in float32")
            yield start, V


def _dora(update: _Update, magnitude: Memory, written: Memory) -> bool:
    """Scale V = W + D to the magnitudes: `round((m / |V|) * V)`, norms and factors in f32 as PEFT's merge has them.

    The only place of this arithmetic here. A row's norm runs over all dimensions but the first; where W is stored
    transposed it is a column's, and V is made twice.

    Returns:
        Whether every finite weight stayed finite.
    """
    m = np.empty(magnitude.numel, np.float32)
    _native.cast(magnitude.data, magnitude.dtype, m.view(np.uint8), "float32")
    num_outputs = update.base.shape[1] if update.transposed else update.base.shape[0]
    if len(m) != num_outputs:
        raise ArrayError(f"merge_lora: magnitude has {len(m)} numbers, and {num_outputs} are needed")
    if not np.isfinite(m).all():
        raise ArrayError("merge_lora: magnitude holds a value that is not finite")
    column_factors = None
    if update.transposed:
        squares = np.zeros(num_outputs, np.float64)
        for _, V in update.blocks():
            squares += np.square(V, dtype=np.float64).sum(axis=0)
        column_factors = m / _norms(squares)
    kept = True
    for start, V in update.blocks():
        factors = column_factors
        if factors is None:
            factors = (m[start : start + len(V)] / _norms(np.square(V, dtype=np.float64).sum(axis=1)))[:, None]
        scaled = memory(V * factors, "V")
        kept &= bool(np.isfinite(scaled.data.view(np.float32)).all())
        kept &= _native.cast(scaled.data, "float32", _rows(written, start, len(V)).data, written.dtype)
    return kept


def _norms(squares: "NDArray[np.float64]") -> "NDArray[np.float32]":
    norms = np.sqrt(squares).astype(np.float32)
    if not norms.all():
        raise ArrayError("merge_lora: DoRA: a row of W + scale * B A is zero and has no direction")
    return norms


def _rows(array: Memory, start: int, count: int) -> Memory:
    width = array.data.nbytes // array.shape[0]
    return replace(array, shape=(count, *array.shape[1:]), data=array.data[start * width : (start + count) * width])
