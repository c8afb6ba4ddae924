"""Reading model folders: what is whole is found, what is broken is refused with a text that names it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastft.convert.folder import read_checkpoint
from fastft.errors import CheckpointError, FastftError, FileError, PlanError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_llama


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_found(tmp_path: Path, shards: int) -> None:
    folder = tiny_llama.write_base(tmp_path / "base", shards=shards)
    read = read_checkpoint(folder)
    for name, array in tiny_llama.weights().items():
        source = read.tensors[name]
        assert source.shape == array.shape
        content = source.file.read_bytes()[source.offset : source.offset + source.nbytes]
        assert content == array.tobytes()
    assert set(read.tensors) == set(tiny_llama.weights())


def test_links_are_followed(tmp_path: Path) -> None:
    """The hub's cache holds a model as links to files elsewhere."""
    folder = tiny_llama.write_base(tmp_path / "base")
    (tmp_path / "linked").mkdir()
    for file in folder.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    assert set(read_checkpoint(tmp_path / "linked").tensors) == set(tiny_llama.weights())


def refused(folder: Path, kind: type[FastftError], *words: str) -> None:
    with pytest.raises(kind) as refusal:
        read_checkpoint(folder)
    for word in words:
        assert word in str(refusal.value)


def index_of(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])


def write_index(folder: Path, weight_map: dict[str, object]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_broken_folders(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", FileError, "not there")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", FileError, "config.json")
    (tmp_path / "empty" / "config.json").write_text("{}")
    refused(tmp_path / "empty", FileError, "no weights", "model.safetensors")
    refused(tmp_path / "empty" / "config.json", FileError, "a file")


def test_single_file_and_index(tmp_path: Path) -> None:
    folder = tiny_llama.write_base(tmp_path / "base", shards=2)
    save_file({"a": np.zeros(1, np.float32)}, folder / "model.safetensors")
    refused(folder, CheckpointError, "both", "stale")


def test_missing_shard(tmp_path: Path) -> None:
    folder = tiny_llama.write_base(tmp_path / "base", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, FileError, "1 of 3 shards", "model-00002-of-00003.safetensors")


def test_tensor_in_another_shard(tmp_path: Path) -> None:
    folder = tiny_llama.write_base(tmp_path / "base", shards=2)
    weight_map = index_of(folder)
    weight_map["model.norm.weight"] = {
        "model-00001-of-00002.safetensors": "model-00002-of-00002.safetensors",
        "model-00002-of-00002.safetensors": "model-00001-of-00002.safetensors",
    }[weight_map["model.norm.weight"]]
    write_index(folder, dict(weight_map))
    refused(folder, CheckpointError, "model.norm.weight", "says")


def test_tensor_that_the_index_does_not_know_or_that_is_nowhere(tmp_path: Path) -> None:
    folder = tiny_llama.write_base(tmp_path / "base", shards=2)
    weight_map = index_of(folder)
    file = weight_map.pop("model.norm.weight")
    write_index(folder, dict(weight_map))
    refused(folder, CheckpointError, "model.norm.weight", "does not know it")
    write_index(folder, {**weight_map, "model.norm.weight": file, "ghost": file})
    refused(folder, CheckpointError, "ghost", "no shard")


def test_shards_of_pickles_are_held_against_their_index(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = tiny_llama.write_base(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    index = folder / "pytorch_model.bin.index.json"
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(1)}, folder / "one.bin")
    torch.save({"c": torch.ones(4)}, folder / "two.bin")
    right = {"a": "one.bin", "b": "one.bin", "c": "two.bin"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": right}))
    found = {name: source.shape for name, source in read_checkpoint(folder).tensors.items()}
    assert found == {"a": (2, 3), "b": (1,), "c": (4,)}
    for change, kind, words in (
        ({"b": "two.bin"}, CheckpointError, ("'b'", "one.bin", "says two.bin")),
        ({"ghost": "two.bin"}, CheckpointError, ("ghost", "no shard")),
        ({"c": "three.bin"}, FileError, ("1 of 2 shards", "three.bin")),
    ):
        index.write_text(json.dumps({"metadata": {}, "weight_map": right | change}))
        refused(folder, kind, *words)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, None])
def test_paths_never_leave_the_folder(tmp_path: Path, file: object) -> None:
    folder = tiny_llama.write_base(tmp_path / "base", shards=2)
    write_index(folder, {"x": file})
    refused(folder, CheckpointError, "plain file name")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "not JSON"),
        (b"[]", "object"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"\xff\xfe", "UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1", "LFS"),
        (b'{"a":' * 100_000, "not JSON"),
    ],
)
def test_config_that_is_no_config(tmp_path: Path, text: bytes, word: str) -> None:
    folder = tiny_llama.write_base(tmp_path / "base")
    (folder / "config.json").write_bytes(text)
    refused(folder, CheckpointError, "config.json", word)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes", "something"])
def test_quantized_weights(tmp_path: Path, method: str) -> None:
    folder = tiny_llama.write_base(tmp_path / "base", quantization_config={"quant_method": method})
    refused(folder, PlanError, "quantized", "16-bit")
    nested = tiny_llama.write_base(tmp_path / "nested", text_config={"quantization_config": {"quant_method": method}})
    refused(nested, PlanError, "quantized")


def test_header_cut_anywhere(tmp_path: Path) -> None:
    folder = tiny_llama.write_base(tmp_path / "base")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in (0, 4, 8, 9, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        refused(folder, CheckpointError, "model.safetensors")
