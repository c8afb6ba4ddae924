"""A folder of weights as Hugging Face lays it out: which tensors it has and where their bytes are.

Reads config.json, and model.safetensors or the index and its shards (only the headers). 4-bit weights of bitsandbytes are
seen as the numbers that they stand for. What is broken or cannot be read as numbers is refused here, before anything is
written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastft import _native
from fastft.convert import bitsandbytes_layout
from fastft.convert.config_file import read_config
from fastft.convert.json_file import read_object
from fastft.convert.source import Fingerprint, Source, as_seen, looked_at
from fastft.errors import CheckpointError, FileError, PlanError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

# Of a file, as file systems allow it.
_LONGEST_NAME = 256

# Tensors by name, and the files that were read.
Found = tuple[dict[str, Source], list[Path]]

_QUANTIZED = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
    "mxfp4": "MXFP4",
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
}


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a model folder.

    Attributes:
        folder: absolute path.
        config: config.json, without the quantization block where 4-bit weights are seen as numbers; empty where none was
            asked for.
        tensors: name to bytes, in the order of the shards and then of the header.
        fingerprints: the files that were read.
        quantization: that block; None for plain weights.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Source]
    fingerprints: tuple[Fingerprint, ...] = field(repr=False)
    quantization: Mapping[str, Any] | None = None

    @property
    def num_bytes(self) -> int:
        return sum(source.nbytes for source in self.tensors.values())


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read config.json and the headers of a model folder.

    Raises:
        FileError: the folder or a file of it is missing.
        CheckpointError: the index and the shards disagree, or a header is broken.
        PlanError: the weights are quantized, and not to 4 bit by bitsandbytes.
    """
    folder = existing_folder(folder, "the base model")
    seen = looked_at(folder)
    config_path = folder / "config.json"
    if not config_path.exists():
        raise FileError(f"{folder}: no config.json there; give the folder of a model in Hugging Face's layout")
    config = read_config(config_path)
    quantization = bitsandbytes_layout.settings_of(config)
    if quantization is not None:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    refuse_quantized(folder, config)
    tensors, files = read_weights(folder)
    if quantization is not None:
        tensors = bitsandbytes_layout.unpacked(folder, config, tensors)
    elif bitsandbytes_layout.is_packed(tensors):
        raise CheckpointError(
            f"{folder}: holds 4-bit weights, but config.json has no quantization_config that says so; add the one that"
            " they were saved with"
        )
    return Checkpoint(folder, config, tensors, as_seen(seen, (config_path, *files)), quantization)


def existing_folder(folder: Path, what: str) -> Path:
    """Give the absolute path of a folder that is there.

    Raises:
        FileError: it is not there, or it is a file.
    """
    if not folder.exists():
        raise FileError(f"{folder}: {what} is not there; give a folder on this machine")
    if not folder.is_dir():
        raise FileError(f"{folder}: {what} must be a folder, this is a file")
    return folder.resolve()


def refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse weights that are no plain numbers.

    Raises:
        PlanError: config.json names a quantization.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        quantization = part.get("quantization_config")
        if not quantization:
            continue
        method = str(quantization.get("quant_method", "?")) if isinstance(quantization, dict) else "?"
        name = _QUANTIZED.get(method, method)
        raise PlanError(
            f"{folder}: its weights are quantized ({name}); give the 16-bit model that they were made from"
            " (an adapter fits it too), or dequantize the folder first"
        )


def read_weights(folder: Path) -> Found:
    """Find every tensor of a folder in safetensors files, else in pytorch_model.bin files.

    Returns:
        The tensors by name, and the files that were read.

    Raises:
        FileError: no weights, or a shard is missing.
        CheckpointError: single file and shards both there, index and shards disagree, or no tensor in any of them.
    """
    tensors, files = _found(folder)
    if not tensors:
        raise CheckpointError(f"{folder}: its files of weights hold no tensors")
    return tensors, files


def _found(folder: Path) -> Found:
    single, index = folder / SINGLE, folder / INDEX
    if index.exists():
        if single.exists() and set(read_index(index).values()) != {SINGLE}:
            raise CheckpointError(
                f"{folder}: holds both {SINGLE} and {INDEX}, two different saves; remove the one that is stale"
            )
        return _read_shards(folder, index, read_safetensors)
    if single.exists():
        return read_safetensors(single), [single]
    if (folder / PICKLE_INDEX).exists():
        return _read_shards(folder, folder / PICKLE_INDEX, _read_pickle)
    if (folder / PICKLE_SINGLE).exists():
        return dict(_read_pickle(folder / PICKLE_SINGLE)), [folder / PICKLE_SINGLE]
    raise FileError(f"{folder}: no weights there; looked for {SINGLE}, {INDEX}, {PICKLE_SINGLE} and {PICKLE_INDEX}")


def read_safetensors(path: Path) -> dict[str, Source]:
    """List the tensors of one safetensors file in the order of its header.

    Raises:
        CheckpointError: the header is broken (see the message), or the file is something else.
    """
    found = _native.read_header(str(path))  # under the name that was given, which its errors show
    path = path.resolve()
    return {info.name: Source(path, info.offset, info.dtype, tuple(info.shape)) for info in found}


def read_index(index: Path) -> dict[str, str]:
    """Read the weight map of an index: tensor name to file name.

    Raises:
        CheckpointError: no weight map, or a file name that is not one plain name (it could leave the folder).
    """
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map in it; it must map tensor names to files")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.isprintable() and len(file) < _LONGEST_NAME
        if not plain or Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(f"{index}: the tensor {name!r} lies in {file!r}; a plain file name is allowed")
    return weight_map


def _read_shards(folder: Path, index: Path, read: Callable[[Path], Mapping[str, Source]]) -> Found:
    """Read each shard with `read` and hold what is in it against the index."""
    weight_map = read_index(index)
    tensors: dict[str, Source] = {}
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise FileError(f"{folder}: {len(missing)} of {len(files)} shards of {index.name} are missing: {_few(missing)}")
    for file in files:
        for name, source in read(folder / file).items():
            if name in tensors:
                raise CheckpointError(f"{folder}: the tensor {name!r} is in two shards, the second is {file}")
            if weight_map.get(name) != file:
                said = f"says {weight_map[name]}" if name in weight_map else "does not know it"
                raise CheckpointError(f"{folder}: the tensor {name!r} is in {file}, but {index.name} {said}")
            tensors[name] = source
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(f"{folder}: {len(absent)} tensors of {index.name} are in no shard: {_few(absent)}")
    return tensors, [index, *(folder / file for file in files)]


def _read_pickle(path: Path) -> Mapping[str, Source]:
    """List the tensors of a pytorch_model.bin; no code in it is run (see pth_reader)."""
    from fastft.convert.pth_reader import read_state_dict

    return read_state_dict(path).tensors


def _few(names: list[str]) -> str:
    """Write the first names of a list that may be long."""
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
