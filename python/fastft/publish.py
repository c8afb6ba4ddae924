"""Put a folder or a file in place whole or not at all.

First form, until the one on renameat2 takes its place: staging beside the target, fsync, rename.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastft.errors import FileError


@contextmanager
def staged(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a staging folder beside `target`; rename it to `target` on success, remove it on an error.

    Raises:
        FileError: the target exists and `force` is False.
    """
    if target.exists() and not force:
        raise FileError(f"{target}: already there; --force replaces it")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield staging
        mask = os.umask(0)
        os.umask(mask)
        staging.chmod(0o777 & ~mask)
        for path in sorted(staging.rglob("*")):
            if path.is_file():
                path.chmod(0o666 & ~mask)
                _flush(path)
        _flush(staging)
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        staging.rename(target)
        _flush(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        _flush(Path(name))
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
