"""What fastft says to the person at the terminal.

Results go to stdout (`result`), so that they can be piped; notes, warnings and progress go to stderr. Colour and
moving bars appear only on a terminal; elsewhere `progress` writes a plain line now and then. No token leaves through here.
"""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from fastft import stop
from fastft.config.mask import masked

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# A job that ends sooner shows no bar (DESIGN section 4).
BAR_AFTER_S = 2.0
# Seconds between two plain progress lines when stderr is no terminal.
PLAIN_LINE_EVERY_S = 10.0
# Columns from which there is room for everything.
WIDE = 110

# Of an error: no path or name that a person wrote is longer; what a hostile file holds can be.
_LONGEST_WORD = 300
_LONGEST_LINE = 900
_ENDLESS = re.compile(rf"\S{{{_LONGEST_WORD},}}")

_consoles: "dict[str, Console]" = {}
# The file that gets a copy of all notes (a run's log.txt), and whether this process keeps quiet (all but the first
# of several training processes).
_copies: list[TextIO] = []
_silent: list[bool] = []


def stderr() -> "Console":
    """The rich console on stderr; rich is imported on first use (it costs 60 ms)."""
    if "stderr" not in _consoles:
        from rich.console import Console

        _consoles["stderr"] = Console(stderr=True, highlight=False, soft_wrap=True)
    return _consoles["stderr"]


def stdout() -> "Console":
    """The rich console on stdout, for results with colour (tables, masked text)."""
    if "stdout" not in _consoles:
        from rich.console import Console

        _consoles["stdout"] = Console(highlight=False, soft_wrap=True)
    return _consoles["stdout"]


def result(text: str) -> None:
    """Print a line that the user asked for, on stdout, as it is but for secrets."""
    print(masked(text))


def note(text: str) -> None:
    """Tell what is being done or chosen, on stderr."""
    _say(printable(text), printable(text))


def show(text: "Text") -> None:
    """Show text with colours (a sample with its mask) on stderr."""
    if not _silent:
        stderr().print(text)
    _copy(printable(text.plain))


def warn(text: str) -> None:
    """Tell that something was ignored, lowered or looks wrong; nothing falls back in silence."""
    _marked("warning:", "yellow", text)


def error(text: str) -> None:
    """Tell why the command failed; printed by `__main__` only.

    A line break in `text` is one: escape it in what comes from outside (`one_line`).
    """
    _marked("error:", "red", "\n".join(map(_bounded, text.split("\n"))))


def one_line(text: str) -> str:
    """`text` as one line that can be read: control characters escaped, what is absurdly long cut in its middle."""
    return _bounded(printable(text).replace("\n", "\\n").replace("\t", "\\t"))


def _bounded(line: str) -> str:
    """Shorten words of more than `_LONGEST_WORD` characters and lines of more than `_LONGEST_LINE`."""
    line = _ENDLESS.sub(lambda word: _cut(word[0], _LONGEST_WORD), line)
    return _cut(line, _LONGEST_LINE)


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]}...({len(text)} characters)...{text[-longest // 4 :]}"


def printable(text: str) -> str:
    """`text` without secrets, with control characters escaped (names in hostile files may hold terminal codes)."""
    text = masked(text)
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def copied_to(path: Path) -> Iterator[None]:
    """Append everything that is said meanwhile to a file too, as plain text."""
    with path.open("a", encoding="utf-8") as file:
        _copies.append(file)
        try:
            yield
        finally:
            _copies.remove(file)


@contextmanager
def silenced() -> Iterator[None]:
    """Say nothing meanwhile, but errors."""
    _silent.append(True)
    try:
        yield
    finally:
        _silent.pop()


class Listener(Protocol):
    """Takes over what would be shown, where a program and no person called us."""

    def progress(self, what: str, done: float, total: float) -> None: ...

    def note(self, text: str) -> None: ...


_listener: "ContextVar[Listener | None]" = ContextVar("listener", default=None)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Hand progress, notes and warnings of this thread to `listener` meanwhile, instead of stderr."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def _marked(mark: str, colour: str, text: str) -> None:
    codes = {"yellow": "\033[33m", "red": "\033[31m"}
    shown = f"{codes[colour]}{mark}\033[0m" if sys.stderr.isatty() else mark
    _say(f"{shown} {printable(text)}", f"{mark} {printable(text)}", even_if_silent=colour == "red")


def _say(shown: str, plain: str, *, even_if_silent: bool = False) -> None:
    if (listener := _listener.get()) is not None:
        listener.note(plain)
    elif not _silent or even_if_silent:
        print(shown, file=sys.stderr, flush=True)
    _copy(plain)


def _copy(plain: str) -> None:
    for file in _copies:
        file.write(plain + "\n")
        file.flush()


class Advance(Protocol):
    """Called with the amount done so far, absolute, in the unit of the bar."""

    def __call__(self, done: float, text: str = "") -> None: ...


@contextmanager
def progress(what: str, total: float, unit: str = "", start: float = 0) -> Iterator[Advance]:
    """A bar on stderr that appears after `BAR_AFTER_S`; plain lines when stderr is no terminal.

    Args:
        what: the work, in a few words ("merging").
        total: amount of work, in `unit`.
        unit: "B" shows bytes with a rate; anything else is printed as it is.
        start: amount done before, by a run that is resumed; the time left is counted from there.

    Yields:
        `advance(done, text)`: sets the amount done; `text` is shown at the end of the line (loss, tokens/s).
    """
    if (listener := _listener.get()) is not None:
        heard = listener
        yield lambda done, text="": heard.progress(what, done, total)  # noqa: ARG005  a listener takes no text
        return
    started = time.monotonic()
    if not sys.stderr.isatty():
        yield _plain_lines(what, total, unit, started, start)
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    # What is said behind the bar matters more than the bar where there is little room.
    narrow = stderr().width < WIDE and unit != "B"
    units = (TextColumn(unit),) if unit and not narrow else ()
    amounts = (DownloadColumn(), TransferSpeedColumn()) if unit == "B" else (MofNCompleteColumn(), *units)
    bar = Progress(
        *(() if narrow else (TextColumn("{task.description}"),)),
        BarColumn(bar_width=8 if narrow else 24),
        *amounts,
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        TextColumn("{task.fields[text]}"),
        console=stderr(),
        transient=True,
    )
    task = bar.add_task(what, total=total, completed=int(start), text="")
    shown = False

    def advance(done: float, text: str = "") -> None:
        nonlocal shown
        if not shown and time.monotonic() - started > BAR_AFTER_S:
            bar.start()
            shown = True
        bar.update(task, completed=done, text=text)

    def give_back_cursor() -> None:
        if shown:
            os.write(2, b"\r\033[K\033[?25h")

    with stop.last_act(give_back_cursor):
        try:
            yield advance
        finally:
            if shown:
                bar.stop()


def _plain_lines(what: str, total: float, unit: str, started: float, start: float) -> Advance:
    last = started

    def advance(done: float, text: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_LINE_EVERY_S:
            return
        last = now
        elapsed_s = now - started
        if unit == "B":
            amount = f"{done / 1e6:.0f}/{total / 1e6:.0f} MB, {done / elapsed_s / 1e6:.0f} MB/s"
        else:
            amount = f"{done:.0f}/{total:.0f} {unit}".strip()
        left = f", {(total - done) * elapsed_s / (done - start):.0f} s left" if done > start else ""
        note(f"{what}: {amount}{left} ({elapsed_s:.0f} s so far) {text}".rstrip())

    return advance
