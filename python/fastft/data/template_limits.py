"""Bounds what a chat template may take: it is a program that comes with a model.

The sandbox of jinja2 keeps a template from files and from Python's internals, but not from running for ever or from
making a text of gigabytes. While `limited` holds, time of the CPU and new memory are bounded; what goes beyond is an
error of the template. The bounds are far above what a template needs: one dialogue takes less than a millisecond.
"""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Of the CPU: for a call, and for each dialogue in it.
CALL_S = 0.5
DIALOGUE_S = 0.02
# New memory while a call renders: at all, and for each character of the dialogues.
ROOM_BYTES = 150 * 1024 * 1024
CHARACTER_BYTES = 32
_PAGE_BYTES = resource.getpagesize()


class TemplateLimitError(Exception):
    """A template that takes too long."""


@contextmanager
def limited(num_dialogues: int, num_characters: int) -> Iterator[None]:
    """Bound the body.

    The time is bounded in the main thread only, where Python delivers signals.

    Args:
        num_dialogues: that are rendered in the body.
        num_characters: in all of them.

    Raises:
        TemplateLimitError: too much time.
        MemoryError: too much memory.
    """
    with (
        _memory_limited(ROOM_BYTES + num_characters * CHARACTER_BYTES),
        _time_limited(CALL_S + num_dialogues * DIALOGUE_S),
    ):
        yield


@contextmanager
def _time_limited(limit_s: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: object) -> None:
        raise TemplateLimitError(f"it ran for more than {limit_s:.0f} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _memory_limited(room_bytes: int) -> Iterator[None]:
    """Lower the limit of the address space; where the system does not tell how much is used, there is no bound."""
    status = Path("/proc/self/statm")
    if not status.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(status.read_text(encoding="ascii").split()[0]) * _PAGE_BYTES + room_bytes
    limit = wanted if soft == resource.RLIM_INFINITY else min(soft, wanted)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
