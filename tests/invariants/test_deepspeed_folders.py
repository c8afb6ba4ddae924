"""pth_to_hf reads what DeepSpeed itself wrote, bit for bit as DeepSpeed's own tool does, and without DeepSpeed.

Two processes on the CPU write ZeRO-1, 2 and 3 with tied, frozen and grouped weights. DeepSpeed builds its communication
library on first use, which takes minutes: `pip install 'fastft[deepspeed]'`, then `pytest -m deepspeed`.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_run
import two_processes
import zero_writer
from fastft.config.schema import Config
from fastft.convert import pth
from fastft.errors import CheckpointError, FileError

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders; FASTFT_ZERO_FOLDER names some of an earlier run, for those who try things."""
    if "FASTFT_ZERO_FOLDER" in os.environ:
        return Path(os.environ["FASTFT_ZERO_FOLDER"])
    folder = tmp_path_factory.mktemp("zero")
    zero_writer.run_all(folder)
    return folder


def _base(folder: Path, target: Path) -> Config:
    """A base without weights: its config.json says which tensors there must be."""
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    values: dict[str, Any] = {
        "model": {"name": str(target)},
        "method": {"kind": "full"},
        "data": {"train": [{"source": "x"}]},
    }
    return Config.model_validate(values)


def _expected(truth: dict[str, torch.Tensor], case: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in truth.items() if not (case.get("tied") and name == "lm_head.weight")}


@pytest.mark.parametrize("name", [name for name, case in zero_writer.CASES.items() if case["stage"] < 3])
def test_16_bit_weights(name: str, written: Path, tmp_path: Path) -> None:
    config = _base(written / name, tmp_path / "base")
    pth.execute(pth.plan(config, written / name, dtype="auto"), tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    truth = _expected(load_file(written / name / "weights.safetensors"), zero_writer.CASES[name])
    assert found.keys() == truth.keys()
    for key, tensor in truth.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", zero_writer.CASES)
def test_masters(name: str, written: Path, tmp_path: Path) -> None:
    """With fp32 asked for; ZeRO-3 has nothing else, so that auto gives the same there."""
    case = zero_writer.CASES[name]
    config = _base(written / name, tmp_path / "base")
    truth = _expected(load_file(written / name / "masters.safetensors"), case)
    for dtype in ("fp32", "auto") if case["stage"] == 3 else ("fp32",):
        plan = pth.plan(config, written / name / "global_step3", dtype=dtype)
        assert any("fp32 masters" in note for note in plan.notes)
        pth.execute(plan, tmp_path / dtype)
        found = load_file(tmp_path / dtype / "model.safetensors")
        assert found.keys() == truth.keys()
        for key, tensor in truth.items():
            expected = tensor.float() if dtype == "fp32" else tensor
            assert torch.equal(found[key], expected), key
    if not case.get("frozen"):
        assert {tensor.dtype for tensor in truth.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["zero1", "zero2-tied", "zero3-tied"])
def test_a_missing_process(name: str, written: Path, tmp_path: Path) -> None:
    config = _base(written / name, tmp_path / "base")
    for rank in (0, 1):
        folder = tmp_path / f"without {rank}"
        shutil.copytree(written / name, folder)
        (found,) = (folder / "global_step3").glob(f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        found.unlink()
        with pytest.raises(FileError, match=r"process 0 is missing|by 2 processes, but 1"):
            pth.plan(config, folder, dtype="fp32")


def test_files_of_two_saves(written: Path, tmp_path: Path) -> None:
    config = _base(written / "zero3-tied", tmp_path / "base")
    folder = tmp_path / "mixed"
    shutil.copytree(written / "zero3-tied", folder)
    other = written / "zero3-frozen" / "global_step3" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(other, folder / "global_step3")
    with pytest.raises(CheckpointError, match="another save|masters end"):
        pth.plan(config, folder, dtype="fp32")


def test_without_deepspeed(written: Path, tmp_path: Path) -> None:
    """In a process that cannot import it, nor torch."""
    _base(written / "zero3-tied", tmp_path / "base")
    config = tmp_path / "run.yaml"
    config.write_text(
        json.dumps(
            {
                "model": {"name": str(tmp_path / "base")},
                "method": {"kind": "full"},
                "data": {"train": [{"source": "x"}]},
            }
        )
    )
    program = (
        "import sys; sys.modules['deepspeed'] = None; sys.argv = ['fastft', *sys.argv[1:]];"
        "from fastft.__main__ import main; sys.exit(main())"
    )
    words = ["convert", "pth_to_hf", str(config), str(written / "zero3-tied"), str(tmp_path / "hf")]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ZeRO-3 keeps its weights as fp32 masters only" in done.stderr


@pytest.mark.parametrize(("kind", "name"), [("lora", "zero2"), ("full", "zero3")])
def test_our_own_runs(kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """checkpoint-N of a fastft run under DeepSpeed: its weights, or the fp32 masters behind them when they are asked for."""
    tiny_run.write_model(tmp_path / "model")
    tiny_run.write_dialogues(tmp_path / "rows.jsonl", 12)
    changes = {"train__max_steps": 2, "output__save_steps": 2, "samples__prompts": (), "distributed__deepspeed": name}
    config = tiny_run.config(tmp_path / "model", tmp_path / "rows.jsonl", kind=kind, **changes)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # ninja
    two_processes.run_all([two_processes.job(config, tmp_path / "run")], tmp_path)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    found = {}
    for dtype in ("auto", "fp32"):
        plan = pth.plan(config, checkpoint, dtype=dtype)
        assert any("fp32 masters" in note for note in plan.notes) is (dtype == "fp32")
        pth.execute(plan, tmp_path / dtype)
        (file,) = (tmp_path / dtype).glob("*.safetensors")
        found[dtype] = load_file(file)
    assert found["auto"].keys() == found["fp32"].keys()
    for key, tensor in found["auto"].items():
        assert found["fp32"][key].dtype == torch.float32
        assert torch.equal(found["fp32"][key].to(tensor.dtype), tensor), key
