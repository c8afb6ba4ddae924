"""Files of torch.save in all their variants: the bytes are torch's, or the file is refused in one line; nothing runs."""

import io
import os
import pickle
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastft.convert import torch_file
from fastft.convert.pth_reader import read_state_dict
from fastft.convert.source import read_bytes
from fastft.errors import CheckpointError, FastftError, FileError

torch = pytest.importorskip("torch")


def raw(tensor: Any) -> bytes:
    """The bytes of a tensor as torch holds them."""
    flat = tensor.detach().clone().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("is_zip", [True, False])
def test_views_and_shared_storages(tmp_path: Path, is_zip: bool, protocol: int) -> None:
    """Both formats: views into one storage, tied weights, parameters, buffers, all dtypes, empty ones and scalars."""
    big = torch.arange(24.0).reshape(4, 6)
    embedding = torch.nn.Embedding(5, 3)
    linear = torch.nn.Linear(3, 5, bias=False)
    linear.weight = embedding.weight
    model = torch.nn.ModuleDict({"e": embedding, "l": linear, "n": torch.nn.BatchNorm1d(2)})
    state = {
        "big": big,
        "rows": big[1:3],
        "last": big[3],
        "scalar": big[2, 3],
        "none": big[:0],
        "column": big[2:3, :1],
        "half": big.half(),
        "bf16": big.bfloat16()[1:],
        "long": big.long(),
        "bytes": big.to(torch.uint8),
        "bool": big > 3,
        "fp8": big.to(torch.float8_e4m3fn),
        **model.state_dict(),
    }
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    found = read_state_dict(tmp_path / "x.pth").tensors
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].shape == tuple(tensor.shape), name
        assert read_bytes(found[name]) == raw(tensor), name
    assert found["e.weight"] == found["l.weight"]


def test_old_files_by_hand(tmp_path: Path) -> None:
    """A view into another storage (torch before 0.4 wrote such), a big-endian machine, a storage that is cut off."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value[1] if isinstance(value, tuple) and value[:1] == ("persistent",) else None

    def written(view: Any, *, little: bool = True, cut: int = 0, numel: int = 6) -> Path:
        file = io.BytesIO()
        identity = ("storage", torch.FloatStorage, "7", "cpu", 6, view)
        for value in (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": little}):
            pickle.dump(value, file, 2)
        pickler = Pickler(file, 2)
        pickler.dump({"a": _Rebuilt(("persistent", identity))})
        pickle.dump(["7"], file, 2)
        file.write(struct.pack("<q", numel) + np.arange(6, dtype="<f4").tobytes())
        (tmp_path / "x.pth").write_bytes(file.getvalue()[: len(file.getvalue()) - cut])
        return tmp_path / "x.pth"

    assert read_bytes(read_state_dict(written(None)).tensors["a"]) == np.arange(2, dtype="<f4").tobytes()
    found = read_state_dict(written(("8", 3, 3))).tensors["a"]
    assert read_bytes(found) == np.array([3, 4], "<f4").tobytes()
    for path, word in (
        (lambda: written(None, little=False), "big-endian"),
        (lambda: written(None, cut=1), "cut off within the storage 7"),
        (lambda: written(None, cut=25), "cut off before the storage 7"),
        (lambda: written(None, numel=-1), "cut off|broken|needs bytes"),
        (lambda: written(None, numel=2**62), "cut off within"),
        (lambda: written(("8", -1, 3)), "storage is not described"),
    ):
        with pytest.raises(CheckpointError, match=word):
            read_state_dict(path())


class _Rebuilt:
    def __init__(self, storage: Any) -> None:
        self.storage = storage

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, (2,), (1,), False, {})


@pytest.mark.parametrize(
    ("tensor", "word"),
    [
        (lambda: torch.arange(12.0).reshape(3, 4).T, "do not lie in a row"),
        (lambda: torch.ones(3, 1).expand(3, 4), "do not lie in a row"),
        (lambda: torch.arange(12.0)[::2], "do not lie in a row"),
        (lambda: torch.eye(3).to_sparse(), "not read here"),
        (lambda: torch.ones(2, dtype=torch.complex64), "ComplexFloatStorage"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "ComplexFloatStorage|negated or conjugated"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj().imag, "negated|do not lie"),
    ],
)
def test_tensors_that_are_not_plain(tmp_path: Path, tensor: Callable[[], Any], word: str) -> None:
    for is_zip in (True, False):
        state = {"fine": torch.ones(3), "w": tensor()}
        try:
            torch.save({"state_dict": state}, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
        except (RuntimeError, NotImplementedError):
            continue  # torch cannot write it in this format
        with pytest.raises(CheckpointError, match=word):
            read_state_dict(tmp_path / "x.pth")


class Reduce:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


def hostile(mark: Path) -> dict[str, bytes]:
    """Pickles that would make the file `mark` in every way that a pickle can call something."""
    command = f"touch '{mark}'".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    return {
        "GLOBAL and REDUCE": b"\x80\x02cposix\nsystem\n" + text + b"\x85R.",
        "os": b"\x80\x02cos\nsystem\n" + text + b"\x85R.",
        "INST": b"(S'" + command.replace(b"'", b"\\'") + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text + b"o.",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + text + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04\x8c\x0asubprocess\x8c\x05Popen\x93" + text + b"\x85}\x92.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + text + b"\x85R.",
        "BUILD with __setstate__": b"\x80\x02c__main__\nX\n)\x81}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb"
        + text
        + b"b.",
        "a nested persistent id": b"\x80\x02(X\x07\x00\x00\x00storagecos\nsystem\n" + text + b"\x85RQtQ.",
        "exec": b"\x80\x02cbuiltins\nexec\n" + text + b"\x85R.",
        "eval of python 2": b"\x80\x02c__builtin__\neval\n" + text + b"\x85R.",
        "import": b"\x80\x02cbuiltins\n__import__\nX\x02\x00\x00\x00os\x85R.",
        "runpy": b"\x80\x02crunpy\n_run_code\n" + text + b"\x85R.",
        "a pickle in a pickle": b"\x80\x02cpickle\nloads\n" + text + b"\x85R.",
        "a dotted name": b"\x80\x04\x8c\x08builtins\x8c\x0dexec.__call__\x93" + text + b"\x85R.",
        "a path of modules": b"\x80\x02cos.path\nos.system\n" + text + b"\x85R.",
    }


@pytest.mark.parametrize("way", hostile(Path("x")))
@pytest.mark.parametrize("place", ["bare", "zip", "legacy", "storage keys"])
def test_hostile_pickles(tmp_path: Path, way: str, place: str) -> None:
    mark = tmp_path / "was here"
    evil = hostile(mark)[way]
    path = tmp_path / "x.pth"
    start = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    if place == "bare":
        path.write_bytes(evil)
    elif place == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", evil)
    elif place == "legacy":
        path.write_bytes(start + evil)
    else:
        path.write_bytes(start + pickle.dumps({}, 2) + evil)
    with pytest.raises(
        CheckpointError, match="which would run code and which no checkpoint needs; nothing of it was run"
    ):
        read_state_dict(path)
    assert not mark.exists()


def test_bombs_end_soon(tmp_path: Path) -> None:
    """Tuples that double 60 times as a name, a key, an offset, a shape; a pickle of many steps; sizes that are lies."""
    doubled = b")q\x00" + b"h\x00h\x00\x86q\x00" * 60
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    name = b"X\x01\x00\x00\x00a"
    bombs = {
        "name": b"\x80\x02" + doubled + b"h\x00\x93.",
        "key": b"\x80\x02" + doubled + b"0}h\x00K\x01s.",
        "offset": b"\x80\x02" + doubled + b"0}" + name + rebuild + b"(" + storage + b"h\x00(K\x01t(K\x01ttRs.",
        "shape": b"\x80\x02" + doubled + b"0}" + name + rebuild + b"(" + storage + b"K\x00h\x00(K\x01ttRs.",
        "storage": b"\x80\x02" + doubled + b"0}" + name + rebuild + b"(h\x00QK\x00(K\x01t(K\x01ttRs.",
        "bytes": b"\x80\x05\x8e" + struct.pack("<Q", 2**62) + b"x.",
        "memo": b"\x80\x02Nr\xff\xff\xff\xff" + b"j\xff\xff\xff\xff" * 1000 + b".",
        "number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    }
    for what, content in bombs.items():
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
            archive.writestr("x/data.pkl", content)
            archive.writestr("x/data/0", b"0" * 16)
        started = time.monotonic()
        with pytest.raises(CheckpointError):
            read_state_dict(tmp_path / "x.pth")
        assert time.monotonic() - started < 2, what


def test_names_are_shown_in_one_line() -> None:
    from fastft.convert import pickle_data

    for module in ("os.\n", "x\x1b[2J"):
        content = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c\x01y\x93."
        with pytest.raises(CheckpointError, match="control characters") as refused:
            pickle_data.read(content, "x")
        assert str(refused.value).isprintable()


def test_too_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft.convert import pickle_data

    monkeypatch.setattr(pickle_data, "MAX_OPCODES", 1000)
    with pytest.raises(CheckpointError, match="more than 1000 steps"):
        pickle_data.read(b"\x80\x02" + b"N0" * 1000 + b"N.", "x")


def test_zip_bomb(tmp_path: Path) -> None:
    """A gigabyte of zeros in a megabyte, and an entry that says so without having it."""
    torch.save({"a": torch.ones(8)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as old, zipfile.ZipFile(tmp_path / "x.pth", "w") as new:
        for info in old.infolist():
            kind = zipfile.ZIP_DEFLATED if info.filename.endswith("data/0") else zipfile.ZIP_STORED
            content = b"\0" * 50_000_000 if kind == zipfile.ZIP_DEFLATED else old.read(info)
            new.writestr(info.filename, content, kind)
    assert (tmp_path / "x.pth").stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="compressed"):
        read_state_dict(tmp_path / "x.pth")
    content = bytearray((tmp_path / "plain.pth").read_bytes())
    at = content.rfind(b"PK\x01\x02", 0, content.rfind(b"data/0"))
    content[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    (tmp_path / "y.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="cut off within"):
        read_state_dict(tmp_path / "y.pth")


@pytest.mark.parametrize("is_zip", [True, False])
def test_cut_off_anywhere(tmp_path: Path, is_zip: bool) -> None:
    torch.save({"a": torch.ones(50), "b": torch.ones(3)}, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    content = (tmp_path / "x.pth").read_bytes()
    for length in [*range(0, 200, 7), *range(200, len(content), 41), len(content) - 1]:
        (tmp_path / "y.pth").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"y\.pth: ") as refused:
            read_state_dict(tmp_path / "y.pth")
        assert "\n" not in str(refused.value)


def test_flipped_bytes(tmp_path: Path) -> None:
    """Whatever a byte becomes: the file is read as it says, or refused; nothing else."""
    rng = np.random.default_rng(0)
    torch.save({"a": torch.ones(5), "b": torch.ones(3)}, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    for _ in range(400):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            changed[place] = rng.integers(0, 256)
        (tmp_path / "y.pth").write_bytes(changed)
        try:
            for source in read_state_dict(tmp_path / "y.pth").tensors.values():
                read_bytes(source)
        except FastftError:
            pass


def test_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(FileError, match="not a regular file"):
        torch_file.read(tmp_path / "pipe.pth")
    if os.getuid() != 0:
        (tmp_path / "x.pth").write_bytes(b"x")
        (tmp_path / "x.pth").chmod(0)
        with pytest.raises(FileError, match="Permission denied"):
            torch_file.read(tmp_path / "x.pth")


def test_torch_is_not_imported(tmp_path: Path) -> None:
    import subprocess

    torch.save({"a": torch.ones(5)}, tmp_path / "x.pth")
    code = (
        "import sys; from pathlib import Path; from fastft.convert.pth_reader import read_state_dict;"
        "assert read_state_dict(Path(sys.argv[1])).tensors; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.pth")], check=True)
