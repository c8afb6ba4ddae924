"""What a plan will need: disk, memory and time, for `--dry-run`.

Disk is exact. Memory is what the stream holds at once, by its own rules (rust/convert/src/stream.rs), and Python. Time is
that of moving the bytes once in and once out at the rate at which a piece of the base can be read now: a cold disk that
writes slower than it reads takes longer.
"""

import os
import time
from dataclasses import dataclass

from fastft.convert.peft_layers import scratch_bytes
from fastft.convert.plan import Dora, Merge, Operation, Quantize
from fastft.convert.rewrite import RewritePlan
from fastft.convert.size import readable
from fastft.convert.source import Source

# Python with numpy, measured as the peak of a merge of a model of no size.
_PYTHON_BYTES = 42 * 1024 * 1024
_TILE_BYTES = 1024 * 1024
_BUFFERS_OF_A_WORKER = 3
_PROBE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a plan needs.

    Attributes:
        disk_bytes: written, with what is removed again.
        memory_bytes: peak, about.
        duration_s: about; None where the base is too small to tell.
        read_bytes_per_s: at which a piece of the base was read now.
    """

    disk_bytes: int
    memory_bytes: int
    duration_s: float | None
    read_bytes_per_s: float | None

    def line(self) -> str:
        """Say it in one line."""
        text = f"needs {readable(self.disk_bytes)} of disk, about {readable(self.memory_bytes)} of memory"
        if self.duration_s is None or self.read_bytes_per_s is None:
            return text
        return f"{text}, about {self.duration_s:.0f} s\n      (the base was read at {readable(self.read_bytes_per_s)}/s just now)"


def estimate(plan: RewritePlan) -> Estimate:
    """Work out what a plan needs; reads up to 64 MiB of the base.

    Raises:
        FileError: the base cannot be read.
    """
    workers = len(os.sched_getaffinity(0))
    held = sorted((_held_bytes(tensor.operation) for tensor in plan.tensors), reverse=True)
    memory_bytes = _PYTHON_BYTES + workers * _BUFFERS_OF_A_WORKER * _TILE_BYTES + sum(held[:workers])
    rate = _read_rate(max(plan.base.tensors.values(), key=lambda source: source.nbytes))
    moved = plan.base.num_bytes + plan.num_bytes
    return Estimate(
        plan.num_bytes + scratch_bytes(plan.tensors), memory_bytes, None if rate is None else moved / rate, rate
    )


def _held_bytes(operation: Operation) -> int:
    """What stays in memory while tiles of a tensor are worked on: factors in f32 (as read, and in panels), and scales."""
    match operation:
        case Merge(_, deltas) | Dora(_, deltas):
            return sum(8 * (delta.a.numel + delta.b.numel) for delta in deltas)
        case Quantize(of, _, shape, four_bit):
            count = 1
            for size in shape:
                count *= size
            return 4 * count // four_bit.blocksize + _held_bytes(of)
        case _:
            return 0


def _read_rate(source: Source) -> float | None:
    """Read a piece from the middle of a tensor; None where it is too small to tell."""
    if source.nbytes < _PROBE_BYTES or source.lens is not None:
        return None
    started = time.monotonic()
    with source.file.open("rb", buffering=0) as file:
        file.seek(source.offset + (source.nbytes - _PROBE_BYTES) // 2)
        num_read = len(file.read(_PROBE_BYTES))
    return num_read / max(time.monotonic() - started, 1e-6)
