"""Checkpoints that are there whole or not at all.

`checkpoint-N` is filled under a staging name, flushed to the disk and renamed, so that a kill or a full disk never
leaves a half one under its final name. A manifest inside holds the size of each file, the hash of each that is not
large, and what the run was, for `resume`. Older checkpoints are deleted only when the newer one is durable.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft import console, publish
from fastft.convert.json_file import read_object
from fastft.errors import CheckpointError, FileError

MANIFEST = "fastft_checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# Larger files have no hash in the manifest: all of an adapter's checkpoint is hashed in a moment, the weights and
# moments of a whole model would hold up the training.
_MOST_HASHED_BYTES = 256 * 2**20
_MOST_STEPS = 2**53


@dataclass(frozen=True)
class Checkpoint:
    """A folder `checkpoint-N`.

    Attributes:
        step: N, optimizer steps done.
        path: the folder.
        fault: why it cannot be used, None when it is whole.
        record: what the run was when it was written: the manifest without the files.
        num_bytes: of all files together; 0 when it cannot be used.
    """

    step: int
    path: Path
    fault: str | None
    record: Mapping[str, Any]
    num_bytes: int = 0


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
        FileError: the disk is full or refuses, also when it has no room for one more like the newest; nothing is left
            behind and older checkpoints are whole.
    """
    target = run_dir / f"checkpoint-{step}"
    newest = next((found for found in find(run_dir) if found.path != target), None)
    num_bytes = 0 if newest is None else newest.num_bytes
    with publish.staged(target, force=True, num_bytes=num_bytes) as staging:
        fill(staging)
        files = [f for f in sorted(staging.rglob("*")) if f.is_file()]
        manifest = {
            "step": step,
            "files": {str(f.relative_to(staging)): f.stat().st_size for f in files},
            "sha256": {str(f.relative_to(staging)): _sha256(f) for f in files if _is_hashed(f)},
            **record,
        }
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return target


def find(run_dir: Path) -> list[Checkpoint]:
    """All checkpoints of a run, newest first, broken ones included; see `examine`."""
    if not run_dir.is_dir():
        return []
    steps = [(int(match[1]), f) for f in run_dir.iterdir() if (match := _NAME.fullmatch(f.name)) and f.is_dir()]
    return [examine(path) for _, path in sorted(steps, reverse=True)]


def examine(path: Path, *, with_hashes: bool = False) -> Checkpoint:
    """Read a checkpoint's manifest and hold the files against it.

    Args:
        path: the folder.
        with_hashes: read the files too; else their sizes are looked at, which a cut-off write has changed.
    """
    match = _NAME.fullmatch(path.name)
    step = int(match[1]) if match else -1
    try:
        if not (path / MANIFEST).exists():
            return Checkpoint(step, path, f"{MANIFEST} is missing", {})
        manifest = read_object(path / MANIFEST)
    except FileError:
        return Checkpoint(step, path, f"{MANIFEST} is no file that can be read", {})
    except OSError as cause:  # a link to itself, a folder that may not be looked into
        return Checkpoint(step, path, f"{MANIFEST} cannot be read: {cause.strerror}", {})
    except CheckpointError:
        return Checkpoint(step, path, f"{MANIFEST} is broken", {})
    files, hashes = manifest.pop("files", None), manifest.pop("sha256", {})
    if (reason := _what_is_wrong(manifest, files, hashes)) is not None:
        return Checkpoint(step, path, f"{MANIFEST} is broken: {reason}", {})
    if match and manifest["step"] != step:
        return Checkpoint(step, path, f"{MANIFEST} is that of step {manifest['step']}", {})
    step = manifest["step"]
    for name, size in files.items():
        file = path / name
        if not _is_file(file):
            return Checkpoint(step, path, f"{name} is missing", manifest)
        if file.stat().st_size != size:
            return Checkpoint(step, path, f"{name} has {file.stat().st_size} bytes instead of {size}", manifest)
        if with_hashes and name in hashes and _sha256(file) != hashes[name]:
            return Checkpoint(step, path, f"{name} is not what was written (its hash is another)", manifest)
    return Checkpoint(step, path, None, manifest, sum(files.values()))


def keep_newest(run_dir: Path, keep: int) -> None:
    """Delete whole checkpoints but the `keep` newest; broken ones are left for the user to look at."""
    whole = [found for found in find(run_dir) if found.fault is None]
    for old in whole[keep:]:
        try:
            publish.remove(old.path)
        except OSError as cause:
            console.warn(f"checkpoint {old.path.name}: cannot be deleted: {cause.strerror}")


def _what_is_wrong(manifest: Mapping[str, Any], files: Any, hashes: Any) -> str | None:
    """Tell which part of a manifest is not what `save` writes."""
    if type(manifest.get("step")) is not int or not 0 <= manifest["step"] < _MOST_STEPS:
        return "step is no number of steps"
    if not isinstance(files, dict) or not all(_is_inside(name) and type(size) is int for name, size in files.items()):
        return "files does not hold the size of each file"
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        return "sha256 does not hold the hash of each file"
    if not isinstance(manifest.get("config", {}), dict):
        return "config is no config"
    data = manifest.get("data", {})
    if not isinstance(data, dict) or not all(type(count) is int for count in data.values()):
        return "data does not hold counts"
    return None


def _is_inside(name: str) -> bool:
    """Whether a name from a manifest stays in the folder."""
    parts = Path(name).parts
    return bool(parts) and "\0" not in name and not name.startswith("/") and ".." not in parts


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _is_hashed(file: Path) -> bool:
    return file.stat().st_size <= _MOST_HASHED_BYTES


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
