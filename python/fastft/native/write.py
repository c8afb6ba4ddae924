"""Writing tensors into a folder of safetensors files, straight from their memory.

The split is huggingface_hub's (greedy, in order), the bytes of a file are those of `safetensors.save_file`, the index
is what transformers writes. The folder is there whole or not at all (fastft.publish).
"""

from collections.abc import Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Self

from fastft import _native, publish
from fastft.convert.plan import index_name, shard_name, weight_index
from fastft.convert.size import DEFAULT_MAX_SHARD_SIZE_BYTES, parse_size
from fastft.errors import ArrayError
from fastft.native.array import SAFETENSORS, Array, Memory, memory

SINGLE = "model.safetensors"
_METADATA = {"format": "pt"}


class ShardedWriter:
    """Writes tensors as they come: `with ShardedWriter(folder) as writer: writer.add(name, tensor)`.

    Nothing is copied: a tensor is written from its own memory when its file is full or at the end, and must not change
    until then. The folder appears when the body ends without an error; else nothing does.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        *,
        max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE_BYTES,
        metadata: Mapping[str, str] | None = None,
        name: str = SINGLE,
        force: bool = False,
        threads: int | None = None,
    ) -> None:
        """Say what will be written; nothing is done before the `with` begins.

        Args:
            folder: to be made; its parents are made too.
            max_shard_size: greatest number of bytes of tensors in a file, or text such as "2GB", "500MB", "1.5GiB"; a
                tensor that is larger gets a file of its own.
            metadata: of every file, text to text; {"format": "pt"} by default, which some loaders ask for.
            name: of the one file; more are called model-00001-of-0000N.safetensors.
            force: replace a folder of models that is there; it stays as it is until the new one is whole.
            threads: that write; all cores by default.
        """
        limit = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ArrayError(f"ShardedWriter: max_shard_size {max_shard_size!r} is not allowed; give bytes, or '2GB'")
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ArrayError(f"ShardedWriter: name {name!r} is not allowed; give a file name that ends in .safetensors")
        metadata = _METADATA if metadata is None else metadata
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise ArrayError("ShardedWriter: metadata holds something else than text")
        self._target, self._limit, self._metadata = Path(folder), limit, dict(metadata)
        self._name, self._force, self._threads = name, force, threads
        self._stack = ExitStack()
        self._staging: Path | None = None
        self._open: dict[str, tuple[Memory, Array]] = {}
        self._open_bytes = 0
        self._shards: list[list[str]] = []
        self._known: set[str] = set()
        self._num_parameters = self._num_bytes = 0
        self._failed = False

    def __enter__(self) -> Self:
        if self._staging is not None:
            raise ArrayError("ShardedWriter: is in use already; make another one")
        self._staging = self._stack.enter_context(publish.staged(self._target, force=self._force))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, traceback)  # the staging folder is removed
            return
        with self._stack:
            self._finish()

    @property
    def folder(self) -> Path:
        """Where other files of the result (config.json) go while it is made; only inside the `with`."""
        if self._staging is None:
            raise ArrayError("ShardedWriter: write inside `with ShardedWriter(...) as writer:`")
        return self._staging

    def add(self, name: str, tensor: Array, *, dtype: str | None = None) -> None:
        """Take a tensor in.

        Args:
            name: in the file, each once.
            tensor: contiguous, of any dtype that safetensors has.
            dtype: "bfloat16" or a float8 where the tensor is its bits in uint16 or uint8.

        Raises:
            ArrayError: the tensor or its name cannot be written; nothing has changed.
            FileError: the disk failed; the folder will not appear.
        """
        folder = self.folder
        if not isinstance(name, str) or not name:
            raise ArrayError(f"ShardedWriter: {name!r} is no name of a tensor")
        if name in self._known:
            raise ArrayError(f"ShardedWriter: tensor {name!r} was added already")
        found = memory(tensor, f"tensor {name!r}", dtype)
        self._known.add(name)
        size = found.data.nbytes
        self._num_parameters += found.numel
        self._num_bytes += size
        if size > self._limit:
            self._write(folder, {name: (found, tensor)})
            return
        if self._open_bytes + size > self._limit:
            self._write_open(folder)
        self._open[name] = (found, tensor)
        self._open_bytes += size

    def _write_open(self, folder: Path) -> None:
        self._write(folder, self._open)
        self._open, self._open_bytes = {}, 0

    def _write(self, folder: Path, tensors: Mapping[str, tuple[Memory, Array]]) -> None:
        self._shards.append(list(tensors))
        failed, self._failed = self._failed, True
        publish.require_space(self._target, sum(found.data.nbytes for found, _ in tensors.values()))
        _native.write_file(
            folder / _unfinished(len(self._shards)),
            [(name, SAFETENSORS[found.dtype], found.shape, found.data) for name, (found, _) in tensors.items()],
            self._metadata,
            threads=self._threads,
        )
        self._failed = failed

    def _finish(self) -> None:
        """Write what is left, give the files their names, and write the index last."""
        folder = self.folder
        if self._failed:
            raise ArrayError(f"ShardedWriter: {self._target} is not made: a file could not be written before")
        if self._open or not self._shards:
            self._write_open(folder)
        count = len(self._shards)
        files: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            file = self._name if count == 1 else shard_name(self._name, number, count)
            (folder / _unfinished(number)).rename(folder / file)
            files |= dict.fromkeys(names, file)
        if count > 1:
            index = weight_index(files, self._num_parameters, self._num_bytes)
            (folder / index_name(self._name)).write_text(index, encoding="utf-8")


def save_sharded(
    tensors: Mapping[str, Array],
    folder: str | PathLike[str],
    *,
    max_shard_size: int | str = DEFAULT_MAX_SHARD_SIZE_BYTES,
    metadata: Mapping[str, str] | None = None,
    name: str = SINGLE,
    force: bool = False,
    threads: int | None = None,
) -> None:
    """Write tensors into a new folder, all or nothing; see `ShardedWriter` for the arguments.

    Raises:
        ArrayError: a tensor cannot be written, or two share memory (tied weights are written once).
        FileError: the target is refused, or the disk has no room.
    """
    found = {name: memory(tensor, f"tensor {name!r}") for name, tensor in tensors.items()}
    _refuse_shared(found)
    publish.check_target(Path(folder), force=force)
    publish.require_space(Path(folder), sum(tensor.data.nbytes for tensor in found.values()))
    with ShardedWriter(
        folder, max_shard_size=max_shard_size, metadata=metadata, name=name, force=force, threads=threads
    ) as writer:
        for tensor_name, tensor in tensors.items():
            writer.add(tensor_name, tensor)


def _refuse_shared(tensors: Mapping[str, Memory]) -> None:
    """Refuse tensors that overlap: the file would hold them twice, and a loader would not know that they are one."""
    spans = sorted(
        (tensor.data.ctypes.data, tensor.data.ctypes.data + tensor.data.nbytes, name)
        for name, tensor in tensors.items()
        if tensor.data.nbytes
    )
    reach, before = 0, ""
    for start, end, name in spans:
        if start < reach:
            raise ArrayError(
                f"save_sharded: tensors {before!r} and {name!r} share memory; leave one out (weights that are tied are"
                " written once), or write a copy"
            )
        if end > reach:
            reach, before = end, name


def _unfinished(number: int) -> str:
    return f"shard-{number}.safetensors"
