"""Is a merged folder base + adapter? Every tensor is computed again, in numpy, and compared.

`verify` does it for a whole folder; `check_sample` is the look that `merge` takes at its own result before it is put
in place (all rows of small models, some rows of each tensor of large ones). The arithmetic here shares no code with
the native stream.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastft import console
from fastft.convert.adapter import read_adapter
from fastft.convert.arithmetic import BLOCK_ELEMENTS, Arithmetic, row_bytes
from fastft.convert.bitsandbytes_layout import is_packed, unpacked
from fastft.convert.folder import existing_folder, read_weights
from fastft.convert.four_bit import FourBit
from fastft.convert.json_file import read_object
from fastft.convert.matching import NameOptions
from fastft.convert.merge import planned_tensors, read_base
from fastft.convert.numbers import bits_of, rounded, ulp_distance, values_of
from fastft.convert.peft_layers import PeftNumbers
from fastft.convert.plan import Bytes, Cast, Copy, Dora, Merge, OutputTensor, PeftLayer, Quantize, ScalesOf
from fastft.convert.source import FLOATS, Packed, Source, check_unchanged, looked_at, read_bytes
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
# Up to this size `merge` looks at every row of its result.
_CHECK_ALL_BYTES = 64 * 1024 * 1024
_SAMPLED_ROWS = 2


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

    def as_json(self) -> str:
        """Say it for other programs: the verdict, the number of tensors by status, and each that is not equal."""
        return json.dumps(
            {
                "merged": str(self.merged),
                "good": self.good,
                "num_tensors": len(self.checks),
                "num_targeted": sum(check.targeted for check in self.checks),
                "by_status": {status: sum(check.status == status for check in self.checks) for status in _MEANING},
                "not_equal": [asdict(check) for check in self.checks if check.status != "equal"],
            },
            indent=2,
        )


def verify(
    merged: Path,
    base: Path,
    adapters: Sequence[tuple[Path, float]],
    *,
    names: NameOptions | None = None,
    four_bit: FourBit | Literal["auto"] | None = "auto",
    match_peft: bool = False,
    base_is_residual: bool = False,
) -> VerifyReport:
    """Compute every tensor of `merged` again from the base and the adapters, and compare.

    `names`, `four_bit`, `match_peft` and `base_is_residual` are those of the merge. The dtypes of `merged` are taken as they are: a merge with
    `--dtype fp16` is compared in fp16.

    Raises:
        FileError, CheckpointError, PlanError: one of the folders cannot be read, or they do not fit together.
    """
    existing_folder(merged, "the merged model")
    read = [(read_adapter(folder, base_is_residual=base_is_residual), weight) for folder, weight in adapters]
    checkpoint = read_base(base, names)
    planned = planned_tensors(checkpoint, read, None, names, four_bit, match_peft=match_peft)
    report = compare(merged, planned)
    check_unchanged(checkpoint.fingerprints)
    for adapter, _ in read:
        check_unchanged(adapter.fingerprints)
    return report


def compare(merged: Path, planned: Sequence[OutputTensor]) -> VerifyReport:
    """Compute planned tensors again, and compare them with those of a folder.

    Raises:
        FileError, CheckpointError: the folder cannot be read, or changed meanwhile.
    """
    merged = existing_folder(merged, "the merged model")
    seen = {path: found for path, found in looked_at(merged).items() if path.suffix in (".safetensors", ".json")}
    written = _read(merged)
    checks: list[TensorCheck] = []
    total = sum(tensor.nbytes for tensor in planned)
    done = 0
    with console.progress("verifying", total, "B") as advance, ThreadPoolExecutor(os.cpu_count()) as workers:
        found = workers.map(lambda tensor: _check_tensor(tensor, written.get(tensor.name), None), planned)
        for tensor, check in zip(planned, found, strict=True):
            checks.append(check)
            done += tensor.nbytes
            advance(done)
    check_unchanged(tuple(seen.values()))
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
    written = _read(folder)
    num_rows = None if sum(tensor.nbytes for tensor in tensors) <= _CHECK_ALL_BYTES else _SAMPLED_ROWS
    checked = [tensor for tensor in tensors if not isinstance(tensor.operation, ScalesOf | Bytes)]
    for tensor in checked:
        check = _check_tensor(tensor, written.get(tensor.name), num_rows)
        if not check.good:
            raise CheckpointError(
                f"the result is not put in place: its tensor {tensor.name!r} is {check.status}"
                f" ({_MEANING[check.status]}); this is a bug of fastft or a failing disk"
            )
    return len(checked)


def _read(folder: Path) -> dict[str, Source]:
    """Find the tensors of a folder; 4-bit ones are seen as numbers, so that their companions are checked with them."""
    tensors, _ = read_weights(folder)
    if not is_packed(tensors):
        return tensors
    return unpacked(folder, read_object(folder / "config.json"), tensors)


def _check_tensor(tensor: OutputTensor, written: Source | None, num_rows: int | None) -> TensorCheck:
    """Compare one tensor with its plan; `num_rows` rows at the start, in the middle and at the end, or all."""
    planned = tensor.operation
    if isinstance(planned, Quantize):
        tensor = OutputTensor(tensor.name, planned.dtype, planned.shape, planned.of)
    targeted = not isinstance(tensor.operation, Copy | Cast)
    if written is None:
        return TensorCheck(tensor.name, "missing", targeted)
    if written.shape != tensor.shape:
        return TensorCheck(tensor.name, "shape", targeted)
    if isinstance(planned, Quantize) and not _as_planned(planned, written):
        return TensorCheck(tensor.name, "off", targeted)
    if isinstance(written.lens, Packed):
        return _check_codes(tensor, written, num_rows, targeted=targeted)
    if isinstance(tensor.operation, Merge | Dora):
        # Experts are rows there, and so are the kernels of a convolution.
        written = replace(written, shape=tensor.operation.source.shape)
    if tensor.dtype not in FLOATS or written.dtype not in FLOATS:
        same = tensor.dtype == written.dtype and _same_bytes(tensor, written)
        return TensorCheck(tensor.name, "equal" if same else "dtype" if tensor.dtype != written.dtype else "off")
    return _check_floats(tensor, written, num_rows, targeted=targeted)


def _as_planned(planned: Quantize, written: Source) -> bool:
    lens = written.lens
    if not isinstance(lens, Packed):
        return False
    settings = FourBit(planned.four_bit.type, lens.nested is not None, lens.blocksize)
    offset = None if lens.nested is None else lens.nested.offset
    return (lens.quant_type, settings, lens.transposed, offset) == (
        planned.four_bit.type,
        planned.four_bit,
        planned.transposed,
        planned.offset,
    )


def _check_codes(tensor: OutputTensor, written: Source, num_rows: int | None, *, targeted: bool) -> TensorCheck:
    """Compare the codes of a 4-bit tensor."""
    from fastft.convert.verify_quantized import compare

    found = compare(_arithmetic(tensor), written, num_rows)
    if found.num_off == 0:
        return TensorCheck(tensor.name, "equal", targeted)
    status: Status = "rounding" if found.explained else "base" if targeted and found.as_base else "off"
    return TensorCheck(tensor.name, status, targeted, found.num_off)


def _arithmetic(tensor: OutputTensor) -> Arithmetic | PeftNumbers:
    operation = tensor.operation
    assert not isinstance(operation, Quantize | ScalesOf | Bytes)
    return PeftNumbers(operation) if isinstance(operation, PeftLayer) else Arithmetic(operation, tensor.dtype)


def _check_floats(tensor: OutputTensor, written: Source, num_rows: int | None, *, targeted: bool) -> TensorCheck:
    import numpy as np

    # Rounded to what the file has: a merge with another --dtype is verified in that.
    arithmetic = _arithmetic(replace(tensor, dtype=written.dtype))
    num_off = max_ulp = 0
    explained, as_base, base_expected = True, targeted, True
    for start, count in _blocks(written.shape, num_rows):
        got = bits_of(row_bytes(written, start, count), written.dtype)
        exact = arithmetic.rows(start, count)
        expected = rounded(exact, written.dtype).reshape(-1)
        differing = (expected != got) & ~(np.isnan(exact.reshape(-1)) & _is_nan(got, written.dtype))
        if differing.any():
            num_off += int(differing.sum())
            max_ulp = max(max_ulp, int(ulp_distance(expected[differing], got[differing]).max()))
            found = values_of(got, written.dtype).reshape(exact.shape)
            explained = explained and _explained(arithmetic, start, exact, found, differing, dtype=written.dtype)
        base = arithmetic.base_rows(start, count) if as_base else None
        if base is not None:
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
    step = max(1, BLOCK_ELEMENTS // max(1, prod(shape[1:])))
    if num_rows is None or rows <= 3 * num_rows:
        yield from ((start, min(step, rows - start)) for start in range(0, rows, step))
        return
    for start in (0, (rows - num_rows) // 2, rows - num_rows):
        yield start, min(step, num_rows)


def _explained(
    arithmetic: Arithmetic | PeftNumbers,
    start: int,
    exact: "Float32",
    found: "Float32",
    differing: "NDArray[np.bool_]",
    *,
    dtype: str,
) -> bool:
    """Tell whether the sum, taken in another order, can round to what was found; looks at the rows that differ."""
    import numpy as np

    count = exact.shape[0] if exact.ndim else 1
    rows = np.flatnonzero(differing.reshape(count, -1).any(axis=1))
    few = len(rows) <= count // 8
    for first, number in ((int(row), 1) for row in rows) if few else ((0, count),):
        bound = arithmetic.error_bound(start + first, number)
        if bound is None:
            return False
        center = exact[first : first + number]
        # Numbers of the base that are not finite have no bounds; they are equal, or not to be explained.
        with np.errstate(invalid="ignore"):
            low, high = (values_of(rounded(edge, dtype), dtype) for edge in (center - bound, center + bound))
        part = found[first : first + number]
        equal = ~differing.reshape(exact.shape)[first : first + number]
        if not np.all((low <= part) & (part <= high) | equal):
            return False
    return True


def _is_nan(bits: "Bits", dtype: str) -> "NDArray[np.bool_]":
    import numpy as np

    exponent, sign_free = {
        "F32": (0x7F800000, 0x7FFFFFFF),
        "F16": (0x7C00, 0x7FFF),
        "BF16": (0x7F80, 0x7FFF),
    }[dtype]
    found: NDArray[np.bool_] = (bits & np.array(sign_free, bits.dtype)) > exponent
    return found


def _same_bytes(tensor: OutputTensor, written: Source) -> bool:
    if not isinstance(tensor.operation, Copy):
        return False
    step = BLOCK_ELEMENTS
    source = tensor.operation.source
    return all(
        read_bytes(source, start, min(step, source.nbytes - start))
        == read_bytes(written, start, min(step, source.nbytes - start))
        for start in range(0, source.nbytes, step)
    )
