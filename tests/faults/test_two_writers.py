"""Two processes at one target: one wins and the other says why it does not; a reader never sees a mixture."""

import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fault_cases import Place, Sources, hashes_of, leftovers
from forks import Forks, Run

BUSY = "another process is writing"


def race(server: Forks, place: Place, num_trials: int, *, paused: bool) -> int:
    """Let two commands write one target at the same time; how often one of them was refused."""
    dice = random.Random(num_trials)
    num_refused = 0
    for trial in range(num_trials):
        pause = {"after_s": dice.uniform(0, 0.25), "pause_s": dice.uniform(0.1, 0.3)} if paused else {}
        first, second = dice.sample([0, 1], 2)
        ended = server.together(
            Run(place.case.words(first, place.target), **pause), Run(place.case.words(second, place.target))
        )
        codes = sorted(done.code for done in ended)
        # Both end well where one was through before the other came to the lock.
        assert codes in ([0, 0], [0, 1]), [done.err for done in ended]
        for done in ended:
            if done.code:
                num_refused += 1
                assert BUSY in done.err
                assert str(place.target) in done.err
        found = hashes_of(place.folder)
        assert found in place.case.whole.values(), f"trial {trial}: {sorted(found)}"
        if codes == [0, 1]:
            winner = first if ended[0].code == 0 else second
            assert found == place.case.whole[winner], f"trial {trial}: the loser's result is there"
        assert leftovers(place.folder) == []
    print(f"{num_trials} races, {num_refused} writers refused")
    return num_refused


@pytest.mark.parametrize("paused", [False, True])
def test_two_writers(server: Forks, medium: Sources, tmp_path: Path, *, paused: bool) -> None:
    place = Place(tmp_path, medium.case("merge, shards over more shards"), server, medium)
    assert race(server, place, 20, paused=paused) > 0


@pytest.mark.slow
@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("name", ["merge, shards over more shards", "merge, shards over one file", "quantize", "split"])
def test_two_writers_many_times(server: Forks, medium: Sources, tmp_path: Path, name: str, *, paused: bool) -> None:
    """1000 trials in all."""
    place = Place(tmp_path, medium.case(name), server, medium)
    assert race(server, place, 125, paused=paused) > 0


def test_two_writers_of_a_file(server: Forks, tiny: Sources, tmp_path: Path) -> None:
    place = Place(tmp_path, tiny.case("copy-cfg"), server, tiny)
    race(server, place, 20, paused=False)


def test_where_files_cannot_be_locked(watched: Forks, tiny: Sources, tmp_path: Path) -> None:
    """Some cluster file systems have no locks: then both may win, one after the other, and never half and half."""
    place = Place(tmp_path, tiny.case("merge, shards over one file"), watched, tiny)
    site = tmp_path / "site"
    site.mkdir()
    (site / "fcntl_without_locks.py").write_text(
        "import errno, fcntl\ndef flock(*_): raise OSError(errno.ENOTSUP, 'no locks')\nfcntl.flock = flock\n"
    )
    with Forks(["fcntl_without_locks"], path=site) as lockless:
        for _ in range(10):
            ended = lockless.together(*(Run(place.case.words(way, place.target)) for way in (0, 1)))
            assert {done.code for done in ended} <= {0, 1}, [done.err for done in ended]
            assert any(done.code == 0 for done in ended)
            assert hashes_of(place.folder) in place.case.whole.values()


def tensors_of(folder: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            found |= {name: np.ascontiguousarray(file.get_tensor(name)).tobytes() for name in file.keys()}  # noqa: SIM118
    return found


def check_readers(server: Forks, medium: Sources, tmp_path: Path, num_replacements: int) -> None:
    """A conversion reads a model that others replace: its result is one of both, or it says that its input changed."""
    place = Place(tmp_path, medium.case("merge, shards over more shards"), server, medium)
    whole = {}
    for way in (0, 1):
        assert server.run(place.case.words(way, place.target)).code == 0
        whole[way] = tensors_of(place.target)
    num_read = num_noticed = 0
    dice = random.Random(num_replacements)
    for number in range(num_replacements):
        reading = ["convert", "split", str(place.target), str(tmp_path / "read"), "--force"]
        writer, reader = server.together(
            Run(place.case.words(number % 2, place.target)),
            Run(reading, after_s=dice.uniform(0, 0.1), pause_s=dice.uniform(0, 0.2)),
        )
        assert writer.code == 0, writer.err
        if reader.code == 0:
            num_read += 1
            assert tensors_of(tmp_path / "read") in whole.values(), f"read {number}: a mixture"
        else:
            num_noticed += 1
            assert any(word in reader.err for word in ("changed while", "missing", "No such file")), reader.err
            assert "Traceback" not in reader.err
        shutil.rmtree(tmp_path / "read", ignore_errors=True)
    print(f"{num_read} read whole, {num_noticed} noticed")
    assert num_read > 0
    assert num_noticed > 0, "no reader met a replacement"


def test_readers_while_a_model_is_replaced(server: Forks, medium: Sources, tmp_path: Path) -> None:
    check_readers(server, medium, tmp_path, 40)


@pytest.mark.slow
def test_many_readers_while_a_model_is_replaced(server: Forks, medium: Sources, tmp_path: Path) -> None:
    check_readers(server, medium, tmp_path, 1000)
