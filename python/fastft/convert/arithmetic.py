"""The planned numbers in numpy: rows of a tensor in f32, before the one rounding to its dtype.

For `verify`, which recomputes what the native stream wrote. Formulas: spec/formats.md section 2, as PEFT 0.21 computes
them; sums are taken in other orders than there, and `error_bound` says what that can change.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fastft.convert.four_bit import numbers_of
from fastft.convert.numbers import as_float32, rounded, values_of
from fastft.convert.plan import (
    Cast,
    Copy,
    Delta,
    Dora,
    Merge,
    Numbers,
    Part,
    PeftLayer,
    Rows,
    Shift,
)
from fastft.convert.source import Source, read_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]

# Largest distance of neighbours, as a part of the number, and the smallest there is.
_SPACING = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
_SMALLEST = {"F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}
# Rounding to nearest in f32 changes a number by at most this part of it.
_UNIT = 2.0**-24
# A sum of n numbers is off by at most _LIKELY * sqrt(n) * _UNIT of itself, whatever its order, but for one sum in 10^13
# (Higham, Mary: A new approach to probabilistic rounding error analysis, 2019, theorem 2.4: 2 exp(-_LIKELY^2 / 2)).
_LIKELY = 8.0
# Elements that are worked on at once: some arrays of 4 bytes each stay below 32 MiB.
BLOCK_ELEMENTS = 1024 * 1024


class Arithmetic:
    """The rows of one planned tensor; factors that every row needs are read once."""

    def __init__(self, operation: Numbers, dtype: str) -> None:
        """Prepare for `operation`, whose result is rounded to `dtype`."""
        self._operation = operation
        self._dtype = dtype
        self._whole_tensors: dict[Source, Float32] = {}
        self._column_norms: Float32 | None = None
        self._column_deviations: NDArray[np.float64] | None = None

    def rows(self, start: int, count: int) -> "Float32":
        """Give rows `start` to `start + count` of the result (a scalar is one row)."""
        match self._operation:
            case Copy(source) | Cast(source):
                return _floats(source, start, count)
            case Rows(parts):
                return _gathered(parts, start, count)
            case Merge(source, deltas, round_delta):
                base = _floats(source, start, count)
                delta = self._sum_of(deltas, start, base.shape)
                return base + (values_of(rounded(delta, self._dtype), self._dtype) if round_delta else delta)
            case Dora():
                return self._dora(self._operation, start, count)
            case Shift(source):
                base = _floats(source, start, count)
                return base + self._vectors(self._operation, start, base.shape)
            case PeftLayer():
                raise AssertionError("peft_layers.PeftNumbers gives these rows")

    def base_rows(self, start: int, count: int) -> "Float32 | None":
        """Give the same rows of the base; None where the tensor is not an update of one."""
        match self._operation:
            case Merge(source) | Dora(source) | Shift(source):
                return _floats(source, start, count)
            case _:
                return None

    def error_bound(self, start: int, count: int) -> "Float32 | None":
        """Bound what another order of the sums can change, for what is no sum: None.

        The error of a sum of r products and two further operations is at most (r + 3) * 2^-24 times the sum of the
        magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); both sums have one.
        """
        import numpy as np

        operation = self._operation
        if isinstance(operation, Dora):
            return self._dora_bound(operation, start, count)
        if isinstance(operation, Shift):
            magnitude = np.abs(_floats(operation.source, start, count))
            magnitude += np.abs(self._vectors(operation, start, magnitude.shape, magnitudes=True))
            return magnitude * np.float32(2 * (len(operation.addends) + 3) * _UNIT)
        if not isinstance(operation, Merge):
            return None
        bound = 2 * self._update_bound(operation.source, operation.deltas, start, count)
        if operation.round_delta:
            # The product may round to the neighbour of what it rounds to here.
            product = self._sum_of(operation.deltas, start, bound.shape)
            bound += np.abs(product) * np.float32(_SPACING[self._dtype]) + np.float32(_SMALLEST[self._dtype])
        return bound

    def _update_bound(self, source: Source, deltas: Sequence[Delta], start: int, count: int) -> "Float32":
        """Bound the error of W + D."""
        import numpy as np

        magnitude = np.abs(_floats(source, start, count))
        # Beside numbers near the largest the bound itself may be infinite; a result that is, has been refused before.
        with np.errstate(over="ignore"):
            magnitude += self._sum_of(deltas, start, magnitude.shape, magnitudes=True)
        return magnitude * np.float32((sum(delta.rank for delta in deltas) + 3) * _UNIT)

    def _sum_of(
        self, deltas: Sequence[Delta], start: int, shape: tuple[int, ...], *, magnitudes: bool = False
    ) -> "Float32":
        """Sum the rows of scale * B A; with `magnitudes` of |scale| * |B| |A|."""
        import numpy as np

        total = np.zeros(shape, np.float32)
        count = shape[0]
        for delta in deltas:
            a, b = (self._whole(side) for side in (delta.a, delta.b))
            if delta.b_columns is not None:
                first, step = delta.b_columns
                b = b[:, first::step]
            if magnitudes:
                a, b = np.abs(a), np.abs(b)
            scale = np.float32(abs(delta.scale) if magnitudes else delta.scale)
            # The transposed product is the product of the transposed factors.
            left, right = (a.T, b.T) if delta.transposed else (b, a)
            for to, of, rows in delta.rows or ((0, 0, left.shape[0]),):
                low, high = max(start, to), min(start + count, to + rows)
                if low < high:
                    total[low - start : high - start] += (left[of + low - to : of + high - to] @ right) * scale
        return total

    def _dora(self, dora: Dora, start: int, count: int) -> "Float32":
        """Scale each row of W + D to its magnitude; each column where the weight is stored transposed."""
        import numpy as np

        base = _floats(dora.source, start, count)
        result = base + self._sum_of(dora.deltas, start, base.shape)
        for delta in dora.deltas:
            if delta.magnitude is None:
                continue
            magnitude = self._whole(delta.magnitude).reshape(-1)
            if delta.transposed:
                result *= magnitude / self._norms_of_columns(dora)
                continue
            for rows, of in _spans(delta, start, base.shape):
                norms = np.sqrt(np.square(result[rows], dtype=np.float64).sum(axis=1)).astype(np.float32)
                result[rows] *= (magnitude[of : of + len(norms)] / norms)[:, None]
        return result

    def _dora_bound(self, dora: Dora, start: int, count: int) -> "Float32":
        """Bound how far two computations of `_dora` can be apart.

        V = W + D is off by its own bound in both, the norm by the norm of that and by what its sum of squares is off
        (half of it, after the root), and by its rounding; then a division and a product are rounded in both. The last
        factor covers the products of these errors.
        """
        import numpy as np

        base = _floats(dora.source, start, count)
        updated = (base + self._sum_of(dora.deltas, start, base.shape)).astype(np.float64)
        apart = 2 * self._update_bound(dora.source, dora.deltas, start, count).astype(np.float64)
        bound = apart.copy()
        for delta in dora.deltas:
            if delta.magnitude is None:
                continue
            magnitude = np.abs(self._whole(delta.magnitude).reshape(-1).astype(np.float64))
            if delta.transposed:
                norms, deviations = self._norms_of_columns(dora).astype(np.float64), self._deviations_of_columns(dora)
                bound = _scaled_bound(updated, apart, magnitude, norms, deviations, num_squares=dora.source.shape[0])
                continue
            for rows, of in _spans(delta, start, base.shape):
                norms, deviations = (np.linalg.norm(part[rows], axis=1)[:, None] for part in (updated, apart))
                of_rows = magnitude[of : of + len(norms), None]
                bound[rows] = _scaled_bound(
                    updated[rows], apart[rows], of_rows, norms, deviations, num_squares=base.shape[1]
                )
        return bound.astype(np.float32)

    def _norms_of_columns(self, dora: Dora) -> "Float32":
        """Norm of each column of W + D, in one pass over the rows."""
        import numpy as np

        if self._column_norms is None:
            sums = np.zeros(dora.source.shape[1], np.float64)
            for start, count in _blocks_of_rows(dora.source):
                base = _floats(dora.source, start, count)
                updated = base + self._sum_of(dora.deltas, start, base.shape)
                sums += np.square(updated, dtype=np.float64).sum(axis=0)
            self._column_norms = np.sqrt(sums).astype(np.float32)
        return self._column_norms

    def _deviations_of_columns(self, dora: Dora) -> "NDArray[np.float64]":
        """Norm of the distance of two computations of each column of W + D."""
        import numpy as np

        if self._column_deviations is None:
            sums = np.zeros(dora.source.shape[1], np.float64)
            for start, count in _blocks_of_rows(dora.source):
                apart = 2 * self._update_bound(dora.source, dora.deltas, start, count)
                sums += np.square(apart, dtype=np.float64).sum(axis=0)
            self._column_deviations = np.sqrt(sums)
        return self._column_deviations

    def _vectors(self, shift: Shift, start: int, shape: tuple[int, ...], *, magnitudes: bool = False) -> "Float32":
        """Sum what is added to a bias; with `magnitudes` the magnitudes of that."""
        import numpy as np

        total = np.zeros(shape, np.float32)
        count = shape[0]
        for addend in shift.addends:
            vector = self._whole(addend.source).reshape(-1) * np.float32(addend.scale)
            if magnitudes:
                vector = np.abs(vector)
            for to, of, rows in addend.rows or ((0, 0, vector.shape[0]),):
                low, high = max(start, to), min(start + count, to + rows)
                if low < high:
                    total[low - start : high - start] += vector[of + low - to : of + high - to]
        return total

    def _whole(self, source: Source) -> "Float32":
        if source not in self._whole_tensors:
            self._whole_tensors[source] = as_float32(read_bytes(source), source)
        return self._whole_tensors[source]


def _scaled_bound(
    updated: "NDArray[np.float64]",
    apart: "NDArray[np.float64]",
    magnitude: "NDArray[np.float64]",
    norms: "NDArray[np.float64]",
    deviations: "NDArray[np.float64]",
    *,
    num_squares: int,
) -> "NDArray[np.float64]":
    """Bound how far (m / norm) V of two computations can be apart; see `Arithmetic._dora_bound`.

    Args:
        updated: V.
        apart: how far V can be.
        magnitude: m, to be broadcast along V, as the next two.
        norms: of the rows or columns of V.
        deviations: norms of the rows or columns of `apart`.
        num_squares: how many squares a norm sums.
    """
    import numpy as np

    norm_apart = deviations + norms * ((_LIKELY * np.sqrt(num_squares) + 1) / 2 + 2) * _UNIT
    with np.errstate(divide="ignore", invalid="ignore"):
        # Where the norm is nothing but errors, everything is explained.
        relative = np.where(norm_apart < norms, norm_apart / (norms - norm_apart), np.inf)
        bound: NDArray[np.float64] = 1.01 * magnitude / norms * (apart + np.abs(updated) * (relative + 4 * _UNIT))
    return np.where(np.isnan(bound), np.inf, bound)


def _spans(delta: Delta, start: int, shape: tuple[int, ...]) -> Iterator[tuple[slice, int]]:
    """Give the rows of a block that take a product, and the row of the product that the first of them takes."""
    end = start + shape[0]
    for to, of, count in delta.rows or ((0, 0, end),):
        low, high = max(start, to), min(end, to + count)
        if low < high:
            yield slice(low - start, high - start), of + low - to


def _blocks_of_rows(source: Source) -> Iterator[tuple[int, int]]:
    """Give (first row, number of rows) of blocks of a matrix."""
    num_rows, num_columns = source.shape
    step = max(1, BLOCK_ELEMENTS // num_columns)
    yield from ((start, min(step, num_rows - start)) for start in range(0, num_rows, step))


def row_bytes(source: Source, start: int, count: int) -> bytes:
    """Read rows of a tensor; a scalar is one row."""
    one = source.nbytes // source.shape[0] if source.shape and source.shape[0] else source.nbytes
    return read_bytes(source, start * one, count * one)


def _floats(source: Source, start: int, count: int) -> "Float32":
    if source.lens is not None:
        elements = source.numel // source.shape[0]
        return numbers_of(source, start * elements, count * elements).reshape(count, *source.shape[1:])
    return as_float32(row_bytes(source, start, count), source)


def _gathered(parts: Sequence[Part], start: int, count: int) -> "Float32":
    import numpy as np

    found: list[Float32] = []
    first = 0
    for part in parts:
        low, high = max(start, first), min(start + count, first + part.count)
        if low < high:
            found.append(_floats(part.source, part.start + low - first, high - low))
        first += part.count
    return np.concatenate(found)
