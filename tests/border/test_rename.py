"""`rename_noreplace` and `rename_exchange`: nothing is destroyed, and errors are those of Python."""

import errno
from pathlib import Path

import pytest

from fastft import _native


def test_noreplace_moves(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    _native.rename_noreplace(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_noreplace_refuses_even_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(FileExistsError) as caught:
        _native.rename_noreplace(tmp_path / "a", tmp_path / "b")
    assert caught.value.errno == errno.EEXIST
    assert caught.value.filename == tmp_path / "a"
    assert caught.value.filename2 == tmp_path / "b"


def test_exchange(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("was a")
    (tmp_path / "b").mkdir()
    _native.rename_exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "was a"
    assert (tmp_path / "a").is_dir()


def test_exchange_needs_both(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError):
        _native.rename_exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").is_dir()
