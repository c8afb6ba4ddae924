"""The mean of an array as torch computes it on a CPU, bit for bit, without torch.

Double quantization holds scales around their mean, and bitsandbytes takes torch's, a sum in f32 whose last bit depends on
its order. To import torch for it would cost 2 s and half a gigabyte. The order: chunks for the threads; in each chunk 8
lanes of 4 partial sums each, which add up in a tree of four levels.

Source: torch 2.11 and 2.15, ATen/native/cpu/SumKernel.cpp and TensorIteratorReduce.cpp (the order only; held against
torch for many lengths and numbers of threads by tests/unit/test_convert_mean.py).
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]

_LANES = 8
_SUMS_OF_A_LANE = 4
_LEVELS = 4
_LEAST_OF_A_STEP = 16
# Fewer numbers are one thread's work.
_GRAIN = 32768


def mean(numbers: "Float32", num_threads: int | None = None) -> float:
    """Give the mean of a flat f32 array as torch would.

    Args:
        numbers: f32, at least one.
        num_threads: those of torch; None: as many as it would start here (`torch_threads`).
    """
    import numpy as np

    return float(np.float32(_total(numbers, num_threads or torch_threads()) / np.float32(len(numbers))))


def torch_threads() -> int:
    """How many threads torch uses, or would: OMP_NUM_THREADS, else one for each core that this process may run on."""
    if "torch" in sys.modules:
        return int(sys.modules["torch"].get_num_threads())
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if said.isdecimal() and int(said) > 0:
        return int(said)
    return max(1, len({_core(number) for number in os.sched_getaffinity(0)}))


def _core(number: int) -> str:
    """Name the core that a logical processor belongs to; its own name where that is not known."""
    siblings = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
    try:
        return siblings.read_text(encoding="ascii").strip()
    except OSError:
        return str(number)


def _total(numbers: "Float32", num_threads: int) -> "np.float32":
    """Sum as all threads together do."""
    import numpy as np

    if len(numbers) < _GRAIN or num_threads == 1:
        return _of_one_thread(numbers)
    chunk = -(-len(numbers) // min(num_threads, -(-len(numbers) // _GRAIN)))
    parts = [_of_one_thread(numbers[start : start + chunk]) for start in range(0, len(numbers), chunk)]
    return _of_one_thread(np.array(parts + [0.0] * (num_threads - len(parts)), np.float32))


def _of_one_thread(numbers: "Float32") -> "np.float32":
    import numpy as np

    lanes = _LANES if len(numbers) >= _LANES else 1
    whole = len(numbers) // lanes * lanes
    sums = _of_lanes(numbers[:whole].reshape(-1, lanes))
    total = np.float32(0)
    for number in (*numbers[whole:], *sums) if lanes > 1 else sums:
        total = np.float32(total + number)
    return total


def _of_lanes(rows: "Float32") -> "Float32":
    """Sum each column: four partial sums, their rest in the first, then all of them."""
    whole = len(rows) // _SUMS_OF_A_LANE * _SUMS_OF_A_LANE
    sums = _cascade(rows[:whole].reshape(-1, _SUMS_OF_A_LANE, rows.shape[1]))
    first = _in_order([sums[0], *rows[whole:]])
    return _in_order([first, *sums[1:]])


def _cascade(rows: "Float32") -> "Float32":
    """Sum over the first dimension: groups of a power of two in order, groups of these, and so on, four levels."""
    import numpy as np

    step = max(_LEAST_OF_A_STEP, 1 << (max(len(rows) - 1, 0).bit_length() // _LEVELS))
    left_over = []
    for _ in range(_LEVELS - 1):
        groups = len(rows) // step
        left_over.append(_in_order(rows[groups * step :], rows.shape[1:]))
        rows = _in_order(np.moveaxis(rows[: groups * step].reshape(groups, step, *rows.shape[1:]), 1, 0), rows.shape)
    return _in_order([*left_over, _in_order(rows, rows.shape[1:])])


def _in_order(parts: "list[Float32] | Float32", shape: tuple[int, ...] = ()) -> "Float32":
    """Add one after the other; zeros of `shape` where there are none."""
    import numpy as np

    if len(parts) == 0:
        return np.zeros(shape, np.float32)
    total = np.array(parts[0], np.float32)
    for part in parts[1:]:
        total += part
    return total
