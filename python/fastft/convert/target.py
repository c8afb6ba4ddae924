"""Where a conversion may write: never onto, into or around what it reads, and only where there is room."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from fastft.convert.size import readable
from fastft.errors import FileError, PlanError

# Side files, headers, the index and the file system's own bookkeeping.
_SLACK_BYTES = 64 * 1024 * 1024


def check_target(target: Path, sources: Sequence[Path], *, force: bool) -> None:
    """Refuse a target that cannot be right.

    Args:
        target: the folder to be made.
        sources: folders and files that are read.
        force: an existing folder may be replaced.

    Raises:
        PlanError: the target is, holds, or lies in a source.
        FileError: it exists and `force` is not given, or it is a file or a link.
    """
    resolved = Path(os.path.realpath(target))
    for source in sources:
        real = Path(os.path.realpath(source))
        if resolved == real or _same_file(target, source):
            raise PlanError(f"{target}: the result cannot be written over what it is made from")
        if real in resolved.parents:
            raise PlanError(f"{target}: lies inside {source}, which is read; choose a folder outside it")
        if resolved in real.parents:
            raise PlanError(f"{target}: {source}, which is read, lies inside it; choose another folder")
    if target.is_symlink():
        raise FileError(f"{target}: is a link; give the folder itself")
    if target.exists() and not target.is_dir():
        raise FileError(f"{target}: is a file; give the name of a folder")
    if target.exists() and not force:
        raise FileError(f"{target}: exists already; give another folder, or --force to replace it")


def check_space(target: Path, num_bytes: int) -> None:
    """Refuse to start when the disk of `target` cannot hold the result.

    Raises:
        FileError: saying how much is needed and how much is free.
    """
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    needed = num_bytes + min(_SLACK_BYTES, num_bytes // 20)
    if free < needed:
        raise FileError(
            f"{target}: not enough room: {readable(needed)} are needed, {readable(free)} are free on that disk"
        )


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
