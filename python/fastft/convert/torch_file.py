"""A file of torch.save as data: the value that it holds, and its tensors as ranges of bytes, without torch.

Both formats are read: the zip of torch 1.6 and later, whose storages are entries that are stored uncompressed, and the
one before, in which they follow the pickles. Either way the native stream reads them straight from the file. The
pickles are read by `pickle_data`, in which nothing can be called. Used by `pth_reader`, `deepspeed_folder` and
`distributed_checkpoint`, whose chunks are such files inside a larger one.
Source: torch/serialization.py (the formats and the persistent ids), torch/_utils.py (the rebuild functions).
"""

import io
import os
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from fastft import regular_file
from fastft.convert import pickle_data
from fastft.convert.pickle_data import Call, Global, Persistent
from fastft.convert.source import DTYPE_BYTES, Source
from fastft.errors import CheckpointError, FileError

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
_WRAPPED = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
)
_REBUILT = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_tensor")
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_PLAIN_CLASSES = ("torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch._tensor.Tensor", "torch.Tensor")
_MAX_ENTRIES = 1_000_000
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# The pickles of the old format stand before the numbers; one of weights has some MB.
_LEGACY_PICKLES_BYTES = 64 * 1024 * 1024
# Where the bytes of a storage are: offset in the file and size.
Places = Mapping[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What a file of torch.save holds.

    Attributes:
        path: absolute.
        value: what the pickle gives; its tensors are inert calls that `tensor` understands.
        storages: key to the offset in the file and the size in bytes.
    """

    path: Path
    value: Any
    storages: Places

    def tensor(self, name: str, item: Any) -> Source:
        """Turn the call that would rebuild a tensor into the bytes that it lies in, checked.

        Raises:
            CheckpointError: it is not stored plainly, or not where it should be.
        """
        item = unwrapped(item)
        assert isinstance(item, Call)
        return _tensor(name, item, self)


def read(path: Path, start: int = 0, length: int | None = None) -> TorchFile:
    """Read the pickle of a file of torch.save, and where its storages are.

    Args:
        path: the file.
        start: first byte, where it lies inside a larger file.
        length: its bytes; None: all to the end.

    Raises:
        FileError: not there, no regular file, or not readable.
        CheckpointError: not a file of torch.save, broken or cut off.
    """
    given, path = path, path.resolve()  # errors about the file itself show the name that was given
    try:
        with _opened(given) as whole:
            size = os.fstat(whole.fileno()).st_size
            if length is not None and not 0 <= start <= start + length <= size:
                raise CheckpointError(f"{path}: cut off: bytes {start} to {start + length} of {size} are needed")
            file: BinaryIO = whole if length is None else io.BufferedReader(_Range(whole, start, length))
            first = file.read(64)
            file.seek(0)
            if first.startswith(b"PK\x03\x04"):
                return _read_zip(path, file, start, size if length is None else length)
            if _is_legacy(first):
                return _read_legacy(path, file, start, size if length is None else length)
            _refuse_hostile(path, file)
            raise CheckpointError(f"{path}: {_what_instead(first)}")
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error) as error:
        raise CheckpointError(f"{path}: the zip is broken or cut off: {error}") from error
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error


def mapping(value: Any) -> dict[Any, Any] | None:
    """Give the items of a dictionary or an ordered one; None for anything else."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Call) and value.function in (
        Global("collections", "OrderedDict"),
        Global("collections", "defaultdict"),
    ):
        return value.items
    return None


def sizes(value: Any) -> tuple[int, ...] | None:
    """Read a shape or a stride: a tuple of whole numbers, or torch.Size of one; None for anything else."""
    if isinstance(value, Call) and value.function == Global("torch", "Size"):
        value = value.arguments[0] if isinstance(value.arguments, tuple) and value.arguments else None
    if not isinstance(value, tuple | list) or not all(type(size) is int and 0 <= size < 2**48 for size in value):
        return None
    return tuple(value)


def unwrapped(value: Any) -> Any:
    """Look through `torch.nn.Parameter` at its tensor."""
    for _ in range(4):
        if not (isinstance(value, Call) and isinstance(value.function, Global) and isinstance(value.arguments, tuple)):
            return value
        path, arguments = value.function.path, value.arguments
        if path in _WRAPPED and arguments:
            value = arguments[0]
        elif path == _SUBCLASS and len(arguments) == 4 and _is_plain_class(arguments[1]):
            value = Call(arguments[0], arguments[2], {})
        else:
            return value
    return value


def is_tensor(value: Any) -> bool:
    """Tell whether a value is a tensor with numbers in a storage."""
    value = unwrapped(value)
    return isinstance(value, Call) and isinstance(value.function, Global) and value.function.path in _REBUILT


def kind(value: Any) -> str:
    """Name what a value is, for error texts; never longer than a line, whatever the file holds."""
    if isinstance(value, Call) and isinstance(value.function, Global):
        return value.function.path[:100]
    return "a call" if isinstance(value, Call) else type(value).__name__


class _Range(io.RawIOBase):
    """Some bytes of a file as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError(22, "seeks before the start")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        content = self._file.read(count)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _opened(path: Path) -> BinaryIO:
    """Open a regular file that is there."""
    if not path.exists():
        raise FileError(f"{path}: not there")
    return regular_file.opened(path)


def _read_zip(path: Path, file: BinaryIO, start: int, size: int) -> TorchFile:
    """Read the directory of the zip and its pickle."""
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (ValueError, OverflowError, LookupError, MemoryError) as error:
        raise CheckpointError(f"{path}: the zip is broken: {error}") from error
    if len(infos) > _MAX_ENTRIES:
        raise CheckpointError(f"{path}: {len(infos)} entries; at most {_MAX_ENTRIES} are read")
    pickles = [info.filename for info in infos if info.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path}: a zip, but not one that torch.save wrote (no data.pkl)")
    prefix = pickles[0].removesuffix("data.pkl")
    own = [info for info in infos if info.filename.startswith(prefix)]
    entries = {info.filename.removeprefix(prefix): _place(info, file, path, size) for info in own}
    if len(entries) != len(own):
        raise CheckpointError(f"{path}: two entries of the zip have one name")
    if "byteorder" in entries and _entry(file, entries["byteorder"], 16, path) != b"little":
        raise CheckpointError(f"{path}: written on a big-endian machine; save it again on a usual one")
    value = pickle_data.read(_entry(file, entries["data.pkl"], pickle_data.MAX_BYTES, path), str(path))
    storages = {
        name.removeprefix("data/"): (start + offset, nbytes)
        for name, (offset, nbytes) in entries.items()
        if name.startswith("data/")
    }
    return TorchFile(path, value, storages)


def _place(info: zipfile.ZipInfo, file: BinaryIO, path: Path, size: int) -> tuple[int, int]:
    """Give offset and size of the data of a zip entry that is stored as it is."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise CheckpointError(f"{path}: the entry {info.filename!r} is compressed; torch.save never does that")
    if info.flag_bits & 1:
        raise CheckpointError(f"{path}: the entry {info.filename!r} is encrypted")
    if not 0 <= info.header_offset < size:
        raise CheckpointError(f"{path}: the zip is broken: the entry {info.filename!r} lies outside of it")
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) != _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{path}: the zip is broken at the entry {info.filename!r}")
    _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    offset = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if offset + info.file_size > size:
        raise CheckpointError(f"{path}: cut off within the entry {info.filename!r}")
    return offset, info.file_size


def _entry(file: BinaryIO, place: tuple[int, int], max_bytes: int, path: Path) -> bytes:
    offset, size = place
    if size > max_bytes:
        raise CheckpointError(f"{path}: an entry of {size} bytes where at most {max_bytes} are read")
    file.seek(offset)
    return file.read(size)


def _is_legacy(first: bytes) -> bool:
    """Tell whether a file begins with the magic number of the old format, pickled in any protocol."""
    try:
        return bool(pickle_data.read_next(io.BytesIO(first), "") == _LEGACY_MAGIC)
    except CheckpointError:
        return False


def _read_legacy(path: Path, file: BinaryIO, start: int, size: int) -> TorchFile:
    """Read the format of torch before 1.6: five pickles, then each storage behind the count of its elements."""
    content = io.BytesIO(file.read(_LEGACY_PICKLES_BYTES))
    read = pickle_data.read_next
    try:
        magic, protocol, system = (read(content, str(path)) for _ in range(3))
        value, keys = read(content, str(path)), read(content, str(path))
    except CheckpointError as error:
        if size > _LEGACY_PICKLES_BYTES and content.tell() > _LEGACY_PICKLES_BYTES - 1024:
            raise CheckpointError(
                f"{path}: its pickles are longer than {_LEGACY_PICKLES_BYTES} bytes; save it again with torch.save"
            ) from error
        raise
    assert magic == _LEGACY_MAGIC
    about = mapping(system) or {}
    if protocol != _LEGACY_PROTOCOL or about.get("little_endian") is not True:
        raise CheckpointError(
            f"{path}: written on a big-endian machine, or by a torch that is not known; save it again on a usual one"
        )
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{path}: the list of its storages is not understood")
    widths = _storage_widths(value, path)
    storages: dict[str, tuple[int, int]] = {}
    at = content.tell()
    for key in keys:
        file.seek(at)
        head = file.read(8)
        if len(head) != 8:
            raise CheckpointError(f"{path}: cut off before the storage {key[:40]}")
        numel = int.from_bytes(head, "little")
        nbytes = numel * widths.get(key, 0)
        if key not in widths or at + 8 + nbytes > size:
            raise CheckpointError(f"{path}: cut off within the storage {key[:40]}, or broken there")
        storages[key] = (start + at + 8, nbytes)
        at += 8 + nbytes
    return TorchFile(path, value, storages)


def _storage_widths(value: Any, path: Path) -> dict[str, int]:
    """Find every storage that a value refers to: key to the bytes of one element."""
    widths: dict[str, int] = {}
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Persistent):
            dtype, key, _, _ = _storage(item.identity, str(path))
            widths[key] = DTYPE_BYTES[dtype] if dtype else 1
            continue
        if not isinstance(item, dict | list | tuple | Call) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Call):
            waiting += [item.arguments, item.items, item.state]
        else:
            waiting += item.values() if isinstance(item, dict) else item
    return widths


def _refuse_hostile(path: Path, file: BinaryIO) -> None:
    """Say of a bare pickle that it would run code, if it would."""
    try:
        pickle_data.read_next(io.BytesIO(file.read(_LEGACY_PICKLES_BYTES)), str(path))
    except pickle_data.HostilePickleError:
        raise
    except CheckpointError:
        return


def _what_instead(start: bytes) -> str:
    """Say what a file is that torch.save did not write."""
    if start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "a pickle, but not one of torch.save; give the checkpoint that the training wrote"
    if start.startswith(b"version https"):
        return "only a Git LFS pointer is here; fetch the file itself with `git lfs pull`"
    if start[:1] in (b"<", b"{"):
        return "is text, not weights; was the download broken off by an error page?"
    if not start:
        return "is empty"
    return "not a .pth file (it is no zip)"


def _tensor(name: str, call: Call, file: TorchFile) -> Source:
    where = f"{file.path}: tensor {name[:200]!r}"
    arguments = call.arguments
    if not isinstance(arguments, tuple) or len(arguments) < 4 or not isinstance(arguments[0], Persistent):
        raise CheckpointError(f"{where}: is not described the way torch.save does it")
    storage, offset, shape, stride = arguments[:4]
    dtype, key, storage_numel, view_offset = _storage(storage.identity, where)
    if call.function.path.endswith("_v3"):
        given = arguments[6] if len(arguments) > 6 else None
        dtype = _DTYPES.get(given.name, "") if isinstance(given, Global) and given.module == "torch" else ""
    _refuse_lazy(arguments, where)
    shape, stride = sizes(shape), sizes(stride)
    if not dtype or shape is None or stride is None or len(shape) != len(stride) or len(shape) > 8:
        raise CheckpointError(f"{where}: its dtype or shape is not understood")
    if type(offset) is not int or offset < 0 or storage_numel < 0:
        raise CheckpointError(f"{where}: where it starts in its storage is not understood")
    if not _contiguous(shape, stride):
        raise CheckpointError(
            f"{where}: its numbers do not lie in a row (stride {stride}); save it again after .contiguous()"
        )
    if key not in file.storages:
        raise CheckpointError(f"{where}: its data, data/{key[:40]}, is not in the file")
    start, size = file.storages[key]
    first, count = (offset + view_offset) * DTYPE_BYTES[dtype], prod(shape) * DTYPE_BYTES[dtype]
    if first + count > size:
        raise CheckpointError(f"{where}: needs bytes {first} to {first + count} of data that has only {size}")
    return Source(file.path, start + first, dtype, shape)


def _refuse_lazy(arguments: tuple[Any, ...], where: str) -> None:
    """Refuse tensors whose numbers are to be negated or conjugated when they are read."""
    for argument in arguments[6:]:
        flags = mapping(argument) or {}
        if flags.get("neg") or flags.get("conj"):
            raise CheckpointError(f"{where}: is stored negated or conjugated; save it again after .resolve_neg()")


def _storage(identity: Any, where: str) -> tuple[str, str, int, int]:
    """Read torch's reference to a storage: ("storage", type, key, device, number of elements).

    Returns:
        dtype (empty for an untyped storage), key, number of elements, and the first element of a view (old format).
    """
    error = CheckpointError(f"{where}: its storage is not described the way torch.save does it")
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise error
    storage, key, numel = identity[1], identity[2], identity[4]
    if not isinstance(storage, Global) or not isinstance(key, str) or type(numel) is not int:
        raise error
    view = identity[5] if len(identity) == 6 else None
    offset = 0
    if view is not None:
        if not isinstance(view, tuple) or len(view) != 3 or type(view[1]) is not int or view[1] < 0:
            raise error
        offset = view[1]
    if storage.path == "torch.storage.UntypedStorage":
        return "", key, numel, offset
    dtype = _STORAGES.get(storage.name) if storage.module in ("torch", "torch.storage", "torch.cuda") else None
    if dtype is None:
        raise CheckpointError(f"{where}: has a storage of kind {storage.path[:100]}, which is not read")
    return dtype, key, numel, offset


def _is_plain_class(value: Any) -> bool:
    return isinstance(value, Global) and value.path in _PLAIN_CLASSES


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Tell whether the elements lie row-major without gaps; the stride of a dimension of size 1 does not matter."""
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return prod(shape) == 0
        expected *= size
    return True
