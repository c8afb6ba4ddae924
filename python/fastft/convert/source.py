"""Where the bytes of a tensor lie: a range of a file, its dtype and shape.

Made by the readers of checkpoint folders, adapters and .pth files; used in every plan. Dtypes are named as
safetensors names them.
"""

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from fastft.errors import CheckpointError, FileError

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "C64": 8,
}
# What the stream reads as numbers; everything else can only be copied.
FLOATS = ("F32", "F16", "BF16")
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor in a file, row-major and contiguous.

    Attributes:
        file: absolute path.
        offset: first byte, counted from the start of the file.
        dtype: a key of `DTYPE_BYTES`.
        shape: sizes of the dimensions.
    """

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return num_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a file looked like when it was planned with: another look before publishing must give the same."""

    path: Path
    size_bytes: int
    modified_ns: int
    inode: int


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a contiguous tensor."""
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(f"dtype {dtype} is not known; known are {', '.join(DTYPE_BYTES)}")
    return prod(shape) * DTYPE_BYTES[dtype]


def rows_of(source: Source, start: int, count: int) -> Source:
    """Give some rows (dimension 0) of a tensor as a tensor of its own; the bytes stay where they are."""
    row_bytes = source.nbytes // source.shape[0]
    return replace(source, offset=source.offset + start * row_bytes, shape=(count, *source.shape[1:]))


def fingerprint(path: Path) -> Fingerprint:
    """Note size, time and inode of a file.

    Raises:
        FileError: it is gone.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    return Fingerprint(path, status.st_size, status.st_mtime_ns, status.st_ino)


def check_unchanged(fingerprints: tuple[Fingerprint, ...]) -> None:
    """Refuse when an input was written to while it was read.

    Raises:
        FileError: naming the file.
    """
    for before in fingerprints:
        if fingerprint(before.path) != before:
            raise FileError(f"{before.path}: changed while it was being read; run again when nothing writes to it")


def read_bytes(source: Source, start: int = 0, count: int | None = None) -> bytes:
    """Read bytes `start` to `start + count` of the tensor (all of them by default).

    Raises:
        CheckpointError: the file ends earlier than its header says.
    """
    count = source.nbytes - start if count is None else count
    with source.file.open("rb") as file:
        file.seek(source.offset + start)
        content = file.read(count)
    if len(content) != count:
        raise CheckpointError(f"{source.file}: ends before the data of a tensor at byte {source.offset + start}")
    return content
