"""The commands as functions: a plan, its run, and a report, with progress for the caller instead of stderr."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TypeAlias

from fastft import console
from fastft.convert.size import DEFAULT_MAX_SHARD_SIZE_BYTES, parse_size
from fastft.errors import ArrayError

Progress: TypeAlias = Callable[[str, int, int], object]
"""Called with (what is done, bytes done, bytes in all), in the thread of the caller; what it raises stops the work."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """How a merge went.

    Attributes:
        folder: the result.
        num_bytes: of its tensors.
        num_tensors: in all.
        num_changed: that an adapter changed.
        num_checked: that were computed a second time and compared.
        duration_s: wall time.
        notes: what a person should know, a sentence each.
    """

    folder: Path
    num_bytes: int
    num_tensors: int
    num_changed: int
    num_checked: int
    duration_s: float
    notes: tuple[str, ...]


def merge_checkpoint(
    base: str | PathLike[str],
    adapter: str | PathLike[str] | Sequence[tuple[str | PathLike[str], float]],
    save_path: str | PathLike[str],
    *,
    dtype: str = "auto",
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE_BYTES,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge an adapter into a model folder: `fastft convert merge` as a function.

    Args:
        base: folder of the base model.
        adapter: folder of the adapter; or several, each with the weight that multiplies its update.
        save_path: folder to be made; it holds the whole result afterwards, or is as it was before.
        dtype: auto (each tensor keeps the base's), bf16, fp16 or fp32.
        max_shard_size: greatest size of a file, in bytes or as text ("2GB").
        force: replace a folder of models that is there.
        progress: told how far the work is, some 20 times a second.

    Raises:
        FastftError: PlanError, CheckpointError or FileError: what is missing, broken, or cannot be merged right.
    """
    from fastft.convert import merge

    limit = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    if limit < 1:
        raise ArrayError(f"merge_checkpoint: max_shard_size {limit} is not allowed; give at least 1 byte")
    adapters = (
        [(Path(adapter), 1.0)]
        if isinstance(adapter, str | PathLike)
        else [(Path(folder), weight) for folder, weight in adapter]
    )
    listener = _Listener(progress)
    with console.heard_by(listener):
        plan = merge.plan(Path(base), adapters, dtype=dtype, max_shard_size_bytes=limit)
        report = merge.execute(plan, Path(save_path), force=force)
    return MergeReport(
        report.folder,
        report.num_bytes,
        report.num_tensors,
        report.num_changed,
        report.num_checked,
        report.duration_s,
        tuple(listener.notes),
    )


class _Listener:
    """Hands progress on and keeps the notes."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.notes: list[str] = []

    def progress(self, what: str, done: float, total: float) -> None:
        if self._progress is not None:
            self._progress(what, int(done), int(total))

    def note(self, text: str) -> None:
        self.notes.append(text)
