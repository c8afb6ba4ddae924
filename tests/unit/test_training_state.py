"""The states of a training come back from a checkpoint as they were, and what is broken is refused in one line."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastft.errors import CheckpointError, FileError
from fastft.training import progress, state

OLD_FILES = {"optimizer": "optimizer.pt", "scheduler": "scheduler.pt", "scaler": "scaler.pt"}


def an_optimizer(eight_bit: bool) -> Any:
    """After three steps; both of its weights are large enough for 8-bit states."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(80, 60)
    if eight_bit:
        import bitsandbytes

        made: Any = bitsandbytes.optim.AdamW8bit(layer.parameters(), lr=1e-3, min_8bit_size=16)
    else:
        made = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    for _ in range(3):
        layer(torch.randn(4, 80)).square().sum().backward()
        made.step()
        made.zero_grad()
    return made


def a_process() -> dict[str, Any]:
    name, keys, *rest = np.random.RandomState(5).get_state()
    return {
        "python": random.Random(5).getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "cpu": torch.random.get_rng_state(),
        "loss_sum": 0.1 + 0.2,
        "logged": 3,
    }


def a_schedule(optimizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0).state_dict()
    return found


def same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        [same(value, other[key]) for key, value in one.items()]
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        [same(value, its) for value, its in zip(one, other, strict=True)]
    else:
        assert one == other or (math.isnan(one) and math.isnan(other))


@pytest.mark.parametrize("eight_bit", [False, True])
def test_an_optimizer_comes_back_with_its_types(eight_bit: bool, tmp_path: Path) -> None:
    made = an_optimizer(eight_bit)
    parts = {"optimizer": made.state_dict(), "scheduler": a_schedule(made), "processes": [a_process()]}
    state.write(tmp_path, parts)
    assert sorted(path.name for path in (tmp_path / state.FOLDER).iterdir()) == ["state.json", "tensors.safetensors"]
    state.check(tmp_path, 3, 1)
    for name, value in parts.items():
        same(state.read(tmp_path, name), value)
    assert state.read(tmp_path, "scaler") is None
    found = state.read(tmp_path, "optimizer")
    if eight_bit:
        first, second = (values["__bnb_optimizer_quant_state__"] for values in found["state"].values())
        assert first["qmap1"] is second["qmap1"]
        assert first["state1"].dtype == torch.uint8
    else:
        assert isinstance(found["state"][0]["step"], torch.Tensor)
        assert isinstance(found["param_groups"][0]["betas"], tuple)
    state.fitting_optimizer(found, made, "x")


def test_all_plain_data_and_layouts(tmp_path: Path) -> None:
    turned, shared = torch.randn(3, 4, 5).permute(2, 0, 1), torch.ones(3, dtype=torch.bfloat16)
    value = {
        "numbers": [0, -1, 1e-300, 0.1, math.inf, -math.inf, math.nan, True, None, "a\nb"],
        "nested": ((), [], {}, {1: (2, {"$x": 3})}),
        "tensors": [turned, shared, shared, torch.tensor(7), torch.ones(0, 2), torch.tensor([True])],
    }
    state.write(tmp_path, {"processes": [value]})
    (found,) = state.read(tmp_path, "processes")
    same(found, value)
    assert found["tensors"][1] is found["tensors"][2]
    with pytest.raises(TypeError, match="set is no plain data"):
        state.write(tmp_path / "new", {"processes": [{1}]})


@pytest.mark.parametrize("eight_bit", [False, True])
def test_a_checkpoint_of_an_earlier_version_is_read_as_data(
    eight_bit: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = an_optimizer(eight_bit)
    parts = {"optimizer": made.state_dict(), "scheduler": a_schedule(made), "scaler": {"scale": 8.0}}
    for name, value in parts.items():
        torch.save(value, tmp_path / OLD_FILES[name])
    processes = [a_process(), {**a_process(), "logged": 2}]
    for rank, value in enumerate(processes):
        torch.save(value, tmp_path / f"rng_state_{rank}.pth")
    monkeypatch.setattr(torch, "load", None)
    assert state.is_old(tmp_path)
    state.check(tmp_path, 3, 2)
    for name, value in {**parts, "processes": processes}.items():
        same(state.read(tmp_path, name), value)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    made = an_optimizer(eight_bit=False)
    parts = {"optimizer": made.state_dict(), "scheduler": a_schedule(made), "processes": [a_process()]}
    state.write(tmp_path, parts)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update(version=2), "version 1"),
        (lambda t: t.update(more=1), "'more'"),
        (lambda t: t.pop("processes"), "processes"),
        (lambda t: t["processes"].append(1), "2 processes"),
        (lambda t: t["processes"][0].update(cpu={"$tensor": "no"}), "'no'"),
        (lambda t: t["processes"][0].update(cpu={"$tuple": 5}), r"\$tuple"),
        (lambda t: t["processes"][0]["cpu"].update(order=[1]), "order"),
        (lambda t: t["processes"][0].update(python=[1]), "random numbers of process 0"),
        (lambda t: t["processes"][0].update(loss_sum={"$float": "nan"}), "nan"),
        (lambda t: t["scheduler"].update(last_epoch=4), "last_epoch is 4"),
        (lambda t: t.pop("scheduler"), "last_epoch"),
        (lambda t: t.pop("optimizer"), "groups"),
        (lambda t: t["optimizer"]["param_groups"][0].update(lr="x"), "lr"),
    ],
)
def test_a_changed_tree_is_refused(change: Callable[[Any], object], says: str, written: Path) -> None:
    tree = json.loads((written / state.TREE).read_text())
    change(tree)
    (written / state.TREE).write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match=says) as caught:
        state.check(written, 3, 1)
    assert "\n" not in str(caught.value)


def test_a_cut_or_missing_file_is_refused(written: Path) -> None:
    tensors = written / state.TENSORS
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors"):
        state.check(written, 3)
    tensors.unlink()
    with pytest.raises(FileError, match="missing"):
        state.check(written, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda o: o["state"][0].update(exp_avg=torch.ones(2)), r"shape \(2,\) instead of \(60, 80\)"),
        (lambda o: o["state"][0].update(exp_avg=torch.full((60, 80), math.nan)), "not finite"),
        (lambda o: o["state"][0].update(exp_avg=torch.ones(60, 80, dtype=torch.int64)), "floating"),
        (lambda o: o["state"][0].update(exp_avg=3), "has none"),
        (lambda o: o["state"][0].update(momentum=torch.ones(60, 80)), "momentum"),
        (lambda o: o["state"][0].update(step=torch.tensor(math.nan)), "no count"),
        (lambda o: o["state"].update({9: {}}), "weight '9'"),
        (lambda o: o["param_groups"].append(o["param_groups"][0]), "groups"),
        (lambda o: o["param_groups"][0].update(betas=(0.9,)), "betas"),
        (lambda o: o["param_groups"][0].update(weight_decay=math.inf), "weight_decay"),
        (lambda o: o["param_groups"][0].update(other=1), "other"),
        (lambda o: o["param_groups"][0].update(params=[1, 0]), "numbers its weights"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(change: Callable[[Any], object], says: str, written: Path) -> None:
    found = state.read(written, "optimizer")
    change(found)
    with pytest.raises(CheckpointError, match=says):
        state.fitting_optimizer(found, an_optimizer(eight_bit=False), "--resume x")


def test_settings_that_a_newer_torch_has_are_its_own(written: Path) -> None:
    found = state.read(written, "optimizer")
    del found["param_groups"][0]["capturable"]
    filled = state.fitting_optimizer(found, an_optimizer(eight_bit=False), "--resume x")
    assert filled["param_groups"][0]["capturable"] is False


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "step None"),
        ('{"global_step": 3}', "step 3"),
        ('{"global_step": 2, "logging_steps": 0}', "logging_steps"),
        ('{"global_step": 2, "epoch": "x"}', "epoch"),
        ('{"global_step": 2, "log_history": 5}', "log_history"),
        ('{"global_step": 2, "hooks": 5}', "hooks"),
        ('{"global_step": true}', "global_step"),
        ("[", "not JSON"),
    ],
)
def test_progress_of_another_kind_is_refused(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / progress.FILE_NAME
    path.write_text(content)
    with pytest.raises(CheckpointError, match=says):
        progress.read(path, 2)
    path.unlink()
    with pytest.raises(FileError, match="missing"):
        progress.read(path, 2)


def test_progress_of_transformers_is_taken(tmp_path: Path) -> None:
    """Every field that the installed version writes is known."""
    from transformers import TrainerState

    TrainerState(global_step=2, epoch=0.5, max_steps=4).save_to_json(str(tmp_path / progress.FILE_NAME))
    assert progress.read(tmp_path / progress.FILE_NAME, 2)["epoch"] == 0.5
