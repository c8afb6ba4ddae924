"""A base whose weights are pickles is laid out as safetensors before a library reads it; nothing in a pickle is run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_run
from fastft.chat import session
from fastft.convert import layout
from fastft.errors import CheckpointError, FileError
from fastft.model import load, whole
from fastft.training import run


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (str(self.target),)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastft" / "layouts"


@pytest.fixture(autouse=True)
def torch_load_is_never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", refuse)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    tiny_run.write_model(tmp_path / "plain")
    return tmp_path / "plain"


def pickled(plain: Path, folder: Path, num_shards: int = 1) -> Path:
    """The same model as older versions of transformers wrote it."""
    shutil.copytree(plain, folder)
    (folder / "model.safetensors").unlink()
    tensors = load_file(plain / "model.safetensors")
    if num_shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names, weight_map = sorted(tensors), {}
    for number in range(num_shards):
        file = f"pytorch_model-{number + 1:05}-of-{num_shards:05}.bin"
        part = {name: tensors[name] for name in names[number::num_shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_same_numbers_and_files(
    num_shards: int, plain: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pickled(plain, tmp_path / "old", num_shards)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    made = layout.without_pickles(folder)
    assert made.parent == cache
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "its weights are pickles" in said
    expected, found = load_file(plain / "model.safetensors"), load_file(made / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], value) for name, value in found.items())
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (made / name).read_bytes() == (plain / name).read_bytes()
    assert not list(made.glob("*.bin*"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert layout.without_pickles(folder) == made
    assert capsys.readouterr().err == ""


def test_safetensors_are_left_as_they_are(plain: Path, tmp_path: Path, cache: Path) -> None:
    assert layout.without_pickles(plain) == plain
    torch.save({"a": torch.ones(2)}, plain / "pytorch_model.bin")  # many repositories hold both
    assert layout.without_pickles(plain) == plain
    (tmp_path / "empty").mkdir()
    assert layout.without_pickles(tmp_path / "empty") == tmp_path / "empty"
    assert not cache.exists()


def test_another_file_is_laid_out_anew(plain: Path, tmp_path: Path) -> None:
    folder = pickled(plain, tmp_path / "old")
    first = layout.without_pickles(folder)
    tensors = load_file(plain / "model.safetensors")
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    second = layout.without_pickles(folder)
    assert first != second
    name = next(iter(tensors))
    assert torch.equal(load_file(second / "model.safetensors")[name], tensors[name] + 1)


@pytest.mark.parametrize("num_shards", [1, 2])
def test_training_and_chat_are_those_of_the_safetensors(num_shards: int, plain: Path, tmp_path: Path) -> None:
    """Two roads, one result: the adapter of a run on the pickles is that of a run on the safetensors, bit for bit."""
    data = tiny_run.write_dialogues(tmp_path / "rows.jsonl", 6)
    old = pickled(plain, tmp_path / "old", num_shards)
    adapters = []
    for folder in (plain, old):
        config = tiny_run.config(folder, data, train__max_steps=2)
        done = run.run(config, work_dir=tmp_path / f"run-{folder.name}")
        adapters.append(load_file(done.artifact / "adapter_model.safetensors"))
        record = json.loads((done.artifact / "adapter_config.json").read_text())
        assert record["base_model_name_or_path"] == str(folder)
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], value) for name, value in adapters[1].items())
    model = session.read(session.locate(str(old), "huggingface", None), None, "auto")
    expected = load_file(plain / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("num_shards", [1, 2])
def test_a_payload_is_refused_and_not_run(num_shards: int, plain: Path, tmp_path: Path, cache: Path) -> None:
    folder = pickled(plain, tmp_path / "old", num_shards)
    file = max(folder.glob("*.bin"))
    torch.save({"model.norm.weight": torch.ones(2), "x": Evil(tmp_path / "payload")}, file)
    data = tiny_run.write_dialogues(tmp_path / "rows.jsonl", 6)
    config = tiny_run.config(folder, data)
    for use in (
        lambda: layout.without_pickles(folder),
        lambda: load.load(config),
        lambda: session.read(session.locate(str(folder), "huggingface", None), None, "auto"),
    ):
        with pytest.raises(CheckpointError, match=rf"{file.name}.*mkdir.*run"):
            use()
    assert not (tmp_path / "payload").exists()
    assert not cache.exists() or not list(cache.iterdir())


def test_a_missing_shard_is_named(plain: Path, tmp_path: Path) -> None:
    folder = pickled(plain, tmp_path / "old", 2)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileError, match=r"shards .* missing: pytorch_model-00002-of-00002\.bin"):
        layout.without_pickles(folder)


def test_no_road_leads_around_it(plain: Path, tmp_path: Path) -> None:
    """The one place where transformers reads a model's weights refuses pickles itself."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(AssertionError, match="unpickle"):
        whole.read(AutoModelForCausalLM, pickled(plain, tmp_path / "old"))


def test_a_projector_tower_is_laid_out_too(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from fastft.model import llava

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    tower = CLIPVisionModel(config)
    folder = tmp_path / "tower"
    folder.mkdir()
    tower.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    found = llava.read_tower(folder, torch.float32).state_dict()
    save_file(tensors, tmp_path / "again.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tower.state_dict().items())
