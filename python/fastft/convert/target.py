"""Where a conversion may write: never onto, into or around what it reads, and only where there is room."""

import os
from collections.abc import Sequence
from pathlib import Path

from fastft import publish
from fastft.errors import PlanError

# Side files, headers, the index and the file system's own bookkeeping.
_SLACK_BYTES = 64 * 1024 * 1024


def check_target(target: Path, sources: Sequence[Path], num_bytes: int, *, force: bool) -> None:
    """Refuse a target that cannot be right, or whose disk has no room, before anything is written.

    Args:
        target: the folder to be made.
        sources: folders and files that are read.
        num_bytes: bytes of all tensors of the result.
        force: an existing folder of a model may be replaced.

    Raises:
        PlanError: the target is, holds, or lies in a source.
        FileError: it exists and `force` is not given, it is a file or a link, or there is no room.
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
    publish.check_target(target, force=force)
    publish.require_space(target, num_bytes + min(_SLACK_BYTES, num_bytes // 20))


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False
