"""Lays a case out, runs it, and says what is wrong with how it ended."""

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from hostile.case import Case
from hostile.forked import Commands, Ended
from hostile.place import PAYLOAD, Place

# What a refusal may take (issue: 300 MB above start-up). Seconds are the caller's: a loaded machine is slow.
MAX_GROWN_MB = 300
MAX_LINE = 1000
# Longer files are compared by size and time.
_MAX_HASHED = 1 << 24
_BUGS = ("Traceback (most recent call last)", "this is a bug in fastft", "panicked at", "RUST_BACKTRACE")


@dataclass(frozen=True)
class Verdict:
    """How a case went.

    Attributes:
        ended: the command.
        faults: what is wrong; empty: the case is survived.
    """

    ended: Ended
    faults: tuple[str, ...]


def judge(case: Case, root: Path, stock: Path, commands: Commands, max_seconds: float) -> Verdict:
    """Run a case in `root`, an empty folder."""
    case.make(Place(root, stock))
    before = _contents(root)
    ended = commands.run(list(case.words), root, case.stdin)
    after = _contents(root)
    faults = [*_how_it_ended(case, ended, max_seconds), *_what_changed(case, before, after)]
    return Verdict(ended, tuple(faults))


def _how_it_ended(case: Case, ended: Ended, max_seconds: float) -> list[str]:
    faults = []
    if ended.code is None:
        return [f"it hangs; stderr: {ended.err[-500:]}"]
    if ended.code != case.code:
        faults.append(f"exit code {ended.code} instead of {case.code}")
    faults += [f"shows {bug!r}" for bug in _BUGS if bug in ended.err or bug in ended.out]
    if ended.seconds > max_seconds:
        faults.append(f"took {ended.seconds:.1f} s")
    if case.code and ended.grown_mb > MAX_GROWN_MB:
        faults.append(f"took {ended.grown_mb:.0f} MB")
    faults += _what_it_said(case, ended)
    return faults


def _what_it_said(case: Case, ended: Ended) -> list[str]:
    """The error must be one line, readable, and name what the case says."""
    if case.is_result or not case.code:
        said = ended.out + ended.err
        return [f"does not name {word!r}; it says: {said[-600:]}" for word in case.says if word not in said]
    lines = ended.err.rstrip("\n").split("\n")
    starts = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    if len(starts) != 1:
        return [f"{len(starts)} lines start with `error: `; stderr: {ended.err[-500:]}"]
    message = "\n".join(lines[starts[0] :])
    faults = []
    if len(lines) > starts[0] + 1 and not case.many_lines:
        faults.append("says more than one line")
    if len(message) > MAX_LINE:
        faults.append(f"a line of {len(message)} characters")
    if not all(character.isprintable() or character == "\n" for character in ended.err.replace("\t", "")):
        faults.append("prints control characters")
    faults += [f"does not name {word!r}" for word in case.says if word not in message]
    if faults:
        faults.append(f"it says: {message[:600]}")
    return faults


def _what_changed(case: Case, before: dict[str, str], after: dict[str, str]) -> list[str]:
    if PAYLOAD in after:
        return ["hostile code ran"]
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    touched = sorted(name for name in names if not name.startswith(case.outputs))
    faults = [f"changed: {', '.join(touched[:5])}"] if touched else []
    if case.code == 0:
        faults += [f"did not make {name}" for name in case.outputs if not any(n.startswith(name) for n in after)]
    return faults


def _contents(root: Path) -> dict[str, str]:
    """What is in a folder: each name with its kind and a hash."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder) / name
            found[str(path.relative_to(root))] = _looked_at(path)
    return found


def _looked_at(path: Path) -> str:
    status = path.lstat()
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFLNK:
        return f"link to {path.readlink()}"
    if kind != stat.S_IFREG:
        return f"kind {kind:o}"
    if status.st_size > _MAX_HASHED:
        return f"{status.st_size} bytes of {status.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()
