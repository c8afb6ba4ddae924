"""All or nothing: what a target holds after success, failure, kill -9 and two writers at once."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastft import _native, publish
from fastft.errors import FileError

WRITER = """
import sys, time
from pathlib import Path
from fastft import publish
target, letter, pause_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
print("ready", flush=True)
with publish.staged(target, force=True) as staging:
    for index in range(20):
        (staging / f"model-{index}.safetensors").write_text(letter * 1000)
        print(index, flush=True)
        time.sleep(pause_s)
print("done", flush=True)
"""


def start_writer(target: Path, letter: str, pause_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(target), letter, str(pause_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write(target: Path, letter: str = "a", *, force: bool = False, num_files: int = 20) -> None:
    with publish.staged(target, force=force) as staging:
        for index in range(num_files):
            (staging / f"model-{index}.safetensors").write_text(letter * 1000)


def letters(target: Path) -> set[str]:
    """The letters that the files of a target hold; more than one would be a mixed model."""
    files = sorted(target.iterdir())
    assert len(files) == 20, files
    return {letter for file in files for letter in file.read_text()}


def beside(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def test_the_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with publish.staged(target) as staging:
        assert staging.parent == target.parent
        assert not target.exists()
        (staging / "config.json").write_text("{}")
        (staging / "sub").mkdir()
        (staging / "sub" / "a.bin").write_bytes(b"1")
    assert (target / "sub" / "a.bin").read_bytes() == b"1"
    assert beside(target) == []
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_failing_body_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(ZeroDivisionError), publish.staged(target) as staging:  # noqa: PT012  the body's end is the case
        (staging / "a.json").write_text("{}")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_failing_body_leaves_the_old_target(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write(target, "a")
    with pytest.raises(KeyboardInterrupt), publish.staged(target, force=True) as staging:  # noqa: PT012  the body's end is the case
        (staging / "model-1.safetensors").write_text("b")
        raise KeyboardInterrupt
    assert letters(target) == {"a"}
    assert beside(target) == []


def test_force_replaces_and_no_force_refuses(tmp_path: Path) -> None:
    target = tmp_path / "model"
    write(target, "a")
    with pytest.raises(FileError, match=r"exists already; choose another folder, or add --force"):
        write(target, "b")
    assert letters(target) == {"a"}
    write(target, "b", force=True)
    assert letters(target) == {"b"}
    assert beside(target) == []


def test_an_empty_folder_is_a_fine_target(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    write(target)
    assert letters(target) == {"a"}


def test_refused_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.odt").write_text("x")
    link = tmp_path / "link"
    link.symlink_to(folder)
    monkeypatch.chdir(folder)
    cases = {
        file: "is a file; give a folder",
        file / "below": "file is a file",
        link: "is a link",
        folder: "holds it",
        tmp_path: "holds it",
        Path("/"): "holds it",
    }
    for target, reason in cases.items():
        with pytest.raises(FileError, match=reason), publish.staged(target, force=True):
            pytest.fail("the body ran")
    monkeypatch.chdir("/")
    with pytest.raises(FileError, match=r"notes\.odt is no file of a model"), publish.staged(folder, force=True):
        pytest.fail("the body ran")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


@pytest.mark.parametrize(
    "names", [("notes.txt", "todo.md"), ("work.py", "rows.jsonl"), ("README.md", "sub/config.json")]
)
def test_force_does_not_replace_what_is_no_model(tmp_path: Path, names: tuple[str, ...]) -> None:
    target = tmp_path / "mine"
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("mine")
    with pytest.raises(FileError, match="is not replaced: there is no model in it"):
        write(target, force=True)
    assert all((target / name).read_text() == "mine" for name in names)


def test_force_replaces_a_model_with_its_notes(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("{}")
    (target / "notes.txt").write_text("of the model")
    write(target, force=True)
    assert letters(target) == {"a"}


def test_force_does_not_replace_a_repository(tmp_path: Path) -> None:
    target = tmp_path / "work"
    (target / ".git").mkdir(parents=True)
    (target / "config.json").write_text("{}")
    with pytest.raises(FileError, match=r"\.git is no file of a model"):
        write(target, force=True)


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(FileError, match="exists already"), publish.staged(target):  # noqa: PT012  the body's end is the case
        target.mkdir()
        (target / "other.json").write_text("{}")
    assert (target / "other.json").read_text() == "{}"
    assert beside(target) == []


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with publish.staged(target) as staging:
        with pytest.raises(FileError, match="another process is writing"):
            write(target, "b", force=True)
        for index in range(20):
            (staging / f"model-{index}.safetensors").write_text("a" * 1000)
    assert letters(target) == {"a"}
    assert beside(target) == []


def test_two_processes_one_wins(tmp_path: Path) -> None:
    target = tmp_path / "model"
    writers = [start_writer(target, letter, 0.02) for letter in "ab"]
    ends = [writer.communicate(timeout=60) for writer in writers]
    codes = sorted(writer.returncode for writer in writers)
    # Both may win if one was done before the other started.
    assert codes in ([0, 1], [0, 0]), ends
    if codes == [0, 1]:
        assert any("another process is writing" in error for _, error in ends)
    assert len(letters(target)) == 1
    assert beside(target) == []


@pytest.mark.parametrize("has_old", [False, True])
def test_kill_at_any_moment(tmp_path: Path, *, has_old: bool) -> None:
    target = tmp_path / "model"
    chance = random.Random(7)
    for _ in range(6):
        if has_old:
            write(target, "a", force=True)
        writer = start_writer(target, "b", 0.004)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(chance.uniform(0, 0.15))
        writer.send_signal(signal.SIGKILL)
        writer.communicate(timeout=60)
        if target.exists():
            assert letters(target) in ({"a"}, {"b"})
            if not has_old:
                assert letters(target) == {"b"}
        else:
            assert not has_old
        leftovers = [name for name in beside(target) if "partial" in name]
        assert len(leftovers) <= 1
    write(target, "c", force=True)
    assert letters(target) == {"c"}
    assert beside(target) == []


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "model"
    stale = tmp_path / ".model.partial-12345678"
    stale.mkdir()
    (stale / "model-00001.safetensors").write_text("x")
    other = tmp_path / ".model2.partial-12345678"
    other.mkdir()
    write(target)
    assert beside(target) == [other.name]
    assert stale.name in capsys.readouterr().err


def test_a_kill_between_two_renames_is_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "model"
    write(target, "a")
    target.rename(tmp_path / ".model.old")
    with pytest.raises(FileError, match="exists already"):
        write(target, "b")
    assert letters(target) == {"a"}
    assert "the old one is put back" in capsys.readouterr().err
    assert beside(target) == []


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS])
def test_file_systems_that_cannot_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_paths: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_native, "rename_exchange", refuse)
    monkeypatch.setattr(_native, "rename_noreplace", refuse)
    target = tmp_path / "model"
    write(target, "a")
    write(target, "b", force=True)
    assert letters(target) == {"b"}
    assert beside(target) == []


def test_a_failed_rename_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_paths: object) -> None:
        raise OSError(errno.EIO, "disk broken")

    target = tmp_path / "model"
    write(target, "a")
    monkeypatch.setattr(_native, "rename_exchange", refuse)
    with pytest.raises(FileError, match="disk broken"):
        write(target, "b", force=True)
    assert letters(target) == {"a"}
    assert beside(target) == []


def test_space(tmp_path: Path) -> None:
    publish.require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(FileError, match=r"GB are needed, .* GB are free"):
        publish.require_space(tmp_path / "not" / "yet", 1 << 60)


def test_write_text(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.yaml"
    publish.write_text(path, "one: \u00e9\n")
    publish.write_text(path, "two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(FileError, match="cannot write"):
        publish.write_text(tmp_path / "sub", "text")
    assert (tmp_path / "sub" / "a.yaml").read_text() == "two"
    assert list(tmp_path.iterdir()) == [tmp_path / "sub"]
