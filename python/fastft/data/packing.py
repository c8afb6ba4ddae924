"""Several samples in one row: best fit decreasing, so that little of a row is empty.

Takes lengths, gives rows of sample numbers; `prepare` lays the tokens out. Samples are never cut here.
"""

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], max_length: int, seed: int) -> list[list[int]]:
    """Distribute samples over rows of at most `max_length` tokens.

    The longest sample goes first, each into the fullest row that still has room for it (best fit decreasing; Johnson et
    al. 1974: at most 11/9 of the best possible number of rows, and one). Samples of equal length are ordered by the
    seed. The rows that come out are in the order of their first sample; a row's samples are in their own order.

    Args:
        lengths: tokens per sample, each 1 to max_length.
        max_length: tokens per row.
        seed: of the order among equal lengths.

    Returns:
        Sample numbers by row; each sample stands in exactly one row.

    Raises:
        ValueError: a length outside 1 to max_length.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and (sizes.min() < 1 or sizes.max() > max_length):
        raise ValueError(f"pack: lengths must be 1 to {max_length}; got {sizes.min()} to {sizes.max()}")
    shuffled = np.random.default_rng(seed).permutation(sizes.size)
    decreasing = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    with_room: list[list[list[int]]] = [[] for _ in range(max_length + 1)]  # rows by the room left in them
    rooms = 0  # bit r is set while some row has exactly room r: the smallest room that fits is one bit operation away
    rows: list[list[int]] = []
    for sample in decreasing.tolist():
        length = int(sizes[sample])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = max_length, []
            rows.append(row)
        row.append(sample)
        left = room - length
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    return sorted(sorted(row) for row in rows)


def pieces(length: int, max_length: int) -> list[tuple[int, int]]:
    """Start and end of the stretches of at most `max_length` into which a document of `length` tokens is cut."""
    return [(start, min(start + max_length, length)) for start in range(0, length, max_length)]
