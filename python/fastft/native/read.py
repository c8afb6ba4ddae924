"""Reading a folder of weights: which tensors are there, and one at a time, whole or some rows.

Headers and index are checked before anything is read (fastft.convert.folder). Files are read by position into the
array that is given back: one copy from the system's cache, none after it, and a file that is cut short is an error and
not a signal that kills the process, as it would be with a mapped file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from fastft import _native
from fastft.convert.folder import existing_folder, read_safetensors, read_weights
from fastft.convert.source import Fingerprint, Source, as_seen, check_unchanged, looked_at, rows_of
from fastft.errors import ArrayError, CheckpointError
from fastft.native.array import NAMES, SIZES, Array, Kind, empty, target


@dataclass(frozen=True, slots=True)
class Tensor:
    """What is known of a tensor without reading it.

    Attributes:
        name: in the file.
        dtype: as numpy and torch name it: "bfloat16".
        shape: sizes of the dimensions.
        nbytes: size in the file.
        file: the file that holds it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path


class CheckpointReader(Mapping[str, Array]):
    """The tensors of a checkpoint by name, read when they are asked for; made by `open_checkpoint`."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        seen: Mapping[Path, Fingerprint],
        kind: Kind,
        *,
        bits: bool,
        threads: int | None,
    ) -> None:
        self._sources = dict(sources)
        files = {source.file for source in self._sources.values()}
        self._fingerprints = dict(zip(files, as_seen(seen, files), strict=True))
        self._kind, self._bits, self._threads = kind, bits, threads

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __getitem__(self, name: str) -> Array:
        return self.read(name)

    def __repr__(self) -> str:
        return f"<CheckpointReader of {len(self)} tensors in {len(self._fingerprints)} files>"

    def info(self, name: str) -> Tensor:
        """Tell dtype, shape and place of a tensor; KeyError if there is none of that name."""
        source = self._sources[name]
        return Tensor(name, _dtype(name, source), source.shape, source.nbytes, source.file)

    def read(self, name: str, *, rows: tuple[int, int] | None = None, out: Array | None = None) -> Array:
        """Read a tensor.

        Args:
            name: KeyError if there is none of that name.
            rows: (first, count) of dimension 0; all by default.
            out: an array of the tensor's dtype (or its bare bits) and shape, filled instead of a new one.

        Raises:
            ArrayError: `rows` or `out` does not fit, or numpy has no such dtype (see `open_checkpoint`).
            CheckpointError, FileError: the file ends early, changed since it was opened, or cannot be read.
        """
        what = f"tensor {name!r}"
        source = self._sources[name]
        dtype = _dtype(name, source)
        if rows is not None:
            first, count = rows
            if not source.shape or first < 0 or count < 0 or first + count > source.shape[0]:
                raise ArrayError(f"{what}: rows {first} to {first + count} of shape {source.shape} are not there")
            source = rows_of(source, first, count) if source.shape[0] else source
        made_dtype = f"uint{SIZES[dtype] * 8}" if self._bits and dtype.startswith(("bfloat", "float8")) else dtype
        result = empty(self._kind, made_dtype, source.shape, what) if out is None else out
        written = target(result, f"{what}: out", dtype, source.shape)
        check_unchanged((self._fingerprints[source.file],))
        _native.read_into(source.file, source.offset, written.data, threads=self._threads)
        check_unchanged((self._fingerprints[source.file],))
        return result


def open_checkpoint(
    path: str | PathLike[str],
    *,
    kind: Kind = "numpy",
    bits: bool = False,
    threads: int | None = None,
) -> CheckpointReader:
    """Open the weights of a folder, or one safetensors file; only headers are read.

    Args:
        path: folder with model.safetensors, or its index and shards, or pytorch_model.bin; or a safetensors file.
        kind: whether arrays of numpy or tensors of torch are given.
        bits: give bfloat16 and float8, which numpy has only with ml_dtypes, as their bits in uint16 and uint8.
        threads: that read a large tensor; all cores by default.

    Raises:
        FileError: nothing is there, or a shard is missing.
        CheckpointError: a file is broken, or the index and the shards disagree.
    """
    if kind not in ("numpy", "torch"):
        raise ArrayError(f"open_checkpoint: kind {kind!r} is not allowed; use numpy or torch")
    if kind == "torch":
        import torch as _  # noqa: F401  `empty` finds it loaded
    path = Path(path).resolve()
    seen = looked_at(path)
    sources = read_safetensors(path) if path.is_file() else read_weights(existing_folder(path, "the checkpoint"))[0]
    return CheckpointReader(sources, seen, kind, bits=bits, threads=threads)


def _dtype(name: str, source: Source) -> str:
    if source.dtype not in NAMES:
        raise CheckpointError(f"tensor {name!r}: dtype {source.dtype} has no array; known are {', '.join(NAMES)}")
    return NAMES[source.dtype]
