"""Exit 0 means that the result survives a power cut: everything is flushed before the rename, the folder after it.

The order of the system calls is looked at, so that this needs no rights; `test_power_cut` cuts a real file system off.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import forks
from fault_cases import CASES, FOLDERS, Place, Sources
from forks import Call, Forks


def check_order(calls: list[Call], target: str) -> None:
    """Every file is flushed after its last write, every folder after its last entry, the parent after the rename."""
    dirty: set[str] = set()  # files with unflushed content, folders with unflushed entries
    published = False
    for name, paths in calls:
        at = paths[0]
        if name in forks.WRITING:
            assert not published, f"{at} was written after it was put in place"
            dirty.add(at)
        elif name in forks.SYNCING:
            dirty.discard(at)
        elif name in ("openat", "mkdir", "mkdirat"):
            dirty |= {at, str(Path(at).parent)}
        elif name in forks.RENAMING and target in paths:
            inside = {path for path in dirty if path == at or path.startswith(f"{at}/")}
            assert not inside, f"not flushed before the rename: {sorted(inside)}"
            dirty.add(str(Path(target).parent))
            published = True
        elif name in forks.RENAMING:
            dirty |= {str(Path(path).parent) for path in paths}
        elif name in forks.REMOVING and published:
            assert str(Path(target).parent) not in dirty, "the old result was removed before the new one was durable"
        elif name in ("ftruncate", "fallocate", "truncate"):
            pytest.fail(f"{name} of {at}: full length must mean full content")
    assert published
    assert str(Path(target).parent) not in dirty, "the rename was not flushed"


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("one_cpu", [False, True])
def test_a_folder_is_flushed_before_it_appears(
    watched: Forks, tiny: Sources, tmp_path: Path, name: str, *, one_cpu: bool
) -> None:
    place = Place(tmp_path, tiny.case(name), watched, tiny)
    done = watched.run(place.words(), watch=str(place.folder), one_cpu=one_cpu)
    assert done.code == 0, done.err
    check_order(done.calls, str(place.target))


def test_a_new_folder_below_new_folders(watched: Forks, tiny: Sources, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "deeper" / "result"
    words = tiny.case("split").words(0, target)
    done = watched.run(words, watch=str(tmp_path))
    assert done.code == 0, done.err
    check_order(done.calls, str(target))
    flushed = [call.paths[0] for call in done.calls if call.name in forks.SYNCING]
    assert {str(tmp_path), str(tmp_path / "deep"), str(tmp_path / "deep" / "deeper")} <= set(flushed)


def test_a_file_is_flushed_before_it_appears(watched: Forks, tiny: Sources, tmp_path: Path) -> None:
    place = Place(tmp_path, tiny.case("copy-cfg"), watched, tiny)
    done = watched.run(place.words(), watch=str(place.folder))
    assert done.code == 0, done.err
    check_order(done.calls, f"{place.target}.yaml")
    assert len(CASES) == len(FOLDERS) + 1


def test_the_check_sees_what_is_missing(watched: Forks, tiny: Sources, tmp_path: Path) -> None:
    """Without the one flush of config.json, of the folder, or of its parent, it fails; weights are flushed twice."""
    place = Place(tmp_path, tiny.case("merge, shards over one file"), watched, tiny)
    calls = watched.run(place.words(), watch=str(place.folder)).calls
    assert sum(call.name in forks.SYNCING for call in calls) == 5
    needed = 0
    for number, call in enumerate(calls):
        if call.name in forks.SYNCING:
            try:
                check_order(calls[:number] + calls[number + 1 :], str(place.target))
            except AssertionError:
                needed += 1
    assert needed == 3
