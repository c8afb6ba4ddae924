"""Are the 4-bit codes of a tensor those of the planned numbers? For `verify`, which compares plain numbers itself.

The numbers are computed again and quantized in numpy. A sum in another order may have moved a number by one place, and
with it a code or the scale of a block: a code that differs is explained where a number within the bound of such errors,
divided by a scale within its own, has it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastft.convert.arithmetic import BLOCK_ELEMENTS, Arithmetic
from fastft.convert.four_bit import code_book, codes_of, codes_of_scales
from fastft.convert.numbers import as_float32, rounded, values_of
from fastft.convert.peft_layers import PeftNumbers
from fastft.convert.source import Packed, Source, read_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]
    UInt8 = NDArray[np.uint8]

# What a division and a product may be off, each in the last place.
_SLACK = 2.0**-22


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found.

    Attributes:
        num_off: codes that differ.
        explained: the order of a sum can be the reason for all of them.
        as_base: all codes are those of the base.
    """

    num_off: int
    explained: bool
    as_base: bool


def compare(arithmetic: Arithmetic | PeftNumbers, view: Source, num_rows: int | None) -> Comparison:
    """Compare the codes in a file with those of the numbers.

    Args:
        arithmetic: gives the numbers, by rows.
        view: the file's tensor as numbers, through a `Packed` lens.
        num_rows: look at that many rows at the start, in the middle and at the end only; None: at all of them.
    """
    import numpy as np

    lens = view.lens
    assert isinstance(lens, Packed)
    num_off, explained, as_base = 0, True, True
    all_scales: list[Float32] = []
    for start, count in _spans(view, lens, num_rows):
        exact = arithmetic.rows(start, count)
        first, numbers = _blocks(exact, view, lens, start)
        codes, scales = codes_of(_rounded(numbers, view.dtype), lens.quant_type, lens.blocksize)
        all_scales.append(scales)
        stored = _codes(view, first, len(numbers))
        differing = _halves(codes, len(numbers)) != _halves(stored, len(numbers))
        off = int(differing.sum())
        if lens.nested is None:
            off += int((_scales(lens, first, len(scales)) != scales).sum())
        num_off += off
        if off:
            bound = arithmetic.error_bound(start, count)
            bounds = None if bound is None else _blocks(bound, view, lens, start)[1]
            explained = explained and bounds is not None and _explained(numbers, bounds, stored, view, first)
        base = arithmetic.base_rows(start, count)
        if base is None:
            as_base = False
        elif as_base:
            base_codes, _ = codes_of(
                _rounded(_blocks(base, view, lens, start)[1], view.dtype), lens.quant_type, lens.blocksize
            )
            as_base = bool(np.array_equal(base_codes, stored))
    if lens.nested is not None and num_rows is None and num_off == 0:
        num_off += _nested_off(np.concatenate(all_scales), lens)
        explained = num_off == 0
    return Comparison(num_off, explained, as_base)


def _spans(view: Source, lens: Packed, num_rows: int | None) -> Iterator[tuple[int, int]]:
    """Give rows to look at, (first, count); all together where blocks do not end with rows."""
    rows, columns = view.shape[0], view.numel // view.shape[0]
    if lens.transposed or columns % lens.blocksize:
        yield 0, rows
    elif num_rows is None or rows <= 3 * num_rows:
        step = max(1, BLOCK_ELEMENTS // columns)
        yield from ((start, min(step, rows - start)) for start in range(0, rows, step))
    else:
        yield from ((start, num_rows) for start in (0, (rows - num_rows) // 2, rows - num_rows))


def _blocks(rows: "Float32", view: Source, lens: Packed, start: int) -> "tuple[int, Float32]":
    """Put rows in the order of the blocks; gives the index of the first number, and the numbers."""
    if lens.transposed:
        return 0, rows.reshape(view.shape).T.reshape(-1)
    return start * (view.numel // view.shape[0]), rows.reshape(-1)


def _rounded(numbers: "Float32", dtype: str) -> "Float32":
    import numpy as np

    return values_of(rounded(np.ascontiguousarray(numbers), dtype), dtype)


def _codes(view: Source, first: int, count: int) -> "UInt8":
    import numpy as np

    codes = Source(view.file, view.offset, "U8", (-(-view.numel // 2),))
    return np.frombuffer(read_bytes(codes, first // 2, -(-count // 2)), np.uint8)


def _halves(codes: "UInt8", count: int) -> "UInt8":
    import numpy as np

    return np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:count]


def _scales(lens: Packed, first: int, count: int) -> "Float32":
    content = read_bytes(lens.absmax, first // lens.blocksize * 4, count * 4)
    return as_float32(content, Source(lens.absmax.file, 0, "F32", (count,)))


def _nested_off(scales: "Float32", lens: Packed) -> int:
    """Count the scales, and the scales of their codes, that are not those of the numbers."""
    import numpy as np

    assert lens.nested is not None
    codes, nested = codes_of_scales(scales, lens.nested.offset)
    stored_codes = np.frombuffer(read_bytes(lens.absmax), np.uint8)
    stored = as_float32(read_bytes(lens.nested.absmax), lens.nested.absmax)
    return int((codes != stored_codes).sum()) + int((nested != stored).sum())


def _explained(numbers: "Float32", bounds: "Float32", stored: "UInt8", view: Source, first: int) -> bool:
    """Tell whether some number within its bound has each stored code, with a scale within its own."""
    import numpy as np

    lens = view.lens
    assert isinstance(lens, Packed)
    low, high = (_rounded(edge, view.dtype) for edge in (numbers - bounds, numbers + bounds))
    largest, least = (
        np.maximum(np.abs(low), np.abs(high)),
        np.where(low * high > 0, np.minimum(np.abs(low), np.abs(high)), 0),
    )
    edges = range(0, len(numbers), lens.blocksize)
    least_scale, largest_scale = (np.maximum.reduceat(values, edges) for values in (least, largest))
    if lens.nested is None:
        scales = _scales(lens, first, len(least_scale))
        if not np.all((least_scale <= scales) & (scales <= largest_scale)):
            return False
        least_scale = largest_scale = scales
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = [
            edge / np.repeat(scale, lens.blocksize)[: len(numbers)].astype(np.float64)
            for edge in (low, high)
            for scale in (least_scale, largest_scale)
        ]
    lowest, highest = np.minimum.reduce(ends) - _SLACK, np.maximum.reduce(ends) + _SLACK
    order = np.argsort(code_book(lens.quant_type), kind="stable")
    values = code_book(lens.quant_type)[order].astype(np.float64)
    thresholds = np.concatenate([[-np.inf], (values[:-1] + values[1:]) / 2, [np.inf]])
    places = np.empty(16, np.int64)
    places[order] = np.arange(16)
    place = places[_halves(stored, len(numbers))]
    return bool(np.all((thresholds[place] <= highest) & (lowest <= thresholds[place + 1])))
