"""Folders of torch.distributed.checkpoint, written by two processes: every chunk at its place, or the folder is refused."""

import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fastft.config.schema import Config
from fastft.convert import distributed_checkpoint, pth
from fastft.convert.source import read_bytes
from fastft.errors import CheckpointError, FastftError, FileError, PlanError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sharded_writer
import tiny_llama

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    sharded_writer.run_all(folder)
    tiny_llama.write_base(folder / "base")
    tied = tiny_llama.weights(tied=True)
    tiny_llama.write_base(folder / "tied", tied, tie_word_embeddings=True)
    return folder


def config(base: Path) -> Config:
    return Config.model_validate(
        {"model": {"name": str(base)}, "method": {"kind": "full"}, "data": {"train": [{"source": "x"}]}}
    )


def converted(base: Path, folder: Path, target: Path, dtype: str) -> dict[str, Any]:
    pth.execute(pth.plan(config(base), folder, dtype=dtype), target)
    return load_file(target / "model.safetensors")


@pytest.mark.parametrize("name", ["plain", "checkpoint-7", "checkpoint-7/pytorch_model_fsdp_0", "all", "columns"])
def test_chunks_become_whole(name: str, written: Path, tmp_path: Path) -> None:
    truth = load_file(written / "truth.safetensors")
    found = converted(written / "base", written / name, tmp_path / "auto", "auto")
    assert found.keys() == truth.keys()
    for key, tensor in truth.items():
        assert torch.equal(found[key], tensor), key
    found = converted(written / "base", written / name, tmp_path / "fp32", "fp32")
    assert all(torch.equal(found[key], tensor.float()) for key, tensor in truth.items())


def test_what_else_is_in_a_folder_is_said(written: Path) -> None:
    plan = pth.plan(config(written / "base"), written / "all")
    assert "tensors of the optimizer in all are left out" in " ".join(plan.notes)
    with pytest.raises(CheckpointError, match="states of an optimizer"):
        pth.plan(config(written / "base"), written / "checkpoint-7" / "optimizer_0")


def test_three_dimensions_and_none(written: Path) -> None:
    found = distributed_checkpoint.read(written / "odd").tensors
    for name, tensor in load_file(written / "odd.safetensors").items():
        assert found[name].shape == tuple(tensor.shape)
        assert read_bytes(found[name]) == tensor.numpy().tobytes()
        if name == "cube":
            assert [read_bytes(found[name], start, 8) for start in (4, 40, 70)] == [
                tensor.numpy().tobytes()[start : start + 8] for start in (4, 40, 70)
            ]


def test_fsdp_of_a_tied_model(written: Path, tmp_path: Path) -> None:
    truth = load_file(written / "fsdp2.safetensors")
    found = converted(written / "tied", written / "fsdp2", tmp_path / "hf", "auto")
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in truth.items())


def test_missing_files(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "plain", tmp_path / "x")
    (tmp_path / "x" / "__1_0.distcp").unlink()
    with pytest.raises(FileError, match=r"1 of 2 files of its chunks are missing: __1_0\.distcp"):
        pth.plan(config(written / "base"), tmp_path / "x")
    shutil.copytree(written / "plain", tmp_path / "y")
    (tmp_path / "y" / ".metadata").unlink()
    with pytest.raises(FileError, match="no checkpoint there"):
        pth.plan(config(written / "base"), tmp_path / "y")


def test_files_that_are_cut_off(written: Path, tmp_path: Path) -> None:
    for name in ("__1_0.distcp", ".metadata"):
        content = (written / "plain" / name).read_bytes()
        for number, length in enumerate((0, 1, 10, len(content) // 2, len(content) - 1)):
            folder = tmp_path / f"{name}-{number}"
            shutil.copytree(written / "plain", folder)
            (folder / name).write_bytes(content[:length])
            with pytest.raises(FastftError):
                distributed_checkpoint.read(folder)


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("a gap", "do not make"),
        ("an overlap", "overlap"),
        ("outside", "not inside"),
        ("another size", "has shape"),
        ("elsewhere", "plain file name"),
        ("compressed", "extensions"),
        ("no place", "is in no file"),
        ("past the end", "cut off"),
    ],
)
def test_metadata_that_lies(what: str, word: str, written: Path, tmp_path: Path) -> None:
    """Changed through torch's own classes, and pickled again."""
    import dataclasses

    folder = tmp_path / "x"
    shutil.copytree(written / "plain", folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    name = "lm_head.weight"
    about = metadata.state_dict_metadata[name]
    first, second = about.chunks
    index = next(key for key in metadata.storage_data if key.fqn == name and key.offset == second.offsets)
    info = metadata.storage_data[index]
    if what == "a gap":
        about.chunks.remove(second)
    elif what == "an overlap":
        moved = dataclasses.replace(second, offsets=first.offsets)
        about.chunks[1] = moved
    elif what == "outside":
        about.chunks[1] = dataclasses.replace(second, offsets=torch.Size([49, 0]))
    elif what == "another size":
        about.chunks[1] = dataclasses.replace(second, sizes=torch.Size([1, 1]))
    elif what == "elsewhere":
        metadata.storage_data[index] = dataclasses.replace(info, relative_path="../x.distcp")
    elif what == "compressed":
        metadata.storage_data[index] = dataclasses.replace(info, transform_descriptors=["zstd"])
    elif what == "no place":
        del metadata.storage_data[index]
    else:
        metadata.storage_data[index] = dataclasses.replace(info, length=10**9)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises((CheckpointError, PlanError), match=word):
        distributed_checkpoint.read(folder)


def test_metadata_does_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "was here"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".metadata").write_bytes(pickle.dumps(_Evil(str(mark))))
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        distributed_checkpoint.read(tmp_path / "x")
    assert not mark.exists()


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (self.path,)
