"""Where the bytes of a tensor lie: a range of a file, its dtype and shape.

Made by the readers of checkpoint folders, adapters and .pth files; used in every plan. Dtypes are named as
safetensors names them.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Literal

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

QuantType = Literal["nf4", "fp4"]


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor in a file, row-major and contiguous.

    Attributes:
        file: absolute path.
        offset: first byte, counted from the start of the file.
        dtype: a key of `DTYPE_BYTES`; with a lens, of the numbers that come out.
        shape: sizes of the dimensions; with a lens, of the numbers that come out.
        lens: how the numbers are made of the bytes; None: they lie there as they are.
    """

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    lens: "Packed | Seen | Joined | None" = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return num_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class Nested:
    """Scales in 8 bit: F32 scales of each 256 of them, and their mean."""

    absmax: Source
    offset: float


@dataclass(frozen=True, slots=True)
class Packed:
    """The bytes are 4-bit codes of bitsandbytes; the numbers are dequantized as they are read (spec/formats.md 5.3).

    Attributes:
        quant_type: nf4 or fp4.
        blocksize: numbers that share a scale.
        absmax: the scales: F32, or U8 codes with `nested`.
        nested: how the scales are held in 8 bit.
        transposed: the codes are those of the transpose (GPT-2's Conv1D).
    """

    quant_type: QuantType
    blocksize: int
    absmax: Source
    nested: Nested | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """The numbers go through 4 bit as they are read: what QLoRA sees.

    They are rounded to the source's dtype, quantized, dequantized, and rounded to it again.

    Attributes:
        quant_type: nf4 or fp4.
        blocksize: numbers that share a scale.
        stored: dtype in the file.
        double_quant: the scales go through 8 bit.
        offset: with double quantization the mean of the scales; None: not known yet (`offsets.found`).
        transposed: the blocks run over the transpose (GPT-2's Conv1D).
    """

    quant_type: QuantType
    blocksize: int
    stored: str
    double_quant: bool = False
    offset: float | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Joined:
    """The numbers lie in pieces, one after another: what a sharded training left of a tensor.

    Copies, casts and rows read them (`plan`); the file and offset of the whole are those of the first piece.

    Attributes:
        parts: plain sources of the whole's dtype; together they have as many numbers.
    """

    parts: tuple[Source, ...]


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
    assert source.lens is None, "rows of 4-bit numbers do not begin at a byte of their own"
    row_bytes = source.nbytes // source.shape[0]
    return replace(source, offset=source.offset + start * row_bytes, shape=(count, *source.shape[1:]))


def stretch(source: Source, start: int, count: int) -> Source:
    """Give numbers `start` to `start + count` of a plain source as a flat tensor of its own."""
    assert source.lens is None, "only numbers that lie as they are can be cut anywhere"
    return replace(source, offset=source.offset + start * DTYPE_BYTES[source.dtype], shape=(count,))


def joined(parts: Sequence[Source], shape: tuple[int, ...]) -> Source:
    """Give plain sources of one dtype, with as many numbers as `shape`, as one tensor.

    Pieces that touch in their file become one; a single piece is a plain source.
    """
    merged: list[Source] = []
    for part in parts:
        if not part.numel:
            continue
        before = merged[-1] if merged else None
        if before is not None and before.file == part.file and before.offset + before.nbytes == part.offset:
            merged[-1] = replace(before, shape=(before.numel + part.numel,))
        else:
            merged.append(replace(part, shape=(part.numel,)))
    assert sum(part.numel for part in merged) == prod(shape)
    assert len({part.dtype for part in parts}) == 1
    first = merged[0] if merged else parts[0]
    lens = Joined(tuple(merged)) if len(merged) > 1 else None
    return Source(first.file, first.offset, first.dtype, shape, lens)


def pieces(source: Source, start: int = 0, count: int | None = None) -> list[Source]:
    """Give numbers `start` to `start + count` (all by default) as the plain sources that hold them."""
    end = source.numel if count is None else start + count
    parts = source.lens.parts if isinstance(source.lens, Joined) else (source,)
    found: list[Source] = []
    at = 0
    for part in parts:
        first, last = max(start, at), min(end, at + part.numel)
        if first < last:
            found.append(stretch(part, first - at, last - first))
        at += part.numel
    return found


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


def looked_at(place: Path) -> dict[Path, Fingerprint]:
    """Note how a file, or each file below a folder, looks before anything in it is read: headers belong to that state."""
    if not place.is_dir():
        return {place: fingerprint(place)} if place.exists() else {}
    files = (Path(folder, name) for folder, _, names in os.walk(place) for name in names)
    return {path: fingerprint(path) for path in files if path.is_file()}


def as_seen(seen: Mapping[Path, Fingerprint], files: Iterable[Path]) -> tuple[Fingerprint, ...]:
    """Give how files, by these names or by those that links stand for, looked before they were read.

    Raises:
        FileError: a file was not there then.
    """
    by_target = {path.resolve(): found for path, found in seen.items()}
    found = [(file, seen.get(file) or by_target.get(file.resolve())) for file in files]
    for file, before in found:
        if before is None:
            raise _changed(file)
    return tuple(before for _, before in found if before is not None)


def _changed(path: Path) -> FileError:
    return FileError(f"{path}: changed while it was being read; run again when nothing writes to it")


def check_unchanged(fingerprints: tuple[Fingerprint, ...]) -> None:
    """Refuse when an input was written to while it was read.

    Raises:
        FileError: naming the file.
    """
    for before in fingerprints:
        if fingerprint(before.path) != before:
            raise _changed(before.path)


def read_bytes(source: Source, start: int = 0, count: int | None = None) -> bytes:
    """Read bytes `start` to `start + count` of the tensor (all of them by default).

    Raises:
        CheckpointError: the file ends earlier than its header says.
    """
    count = source.nbytes - start if count is None else count
    if isinstance(source.lens, Joined):
        return _read_joined(source.lens, start, start + count)
    assert source.lens is None, "the bytes of a source with a lens are not its numbers"
    with source.file.open("rb") as file:
        file.seek(source.offset + start)
        content = file.read(count)
    if len(content) != count:
        raise CheckpointError(f"{source.file}: ends before the data of a tensor at byte {source.offset + start}")
    return content


def _read_joined(lens: Joined, start: int, end: int) -> bytes:
    found, at = [], 0
    for part in lens.parts:
        first, last = max(start, at), min(end, at + part.nbytes)
        if first < last:
            found.append(read_bytes(part, first - at, last - first))
        at += part.nbytes
    return b"".join(found)
