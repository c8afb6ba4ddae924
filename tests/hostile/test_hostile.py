"""Every hostile input ends in one clear line, in bounded time and memory, with nothing run, changed or left behind.

Each case runs the command line in a fork of one warmed process (`forked.py`) and is judged by `judge.py`. `make test` takes a
fifth of the corpus, spread over all commands and kinds; the rest is slow. Seconds here are generous: the bound of 2 s is
measured by `run.py --table` on a quiet machine.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostile.case import Case
from hostile.corpus import all_cases
from hostile.forked import Commands, Ended
from hostile.judge import Verdict, judge
from hostile.run import described
from hostile.stock import write_stock

SECONDS = 10.0
# A good input is worked on; it is here to show that the corpus does not pass by refusing everything.
SECONDS_OF_CONTROLS = 60.0
SHARE = 5
CASES = all_cases()
COMMANDS = (
    "chat", "check-dataset", "config import", "config show", "convert dequantize", "convert merge", "convert pth_to_hf",
    "convert quantize", "convert split", "convert verify", "plan", "train",
)  # fmt: skip
# Through the real command line, a process of its own each; none needs torch, so that memory is that of the refusal.
REAL = (
    "yaml_alias_bomb", "yaml_device", "yaml_key_with_escape_codes", "python_power", "python_import_system", "target_root",
    "base_length_huge", "split_pickle", "state_deep", "scales_nan",
)  # fmt: skip


def quick() -> set[str]:
    """The names of every fifth case of each command and kind (the first word of a name), at least one of each."""
    groups = defaultdict(list)
    for name, case in CASES.items():
        groups[described(case)["command"], name.split("_")[0]].append(name)
    return {name for names in groups.values() for name in names[len(names) // 2 % SHARE :: SHARE] or names[:1]}


QUICK = quick()


@pytest.fixture(scope="module")
def stock() -> Iterator[tuple[Path, Commands]]:
    """What cases copy from, and the warmed process."""
    with tempfile.TemporaryDirectory(prefix="fastft-hostile-") as folder:
        commands = Commands(limit_s=SECONDS_OF_CONTROLS)
        write_stock(Path(folder) / "stock", commands)
        yield Path(folder) / "stock", commands
        commands.close()


@pytest.fixture
def root() -> Iterator[Path]:
    """An empty folder that goes at once: a case may hold gigabytes of holes."""
    with tempfile.TemporaryDirectory(prefix="fastft-hostile-") as folder:
        yield Path(folder)


def survived(verdict: Verdict) -> None:
    assert not verdict.faults, "\n".join(verdict.faults)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in CASES.items()],
)
def test_a_case(case: Case, root: Path, stock: tuple[Path, Commands]) -> None:
    seconds = SECONDS if case.code else SECONDS_OF_CONTROLS
    survived(judge(case, root, *stock, seconds))


def test_the_corpus_is_spread() -> None:
    assert len(CASES) >= 1300
    assert len(QUICK) >= 260
    everywhere = Counter(described(case)["command"] for case in CASES.values())
    here = Counter(described(CASES[name])["command"] for name in QUICK)
    assert set(COMMANDS) <= set(here) == set(everywhere)
    assert min(everywhere[command] for command in COMMANDS) >= 8
    assert sum(case.code == 0 for case in CASES.values()) >= 30
    assert sum(CASES[name].code == 0 for name in QUICK) >= 8
    assert len(set(REAL) & set(CASES)) == len(REAL)


class RealCommands:
    """As `Commands`, but each command is a process as a user starts it."""

    def __init__(self) -> None:
        self._start_mb = 0.0
        self._start_mb = self.run(["version"], Path.cwd()).grown_mb

    def run(self, words: list[str], folder: Path, stdin: str = "") -> Ended:
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(stdin.encode())
            given.seek(0)
            started = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-m", "fastft", *words], cwd=folder, stdin=given, stdout=out, stderr=err
            )
            hangs = threading.Timer(SECONDS_OF_CONTROLS, process.kill)
            hangs.start()
            _, status, used = os.wait4(process.pid, 0)
            hangs.cancel()
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.monotonic() - started
            for stream in (out, err):
                stream.seek(0)
            texts = [stream.read().decode("utf-8", "replace") for stream in (out, err)]
        grown_mb = used.ru_maxrss * 1024 / 1e6 - self._start_mb
        return Ended(process.returncode, *texts, seconds, used.ru_utime + used.ru_stime, grown_mb)


@pytest.fixture(scope="module")
def real() -> Any:
    return RealCommands()


@pytest.mark.parametrize("name", REAL)
def test_the_real_command_line(name: str, root: Path, real: Any) -> None:
    survived(judge(CASES[name], root, Path("/nowhere"), real, 3 * SECONDS))


def test_the_judge_can_fail(root: Path) -> None:
    """A command that does what no refusal may do is told so, each thing by name."""

    class Bad:
        def run(self, words: list[str], folder: Path, stdin: str = "") -> Ended:  # noqa: ARG002
            (folder / "base").write_text("changed")
            error = "Traceback (most recent call last)\nerror: \x1b[31mno\nmore"
            return Ended(2, "", error, 3.0, 3.0, 400.0)

    case = Case("x", lambda place: place.write("base", "x"), ("train",), ("the key",))
    found = "\n".join(judge(case, root, root, Bad(), 2.0).faults)  # type: ignore[arg-type]
    for fault in (
        "exit code 2 instead of 1", "shows 'Traceback", "took 3.0 s", "took 400 MB", "says more than one line",
        "prints control characters", "does not name 'the key'", "changed: base",
    ):  # fmt: skip
        assert fault in found
