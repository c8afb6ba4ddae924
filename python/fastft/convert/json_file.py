"""Reading JSON that comes with a checkpoint, without trusting it.

Used for config.json, adapter_config.json and the index of a sharded checkpoint.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastft import regular_file
from fastft.errors import CheckpointError, FileError

# An index of a very large model has some 20 MB and 200,000 entries; a tokenizer is never read here. Each value can
# cost a hundred times its bytes in memory, so both are bounded.
_MAX_BYTES = 64 * 1024 * 1024
_MAX_VALUES = 1_000_000


def read_regular_file(path: Path, max_bytes: int = _MAX_BYTES) -> bytes:
    """Read a small file whole; a FIFO, a device or a folder is refused instead of waited for.

    Raises:
        FileError: the file cannot be opened or is no regular file.
        CheckpointError: it is longer than `max_bytes`.
    """
    try:
        opened = regular_file.opened(path)
    except FileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise FileError(f"{path}: cannot be read: {reason}") from error
    with opened as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > max_bytes:
            raise CheckpointError(f"{path}: {num_bytes} bytes are too many; at most {max_bytes} are read")
        return file.read(max_bytes)


def read_object(path: Path, max_bytes: int = _MAX_BYTES) -> dict[str, Any]:
    """Read a JSON object of at most `max_bytes`; the order of its keys is kept.

    Raises:
        FileError: the file cannot be opened.
        CheckpointError: not UTF-8, not JSON, a key twice, nested too deep, or not an object.
    """
    return parse_object(read_regular_file(path, max_bytes), str(path))


def parse_object(content: bytes, where: str) -> dict[str, Any]:
    """Parse the bytes of a JSON object that was found at `where` (for the error texts).

    Raises:
        CheckpointError: see `read_object`.
    """
    if content.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{where}: only a Git LFS pointer is here; fetch the file itself with `git lfs pull`")
    if sum(map(content.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise CheckpointError(f"{where}: holds more than {_MAX_VALUES} values")
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: not JSON: {error.msg} at line {error.lineno}") from error
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{where}: the key {error} stands there twice") from error
    except RecursionError as error:
        raise CheckpointError(f"{where}: not JSON that can be read: it is nested too deep") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not JSON that can be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object is expected, not {type(value).__name__}")
    return value


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _DuplicateKeyError(repr(key))
        found[key] = value
    return found


class _DuplicateKeyError(Exception):
    """A key stands twice in one JSON object."""
