"""`fastft convert split`: the same model in files of another size; every tensor is copied, the rest goes along."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastft import publish
from fastft.convert.folder import Checkpoint, existing_folder, read_weights
from fastft.convert.json_file import read_object, read_regular_file
from fastft.convert.plan import Shard, into_shards, natural_order, taken_over
from fastft.convert.sidefiles import copy_side_files, side_files
from fastft.convert.size import DEFAULT_MAX_SHARD_SIZE_BYTES, readable
from fastft.convert.source import as_seen, check_unchanged, looked_at
from fastft.convert.stream import write_shards
from fastft.convert.target import check_target
from fastft.errors import FileError


@dataclass(frozen=True)
class SplitPlan:
    """What will be written.

    Attributes:
        source: the model folder; quantized weights are copied as any others.
        shards: the new files.
        side_files: name to the file to copy, config.json not among them.
    """

    source: Checkpoint
    shards: tuple[Shard, ...]
    side_files: Mapping[str, Path] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)


@dataclass(frozen=True, slots=True)
class SplitReport:
    """How it went."""

    folder: Path
    num_bytes: int
    num_files: int
    duration_s: float

    def line(self) -> str:
        """Say it in one line."""
        rate = self.num_bytes / max(self.duration_s, 1e-3)
        return (
            f"written to {self.folder}: {readable(self.num_bytes)} in {self.num_files} files, {self.duration_s:.1f} s"
            f" ({readable(rate)}/s)"
        )


def plan(source: Path, *, max_shard_size_bytes: int = DEFAULT_MAX_SHARD_SIZE_BYTES) -> SplitPlan:
    """Plan new files for a model folder (safetensors or pytorch_model.bin).

    Raises:
        FileError, CheckpointError: the folder is missing or broken.
    """
    folder = existing_folder(source, "the model")
    seen = looked_at(folder)
    config = folder / "config.json"
    if not config.exists():
        raise FileError(f"{folder}: no config.json there; give the folder of a model in Hugging Face's layout")
    tensors, files = read_weights(folder)
    checkpoint = Checkpoint(folder, read_object(config), tensors, as_seen(seen, (config, *files)))
    ordered = sorted(tensors, key=natural_order)
    outputs = [taken_over(name, tensors[name], None) for name in ordered]
    return SplitPlan(checkpoint, into_shards(outputs, max_shard_size_bytes), side_files(folder))


def execute(plan: SplitPlan, save_path: Path, *, force: bool = False) -> SplitReport:
    """Run a plan: `save_path` holds the whole result afterwards, or is as it was before.

    Raises:
        PlanError, FileError: the target is not allowed, or there is no room.
        CheckpointError: an input changed.
    """
    started = time.monotonic()
    check_target(save_path, [plan.source.folder], plan.num_bytes, force=force)
    with publish.staged(save_path, force=force, num_bytes=plan.num_bytes) as stage:
        write_into(stage, plan)
    return SplitReport(save_path, plan.num_bytes, len(plan.shards), time.monotonic() - started)


def write_into(folder: Path, plan: SplitPlan) -> None:
    """Write the model into an existing (staging) folder.

    Raises:
        CheckpointError: an input changed.
    """
    write_shards(plan.shards, folder, "splitting")
    copy_side_files(dict(plan.side_files), folder)
    (folder / "config.json").write_bytes(read_regular_file(plan.source.folder / "config.json"))
    check_unchanged(plan.source.fingerprints)
