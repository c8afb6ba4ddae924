"""Ctrl-C and SIGTERM: where nothing is to be put away, the process ends at once, wherever it is.

An exception, Python's own way, is not enough: libraries swallow it while they are imported, threads of a download are
waited for, and torch needs a second or more to shut down. So it is raised only where something holds the process
(`held`): a staging folder that must be removed, an answer of a chat. And where an exception between two lines would
leave something behind, it waits until it can be raised (`deferred`); a second signal does not wait.

All this is about the process of a command line, which listens. In a library's process nothing here has an effect.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn


class _State:
    """What a signal meets in this process.

    Attributes:
        holders: bodies of `held` that are run now.
        deferrals: bodies of `deferred` that are run now, since the innermost `allowed`.
        waiting: the signal that came in one of them.
        last_acts: what is done before the process ends at once.
    """

    def __init__(self) -> None:
        self.holders = 0
        self.deferrals = 0
        self.waiting: int | None = None
        self.last_acts: list[Callable[[], object]] = []


_state = _State()


def listen() -> None:
    """Take both signals for this process; of the command line only, a library leaves them to its program."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stopped)


@contextmanager
def held() -> Iterator[None]:
    """A stop is raised in the body, as KeyboardInterrupt or SystemExit(143), so that it can put away what it has."""
    _state.holders += 1
    try:
        yield
    finally:
        _state.holders -= 1


@contextmanager
def deferred() -> Iterator[None]:
    """A stop waits until the body has ended; then it is raised, or ends the process if nothing holds it."""
    _state.deferrals += 1
    try:
        yield
    finally:
        _state.deferrals -= 1
        _fire()


@contextmanager
def allowed() -> Iterator[None]:
    """Within `deferred`: a stop is raised in this body at once."""
    before = _state.deferrals
    _state.holders += 1
    try:
        _state.deferrals = 0
        _fire()
        yield
    finally:
        _state.deferrals = before
        _state.holders -= 1


@contextmanager
def at_once() -> Iterator[None]:
    """A stop ends the process in the body, after the last acts, although something outside holds it.

    For work in a library's threads, which an exception would have to wait for: a download. What holds the process
    outside must have nothing to put away but its last acts.
    """
    before, _state.holders = _state.holders, 0
    try:
        yield
    finally:
        _state.holders = before


@contextmanager
def last_act(act: Callable[[], object]) -> Iterator[None]:
    """Have a stop that ends the process within the body do something small first."""
    _state.last_acts.append(act)
    try:
        yield
    finally:
        _state.last_acts.remove(act)


def leave(code: int) -> NoReturn:
    """End the process now, with what was said written out, but without the libraries' own ends."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _fire() -> None:
    if _state.deferrals == 0 and _state.waiting is not None:
        number, _state.waiting = _state.waiting, None
        _stopped(number, None)


def _stopped(number: int, _frame: object) -> None:
    if _state.deferrals and _state.waiting is None:
        _state.waiting = number
        return
    if _state.holders and number == signal.SIGINT:
        raise KeyboardInterrupt  # `main` says it
    if not _state.holders:
        for act in reversed(_state.last_acts):
            with suppress(OSError):
                act()
    with suppress(OSError):
        os.write(2, b"stopped\n")  # not by print, which may have been interrupted itself
    if _state.holders:
        raise SystemExit(128 + number)
    os._exit(128 + number)
