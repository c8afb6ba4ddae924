"""DeepSpeed with two processes makes the steps of one process with twice the batch, and resumes exactly.

DeepSpeed builds its communication library on first use, which takes a minute: `pip install 'fastft[deepspeed]'`, then
`pytest -m deepspeed`.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_run
import two_processes
from fastft.config.schema import Config
from fastft.training import checkpoint, run

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

WAYS = [("lora", "zero2"), ("full", "zero2"), ("lora", "zero3"), ("full", "zero3")]
STEPS = {
    "train__max_steps": 4,
    "train__batch_size": 4,
    "train__grad_accumulation": 2,
    "train__log_steps": 1,
    "output__save_steps": 1,
    "output__keep": 4,
    "samples__prompts": ("How many apples?",),
    "samples__max_new_tokens": 3,
}


def _config(folder: Path, kind: str, **changes: Any) -> Config:
    return tiny_run.config(folder / "model", folder / "rows.jsonl", kind=kind, **{**STEPS, **changes})


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    tiny_run.write_model(folder / "model")
    tiny_run.write_dialogues(folder / "rows.jsonl", 12)
    jobs = []
    for kind, name in WAYS:
        config = _config(folder, kind, distributed__deepspeed=name, train__batch_size=2)
        jobs.append(two_processes.job(config, folder / f"{name}-{kind}"))
        jobs.append(two_processes.job(config, folder / f"broken-{name}-{kind}", die_at=5))
        jobs.append(two_processes.job(config, folder / f"broken-{name}-{kind}", resume="auto"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # ninja
        two_processes.run_all(jobs, folder)
    return folder


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(("kind", "name"), WAYS)
def test_two_processes_are_one_with_twice_the_batch(kind: str, name: str, ran: Path, tmp_path: Path) -> None:
    one = run.run(_config(ran, kind), work_dir=tmp_path / "one")
    expected, lines = _lines(one.run_dir), _lines(ran / f"{name}-{kind}")
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-3)
    theirs, ours = _weights(one.artifact), _weights(ran / f"{name}-{kind}" / one.artifact.name)
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        assert torch.allclose(ours[key].float(), value, rtol=1e-2, atol=1e-3), key


@pytest.mark.parametrize(("kind", "name"), WAYS)
def test_resumed_is_bit_for_bit_the_same(kind: str, name: str, ran: Path) -> None:
    unbroken, broken = ran / f"{name}-{kind}", ran / f"broken-{name}-{kind}"
    assert [found.fault for found in checkpoint.find(broken)] == [None] * 4
    expected, weights = (_weights(f / ("model" if kind == "full" else "adapter")) for f in (unbroken, broken))
    assert expected.keys() == weights.keys()
    for key, value in expected.items():
        assert torch.equal(value, weights[key]), key
