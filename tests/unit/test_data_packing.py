"""fastft.data.packing: every sample once, no row too long, few rows, the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.data.packing import pack, pieces

LENGTHS = st.lists(st.integers(1, 64), max_size=60)


@given(LENGTHS, st.integers(0, 5))
def test_each_sample_is_in_one_row_and_rows_are_not_too_long(lengths: list[int], seed: int) -> None:
    rows = pack(lengths, 64, seed)
    assert sorted(sample for row in rows for sample in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[sample] for sample in row) <= 64 for row in rows)
    assert rows == pack(lengths, 64, seed)


@given(LENGTHS)
def test_as_few_rows_as_the_bound_says(lengths: list[int]) -> None:
    """Best fit decreasing needs at most 11/9 of the best, and one; the best is at least the tokens over the room.

    And a row is opened only when nothing fits: no two rows could be joined.
    """
    rows = pack(lengths, 64, 0)
    fills = sorted(sum(lengths[sample] for sample in row) for row in rows)
    assert len(fills) < 2 or fills[0] + fills[1] > 64
    large = sum(length > 32 for length in lengths)
    best_at_least = max(-(-sum(lengths) // 64), large)
    assert len(rows) <= 2 * best_at_least + 1


def test_the_fullest_row_with_room_is_chosen() -> None:
    # 7 and 6 open rows with room 3 and 4; 3 fits both.
    assert pack([3, 6, 7], 10, 0) == [[0, 2], [1]]


def test_the_seed_changes_what_stands_together() -> None:
    lengths = [8] * 40
    assert pack(lengths, 16, 1) != pack(lengths, 16, 2)


def test_real_lengths_fill_rows() -> None:
    lengths = np.random.default_rng(0).gamma(2.0, 80.0, 5000).astype(int).clip(8, 2048)
    rows = pack(lengths.tolist(), 2048, 0)
    assert lengths.sum() / (len(rows) * 2048) > 0.99


@pytest.mark.parametrize("lengths", [[0], [11], [5, -1]])
def test_impossible_lengths_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths must be 1 to 10"):
        pack(lengths, 10, 0)


def test_no_samples_no_rows() -> None:
    assert pack([], 10, 0) == []


@pytest.mark.parametrize(("length", "expected"), [(0, []), (4, [(0, 4)]), (5, [(0, 4), (4, 5)]), (8, [(0, 4), (4, 8)])])
def test_pieces(length: int, expected: list[tuple[int, int]]) -> None:
    assert pieces(length, 4) == expected
