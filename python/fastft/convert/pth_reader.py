"""Finds the tensors of a .pth file (torch.save since version 1.6: a zip) as ranges of bytes, without torch.

The pickle in it is read by `pickle_data`, in which nothing can be called; the storages are zip entries that are
stored uncompressed, so that the native stream reads them straight from the file.
Source: torch/serialization.py (the archive and the persistent ids), torch/_utils.py (the rebuild functions).
"""

import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fastft.convert import pickle_data
from fastft.convert.pickle_data import Call, Global, Persistent
from fastft.convert.source import DTYPE_BYTES, Source
from fastft.errors import CheckpointError, FileError

# Where a training framework puts the state dict.
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
_STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "Float8_e4m3fnStorage": "F8_E4M3",
    "Float8_e5m2Storage": "F8_E5M2",
}
_DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_MAX_ENTRIES = 1_000_000
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@dataclass(frozen=True)
class StateDict:
    """What a .pth file holds.

    Attributes:
        path: the file.
        tensors: name to bytes.
        meta: the training's notes beside the weights (mmengine's `meta`), as far as they are plain data.
        skipped: names beside the tensors that hold none.
    """

    path: Path
    tensors: Mapping[str, Source]
    meta: Mapping[str, Any]
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Archive:
    path: Path
    prefix: str
    # Name of an entry (without the prefix) to the offset and the size of its data.
    entries: Mapping[str, tuple[int, int]]


def read_state_dict(path: Path) -> StateDict:
    """Read the names and places of all tensors in a .pth, .pt or .bin file.

    Raises:
        FileError: the file is not there.
        CheckpointError: not a zip that torch.save wrote, broken, or a tensor that is not stored plainly.
    """
    archive, pickle_bytes = _open(path)
    path = archive.path
    value = pickle_data.read(pickle_bytes, str(path))
    top = _mapping(value)
    if top is None:
        raise CheckpointError(f"{path}: holds a {_kind(value)}; a dictionary of tensors is expected")
    found = top
    for wrapper in _WRAPPERS:
        inner = _mapping(top.get(wrapper))
        if inner and any(_is_tensor(item) for item in inner.values()):
            found = inner
            break
    tensors: dict[str, Source] = {}
    skipped: list[str] = []
    for name, item in found.items():
        rebuilt = _unwrapped(item)
        if not isinstance(name, str) or not _is_tensor(rebuilt):
            skipped.append(_word(name))
            continue
        tensors[name] = _tensor(name, rebuilt, archive)
    if not tensors:
        raise CheckpointError(
            f"{path}: no tensors found; looked at the top and under {', '.join(_WRAPPERS)}."
            f" It holds: {', '.join(map(_word, list(top)[:8]))}"
        )
    meta = _mapping(top.get("meta")) if found is not top else None
    return StateDict(path, tensors, meta or {}, tuple(skipped))


def _open(path: Path) -> tuple[_Archive, bytes]:
    """Read the directory of the zip and the bytes of its pickle."""
    if not path.exists():
        raise FileError(f"{path}: not there")
    if not path.is_file():
        raise FileError(f"{path}: not a regular file")
    try:
        with path.open("rb") as file:
            start = file.read(16)
            if not start.startswith(b"PK\x03\x04"):
                raise CheckpointError(f"{path}: {_what_instead(start)}")
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                if len(infos) > _MAX_ENTRIES:
                    raise CheckpointError(f"{path}: {len(infos)} entries; at most {_MAX_ENTRIES} are read")
                pickles = [info.filename for info in infos if info.filename.endswith("/data.pkl")]
                if len(pickles) != 1:
                    raise CheckpointError(f"{path}: a zip, but not one that torch.save wrote (no data.pkl)")
                prefix = pickles[0].removesuffix("data.pkl")
                entries = {
                    info.filename.removeprefix(prefix): _place(info, file, path)
                    for info in infos
                    if info.filename.startswith(prefix)
                }
                if len(entries) != sum(info.filename.startswith(prefix) for info in infos):
                    raise CheckpointError(f"{path}: two entries of the zip have one name")
            if "byteorder" in entries and _read(file, entries["byteorder"], 16, path) != b"little":
                raise CheckpointError(f"{path}: written on a big-endian machine; save it again on a usual one")
            pickle_bytes = _read(file, entries["data.pkl"], pickle_data.MAX_BYTES, path)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: the zip is broken or cut off: {error}") from error
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    return _Archive(path.resolve(), prefix, entries), pickle_bytes


def _place(info: zipfile.ZipInfo, file: Any, path: Path) -> tuple[int, int]:
    """Give offset and size of the data of a zip entry that is stored as it is."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise CheckpointError(f"{path}: the entry {info.filename!r} is compressed; torch.save never does that")
    if info.flag_bits & 1:
        raise CheckpointError(f"{path}: the entry {info.filename!r} is encrypted")
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) != _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{path}: the zip is broken at the entry {info.filename!r}")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    offset = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if offset + info.file_size > path.stat().st_size:
        raise CheckpointError(f"{path}: cut off within the entry {info.filename!r}")
    return offset, info.file_size


def _read(file: Any, place: tuple[int, int], max_bytes: int, path: Path) -> bytes:
    offset, size = place
    if size > max_bytes:
        raise CheckpointError(f"{path}: an entry of {size} bytes where at most {max_bytes} are read")
    file.seek(offset)
    content: bytes = file.read(size)
    return content


def _what_instead(start: bytes) -> str:
    """Say what a file is that is no zip."""
    if start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return (
            "in the format of torch before 1.6, which cannot be read in place; load it once with"
            " torch.load(..., weights_only=True) and save it again with torch.save"
        )
    if start.startswith(b"version https"):
        return "only a Git LFS pointer is here; fetch the file itself with `git lfs pull`"
    if start[:1] in (b"<", b"{"):
        return "is text, not weights; was the download broken off by an error page?"
    if not start:
        return "is empty"
    return "not a .pth file (it is no zip)"


def _mapping(value: Any) -> dict[Any, Any] | None:
    """Give the items of a dictionary or an ordered one."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Call) and value.function == Global("collections", "OrderedDict"):
        return value.items
    return None


def _unwrapped(value: Any) -> Any:
    """Look through `torch.nn.Parameter` at its tensor."""
    for _ in range(4):
        if not (isinstance(value, Call) and isinstance(value.function, Global)):
            return value
        if value.function.path not in (
            "torch._utils._rebuild_parameter",
            "torch._utils._rebuild_parameter_with_state",
            "torch.nn.parameter.Parameter",
        ):
            return value
        if not isinstance(value.arguments, tuple) or not value.arguments:
            return value
        value = value.arguments[0]
    return value


def _is_tensor(value: Any) -> bool:
    value = _unwrapped(value)
    return (
        isinstance(value, Call)
        and isinstance(value.function, Global)
        and value.function.path in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
    )


def _tensor(name: str, call: Call, archive: _Archive) -> Source:
    """Turn the call that would rebuild a tensor into the bytes that it lies in, checked."""
    where = f"{archive.path}: tensor {name!r}"
    arguments = call.arguments
    if not isinstance(arguments, tuple) or len(arguments) < 4 or not isinstance(arguments[0], Persistent):
        raise CheckpointError(f"{where}: is not described the way torch.save does it")
    storage, offset, shape, stride = arguments[:4]
    dtype, key, storage_numel = _storage(storage.identity, where)
    if call.function.path.endswith("_v3"):
        given = arguments[6] if len(arguments) > 6 else None
        dtype = _DTYPES.get(given.name, "") if isinstance(given, Global) and given.module == "torch" else ""
    shape, stride = (_sizes(sizes) for sizes in (shape, stride))
    if not dtype or shape is None or stride is None or len(shape) != len(stride) or len(shape) > 8:
        raise CheckpointError(f"{where}: its dtype or shape is not understood")
    if not isinstance(offset, int) or offset < 0 or storage_numel < 0:
        raise CheckpointError(f"{where}: starts at {_word(offset)} in its storage")
    if not _contiguous(shape, stride):
        raise CheckpointError(
            f"{where}: its numbers do not lie in a row (stride {stride}); save it again after .contiguous()"
        )
    if f"data/{key}" not in archive.entries:
        raise CheckpointError(f"{where}: its data, data/{key}, is not in the file")
    start, size = archive.entries[f"data/{key}"]
    first, count = offset * DTYPE_BYTES[dtype], prod(shape) * DTYPE_BYTES[dtype]
    if first + count > size:
        raise CheckpointError(f"{where}: needs bytes {first} to {first + count} of data that has only {size}")
    return Source(archive.path, start + first, dtype, shape)


def _storage(identity: Any, where: str) -> tuple[str, str, int]:
    """Read torch's reference to a storage: ("storage", type, key, device, number of elements)."""
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise CheckpointError(f"{where}: its storage is not described the way torch.save does it")
    _, kind, key, _, numel = identity
    if not isinstance(kind, Global) or not isinstance(key, str) or not isinstance(numel, int):
        raise CheckpointError(f"{where}: its storage is not described the way torch.save does it")
    if kind.path == "torch.storage.UntypedStorage":
        return "", key, numel
    dtype = _STORAGES.get(kind.name) if kind.module in ("torch", "torch.storage") else None
    if dtype is None:
        raise CheckpointError(f"{where}: has a storage of kind {kind.path}, which is not read")
    return dtype, key, numel


def _sizes(value: Any) -> tuple[int, ...] | None:
    """Read a shape or a stride: a tuple of whole numbers, or torch.Size of one."""
    if isinstance(value, Call) and value.function == Global("torch", "Size"):
        value = value.arguments[0] if isinstance(value.arguments, tuple) and value.arguments else None
    if not isinstance(value, tuple | list) or not all(type(size) is int and 0 <= size < 2**48 for size in value):
        return None
    return tuple(value)


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Tell whether the elements lie row-major without gaps; the stride of a dimension of size 1 does not matter."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return prod(shape) == 0
        expected *= size
    return True


def _word(value: Any) -> str:
    """Say what stands somewhere. Not by `repr`: lists that hold one another would be written out for ever."""
    return str(value)[:200] if isinstance(value, str | int) else _kind(value)


def _kind(value: Any) -> str:
    if isinstance(value, Call) and isinstance(value.function, Global):
        return value.function.path
    return type(value).__name__
