"""Two processes with one row each make the same steps as one process with two rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from fastft.config import show
from fastft.training import run


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    model = tiny_run.write_model(tmp_path / "model")
    data = tiny_run.write_dialogues(tmp_path / "rows.jsonl", 12)
    settings = {"train__max_steps": 8, "data__eval_rows": 2, "train__eval_steps": 4, "output__save_steps": 4}
    one = run.run(tiny_run.config(model, data, train__batch_size=2, **settings), work_dir=tmp_path / "one")
    config = tmp_path / "two.yaml"
    config.write_text(show.flat_yaml(tiny_run.config(model, data, train__batch_size=1, **settings)))
    environ = {**os.environ, "NPROC_PER_NODE": "2", "PYTHONPATH": str(Path(run.__file__).parents[2])}
    words = [sys.executable, "-m", "fastft", "train", str(config), "--work-dir", str(tmp_path / "two")]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("first sample") == 1  # only the first process speaks
    lines, others = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    for name in ("loss", "eval_loss", "grad_norm"):
        # Sums in another order: fp32 noise, grown over 8 steps of AdamW.
        assert [o[name] for o in others if name in o] == pytest.approx([x[name] for x in lines if name in x], rel=1e-3)
    assert (tmp_path / "two" / "checkpoint-8" / "rng_state_1.pth").is_file()
    weights = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    for name, value in load_file(one.artifact / "adapter_model.safetensors").items():
        assert torch.allclose(weights[name], value, rtol=1e-2, atol=1e-3), name
