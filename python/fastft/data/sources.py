"""Rows from files, folders and hub data sets, each with the place it came from.

Reads json (an array, an object that holds one, or one value per line), jsonl, parquet, csv and txt, each also as .gz,
as UTF-8 with or without a byte order mark. A txt file is one row with the single column `text`: its documents are not
guessed at, packing cuts it where max_length demands. Rows go to `formats`. Everything is read as a stream, so that a file
may be larger than the memory; except a json object around the rows, and a txt file, which is one row.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fastft import regular_file
from fastft.data.dialogue import Where
from fastft.errors import DataError, FileError, HubError

KINDS = ("json", "jsonl", "parquet", "csv", "txt")
# An object with one of these keys is a row by itself; any other object must hold one list of rows.
ROW_KEYS = frozenset({"messages", "conversations", "conversation", "instruction", "text"})
# Characters of a json file that are read at a time.
CHUNK_CHARACTERS = 1 << 20
# White space of JSON.
BLANKS = re.compile(r"[ \t\n\r]*")
# A row (a line, an element of an array, a cell) is read whole: the largest document is far smaller, and what is larger
# is a broken file or one that was packed to fill the memory.
MAX_ROW_BYTES = 32 * 1024 * 1024
# The same of a txt file, and of an object around the rows.
MAX_WHOLE_BYTES = 64 * 1024 * 1024
# Values in one of them.
MAX_VALUES = 3_000_000
# Rows of a parquet file that are unpacked at a time, and bytes that they may take.
BATCH_ROWS, BATCH_BYTES = 1024, 32 * 1024 * 1024
# What the rows of a column of a parquet file may have on average.
MAX_MEAN_BYTES = 8 * 1024 * 1024


class HubDataset(Protocol):
    """A data set on a hub, as `hub.locate.dataset` describes it."""

    @property
    def id(self) -> str: ...
    @property
    def subset(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def revision(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in its file: a mapping of columns, or a bare list of messages."""

    value: Any
    where: Where
    share: float  # part of the file that is read with this row, 0 to 1; moves the progress bar


def files(path: Path) -> list[Path]:
    """The files of rows at `path`: itself, or all below a folder, sorted by path.

    Hidden files and files of other kinds in a folder are left alone (README, images).

    Raises:
        FileError: nothing is there.
        DataError: a file of an unknown kind, or a folder without any file of rows.
    """
    if path.is_dir():
        found = sorted(
            file
            for file in path.rglob("*")
            if file.is_file() and kind(file) and not any(p.startswith(".") for p in file.relative_to(path).parts)
        )
        if not found:
            raise DataError(
                f"data {path}: no file of rows in this folder; known are {', '.join(KINDS)} and these as .gz"
            )
        return found
    if not path.exists():
        raise FileError(f"data {path}: no such file or folder")
    if kind(path) is None:
        raise DataError(f"data {path}: unknown kind of file; known are {', '.join(KINDS)} and these as .gz")
    return [path]


def kind(path: Path) -> str | None:
    """Which of `KINDS` a file is by its name (`a.json.gz` is json), or None."""
    suffixes = [suffix.lower().lstrip(".") for suffix in path.suffixes]
    if suffixes and suffixes[-1] == "gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else None


def rows(path: Path) -> Iterator[Row]:
    """The rows of one file, in order.

    Raises:
        DataError: broken JSON, csv, parquet or UTF-8, with the line.
        FileError: the file cannot be opened.
    """
    readers = {"json": _json, "jsonl": _jsonl, "parquet": _parquet, "csv": _csv, "txt": _txt}
    chosen = kind(path)
    if chosen is None:
        raise DataError(f"data {path}: unknown kind of file; known are {', '.join(KINDS)} and these as .gz")
    try:
        yield from readers[chosen](path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"data {path}: not a whole gzip file ({error})") from error
    except (FileError, DataError):
        raise
    except OSError as error:
        raise FileError(f"data {path}: cannot be read ({error.strerror or error})") from error


def hub_name(dataset: HubDataset) -> str:
    """What a hub data set is called in reports."""
    return f"{dataset.id if dataset.subset is None else f'{dataset.id} ({dataset.subset})'}/{dataset.split}"


def hub_table(dataset: HubDataset) -> Any:
    """The table of a data set on the Hugging Face hub (or in its cache), through `datasets`; its files are mapped.

    Raises:
        HubError: the data set cannot be had.
    """
    from fastft.hub import huggingface, quiet

    quiet.prepare()
    import datasets

    with quiet.spoken_for():
        try:
            return undecoded(
                datasets.load_dataset(dataset.id, dataset.subset, split=dataset.split, revision=dataset.revision)
            )
        except Exception as error:  # load_dataset raises dozens of kinds; each means that there is no such data set
            raise HubError(
                huggingface.dataset_reason(hub_name(dataset), dataset.id, dataset.revision, error)
            ) from error


def undecoded(table: Any) -> Any:
    """The table with its images as bytes: `datasets` would decode each on the way, unchecked."""
    import datasets

    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return table


def table_rows(table: Any, name: str) -> Iterator[Row]:
    """The rows of a table of `datasets`."""
    for index, value in enumerate(table):
        yield Row(value, Where(name, index + 1), (index + 1) / len(table))


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """Open a regular file; a pipe or a device is refused instead of waited for.

    Raises:
        FileError: it is no regular file.
    """
    plain = regular_file.opened(path, f"data {path}")
    return _Unpacked(plain) if path.suffix.lower() == ".gz" else plain


class _Unpacked(gzip.GzipFile):
    """A .gz that closes its file."""

    def __init__(self, packed: io.BufferedReader) -> None:
        super().__init__(fileobj=packed, mode="rb")
        self._packed = packed

    def close(self) -> None:
        super().close()
        self._packed.close()


def _lines(stream: gzip.GzipFile | io.BufferedReader, path: Path) -> Iterator[bytes]:
    """The lines with their ends.

    Raises:
        DataError: a line is too long.
    """
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise DataError(f"data {path}:{number}: {_too_long('a line')}")
        yield line


def _too_long(what: str) -> str:
    return f"{what} of more than {MAX_ROW_BYTES >> 20} MiB, and no row may be longer"


def _done(stream: gzip.GzipFile | io.BufferedReader, num_bytes: int) -> int:
    """Bytes of the file that have been read, where `num_bytes` came out of the stream: fewer of a .gz."""
    packed: Any = stream.fileobj if isinstance(stream, gzip.GzipFile) else None
    return num_bytes if packed is None else int(packed.tell())


def _text(path: Path) -> str:
    with _open(path) as stream:
        raw = stream.read(MAX_WHOLE_BYTES + 1)
        if len(raw) > MAX_WHOLE_BYTES:
            raise DataError(
                f"data {path}: more than {MAX_WHOLE_BYTES >> 20} MiB that can only be read as a whole; write one row per"
                " line (jsonl) or one list of rows (json), which are read as a stream"
            )
        return _decode(raw, path, 1)


def _decode(raw: bytes, path: Path, first_line: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise DataError(
            f"data {path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error
    return text.removeprefix("\ufeff") if first_line == 1 else text


def _json(path: Path) -> Iterator[Row]:
    with _open(path) as stream:
        text = _Text(stream, path)
        text.more()
        first = text.skip_blanks()
        is_lines = text.is_lines()  # many data sets put one value per line into a .json file
        if first == "[" and not is_lines:
            yield from _elements(text, path)
            return
    yield from _jsonl(path) if is_lines else _whole_json(path)


def _whole_json(path: Path) -> Iterator[Row]:
    text = _text(path)
    _check_values(text, path, 1)
    try:
        value = json.loads(text)
        _check_characters(value, text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and error.lineno > 1:
            yield from _jsonl(path)  # a first line that is very long
            return
        raise DataError(_broken(path, error)) from error
    found = _row_list(value, path)
    for index, row in enumerate(found):
        yield Row(row, Where(str(path), index + 1), (index + 1) / len(found))


class _Text:
    """A file as text, of which only the part around one value is in memory."""

    def __init__(self, stream: gzip.GzipFile | io.BufferedReader, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._size = max(path.stat().st_size, 1)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0
        # Lines before `buffer`, and characters of its first line before it: places of errors are told by both.
        self._lines = 0
        self._column = 0
        self.buffer = ""
        self.place = 0
        self.ended = False

    @property
    def share(self) -> float:
        """Part of the file that has been read, 0 to 1."""
        return min(_done(self._stream, self._bytes) / self._size, 1.0)

    def more(self, count: int = CHUNK_CHARACTERS) -> None:
        """Drop what lies before `place` and read on."""
        dropped = self.buffer[: self.place]
        line_end = dropped.rfind("\n")
        self._column = len(dropped) - line_end - 1 if line_end >= 0 else self._column + len(dropped)
        self._lines += dropped.count("\n")
        self.buffer, self.place = self.buffer[self.place :], 0
        raw = self._stream.read(count)
        first = not self._bytes
        self._bytes += len(raw)
        self.ended = not raw
        try:
            read = self._decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            line = 1 + self._lines + self.buffer.count("\n") + error.object.count(b"\n", 0, error.start)
            raise DataError(
                f"data {self._path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8"
            ) from error
        self.buffer += read.removeprefix("\ufeff") if first else read

    def skip_blanks(self) -> str:
        """The next character that is not white space, at `place` then; "" at the end."""
        while True:
            found = BLANKS.match(self.buffer, self.place)
            assert found is not None
            self.place = found.end()
            if self.place < len(self.buffer) or self.ended:
                return self.buffer[self.place : self.place + 1]
            self.more()

    def is_lines(self) -> bool:
        """Whether the first line is a value by itself and another follows: one list of messages per line."""
        line, line_end, rest = self.buffer[self.place :].partition("\n")
        if not line_end or not rest.strip():
            return False
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return False
        return True

    def value(self) -> Any:
        """The value at `place`, which is then behind it.

        Raises:
            DataError: there is none.
        """
        wanted = CHUNK_CHARACTERS
        while True:
            _check_values(self.buffer, self._path, self._line)
            try:
                found, end = _DECODER.raw_decode(self.buffer, self.place)
                _check_characters(found, self.buffer[self.place : end])
            except json.JSONDecodeError as error:
                if self.ended:
                    raise self.broken(error.msg, error.pos) from error
            except (RecursionError, ValueError) as error:
                raise DataError(_broken(self._path, error)) from error
            else:
                # A number at the very end of the buffer may go on behind it.
                if end < len(self.buffer) or self.ended:
                    self.place = end
                    return found
            if len(self.buffer) - self.place > MAX_ROW_BYTES:
                raise DataError(f"data {self._path}:{self._line}: {_too_long('a value')}")
            self.more(wanted)
            wanted *= 2  # a value of many chunks is tried a few times only

    @property
    def _line(self) -> int:
        return 1 + self._lines + self.buffer.count("\n", 0, self.place)

    def broken(self, what: str, place: int) -> DataError:
        """An error with line and column of a place in the buffer."""
        before = self.buffer[:place]
        line_end = before.rfind("\n")
        column = place - line_end if line_end >= 0 else self._column + place + 1
        line = 1 + self._lines + before.count("\n")
        return DataError(f"data {self._path}:{line}: broken JSON, {what} at column {column}")


_DECODER = json.JSONDecoder()


def _elements(text: _Text, path: Path) -> Iterator[Row]:
    """The elements of the array at `text`, each as soon as it is read."""
    text.place += 1
    number = 0
    if text.skip_blanks() == "]":
        text.place += 1
    else:
        while True:
            text.skip_blanks()
            value = text.value()
            number += 1
            following = text.skip_blanks()
            last = following == "]" and text.ended
            yield Row(value, Where(str(path), number), 1.0 if last else text.share)
            if following == "]":
                text.place += 1
                break
            if following != ",":
                raise text.broken("Expecting ',' delimiter", text.place)
            text.place += 1
    if text.skip_blanks():
        raise text.broken("Extra data", text.place)


def _broken(path: Path, error: Exception, line: int | None = None) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"data {path}:{line or error.lineno}: broken JSON, {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return f"data {path}:{line or 1}: JSON nested too deeply"
    return f"data {path}:{line or 1}: JSON that cannot be read, {error}"


def _check_values(text: str, path: Path, line: int) -> None:
    """Refuse a long text of very many values before they are made: each costs up to thirty times its characters.

    Raises:
        DataError: there are too many.
    """
    if len(text) > MAX_VALUES and sum(map(text.count, "[{,")) > MAX_VALUES:
        raise DataError(f"data {path}:{line}: a value that holds more than {MAX_VALUES} others")


def _check_characters(value: Any, text: str) -> None:
    """Refuse halves of a character (an escaped surrogate alone), which no tokenizer takes.

    Raises:
        ValueError: there is one.
    """
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            raise ValueError(f"{half} is half of a character; escapes of such come in pairs") from error


def _row_list(value: Any, path: Path) -> Sequence[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        if ROW_KEYS & value.keys():
            return [value]
        lists = [name for name, item in value.items() if isinstance(item, list)]
        if len(lists) == 1:
            return list(value[lists[0]])
        raise DataError(
            f"data {path}: an object with {len(lists)} lists ({', '.join(map(repr, lists)) or 'none'}); "
            "a json file holds a list of rows, or an object with exactly one such list"
        )
    raise DataError(f"data {path}: holds a {type(value).__name__}, not a list of rows")


def _jsonl(path: Path) -> Iterator[Row]:
    size, done = max(path.stat().st_size, 1), 0
    with _open(path) as stream:
        for index, raw in enumerate(_lines(stream, path)):
            done += len(raw)
            line = _decode(raw, path, index + 1)
            if not line.strip():
                continue
            _check_values(line, path, index + 1)
            try:
                value = json.loads(line)
                _check_characters(value, line)
            except (ValueError, RecursionError) as error:
                raise DataError(_broken(path, error, index + 1)) from error
            yield Row(value, Where(str(path), index + 1, "line"), min(_done(stream, done) / size, 1.0))


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW_BYTES)
    size = max(path.stat().st_size, 1)
    with _open(path) as stream:
        lines = _Lines(stream, path)
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                raise DataError(f"data {path}: the file is empty; a csv file starts with the names of its columns")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"data {path}:{reader.line_num}: {len(cells)} cells, but the header names {len(header)} columns"
                    )
                where = Where(str(path), reader.line_num, "line")
                yield Row(dict(zip(header, cells, strict=True)), where, min(_done(stream, lines.num_bytes) / size, 1.0))
        except csv.Error as error:
            raise DataError(f"data {path}:{reader.line_num}: broken csv, {error}") from error


class _Lines:
    """The lines of a file as text, with their line ends."""

    def __init__(self, stream: gzip.GzipFile | io.BufferedReader, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._number = 0
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        for raw in _lines(self._stream, self._path):
            self._number += 1
            self.num_bytes += len(raw)
            if b"\0" in raw:
                raise DataError(f"data {self._path}:{self._number}: a NUL character; this is no text")
            yield _decode(raw, self._path, self._number)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = 0
    try:
        with _open(path) as stream:
            table = pq.ParquetFile(stream)
            total = max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(batch_size=_batch_rows(table.metadata, path)):
                for value in batch.to_pylist():
                    index += 1
                    yield Row(value, Where(str(path), index), index / total)
    except pa.ArrowException as error:
        raise DataError(f"data {path}, after row {index}: broken parquet ({error})") from error


def _batch_rows(metadata: Any, path: Path) -> int:
    """How many rows can be unpacked at a time.

    Raises:
        DataError: the rows of a column are too large to be documents.
    """
    most = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in range(group.num_columns):
            chunk = group.column(column)
            each = chunk.total_uncompressed_size // max(group.num_rows, 1)
            if each > MAX_MEAN_BYTES:
                raise DataError(
                    f"data {path}: its column {chunk.path_in_schema!r} has {group.num_rows} rows of {each} bytes on"
                    f" average; at most {MAX_MEAN_BYTES} are read"
                )
            most = max(most, each)
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(most, 1)))


def _txt(path: Path) -> Iterator[Row]:
    yield Row({"text": _text(path)}, Where(str(path), 1, "line"), 1.0)
