"""The planned numbers in numpy: rows of a tensor in f32, before the one rounding to its dtype.

Two users: `verify` recomputes what the native stream wrote, and `computed` fills in the tensors whose arithmetic the
stream does not have (DoRA, biases of lora_B). Formulas: spec/formats.md section 2, as PEFT 0.21 computes them.
"""

from collections.abc import Sequence
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
            case Shift():
                return self._shifted(self._operation, start, count)
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
        """Bound what another order of the sum can change, for a plain merge; None for the rest.

        The error of a sum of r products and two further operations is at most (r + 3) * 2^-24 times the sum of the
        magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); both sums have one.
        """
        import numpy as np

        if not isinstance(self._operation, Merge):
            return None
        rank = sum(delta.rank for delta in self._operation.deltas)
        magnitude = np.abs(_floats(self._operation.source, start, count))
        magnitude += self._sum_of(self._operation.deltas, start, magnitude.shape, magnitudes=True)
        bound = magnitude * np.float32(2 * (rank + 3) * 2.0**-24)
        if self._operation.round_delta:
            # The product may round to the neighbour of what it rounds to here.
            product = self._sum_of(self._operation.deltas, start, magnitude.shape)
            bound += np.abs(product) * np.float32(_SPACING[self._dtype]) + np.float32(_SMALLEST[self._dtype])
        return bound

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
            for to, of, rows in delta.rows or ((0, 0, base.shape[0] + start),):
                low, high = max(start, to), min(start + count, to + rows)
                if low < high:
                    part = result[low - start : high - start]
                    norms = np.sqrt(np.square(part, dtype=np.float64).sum(axis=1)).astype(np.float32)
                    part *= (magnitude[of + low - to : of + high - to] / norms)[:, None]
        return result

    def _norms_of_columns(self, dora: Dora) -> "Float32":
        """Norm of each column of W + D, in one pass over the rows."""
        import numpy as np

        if self._column_norms is None:
            num_rows, num_columns = dora.source.shape
            sums = np.zeros(num_columns, np.float64)
            step = max(1, BLOCK_ELEMENTS // num_columns)
            for start in range(0, num_rows, step):
                base = _floats(dora.source, start, min(step, num_rows - start))
                updated = base + self._sum_of(dora.deltas, start, base.shape)
                sums += np.square(updated, dtype=np.float64).sum(axis=0)
            self._column_norms = np.sqrt(sums).astype(np.float32)
        return self._column_norms

    def _shifted(self, shift: Shift, start: int, count: int) -> "Float32":
        import numpy as np

        result = _floats(shift.source, start, count)
        for addend in shift.addends:
            vector = self._whole(addend.source) * np.float32(addend.scale)
            for to, of, rows in addend.rows or ((0, 0, vector.shape[0]),):
                low, high = max(start, to), min(start + count, to + rows)
                if low < high:
                    result[low - start : high - start] += vector[of + low - to : of + high - to]
        return result

    def _whole(self, source: Source) -> "Float32":
        if source not in self._whole_tensors:
            self._whole_tensors[source] = as_float32(read_bytes(source), source)
        return self._whole_tensors[source]


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
