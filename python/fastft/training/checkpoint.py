"""Checkpoints that are there whole or not at all.

`checkpoint-N` is filled under a staging name, flushed to the disk and renamed, so that a kill or a full disk never
leaves a half one under its final name. A manifest inside holds the size of each file and what the run was, for
`resume`. Older checkpoints are deleted only when the newer one is durable.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft import console, publish
from fastft.errors import FileError

MANIFEST = "fastft_checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A folder `checkpoint-N`.

    Attributes:
        step: N, optimizer steps done.
        path: the folder.
        fault: why it cannot be used, None when it is whole.
        record: what the run was when it was written: the manifest without the files.
    """

    step: int
    path: Path
    fault: str | None
    record: Mapping[str, Any]


def save(run_dir: Path, step: int, fill: Callable[[Path], None], record: Mapping[str, Any]) -> Path:
    """Write `checkpoint-STEP` into the run folder.

    Args:
        run_dir: the run folder.
        step: optimizer steps done.
        fill: writes all files into the folder it is given.
        record: plain data, kept in the manifest.

    Returns:
        the folder; it is durable.

    Raises:
        FileError: the disk is full or refuses; nothing is left behind and older checkpoints are whole.
    """
    target = run_dir / f"checkpoint-{step}"
    try:
        with publish.staged(target, force=True) as staging:
            fill(staging)
            sizes = {str(f.relative_to(staging)): f.stat().st_size for f in sorted(staging.rglob("*")) if f.is_file()}
            manifest = {"step": step, "files": sizes, **record}
            (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except OSError as cause:
        if isinstance(cause, FileError):
            raise
        raise FileError(
            f"checkpoint {target}: cannot be written: {cause.strerror or cause}; {_room(run_dir)}"
        ) from cause
    return target


def find(run_dir: Path) -> list[Checkpoint]:
    """All checkpoints of a run, newest first, broken ones included."""
    if not run_dir.is_dir():
        return []
    steps = [(int(match[1]), f) for f in run_dir.iterdir() if (match := _NAME.fullmatch(f.name)) and f.is_dir()]
    return [examine(path) for _, path in sorted(steps, reverse=True)]


def examine(path: Path) -> Checkpoint:
    """Read a checkpoint's manifest and hold the files against it."""
    match = _NAME.fullmatch(path.name)
    step = int(match[1]) if match else -1
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest.pop("files"))
        step = int(manifest["step"])
    except OSError:
        return Checkpoint(step, path, f"{MANIFEST} is missing", {})
    except (ValueError, KeyError, TypeError, AttributeError):
        return Checkpoint(step, path, f"{MANIFEST} is broken", {})
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return Checkpoint(step, path, f"{name} is missing", manifest)
        if file.stat().st_size != size:
            return Checkpoint(step, path, f"{name} has {file.stat().st_size} bytes instead of {size}", manifest)
    return Checkpoint(step, path, None, manifest)


def keep_newest(run_dir: Path, keep: int) -> None:
    """Delete whole checkpoints but the `keep` newest; broken ones are left for the user to look at."""
    whole = [found for found in find(run_dir) if found.fault is None]
    for old in whole[keep:]:
        # Renamed first: a kill in the middle must not leave a half checkpoint under its final name.
        doomed = old.path.with_name(f".{old.path.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            old.path.rename(doomed)
            shutil.rmtree(doomed)
        except OSError as cause:
            console.warn(f"checkpoint {old.path.name}: cannot be deleted: {cause.strerror}")


def remove_leftovers(run_dir: Path) -> None:
    """Remove half-deleted checkpoints of a killed run."""
    for doomed in run_dir.glob(".checkpoint-*.deleted"):
        shutil.rmtree(doomed, ignore_errors=True)


def _room(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are free there"
