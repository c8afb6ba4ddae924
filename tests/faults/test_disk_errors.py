"""The disk refuses one write call, each of them in turn, or all from one on: one clear line, and nothing is lost or left."""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import forks
from fault_cases import CASES, Place, Sources, hashes_of, leftovers, staging
from forks import Ended, Forks

ERRORS = {"no space": errno.ENOSPC, "I/O error": errno.EIO, "quota": errno.EDQUOT, "file too large": errno.EFBIG}


def check_said(done: Ended, number: int, place: Place) -> None:
    """One line: what was written where, the system's reason, and what is free there; no traceback."""
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.err
    assert done.out == ""
    assert os.strerror(number) in errors[0], errors
    assert str(place.target) in errors[0] or str(place.folder) in errors[0]
    assert ".partial-" not in errors[0], errors
    assert re.search(r"\d ([GM]B|bytes) are free there", errors[0]), errors
    assert "Traceback" not in done.err


def fail_at_each_call(server: Forks, place: Place, number: int, *, lasting: bool = False, stride: int = 1) -> int:
    """Let call 1, 1 + stride, ... fail until a run ends before it comes so far; the number of calls."""
    call = 1
    while True:
        place.put_back()
        words = place.words()
        done = server.run(words, watch=str(place.folder), fail_at=call, error=number, lasting=lasting, one_cpu=True)
        what = f"call {call} {done.calls[call - 1 : call]}: {done.err}"
        assert done.code in (0, 1), what
        is_new = place.look(what)
        assert is_new == (done.code == 0), what
        failed = done.calls[call - 1].name if len(done.calls) >= call else None
        if done.code == 1:
            check_said(done, number, place)
        if failed in forks.REMOVING:
            # A file that cannot be removed stays, and that is said; the result does not suffer.
            assert done.code == 0, what
            assert staging(place.folder) == [] or "the next run that writes here removes it" in done.err
            place.finish(server)
        else:
            assert leftovers(place.folder) == [], what
        if failed is None:
            assert done.code == 0, what
            print(f"{(call - 1) // stride} calls failed with {os.strerror(number)}")
            return call
        call += stride


@pytest.mark.parametrize("error", ERRORS)
def test_every_write_call_of_a_merge_is_refused(watched: Forks, tiny: Sources, tmp_path: Path, error: str) -> None:
    place = Place(tmp_path, tiny.case("merge, shards over more shards"), watched, tiny)
    fail_at_each_call(watched, place, ERRORS[error], stride=1 if error == "no space" else 5)


def test_every_write_call_of_a_config_is_refused(watched: Forks, tiny: Sources, tmp_path: Path) -> None:
    place = Place(tmp_path, tiny.case("copy-cfg"), watched, tiny)
    assert fail_at_each_call(watched, place, errno.ENOSPC) > 5


def test_a_disk_that_is_full_from_some_call_on(watched: Forks, tiny: Sources, tmp_path: Path) -> None:
    place = Place(tmp_path, tiny.case("quantize"), watched, tiny)
    fail_at_each_call(watched, place, errno.ENOSPC, lasting=True, stride=3)


@pytest.mark.slow
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", CASES)
def test_every_write_call_of_every_command_is_refused(
    watched: Forks, tiny: Sources, tmp_path: Path, name: str, error: str, *, lasting: bool
) -> None:
    place = Place(tmp_path, tiny.case(name), watched, tiny)
    fail_at_each_call(watched, place, ERRORS[error], lasting=lasting)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(mount)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(words, check=False).returncode != 0:
        pytest.skip("a small tmpfs can be mounted by root only")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


@pytest.mark.parametrize("name", ["merge, one file over one file", "split", "dequantize", "pth_to_hf"])
def test_a_disk_without_room_is_refused_before_the_first_byte(
    server: Forks, medium: Sources, small_disk: Path, name: str
) -> None:
    """The old result takes 8 of 12 MB; both numbers are said, and nothing has been touched."""
    case = medium.case(name)
    target = small_disk / "result"
    assert server.run(case.words(0, target)).code == 0
    old, changed = hashes_of(small_disk), small_disk.stat().st_mtime_ns
    done = server.run(case.words(1, target))
    assert done.code == 1
    assert re.search(
        r"^error: \S*/result: \d\.\d\d MB are needed, \d\.\d\d MB are free; make room", done.err, re.MULTILINE
    )
    assert hashes_of(small_disk) == old
    assert small_disk.stat().st_mtime_ns == changed


def test_what_a_killed_run_left_counts_as_room(server: Forks, medium: Sources, small_disk: Path) -> None:
    """It is removed before the writing begins: a disk full of leftovers is no reason to refuse."""
    stale = small_disk / ".result.partial-12345678"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(bytes(9_000_000))
    done = server.run(medium.case("split").words(0, small_disk / "result"))
    assert done.code == 0, done.err
    assert leftovers(small_disk) == []


@pytest.mark.parametrize("bytes_free", [0, 100_000, 4_000_000])
def test_a_disk_that_fills_up_meanwhile(medium: Sources, small_disk: Path, bytes_free: int) -> None:
    """Somebody else takes the room after it was checked: as the kernel says it, not as a test does."""
    case = medium.case("split")
    target = small_disk / "result"
    filler = small_disk / "filler"
    hoped = "shutil.disk_usage = lambda path, real=shutil.disk_usage: real(path)._replace(free=10**12)"
    code = f"import shutil, sys; {hoped}; from fastft.__main__ import main; sys.exit(main(sys.argv[1:]))"
    with filler.open("wb") as file:
        free = shutil.disk_usage(small_disk).free
        file.write(bytes(max(free - bytes_free, 0)))
    words = [sys.executable, "-c", code, *case.words(1, target)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "No space left on device" in errors[0]
    assert str(target) in errors[0]
    assert "Traceback" not in done.stderr
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
