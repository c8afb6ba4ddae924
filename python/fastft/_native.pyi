# ruff: noqa: PYI021  the stub is where editors and `help` readers find the docs of a compiled module
"""The Rust core: headers, plans, shards, renames. Built from `rust/py`.

Errors are the classes of `fastft.errors`; a `RuntimeError` that speaks of a bug is a bug of ours.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Protocol, TypedDict, final, type_check_only

__all__ = [
    "TensorInfo",
    "block_maxima",
    "build_info",
    "read_header",
    "rename_exchange",
    "rename_noreplace",
    "run_plan",
    "split_into_shards",
]

@type_check_only
class _BuildInfo(TypedDict):
    version: str
    level: str
    threads: int
    commit: str | None

@type_check_only
class _Device(Protocol):
    """Computes merges elsewhere, in the CPU's bits; called by several threads.

    `prepare` gets the right factors of a tensor, each as (f32 bytes, rank, transposed): (rank, columns) row-major, or
    (columns, rank) with `transposed`. `merge` gets shape (rows, columns), dtypes of base and result, the base's bytes and
    the products in order, each as (index of its right factor, left factor (rows, rank) as f32 bytes, rank, scale); it
    returns the merged bytes and whether every finite base value stayed finite.
    """

    def prepare(self, tensor: str, rights: list[tuple[bytes, int, bool]], /) -> object: ...
    def merge(
        self,
        tensor: str,
        shape: tuple[int, int],
        dtypes: tuple[str, str],
        base: bytes,
        products: list[tuple[int, bytes, int, float]],
        round_delta: bool,
        /,
    ) -> tuple[bytes, bool]: ...
    def finish(self, tensor: str, /) -> object: ...

@type_check_only
class _RunReport(TypedDict):
    bytes_read: int
    bytes_written: int
    tensors: int

@final
class TensorInfo:
    """A tensor in a safetensors file: `dtype` as the header spells it ("BF16"), `offset` counted from the start of the file."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...

def build_info() -> _BuildInfo:
    """Version, CPU level ("scalar", "neon", "avx2", "avx512"), number of cores, and the commit if it was known when built.

    Raises:
        ValueError: FASTFT_SIMD names a level that is unknown or that this CPU lacks.
    """

def read_header(path: str | PathLike[str]) -> list[TensorInfo]:
    """The tensors of the safetensors file at `path`, in the order of their data, fully checked.

    Raises:
        CheckpointError: the file is no whole safetensors file; the text says what it is.
        FileError: the file cannot be opened or read.
    """

def run_plan(
    plan_json: str,
    *,
    threads: int | None = None,
    memory_budget_bytes: int = 134217728,
    progress: Callable[[int, int], object] | None = None,
    device: _Device | None = None,
) -> _RunReport:
    """Run a whole conversion: read, compute and write every tensor of the plan, without the GIL.

    Args:
        plan_json: the plan; its form is described in `rust/convert/src/plan.rs`.
        threads: workers; all cores when None.
        memory_budget_bytes: bytes of all buffers together; the adapter factors of the tensors in work come on top.
        progress: called in this thread with (bytes done, bytes in all) some 20 times a second and once at the end.
            What it raises stops the run and is raised here, as is a KeyboardInterrupt.
        device: computes the products and sums of merges instead of the CPU; what it raises is raised here.

    Raises:
        PlanError: the plan cannot be right, or a value cannot be represented in the output's dtype.
        CheckpointError: a source file is cut off, changed while it was read, or an adapter holds non-finite values.
        FileError: a file cannot be read or written. On any error the files written so far are incomplete.
    """

def block_maxima(
    plan_json: str,
    *,
    threads: int | None = None,
    memory_budget_bytes: int = 134217728,
    progress: Callable[[int, int], object] | None = None,
) -> bytes:
    """Scales (f32, little-endian) of the one tensor that the plan quantizes, exact as before any double quantization; nothing is written.

    The arguments and errors are those of `run_plan`; also a PlanError when the plan does not quantize exactly one tensor.
    """

def split_into_shards(sizes: Sequence[int], max_shard_size: int) -> list[list[int]]:
    """Indices of `sizes` (bytes) by shard of at most `max_shard_size` bytes, greedy in order as huggingface_hub does it."""

def rename_noreplace(src: str | PathLike[str], dst: str | PathLike[str]) -> None:
    """Rename `src` to `dst`; FileExistsError if there is a `dst`, OSError EINVAL where the file system cannot do it."""

def rename_exchange(a: str | PathLike[str], b: str | PathLike[str]) -> None:
    """Put two existing files or folders into each other's place in one step; OSError EINVAL or EXDEV where that cannot be done."""
