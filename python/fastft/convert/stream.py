"""Runs a plan: the native stream writes the shards into a folder, with progress on stderr, and the index last."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastft import _native, console
from fastft.convert.folder import read_safetensors
from fastft.convert.plan import Shard, index_name, index_text, native_json
from fastft.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    from fastft.convert.cuda_merge import CudaMerge


@dataclass(frozen=True, slots=True)
class Streamed:
    """What one run of the stream did."""

    bytes_read: int
    bytes_written: int
    num_tensors: int
    duration_s: float


def write_shards(
    shards: Sequence[Shard],
    folder: Path,
    what: str,
    *,
    single: str = "model.safetensors",
    on_gpu: bool = False,
    finite: bool = False,
) -> Streamed:
    """Write shards, and their index where there is more than one, into an existing folder.

    Args:
        shards: what to write.
        folder: where; normally a staging folder of `publish.staged`.
        what: the work in a word, for the progress bar ("merging").
        single: the name of the one file, which the index is named after.
        on_gpu: the arithmetic of merges runs on the GPU (`check_gpu` comes before).
        finite: a weight that is infinite or undefined is refused, also where it is only copied.

    Raises:
        CheckpointError: a value that overflows the output's dtype, or a file that changed; from the native code.
        PlanError: a value that is not finite.
        FileError: the disk.
    """
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    started = time.monotonic()
    with console.progress(what, total, "B") as advance:
        done = _native.run_plan(
            native_json(shards, folder, finite=finite),
            progress=lambda now, in_all: advance(total * now / max(in_all, 1)),
            device=_gpu() if on_gpu else None,
        )
    if len(shards) > 1:
        (folder / index_name(single)).write_text(index_text(shards), encoding="utf-8")
    check_written(shards, folder)
    return Streamed(done["bytes_read"], done["bytes_written"], done["tensors"], time.monotonic() - started)


def check_gpu() -> None:
    """Refuse `--device cuda` where it cannot be had.

    Raises:
        PlanError: torch, a GPU that it can use, or its compiler is not there.
    """
    way_out = "--device cpu (the default) needs no GPU and gives the same bits"
    try:
        import torch
    except ImportError as error:
        raise PlanError(f"--device cuda: torch is not installed; {way_out}") from error
    if not torch.cuda.is_available():
        raise PlanError(f"--device cuda: torch {torch.__version__} finds no CUDA device; {way_out}")
    try:
        _gpu()
    except ImportError as error:
        raise PlanError(f"--device cuda: triton, which compiles the kernel, is not installed; {way_out}") from error


def _gpu() -> "CudaMerge":
    from fastft.convert.cuda_merge import CudaMerge

    return CudaMerge()


def check_written(shards: Sequence[Shard], folder: Path) -> None:
    """Hold the headers of the written files against the plan.

    Raises:
        CheckpointError: a bug of ours, or a disk that lies.
    """
    for shard in shards:
        written = {
            name: (source.dtype, source.shape) for name, source in read_safetensors(folder / shard.file_name).items()
        }
        planned = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
        if written != planned:
            differing = [name for name in planned if written.get(name) != planned[name]]
            raise CheckpointError(f"{folder / shard.file_name}: not what was planned: {differing[:5]}")
