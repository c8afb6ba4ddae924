"""The power goes: an ext4 file system in a file is shut down without its journal, mounted anew, and looked at.

Exit 0 means that the new result is there and right; before that the old one is, or none where none was. Needs root and
loop devices; where they are not there, `test_flushed` looks at the order of the system calls instead.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import forks
from fault_cases import Case, Hashes, Sources, hashes_of, staging
from forks import Forks


class Disk:
    """A file system in a file, and a copy of how it was."""

    def __init__(self, folder: Path) -> None:
        self.image, self.kept, self.mount = folder / "image", folder / "kept", folder / "disk"
        self.mount.mkdir()
        with self.image.open("wb") as file:
            file.truncate(48 << 20)
        self._do("mkfs.ext4", "-q", "-F", str(self.image))

    def _do(self, *words: str) -> None:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"{words[0]} is refused here: {done.stderr.strip()}")

    def plug_in(self) -> None:
        self._do("mount", "-o", "loop", str(self.image), str(self.mount))

    def unplug(self) -> None:
        subprocess.run(["umount", str(self.mount)], check=True)

    def keep(self) -> None:
        subprocess.run(["cp", "--sparse=always", str(self.image), str(self.kept)], check=True)

    def put_back(self) -> None:
        subprocess.run(["cp", "--sparse=always", str(self.kept), str(self.image)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        pytest.skip("a file system of its own can be mounted by root only, and made by mkfs.ext4")
    made = Disk(tmp_path)
    yield made
    subprocess.run(["umount", "--lazy", str(made.mount)], check=False, capture_output=True)


def learn(server: Forks, disk: Disk, case: Case, *, has_old: bool) -> None:
    """Find out what the results are, and keep the disk with the second one, or none."""
    disk.plug_in()
    (disk.mount / "place").mkdir()
    case.learn(server, disk.mount / "place" / "result")
    if not has_old:
        shutil.rmtree(disk.mount / "place")
        (disk.mount / "place").mkdir()
    disk.unplug()
    disk.keep()


def look(disk: Disk, case: Case, *, has_old: bool, what: str) -> bool:
    """Mount the disk anew; whether the new result is in place. Nothing but the old one, or none, may be there else."""
    disk.unplug()
    disk.plug_in()
    found: Hashes = hashes_of(disk.mount / "place")
    allowed = [case.whole[0], case.whole[1] if has_old else {}]
    assert found in allowed, f"{what}: {sorted(found)}"
    return found == case.whole[0]


def check_cuts(
    server: Forks, disk: Disk, case: Case, *, has_old: bool, stride: int, written_back: float, committed: bool
) -> int:
    """Cut the power at call 1, 1 + stride, ...; and once after the end. The number of cuts."""
    call, num_cuts = 1, 0
    while True:
        disk.put_back()
        disk.plug_in()
        place = disk.mount / "place"
        settings = {"written_back": written_back, "committed": committed, "one_cpu": True}
        words = case.words(0, place / "result")
        done = server.run(words, watch=str(place), kill_at=call, cut=str(disk.mount), **settings)
        if done.code == 0:
            forks.cut_power(disk.mount, written_back=written_back)
        else:
            assert done.code == -signal.SIGKILL, done.err
        num_cuts += 1
        what = f"call {call}, {written_back:.0%} written back: {done.calls[-1:]}"
        is_new = look(disk, case, has_old=has_old, what=what)
        if done.code == 0:
            assert is_new, "a run that ended with 0 is gone"
            disk.unplug()
            print(f"{num_cuts} power cuts")
            return num_cuts
        again = server.run(words)
        assert again.code == 0, again.err
        assert hashes_of(place) == case.whole[0], what
        assert staging(place) == [], what
        disk.unplug()
        call += stride


@pytest.mark.parametrize("has_old", [False, True])
def test_the_power_goes(watched: Forks, tiny: Sources, disk: Disk, *, has_old: bool) -> None:
    case = tiny.case("merge, shards over one file")
    learn(watched, disk, case, has_old=has_old)
    num_cuts = check_cuts(watched, disk, case, has_old=has_old, stride=7, written_back=0.5, committed=True)
    assert num_cuts > 2


@pytest.mark.slow
@pytest.mark.parametrize("has_old", [False, True])
@pytest.mark.parametrize(("written_back", "committed"), [(0.0, False), (0.2, True), (0.5, False), (0.8, True)])
@pytest.mark.parametrize("name", ["merge, shards over one file", "merge, shards over more shards", "copy-cfg"])
def test_the_power_goes_at_every_write_call(
    watched: Forks, tiny: Sources, disk: Disk, name: str, written_back: float, *, committed: bool, has_old: bool
) -> None:
    case = tiny.case(name)
    learn(watched, disk, case, has_old=has_old)
    check_cuts(watched, disk, case, has_old=has_old, stride=1, written_back=written_back, committed=committed)


def test_the_test_can_fail(server: Forks, tiny: Sources, disk: Disk) -> None:
    """A copy without a flush, as others write, does not survive the same cut."""
    case = tiny.case("split")
    learn(server, disk, case, has_old=False)
    disk.put_back()
    disk.plug_in()
    shutil.copytree(tiny.folder / "base", disk.mount / "place" / "result")
    forks.cut_power(disk.mount)
    disk.unplug()
    disk.plug_in()
    assert hashes_of(disk.mount / "place") != hashes_of(tiny.folder / "base")
    assert not (disk.mount / "place" / "result" / "model.safetensors").exists()
    disk.unplug()
