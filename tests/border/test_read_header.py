"""`read_header`: what it reads, and that hostile and foreign files are refused with a clear line."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastft import _native
from fastft.errors import CheckpointError, FileError


def file_of(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_what_it_reads(tmp_path: Path) -> None:
    arrays = {"b": np.ones((2, 3), np.float16), "a": np.zeros((), np.float32), "z": np.zeros((0, 4), np.int64)}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    tensors = {tensor.name: tensor for tensor in _native.read_header(tmp_path / "x.safetensors")}
    assert tensors["b"].shape == (2, 3)
    assert (tensors["b"].dtype, tensors["a"].dtype, tensors["z"].dtype) == ("F16", "F32", "I64")
    assert tensors["a"].shape == ()
    content = (tmp_path / "x.safetensors").read_bytes()
    b = tensors["b"]
    assert content[b.offset : b.offset + b.nbytes] == arrays["b"].tobytes()
    assert b.offset + b.nbytes == len(content)
    assert repr(b).startswith('TensorInfo(name="b", dtype="F16", shape=[2, 3]')
    assert b == _native.read_header(str(tmp_path / "x.safetensors"))[-1]


def test_a_length_that_looks_like_a_pickle(tmp_path: Path) -> None:
    """640 is written 80 02 00 ...: the first bytes of a pickle of protocol 2."""
    text = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).ljust(640).encode()
    assert [tensor.name for tensor in _native.read_header(file_of(tmp_path / "x.safetensors", text, b"\0"))] == ["a"]


def lfs_pointer(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")


def html(path: Path) -> None:
    path.write_bytes(b"<!DOCTYPE html><html>not found</html>")


def zip_file(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 100)


def pickle_file(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": [1] * 100}, protocol=2))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lfs_pointer, "a Git LFS pointer"),
        (html, "an HTML page"),
        (zip_file, "a zip archive"),
        (pickle_file, "a pickle"),
        (lambda path: path.write_bytes(b""), "only 0 bytes"),
        (lambda path: path.write_bytes(b"abc"), "only 3 bytes"),
        (lambda path: path.write_bytes(b"\xff" * 100), "its header would have"),
        (lambda path: file_of(path, {}, length=500), "cut off"),
        (lambda path: file_of(path, b'{"a' + b"\xff" * 9), "header is broken"),
        (lambda path: file_of(path, b'{"a":' * 100_000), "header is broken"),
        (lambda path: file_of(path, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}), "cut off"),
        (
            lambda path: file_of(path, {"\x1b[2J": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}, b"1"),
            r"\\u\{1b\}",
        ),
    ],
)
def test_refused(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match=reason) as caught:
        _native.read_header(path)
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < 500


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot open .*missing.*No such file"):
        _native.read_header(tmp_path / "missing")
    with pytest.raises(FileError, match="no regular file"):
        _native.read_header(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="no regular file"):
        _native.read_header(tmp_path / "pipe")
