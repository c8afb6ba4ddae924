"""kill -9 at random moments and at every single write call: the old result or the new one, whole, and no leftovers.

Results are deterministic, so "whole" means every byte of every file.
"""

import random
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fault_cases import CASES, FOLDERS, Place, Sources, staging
from forks import Forks


def kill_at_random(server: Forks, place: Place, num_kills: int) -> None:
    """Kill runs that replace each result by the other; most while they write, some at any time of their lives."""
    started = time.monotonic()
    place.finish(server)
    place.standing = 0
    total_s = time.monotonic() - started
    dice = random.Random(num_kills)
    num_killed = num_staged = 0
    for number in range(num_kills):
        where = {} if number % 4 == 0 else {"watch": str(place.folder), "begun": "partial-"}
        # A small result is written in a moment: most of the kills come soon after the writing began.
        after_s = total_s * (dice.random() if number % 4 == 0 else dice.random() ** 4 / 2)
        done = server.run(place.words(), after_s=after_s, **where)
        assert done.code in (0, -signal.SIGKILL), done.err
        num_killed += done.code != 0
        num_staged += staging(place.folder) != []
        place.look(f"kill {number} of {num_kills}")
    print(f"{num_kills} kills: {num_killed} before the end, {num_staged} left a staging folder")
    # Fewer, and the test would say little about the writing.
    assert num_killed >= num_kills // 3, f"only {num_killed} of {num_kills} runs were killed"
    assert num_staged >= num_kills // 10, f"only {num_staged} of {num_kills} kills left a staging folder"
    place.finish(server)


@pytest.mark.parametrize("name", FOLDERS)
def test_kill_9(server: Forks, medium: Sources, tmp_path: Path, name: str) -> None:
    kill_at_random(server, Place(tmp_path, medium.case(name), server, medium), num_kills=20)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_kill_9_many_times(server: Forks, medium: Sources, tmp_path: Path, name: str) -> None:
    """1000 kills in all."""
    kill_at_random(server, Place(tmp_path, medium.case(name), server, medium), num_kills=125)


def kill_at_each_call(server: Forks, place: Place, stride: int = 1) -> int:
    """Kill at call 1, 1 + stride, ... until a run ends before it comes so far; the number of calls."""
    call = 1
    while True:
        place.put_back()
        done = server.run(place.words(), watch=str(place.folder), kill_at=call, one_cpu=True)
        assert done.code in (0, -signal.SIGKILL), done.err
        is_new = place.look(f"killed at call {call}: {done.calls[-1:]}")
        if done.code == 0:
            assert is_new
            break
        call += stride
    place.put_back()
    place.finish(server)
    print(f"killed at {(call - 1) // stride} calls")
    return call


@pytest.mark.parametrize("name", ["merge, shards over more shards", "copy-cfg"])
def test_killed_at_every_write_call(watched: Forks, tiny: Sources, tmp_path: Path, name: str) -> None:
    place = Place(tmp_path, tiny.case(name), watched, tiny)
    assert kill_at_each_call(watched, place) > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_at_every_write_call_of_every_command(watched: Forks, tiny: Sources, tmp_path: Path, name: str) -> None:
    place = Place(tmp_path, tiny.case(name), watched, tiny)
    assert kill_at_each_call(watched, place) > 5


def test_killed_while_it_removes_what_a_killed_run_left(watched: Forks, tiny: Sources, tmp_path: Path) -> None:
    place = Place(tmp_path, tiny.case("merge, shards over one file"), watched, tiny)
    killed = watched.run(place.words(), watch=str(place.folder), kill_at=12, one_cpu=True)
    assert killed.code == -signal.SIGKILL
    assert len(staging(place.folder)) == 1
    for call in range(2, 8):
        watched.run(place.words(), watch=str(place.folder), kill_at=call, one_cpu=True)
        place.look(f"killed at call {call}")
    place.finish(watched)


@pytest.mark.parametrize("name", ["merge, shards over one file"])
def test_killed_where_folders_cannot_be_exchanged(watched: Forks, tiny: Sources, tmp_path: Path, name: str) -> None:
    """Two renames instead of one: between them the target may be absent, and the next run puts the old one back."""
    place = Place(tmp_path, tiny.case(name), watched, tiny)
    whole = watched.run(place.words(), watch=str(place.folder), one_cpu=True)
    exchange = next(number for number, call in enumerate(whole.calls, 1) if call.name.startswith("renameat"))
    for later in range(1, 6):
        place.put_back()
        words = {"watch": str(place.folder), "one_cpu": True, "fail_at": exchange, "error": 22}
        watched.run(place.words(), kill_at=exchange + later, **words)
        if place.target.exists():
            place.look(f"killed {later} calls after the exchange")
        else:
            assert (place.folder / ".result.old").is_dir()
        place.finish(watched)
