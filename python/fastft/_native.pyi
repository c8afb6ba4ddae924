# ruff: noqa: PYI021  the stub is where editors and `help` readers find the docs of a compiled module
"""The Rust core: headers, plans, shards, renames. Built from `rust/py`.

Errors are the classes of `fastft.errors`; a `RuntimeError` that speaks of a bug is a bug of ours.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Protocol, TypedDict, final, type_check_only

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ByteLevel",
    "ByteLevelScan",
    "TensorInfo",
    "block_maxima",
    "build_info",
    "cast",
    "code_book",
    "dequantize_4bit",
    "dequantize_scales",
    "merge_low_rank",
    "nested_map",
    "quantize_4bit",
    "quantize_scales",
    "read_header",
    "read_into",
    "rename_exchange",
    "rename_noreplace",
    "run_plan",
    "split_into_shards",
    "write_file",
]

# Arrays are flat, contiguous and in their own memory: u8 for numbers of any dtype, f32 for scales. What is written to
# may share no byte with anything else of the call. Elements are "float32", "float16" and "bfloat16".

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

@final
class ByteLevel:
    """A byte-level tokenizer that remembers the tokens of pieces.

    Args:
        pattern: gpt2, qwen2 or llama3: how a text is cut into pieces.
        first: content and id of the added tokens that are looked for first.
        then: those looked for in what is left.
        shapes: three u16 for each token by id: its bytes of text, and how many bytes of white space at its start and its
            end are not counted as part of it.
    """

    def __new__(
        cls,
        pattern: str,
        first: Sequence[tuple[str, int]],
        then: Sequence[tuple[str, int]],
        shapes: bytes,
    ) -> ByteLevel: ...
    @staticmethod
    def of_words(joiners: str, prepends: bool, added: Sequence[tuple[str, int]], shapes: bytes) -> ByteLevel:
        """A tokenizer of SentencePiece's kind, cut before each blank that no token can have behind what stands before it.

        `joiners`: the characters that stand before a blank inside a token. `prepends`: whether a blank is put before each
        text between `added` tokens; pieces with it are asked for with a byte 0xFF before them. Texts with the sign of a
        blank, U+2581, are refused.
        """

    def learn_block(self, block: int, classes: bytes) -> None:
        """Learn the classes of 4,096 characters: 1 is a letter, 2 a number, 3 white space, 0 something else."""

    def scan(self, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]], threads: int) -> ByteLevelScan:
        """Cut texts and look up their pieces; `spans` are the learned stretches of each in characters, in order.

        Raises ValueError for spans that are outside their text or out of order.
        """

    def finish(self, scan: ByteLevelScan, answers: Sequence[Sequence[int]]) -> tuple[bytes, bytes, bytes]:
        """Put the tokens together, `answers` being those of `scan.asked`, and remember them.

        Returns ids (u32), whether each is learned (u8) and the number of tokens of each text (u64), one text after the
        other. Raises ValueError where the answers do not fit.
        """

@final
class ByteLevelScan:
    """What `ByteLevel.scan` found."""

    @property
    def blocks(self) -> list[int]:
        """Blocks of characters to be learned; then the texts must be scanned again."""

    @property
    def refused(self) -> list[int]:
        """Numbers of the texts that cannot be cut here; they get no tokens."""

    @property
    def asked(self) -> list[bytes]:
        """Pieces whose tokens are not known."""

def split_into_shards(sizes: Sequence[int], max_shard_size: int) -> list[list[int]]:
    """Indices of `sizes` (bytes) by shard of at most `max_shard_size` bytes, greedy in order as huggingface_hub does it."""

def rename_noreplace(src: str | PathLike[str], dst: str | PathLike[str]) -> None:
    """Rename `src` to `dst`; FileExistsError if there is a `dst`, OSError EINVAL where the file system cannot do it."""

def rename_exchange(a: str | PathLike[str], b: str | PathLike[str]) -> None:
    """Put two existing files or folders into each other's place in one step; OSError EINVAL or EXDEV where that cannot be done."""

def quantize_4bit(
    source: NDArray[np.uint8],
    dtype: str,
    packed: NDArray[np.uint8],
    absmax: NDArray[np.float32],
    *,
    quant_type: str,
    blocksize: int,
    threads: int | None = None,
) -> bool:
    """Quantize n numbers of `dtype`; fill `packed` (ceil(n / 2)) and `absmax` (ceil(n / blocksize)).

    Returns:
        Whether every scale is finite.

    Raises:
        ArrayError: a length does not fit, an array is read-only, or two share memory.
    """

def dequantize_4bit(
    packed: NDArray[np.uint8],
    absmax: NDArray[np.float32],
    target: NDArray[np.uint8],
    dtype: str,
    *,
    quant_type: str,
    blocksize: int,
    threads: int | None = None,
) -> None:
    """Fill `target` with the numbers as `dtype`; the way back of `quantize_4bit`."""

def quantize_scales(
    absmax: NDArray[np.float32],
    offset: float,
    codes: NDArray[np.uint8],
    nested_absmax: NDArray[np.float32],
    *,
    threads: int | None = None,
) -> None:
    """Quantize n scales around `offset`; fill `codes` (n) and `nested_absmax` (ceil(n / 256))."""

def dequantize_scales(
    codes: NDArray[np.uint8],
    nested_absmax: NDArray[np.float32],
    offset: float,
    absmax: NDArray[np.float32],
    *,
    threads: int | None = None,
) -> None:
    """Fill `absmax` with the scales again; the way back of `quantize_scales`."""

def code_book(quant_type: str) -> list[float]:
    """The 16 values of nf4 or fp4, by code."""

def nested_map() -> list[float]:
    """The 256 values that scales are quantized to, ascending."""

def merge_low_rank(
    base: NDArray[np.uint8] | None,
    base_dtype: str,
    target: NDArray[np.uint8],
    dtype: str,
    shape: tuple[int, int],
    a: NDArray[np.uint8],
    a_dtype: str,
    b: NDArray[np.uint8],
    b_dtype: str,
    rank: int,
    scale: float,
    *,
    magnitude: NDArray[np.float32] | None = None,
    transposed: bool,
    threads: int | None = None,
) -> bool:
    """Fill `target` (shape, `dtype`) with `round(f32(base) + scale * (b @ a))`, or the transpose of the product.

    With `magnitude` each row of that (each column, if transposed) is scaled to it before it is rounded: DoRA.

    `base` is (shape, `base_dtype`), or None for `target` itself; `a` is (rank, shape[1]) and `b` (shape[0], rank), if
    transposed (rank, shape[0]) and (shape[1], rank).

    Returns:
        Whether every finite weight stayed finite.

    Raises:
        ArrayError: lengths do not fit, or a factor is not finite.
    """

def cast(source: NDArray[np.uint8], source_dtype: str, target: NDArray[np.uint8], dtype: str) -> bool:
    """Round numbers to another dtype; whether every finite one stayed finite."""

def read_into(path: str | PathLike[str], offset: int, target: NDArray[np.uint8], *, threads: int | None = None) -> None:
    """Fill `target` with the bytes of a file from `offset` on.

    Raises:
        CheckpointError: the file ends too early.
        FileError: it cannot be opened or read.
    """

def write_file(
    path: str | PathLike[str],
    tensors: Sequence[tuple[str, str, Sequence[int], NDArray[Any]]],
    metadata: Mapping[str, str],
    *,
    threads: int | None = None,
) -> int:
    """Write a new safetensors file: byte for byte that of `safetensors.save_file`; not flushed to the disk.

    Args:
        path: must not exist.
        tensors: name, dtype as the header spells it ("BF16"), shape, and bytes.
        metadata: of the header.
        threads: all cores by default.

    Returns:
        Size of the file.

    Raises:
        PlanError: a name stands twice or is not allowed, or bytes and shape disagree.
        FileError: the disk refuses; a part of the file may be left.
    """
