"""A folder of torch.distributed.checkpoint (FSDP and others): its tensors put together from the chunks, without torch.

`.metadata` is a pickle that says which chunk of which tensor is in which file; it is read by `pickle_data`, in which
nothing can be called. A chunk is a file of torch.save inside a larger one (`__0_0.distcp`). Goes to `trained`.
Source: torch/distributed/checkpoint/metadata.py and filesystem.py, torch 2.15; spec/formats.md 7.5.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fastft.convert import pickle_data, torch_file
from fastft.convert.json_file import read_regular_file
from fastft.convert.pickle_data import Call, Global, unwrapped_key
from fastft.convert.source import Source, joined, stretch
from fastft.convert.torch_file import is_tensor, mapping, sizes
from fastft.errors import CheckpointError, FileError, PlanError

METADATA = ".metadata"
# A chunk that cuts the second dimension takes one piece for each row.
_MAX_PIECES = 2_000_000
_MODULE = "torch.distributed.checkpoint."


@dataclass(frozen=True)
class DistributedCheckpoint:
    """The tensors of a folder.

    Attributes:
        tensors: name to bytes; nested dictionaries are one name with dots.
        files: what was read.
        skipped: names of what is no tensor.
    """

    tensors: Mapping[str, Source]
    files: tuple[Path, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Chunk:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    file: Path
    offset: int
    length: int


def find(folder: Path) -> Path | None:
    """Give the folder with `.metadata`: `folder` itself, or accelerate's inside it; None: there is none.

    Raises:
        PlanError: several models.
    """
    if (folder / METADATA).exists():
        return folder
    inside = sorted(
        path.parent for path in folder.glob(f"*/{METADATA}") if not path.parent.name.startswith("optimizer")
    )
    if len(inside) > 1:
        raise PlanError(
            f"{folder}: several sharded models: {', '.join(path.name for path in inside)}; give one of them"
        )
    return inside[0] if inside else None


def read(folder: Path) -> DistributedCheckpoint:
    """Find every tensor of a folder.

    Raises:
        FileError: a file of chunks is missing.
        CheckpointError: broken, or the chunks do not make the whole.
        PlanError: another format of chunks.
    """
    folder = folder.resolve()
    path = folder / METADATA
    content = read_regular_file(path, pickle_data.MAX_BYTES)
    top = _state(pickle_data.read(content, str(path)), "Metadata")
    described = mapping((top or {}).get("state_dict_metadata"))
    stored = mapping((top or {}).get("storage_data"))
    if described is None or stored is None:
        raise CheckpointError(f"{path}: not the metadata of torch.distributed.checkpoint")
    places = _places(stored, folder)
    _refuse_missing(folder, {place.file for place in places.values()})
    tensors: dict[str, Source] = {}
    skipped: list[str] = []
    for name, about in described.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: a tensor has a name that is no text")
        description = _state(about, "TensorStorageMetadata")
        if description is None:
            skipped.append(name[:200])
            continue
        tensors[name] = _whole(name, description, places, path)
    if not tensors:
        raise CheckpointError(f"{folder}: no tensors in it")
    files = sorted({place.file for place in places.values()})
    return DistributedCheckpoint(tensors, (path, *files), tuple(skipped))


def _state(value: Any, name: str) -> dict[Any, Any] | None:
    """Give the fields of a data class of torch's; None: it is another."""
    if not isinstance(value, Call) or not isinstance(value.function, Global):
        return None
    function, arguments = value.function, value.arguments
    if function.path == "copyreg._reconstructor" and isinstance(arguments, tuple) and arguments:
        function = arguments[0]
    if not isinstance(function, Global) or function.name != name or not function.module.startswith(_MODULE):
        return None
    return mapping(value.state)


def _places(stored: Mapping[Any, Any], folder: Path) -> dict[tuple[str, tuple[int, ...]], _Place]:
    """Read `storage_data`: name and first index of each chunk to where it is."""
    path = folder / METADATA
    places: dict[tuple[str, tuple[int, ...]], _Place] = {}
    for key, value in stored.items():
        index, info = _state(unwrapped_key(key), "MetadataIndex"), _state(value, "_StorageInfo")
        if index is None or info is None or not isinstance(index.get("fqn"), str):
            raise CheckpointError(f"{path}: its storage_data is not understood")
        name, first = index["fqn"], index.get("offset")
        offsets = () if first is None else sizes(first)
        file, offset, length = info.get("relative_path"), info.get("offset"), info.get("length")
        if offsets is None or type(offset) is not int or type(length) is not int or not isinstance(file, str):
            raise CheckpointError(f"{path}: where a chunk of {name[:200]!r} is, is not understood")
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{path}: a chunk lies in {file[:80]!r}; a plain file name is allowed")
        if info.get("transform_descriptors"):
            raise PlanError(f"{path}: its chunks are compressed ({file}); save it again without extensions")
        places[name, offsets] = _Place(folder / file, offset, length)
    return places


def _refuse_missing(folder: Path, files: set[Path]) -> None:
    missing = sorted(path.name for path in files if not path.is_file())
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise FileError(
            f"{folder}: {len(missing)} of {len(files)} files of its chunks are missing: {shown}; each process wrote its"
            " own, perhaps on another machine: copy them all into one folder"
        )


def _whole(
    name: str, description: Mapping[Any, Any], places: Mapping[tuple[str, tuple[int, ...]], _Place], path: Path
) -> Source:
    """Put a tensor together from its chunks."""
    where = f"{path}: tensor {name[:200]!r}"
    shape = sizes(description.get("size"))
    given = description.get("chunks")
    if shape is None or len(shape) > 8 or not isinstance(given, list) or not given:
        raise CheckpointError(f"{where}: its shape or chunks are not understood")
    chunks = [_chunk(chunk, shape, where) for chunk in given]
    sources: dict[_Chunk, Source] = {}
    for chunk in chunks:
        place = places.get((name, chunk.offsets))
        if place is None and not shape:
            place = places.get((name, ()))
        if place is None:
            raise CheckpointError(f"{where}: the chunk at {chunk.offsets} is in no file")
        sources[chunk] = _read_chunk(name, chunk, place)
    if len({source.dtype for source in sources.values()}) != 1:
        raise CheckpointError(f"{where}: its chunks are of different dtypes")
    return _placed(sources, shape, where)


def _chunk(value: Any, shape: tuple[int, ...], where: str) -> _Chunk:
    fields = _state(value, "ChunkStorageMetadata") or {}
    offsets, extent = sizes(fields.get("offsets")), sizes(fields.get("sizes"))
    if (
        offsets is None
        or extent is None
        or len(offsets) != len(shape)
        or len(extent) != len(shape)
        or any(first + count > size for first, count, size in zip(offsets, extent, shape, strict=True))
    ):
        raise CheckpointError(f"{where}: a chunk is not understood, or not inside {shape}")
    return _Chunk(offsets, extent)


def _read_chunk(name: str, chunk: _Chunk, place: _Place) -> Source:
    """Find the numbers of a chunk, which is a file of torch.save with one tensor."""
    file = torch_file.read(place.file, place.offset, place.length)
    if not is_tensor(file.value):
        raise CheckpointError(f"{place.file}: the chunk of {name[:200]!r} at byte {place.offset} holds no tensor")
    source = file.tensor(name, file.value)
    if source.shape != chunk.sizes:
        raise CheckpointError(f"{place.file}: a chunk of {name[:200]!r} has shape {source.shape}, not {chunk.sizes}")
    return source


def _placed(sources: Mapping[_Chunk, Source], shape: tuple[int, ...], where: str) -> Source:
    """Join the rows of chunks in the order of the whole tensor, each number exactly once."""
    if sum(source.numel for source in sources.values()) != prod(shape):
        raise CheckpointError(f"{where}: its {len(sources)} chunks do not make {shape}: some overlap or are missing")
    if prod(shape) == 0:
        return Source(*_first(sources), shape)
    cut = max((d for d in range(len(shape)) for chunk in sources if chunk.sizes[d] != shape[d]), default=0)
    num_rows = prod(shape[:cut])
    if num_rows * len(sources) > _MAX_PIECES:
        raise PlanError(
            f"{where}: is cut along dimension {cut}, into more than {_MAX_PIECES} pieces; gather it with torch"
        )
    inner = prod(shape[cut + 1 :])
    pieces: list[Source] = []
    for row in itertools.product(*(range(size) for size in shape[:cut])):
        pieces += _row_pieces(row, sources, cut, inner, where)
    return joined(pieces, shape)


def _row_pieces(
    row: tuple[int, ...], sources: Mapping[_Chunk, Source], cut: int, inner: int, where: str
) -> Sequence[Source]:
    """The pieces of one row: the numbers with these leading indices, along dimension `cut` and all later ones."""
    found: list[tuple[int, int, Source]] = []
    for chunk, source in sources.items():
        at = [index - first for index, first in zip(row, chunk.offsets, strict=False)]
        if any(not 0 <= index < count for index, count in zip(at, chunk.sizes, strict=False)):
            continue
        number = 0
        for index, count in zip(at, chunk.sizes, strict=False):
            number = number * count + index
        first, count = (chunk.offsets[cut], chunk.sizes[cut]) if chunk.sizes else (0, 1)
        found.append((first, count, stretch(source, number * count * inner, count * inner)))
    found.sort(key=lambda piece: piece[0])
    at_index = 0
    for first, count, _ in found:
        if first != at_index:
            raise CheckpointError(f"{where}: its chunks overlap or leave a gap at {(*row, at_index)}")
        at_index += count
    return [piece for _, _, piece in found]


def _first(sources: Mapping[_Chunk, Source]) -> tuple[Path, int, str]:
    source = next(iter(sources.values()))
    return source.file, source.offset, source.dtype
