"""DeepSpeed folders, built to the layout by hand: what each stage keeps where, and what is refused.

tests/invariants/test_deepspeed_folders.py does the same with folders that DeepSpeed wrote.
"""

import collections
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from fastft.config.schema import Config
from fastft.convert import deepspeed_folder, pth
from fastft.errors import CheckpointError, FastftError, FileError, PlanError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_llama

torch = pytest.importorskip("torch")

WORLD = 3


def config(base: Path) -> Config:
    return Config.model_validate(
        {"model": {"name": str(base)}, "method": {"kind": "full"}, "data": {"train": [{"source": "x"}]}}
    )


def masters(seed: int = 5) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in tiny_llama.weights(seed=seed).items()}


def write_whole(folder: Path, truth: dict[str, Any], *, gaps: bool = False, groups: int = 1) -> Path:
    """ZeRO-2: 16-bit weights in one file, the masters of each group cut into equal parts with padding at the end."""
    folder.mkdir(parents=True)
    names = list(truth)
    shapes, parts, paddings = [], [[] for _ in range(WORLD)], []
    for group in (names[number::groups] for number in range(groups)):
        shapes.append(collections.OrderedDict((name, truth[name].shape) for name in group))
        paddings.append([7 if gaps else 0 for _ in group])
        flat = torch.cat([torch.cat([truth[name].flatten(), torch.full((7 if gaps else 0,), 9.0)]) for name in group])
        length = -(-flat.numel() // (2 * WORLD)) * 2
        flat = torch.cat([flat, torch.full((length * WORLD - flat.numel(),), 8.0)])
        for rank in range(WORLD):
            parts[rank].append(flat[rank * length : (rank + 1) * length].clone())
    top = {
        "module": {name: tensor.bfloat16() for name, tensor in truth.items()},
        "param_shapes": shapes,
        "buffer_names": [],
        "shared_params": {},
        "frozen_param_shapes": None,
        "ds_version": "0.16.2",
    }
    torch.save(top, folder / "mp_rank_00_model_states.pt")
    for rank in range(WORLD):
        state = {
            "zero_stage": 2,
            "partition_count": [WORLD] * groups,
            "single_partition_of_fp32_groups": parts[rank],
            **({"param_alignment_paddings": paddings} if gaps else {}),
        }
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_version": "0.16.2"}, folder / name)
    return folder


def write_parts(folder: Path, truth: dict[str, Any], frozen: tuple[str, ...] = (), sub_group: int = 400) -> Path:
    """ZeRO-3: each weight cut into equal parts, the parts of a process one after another in groups that cut weights."""
    folder.mkdir(parents=True)

    def cut(tensor: Any, rank: int) -> Any:
        length = -(-tensor.numel() // WORLD)
        padded = torch.cat([tensor.flatten(), torch.full((length * WORLD - tensor.numel(),), 9.0).to(tensor.dtype)])
        return padded[rank * length : (rank + 1) * length].clone()

    for rank in range(WORLD):
        trained = {name: tensor for name, tensor in truth.items() if name not in frozen}
        flat = torch.cat([cut(tensor, rank) for tensor in trained.values()])
        states = {
            "module": {name: torch.empty(0) for name in truth},
            "param_shapes": [collections.OrderedDict((name, tensor.shape) for name, tensor in trained.items())],
            "buffer_names": [],
            "shared_params": {"twin.weight": "model.norm.weight"} if "twin.weight" not in truth else {},
            "frozen_param_shapes": {name: truth[name].shape for name in frozen},
            "frozen_param_fragments": {name: cut(truth[name].bfloat16(), rank) for name in frozen},
        }
        torch.save(states, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        state = {"zero_stage": 3, "partition_count": WORLD, "fp32_flat_groups": list(torch.split(flat, sub_group))}
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def converted(folder: Path, tmp_path: Path, dtype: str) -> dict[str, Any]:
    base = tmp_path / "base"
    if not base.exists():
        tiny_llama.write_base(base)
    shutil.rmtree(tmp_path / "hf", ignore_errors=True)
    pth.execute(pth.plan(config(base), folder, dtype=dtype), tmp_path / "hf")
    return load_file(tmp_path / "hf" / "model.safetensors")


@pytest.mark.parametrize(("gaps", "groups"), [(False, 1), (True, 1), (False, 3), (True, 2)])
def test_zero_2(tmp_path: Path, gaps: bool, groups: int) -> None:
    truth = masters()
    folder = write_whole(tmp_path / "iter_5.pth", truth, gaps=gaps, groups=groups)
    found = converted(folder, tmp_path, "auto")
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in truth.items())
    # The base says float32; the weights that are kept say otherwise.
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    found = converted(folder, tmp_path, "fp32")
    assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())


@pytest.mark.parametrize("sub_group", [1, 64, 100_000])
def test_zero_3(tmp_path: Path, sub_group: int) -> None:
    """Weights whose parts lie in several groups of several files; frozen ones beside them, in bf16."""
    truth = masters()
    if sub_group == 1:
        truth = {"model.norm.weight": truth["model.norm.weight"], "odd": torch.arange(7.0)}
    frozen = ("model.embed_tokens.weight",) if sub_group > 1 else ()
    folder = write_parts(tmp_path / "tag", truth, frozen, sub_group)
    read = deepspeed_folder.read(folder, masters=False)
    assert read.tensors.pop("twin.weight") == read.tensors["model.norm.weight"]  # type: ignore[attr-defined]
    assert read.trained == truth.keys() - set(frozen)
    if sub_group == 1:
        from fastft.convert.source import read_bytes

        for name, tensor in truth.items():
            assert read_bytes(read.tensors[name]) == tensor.numpy().tobytes()
        return
    for rank in range(WORLD):
        path = folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        states = torch.load(path, weights_only=True)
        torch.save({**states, "shared_params": {}}, path)
    found = converted(folder, tmp_path, "auto")
    assert found.keys() == truth.keys()
    for name, tensor in truth.items():
        assert torch.equal(found[name], tensor.bfloat16() if name in frozen else tensor), name
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float32"
    found = converted(folder, tmp_path, "bf16")
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in truth.items())


def test_tags(tmp_path: Path) -> None:
    """`latest` says which; without it one global_step is clear and two are not."""
    run = tmp_path / "checkpoint-9"
    write_whole(run / "global_step9", masters())
    assert deepspeed_folder.find(run) == run / "global_step9"
    write_whole(run / "global_step12", masters(6))
    with pytest.raises(PlanError, match="several checkpoints"):
        deepspeed_folder.find(run)
    (run / "latest").write_text("global_step9\n")
    assert deepspeed_folder.find(run) == run / "global_step9"
    (run / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="name of a folder"):
        deepspeed_folder.find(run)
    (run / "latest").write_text("global_step1")
    with pytest.raises(FileError, match="not there"):
        deepspeed_folder.find(run)


def test_trainers_folder(tmp_path: Path) -> None:
    """checkpoint-N of transformers with both: the weights in it, or the masters of its global_stepN when fp32 is asked."""
    truth = masters()
    folder = tiny_llama.write_base(
        tmp_path / "checkpoint-9", {name: tensor.numpy().astype(np.float16) for name, tensor in truth.items()}
    )
    write_whole(folder / "global_step9", truth)
    (folder / "latest").write_text("global_step9")
    assert converted(folder, tmp_path, "auto")["lm_head.weight"].dtype == torch.float16
    found = converted(folder, tmp_path, "fp32")
    assert all(torch.equal(found[name], tensor) for name, tensor in truth.items())


def damaged(folder: Path, change: Callable[[dict[str, Any]], object], name: str) -> None:
    (path,) = folder.glob(name)
    states = torch.load(path, weights_only=False)
    change(states)
    torch.save(states, path)


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("*pp_rank_1_*optim*", lambda s: s["optimizer_state_dict"].pop("fp32_flat_groups"), "no fp32_flat_groups"),
        ("*pp_rank_1_*optim*", lambda s: s["optimizer_state_dict"].update(zero_stage=2), "different saves"),
        ("*pp_rank_1_*optim*", lambda s: s["optimizer_state_dict"].update(zero_stage="3"), "zero_stage"),
        ("*pp_rank_1_*optim*", lambda s: s["optimizer_state_dict"].update(partition_count=0), "partition_count"),
        ("*pp_rank_1_*optim*", lambda s: s.clear(), "no optimizer_state_dict"),
        (
            "*pp_rank_2_*optim*",
            lambda s: s["optimizer_state_dict"].update(fp32_flat_groups=[torch.ones(5)]),
            "another save",
        ),
        (
            "*pp_rank_2_*optim*",
            lambda s: s["optimizer_state_dict"]["fp32_flat_groups"].append(torch.ones(5)),
            "another save",
        ),
        (
            "*pp_rank_0_*optim*",
            lambda s: s["optimizer_state_dict"].update(fp32_flat_groups=[torch.ones(5, 5)]),
            "flat floating numbers",
        ),
        ("*pp_rank_0_*optim*", lambda s: s["optimizer_state_dict"].update(fp32_flat_groups=["text"]), "no tensor"),
        ("*pp_rank_0_*model*", lambda s: s.pop("param_shapes"), "param_shapes"),
        ("*pp_rank_0_*model*", lambda s: s.update(param_shapes=[{"a": "text"}]), "param_shapes"),
        ("*pp_rank_0_*model*", lambda s: s.update(param_shapes=s["param_shapes"] * 2), "two groups"),
        ("*pp_rank_0_*model*", lambda s: s.update(shared_params=["a"]), "shared_params"),
        ("*pp_rank_1_*model*", lambda s: s["frozen_param_fragments"].clear(), "frozen weight"),
        ("*pp_rank_0_*model*", lambda s: s.update(autoep_layers=[1]), "AutoEP"),
    ],
)
def test_broken_zero_3(tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object], word: str) -> None:
    folder = write_parts(tmp_path / "tag", masters(), ("model.norm.weight",))
    damaged(folder, change, name)
    with pytest.raises(FastftError, match=word):
        deepspeed_folder.read(folder, masters=False)


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("mp_rank*", lambda s: s.pop("module"), "no `module`"),
        ("mp_rank*", lambda s: s.update(param_shapes=s["param_shapes"] * 2), "another number of groups"),
        ("mp_rank*", lambda s: s["param_shapes"][0].pop("lm_head.weight"), "another save"),
        ("mp_rank*", lambda s: s["param_shapes"][0].update(more=torch.Size([900])), "masters end"),
        ("*pp_rank_1_*optim*", lambda s: s["optimizer_state_dict"].update(param_alignment_paddings=[[1]]), ""),
        ("*pp_rank_0_*optim*", lambda s: s["optimizer_state_dict"].update(param_alignment_paddings=[[1]]), "paddings"),
        ("*pp_rank_0_*optim*", lambda s: s["optimizer_state_dict"].update(partition_count=[3, 1]), "experts"),
    ],
)
def test_broken_zero_2(tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object], word: str) -> None:
    folder = write_whole(tmp_path / "tag", masters())
    damaged(folder, change, name)
    if not word:  # only the first process's is read
        assert deepspeed_folder.read(folder, masters=True).tensors
        return
    with pytest.raises(FastftError, match=word):
        deepspeed_folder.read(folder, masters=True)


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("mp_rank_01_model_states.pt", "tensor parallel"),
        ("layer_00-model_states.pt", "pipeline"),
        ("layer_1_expert_3_mp_rank_00_model_states.pt", "experts"),
        ("zero", "universal"),
        ("other_model_states.pt", "no file of ZeRO"),
        ("zero_pp_rank_0_mp_rank_00_model_states.pt", "two different saves"),
    ],
)
def test_layouts_that_are_not_read(tmp_path: Path, file: str, word: str) -> None:
    folder = write_whole(tmp_path / "tag", masters())
    (folder / file).write_bytes(b"")
    with pytest.raises(FastftError, match=word):
        deepspeed_folder.read(folder, masters=False)


def test_missing_processes(tmp_path: Path) -> None:
    for rank in range(WORLD):
        folder = write_parts(tmp_path / f"optimizer {rank}", masters())
        (folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").unlink()
        with pytest.raises(FileError, match=r"is missing beside|by 3 processes, but 2"):
            deepspeed_folder.read(folder, masters=False)
        folder = write_parts(tmp_path / f"model {rank}", masters())
        (folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt").unlink()
        with pytest.raises(FileError, match=r"is missing beside|by 3 processes, but 2"):
            deepspeed_folder.read(folder, masters=False)
    folder = write_parts(tmp_path / "none", masters())
    for path in folder.glob("*optim*"):
        path.unlink()
    with pytest.raises(FileError, match="without its"):
        deepspeed_folder.read(folder, masters=False)


def test_no_masters_is_said(tmp_path: Path) -> None:
    """fp32 from a folder whose optimizer files were thrown away: the 16-bit weights, and a note."""
    truth = masters()
    folder = write_whole(tmp_path / "tag", truth)
    for path in folder.glob("*optim*"):
        path.unlink()
    read = deepspeed_folder.read(folder, masters=True)
    assert "not the fp32 masters" in " ".join(read.notes)
    found = converted(folder, tmp_path, "fp32")
    assert all(torch.equal(found[name], tensor.bfloat16().float()) for name, tensor in truth.items())
