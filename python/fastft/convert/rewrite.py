"""A model folder made anew from another: what merge, quantize and dequantize plan, and how it is carried out.

A plan is plain data, made from headers; `execute` runs it into a staging folder, checks the result and puts it in place.
"""

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastft import console, publish
from fastft.convert import offsets, peft_layers
from fastft.convert.adapter import Adapter
from fastft.convert.folder import Checkpoint
from fastft.convert.model_config import ConfigEdits, edited_text
from fastft.convert.plan import OutputTensor, Shard, into_shards
from fastft.convert.sidefiles import copy_side_files
from fastft.convert.size import readable
from fastft.convert.source import check_unchanged
from fastft.convert.stream import check_gpu, write_shards
from fastft.convert.target import check_target


@dataclass(frozen=True)
class RewritePlan:
    """Everything that a merge (or a quantization) will do.

    Attributes:
        base: the folder that it is made from.
        adapters: with the weight that multiplies each.
        tensors: what the result holds, in the order of its files.
        max_shard_size_bytes: greedy limit of a file.
        changed: names of the tensors that an adapter changes.
        edits: what becomes of config.json.
        side_files: name in the result to the file to copy.
        notes: what the user should know, a sentence each.
        verb: what is done, for the last line: merged, quantized, dequantized.
        doing: the same for the progress bar.
    """

    base: Checkpoint
    adapters: tuple[tuple[Adapter, float], ...]
    tensors: tuple[OutputTensor, ...]
    max_shard_size_bytes: int
    changed: frozenset[str]
    edits: ConfigEdits
    side_files: Mapping[str, Path]
    notes: tuple[str, ...]
    verb: str = "merged"
    doing: str = "merging"

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The files of the result and the tensors in them."""
        return into_shards(self.tensors, self.max_shard_size_bytes)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def as_table(self) -> str:
        """Write the plan as text of 80 columns."""
        from fastft.convert.estimate import estimate
        from fastft.convert.plan_table import as_table

        return as_table(self, estimate(self))

    def as_json(self) -> str:
        """Write the plan as JSON."""
        from fastft.convert.estimate import estimate
        from fastft.convert.plan_table import as_json

        return as_json(self, estimate(self))

    @property
    def sources(self) -> tuple[Path, ...]:
        return (self.base.folder, *(adapter.folder for adapter, _ in self.adapters))


@dataclass(frozen=True, slots=True)
class RewriteReport:
    """How it went."""

    verb: str
    folder: Path
    num_bytes: int
    duration_s: float
    num_tensors: int
    num_changed: int
    num_checked: int
    peak_memory_bytes: int

    def line(self) -> str:
        """Say it in one line."""
        rate = self.num_bytes / max(self.duration_s, 1e-3)
        return (
            f"{self.verb} into {self.folder}: {readable(self.num_bytes)} in {self.duration_s:.1f} s ({readable(rate)}/s,"
            f" {readable(self.peak_memory_bytes)} of memory), {self.num_changed} of {self.num_tensors} tensors"
            f" changed, {self.num_checked} checked"
        )


def execute(plan: RewritePlan, save_path: Path, *, force: bool = False, on_gpu: bool = False) -> RewriteReport:
    """Run a plan: `save_path` holds the whole result afterwards, or is as it was before.

    Args:
        plan: from `plan`.
        save_path: folder to be made.
        force: replace it where it exists.
        on_gpu: let a GPU do the arithmetic of merges; the bits are the same.

    Raises:
        PlanError, FileError: the target is not allowed, or there is no room.
        CheckpointError: a value overflows or is not finite, an input changed, or the check of the result failed.
    """
    from fastft.convert.verify import check_sample

    started = time.monotonic()
    if on_gpu:
        check_gpu()
    num_bytes = plan.num_bytes + peft_layers.scratch_bytes(plan.tensors)
    check_target(save_path, plan.sources, num_bytes, force=force)
    for note in plan.notes:
        console.note(note)
    with publish.staged(save_path, force=force, num_bytes=num_bytes) as stage:
        tensors = offsets.found(peft_layers.materialized(plan.tensors, stage))
        shards = into_shards(tensors, plan.max_shard_size_bytes)
        write_shards(shards, stage, plan.doing, on_gpu=on_gpu, finite=True)
        copy_side_files(dict(plan.side_files), stage)
        (stage / "config.json").write_bytes(edited_text(plan.base.folder / "config.json", plan.base.config, plan.edits))
        num_checked = check_sample(tensors, stage)
        peft_layers.remove_scratch(stage)
        check_unchanged(plan.base.fingerprints)
        for adapter, _ in plan.adapters:
            check_unchanged(adapter.fingerprints)
    return RewriteReport(
        plan.verb,
        save_path,
        sum(tensor.nbytes for tensor in tensors),  # the plan does not know how long the offsets' texts are
        time.monotonic() - started,
        len(plan.tensors),
        len(plan.changed),
        num_checked,
        peak_memory_bytes(),
    )


def peak_memory_bytes() -> int:
    """The most memory that this process has held.

    What `getrusage` counts begins with the memory of the process that started this one; Linux keeps the right number.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
