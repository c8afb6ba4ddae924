"""Is a merged folder base + adapter? Every tensor is computed again, in numpy, and compared.

`verify` does it for a whole folder; `check_sample` is the look that `merge` takes at its own result before it is put
in place (all rows of small models, some rows of each tensor of large ones). The arithmetic here shares no code with
the native stream.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastft import console
from fastft.convert.adapter import read_adapter
from fastft.convert.folder import existing_folder, read_weights
from fastft.convert.matching import NameOptions
from fastft.convert.merge import planned_tensors, read_base
from fastft.convert.numbers import as_float32, bits_of, rounded, ulp_distance, values_of
from fastft.convert.plan import Cast, Copy, Delta, Merge, OutputTensor, Part, Rows
from fastft.convert.source import FLOATS, Source, read_bytes
from fastft.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]
    Bits = NDArray[np.uint16] | NDArray[np.uint32]

Status = Literal["equal", "rounding", "off", "base", "missing", "unexpected", "shape", "dtype"]
GOOD: tuple[Status, ...] = ("equal", "rounding")
_MEANING: dict[Status, str] = {
    "equal": "bit for bit what base + adapter gives",
    "rounding": "within what the order of the sum explains",
    "off": "other values",
    "base": "equal to the base, though an adapter targets it",
    "missing": "not in the merged folder",
    "unexpected": "in the merged folder only",
    "shape": "another shape",
    "dtype": "not a floating dtype that can be compared",
}
# Elements that are held in memory at once: 4 arrays of 4 bytes each make 64 MiB.
_BLOCK_ELEMENTS = 4 * 1024 * 1024
# Up to this size `merge` looks at every row of its result.
_CHECK_ALL_BYTES = 64 * 1024 * 1024
_SAMPLED_ROWS = 8


@dataclass(frozen=True, slots=True)
class TensorCheck:
    """What was found out about one tensor.

    Attributes:
        name: of the tensor.
        status: see `_MEANING`.
        targeted: an adapter changes it.
        num_off: elements that differ from the expected bits.
        max_ulp: largest difference in units of the last place.
    """

    name: str
    status: Status
    targeted: bool = False
    num_off: int = 0
    max_ulp: int = 0

    @property
    def good(self) -> bool:
        return self.status in GOOD


@dataclass(frozen=True)
class VerifyReport:
    """The outcome for a folder; `good` decides the exit code."""

    merged: Path
    checks: tuple[TensorCheck, ...]

    @property
    def good(self) -> bool:
        return all(check.good for check in self.checks)

    def text(self) -> str:
        """Say it in some lines, at most ten names for each kind of fault."""
        targeted = sum(check.targeted for check in self.checks)
        lines = [f"{self.merged}: {len(self.checks)} tensors, {targeted} of them targeted by an adapter"]
        for status, meaning in _MEANING.items():
            found = [check for check in self.checks if check.status == status]
            if not found:
                continue
            lines.append(f"  {len(found):5} {status}: {meaning}")
            if status == "rounding":
                lines[-1] += f" (at most {max(check.max_ulp for check in found)} ulp)"
            if status in GOOD:
                continue
            for check in found[:10]:
                ulp = f" ({check.num_off} elements, up to {check.max_ulp} ulp)" if check.num_off else ""
                lines.append(f"        {check.name}{ulp}")
            if len(found) > 10:
                lines.append(f"        and {len(found) - 10} more")
        lines.append("right: it is base + adapter" if self.good else "WRONG: it is not base + adapter")
        return "\n".join(lines)


def verify(
    merged: Path, base: Path, adapters: Sequence[tuple[Path, float]], names: NameOptions | None = None
) -> VerifyReport:
    """Compute every tensor of `merged` again from the base and the adapters, and compare; `names` as in the merge.

    The dtypes of `merged` are taken as they are: a merge with `--dtype fp16` is compared in fp16.

    Raises:
        FileError, CheckpointError, PlanError: one of the folders cannot be read, or they do not fit together.
    """
    merged = existing_folder(merged, "the merged model")
    written, _ = read_weights(merged)
    planned = planned_tensors(
        read_base(base, names), [(read_adapter(folder), weight) for folder, weight in adapters], None, names
    )
    checks: list[TensorCheck] = []
    total = sum(tensor.nbytes for tensor in planned)
    done = 0
    with console.progress("verifying", total, "B") as advance:
        for tensor in planned:
            checks.append(_check_tensor(tensor, written.get(tensor.name), None))
            done += tensor.nbytes
            advance(done)
    expected = {tensor.name for tensor in planned}
    checks += [TensorCheck(name, "unexpected") for name in written if name not in expected]
    return VerifyReport(merged, tuple(checks))


def check_sample(tensors: Sequence[OutputTensor], folder: Path) -> int:
    """Recompute some rows of each tensor of a new folder (all of a small one).

    Returns:
        The number of tensors that were looked at.

    Raises:
        CheckpointError: a tensor is not what was planned.
    """
    written, _ = read_weights(folder)
    num_rows = None if sum(tensor.nbytes for tensor in tensors) <= _CHECK_ALL_BYTES else _SAMPLED_ROWS
    for tensor in tensors:
        check = _check_tensor(tensor, written.get(tensor.name), num_rows)
        if not check.good:
            raise CheckpointError(
                f"the result is not put in place: its tensor {tensor.name!r} is {check.status}"
                f" ({_MEANING[check.status]}); this is a bug of fastft or a failing disk"
            )
    return len(tensors)


def _check_tensor(tensor: OutputTensor, written: Source | None, num_rows: int | None) -> TensorCheck:
    """Compare one tensor with its plan; `num_rows` rows at the start, in the middle and at the end, or all."""
    targeted = not isinstance(tensor.operation, Copy | Cast)
    if written is None:
        return TensorCheck(tensor.name, "missing", targeted)
    if written.shape != tensor.shape:
        return TensorCheck(tensor.name, "shape", targeted)
    if isinstance(tensor.operation, Merge):
        # Experts are rows there.
        written = replace(written, shape=tensor.operation.source.shape)
    if tensor.dtype not in FLOATS or written.dtype not in FLOATS:
        same = tensor.dtype == written.dtype and _same_bytes(tensor, written)
        return TensorCheck(tensor.name, "equal" if same else "dtype" if tensor.dtype != written.dtype else "off")
    return _check_floats(tensor, written, num_rows, targeted=targeted)


def _check_floats(tensor: OutputTensor, written: Source, num_rows: int | None, *, targeted: bool) -> TensorCheck:
    import numpy as np

    factors: dict[Source, Float32] = {}
    num_off = max_ulp = 0
    explained, as_base, base_expected = True, targeted, True
    for start, count in _blocks(written.shape, num_rows):
        got = bits_of(_rows_of(written, start, count), written.dtype)
        exact, base = _expected(tensor.operation, start, count, factors)
        expected = rounded(exact, written.dtype).reshape(-1)
        differing = (expected != got) & ~(np.isnan(exact.reshape(-1)) & _is_nan(got, written.dtype))
        if differing.any():
            num_off += int(differing.sum())
            max_ulp = max(max_ulp, int(ulp_distance(expected[differing], got[differing]).max()))
            merge = tensor.operation
            explained = (
                explained
                and isinstance(merge, Merge)
                and _within(merge, start, exact, got, dtype=written.dtype, factors=factors)
            )
        if as_base and base is not None:
            base_bits = rounded(base, written.dtype).reshape(-1)
            as_base = bool(np.array_equal(base_bits, got))
            base_expected = base_expected and bool(np.array_equal(base_bits, expected))
    if num_off == 0:
        return TensorCheck(tensor.name, "equal", targeted)
    status: Status = "rounding" if explained else "base" if as_base and not base_expected else "off"
    return TensorCheck(tensor.name, status, targeted, num_off, max_ulp)


def _blocks(shape: tuple[int, ...], num_rows: int | None) -> Iterator[tuple[int, int]]:
    """Give (first row, number of rows) of the blocks to compare; a scalar is one row."""
    rows = shape[0] if shape else 1
    step = max(1, _BLOCK_ELEMENTS // max(1, prod(shape[1:])))
    if num_rows is None or rows <= 3 * num_rows:
        yield from ((start, min(step, rows - start)) for start in range(0, rows, step))
        return
    for start in (0, (rows - num_rows) // 2, rows - num_rows):
        yield start, min(step, num_rows)


def _rows_of(source: Source, start: int, count: int) -> bytes:
    row_bytes = source.nbytes // source.shape[0] if source.shape and source.shape[0] else source.nbytes
    return read_bytes(source, start * row_bytes, count * row_bytes)


def _expected(
    operation: Copy | Cast | Rows | Merge, start: int, count: int, factors: "dict[Source, Float32]"
) -> "tuple[Float32, Float32 | None]":
    """Give rows of the result in f32 before the last rounding, and the same rows of the base where they differ."""
    match operation:
        case Copy(source) | Cast(source):
            return as_float32(_rows_of(source, start, count), source), None
        case Rows(parts):
            return _gathered(parts, start, count), None
        case Merge(source, deltas):
            base = as_float32(_rows_of(source, start, count), source)
            return base + _sum_of(deltas, start, base.shape, factors), base


def _gathered(parts: Sequence[Part], start: int, count: int) -> "Float32":
    import numpy as np

    found: list[Float32] = []
    first = 0
    for part in parts:
        low, high = max(start, first), min(start + count, first + part.count)
        if low < high:
            found.append(as_float32(_rows_of(part.source, part.start + low - first, high - low), part.source))
        first += part.count
    return np.concatenate(found)


def _sum_of(
    deltas: Sequence[Delta],
    start: int,
    shape: tuple[int, ...],
    factors: "dict[Source, Float32]",
    *,
    magnitudes: bool = False,
) -> "Float32":
    """Sum the rows of scale * B A; with `magnitudes` of |scale| * |B| |A|, the bound of the rounding error."""
    import numpy as np

    total = np.zeros(shape, np.float32)
    count = shape[0]
    for delta in deltas:
        a, b = (_whole(side, factors) for side in (delta.a, delta.b))
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


def _whole(source: Source, factors: "dict[Source, Float32]") -> "Float32":
    if source not in factors:
        factors[source] = as_float32(read_bytes(source), source)
    return factors[source]


def _within(
    merge: Merge, start: int, exact: "Float32", got: "Bits", *, dtype: str, factors: "dict[Source, Float32]"
) -> bool:
    """Tell whether the sum, taken in another order in f32, can round to what was found.

    The error of a sum of r products and two further operations is at most (r + 3) * 2^-24 times the sum of the
    magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1).
    """
    import numpy as np

    count = exact.shape[0]
    rank = sum(delta.rank for delta in merge.deltas)
    magnitude = np.abs(as_float32(_rows_of(merge.source, start, count), merge.source))
    magnitude += _sum_of(merge.deltas, start, exact.shape, factors, magnitudes=True)
    bound = magnitude * np.float32((rank + 3) * 2.0**-24)
    low, high = (values_of(rounded(edge, dtype).reshape(-1), dtype) for edge in (exact - bound, exact + bound))
    found = values_of(got, dtype)
    return bool(np.all((low <= found) & (found <= high)))


def _is_nan(bits: "Bits", dtype: str) -> "NDArray[np.bool_]":
    import numpy as np

    exponent, sign_free = {
        "F32": (0x7F800000, 0x7FFFFFFF),
        "F16": (0x7C00, 0x7FFF),
        "BF16": (0x7F80, 0x7FFF),
    }[dtype]
    nan: NDArray[np.bool_] = (bits & np.array(sign_free, bits.dtype)) > exponent
    return nan


def _same_bytes(tensor: OutputTensor, written: Source) -> bool:
    if not isinstance(tensor.operation, Copy):
        return False
    step = _BLOCK_ELEMENTS
    source = tensor.operation.source
    return all(
        read_bytes(source, start, min(step, source.nbytes - start))
        == read_bytes(written, start, min(step, source.nbytes - start))
        for start in range(0, source.nbytes, step)
    )


def summary(report: VerifyReport) -> Mapping[str, int]:
    """Count the tensors by status, for `--json`."""
    return {status: sum(check.status == status for check in report.checks) for status in _MEANING}
