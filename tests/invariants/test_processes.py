"""Two processes make the steps of one process with twice the batch, each with the whole model or with a part of it.

And a run of two processes that broke off ends, resumed, with the bits of one that did not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_run
import two_processes
from fastft.config import show
from fastft.config.schema import Config
from fastft.training import checkpoint, run, state

KINDS = ("full", "lora", "qlora")
# 12 rows: each epoch is three batches of four rows, and so two steps: one of two batches, one of one.
STEPS = {
    "train__max_steps": 4,
    "train__batch_size": 4,
    "train__grad_accumulation": 2,
    "train__log_steps": 1,
    "train__eval_steps": 2,
    "output__save_steps": 2,
    "samples__prompts": ("How many apples?",),
    "samples__max_new_tokens": 3,
    "data__eval_rows": 1,  # fewer rows than processes
}
# Packed rows, with dropout; the run breaks off within an epoch, within a step and between two lines of metrics.jsonl.
PACKED = {
    "train__max_steps": 6,
    "train__batch_size": 1,
    "train__grad_accumulation": 2,
    "train__log_steps": 2,
    "output__save_steps": 1,
    "data__packing": True,
    "data__max_length": 80,  # 13 dialogues in 8 rows: an epoch is two steps of two batches in each process
    "train__lr": 1e-3,
}
DIE_AT = 8  # the second half of step 4
# Tasks that compare or judge answers; dpo with `full` asks its reference once, before the first step.
PREFERENCES = (("dpo", "lora"), ("dpo", "full"), ("orpo", "full"), ("kto", "lora"), ("reward", "lora"))
COMPARED = {
    "train__max_steps": 4,
    "train__batch_size": 4,
    "train__grad_accumulation": 1,
    "train__log_steps": 2,
    "train__eval_steps": 2,
    "output__save_steps": 3,
    "data__eval_rows": 2,
    "train__lr": 1e-3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    tiny_run.write_model(folder / "model")
    tiny_run.write_dialogues(folder / "rows.jsonl", 13)
    tiny_run.write_pairs(folder / "pairs.jsonl", 14)
    tiny_run.write_judged(folder / "judged.jsonl", 14)
    return folder


def _config(folder: Path, kind: str, **changes: Any) -> Config:
    return tiny_run.config(folder / "model", folder / "rows.jsonl", kind=kind, **changes)


def _packed(folder: Path, kind: str, *, fsdp: bool) -> Config:
    dropout = {} if kind == "full" else {"method__lora": {"r": 4, "alpha": 8, "dropout": 0.2}}
    return _config(folder, kind, distributed__fsdp=fsdp, **PACKED, **dropout)


def _compared(folder: Path, task: str, kind: str, **changes: Any) -> Config:
    rows = folder / ("judged.jsonl" if task == "kto" else "pairs.jsonl")
    return tiny_run.config(folder / "model", rows, task=task, kind=kind, **{**COMPARED, **changes})


BROKEN = [("lora", False), ("lora", True), ("full", True)]


@pytest.fixture(scope="module")
def ran(folder: Path) -> Path:
    """All runs with two processes."""
    halved = {**STEPS, "train__batch_size": 2}
    jobs = [two_processes.job(_config(folder, "lora", **halved), folder / "ddp")]
    for kind in KINDS:
        config = _config(folder, kind, distributed__fsdp=True, **halved)
        jobs.append(two_processes.job(config, folder / f"fsdp-{kind}"))
    for kind, fsdp in BROKEN:
        config, name = _packed(folder, kind, fsdp=fsdp), f"{kind}-{fsdp}"
        jobs.append(two_processes.job(config, folder / f"unbroken-{name}"))
        jobs.append(two_processes.job(config, folder / f"broken-{name}", die_at=DIE_AT))
        jobs.append(two_processes.job(config, folder / f"broken-{name}", resume="auto"))
    for task, kind in PREFERENCES:
        config = _compared(folder, task, kind, train__batch_size=2)
        jobs.append(two_processes.job(config, folder / f"{task}-{kind}"))
    config = _compared(folder, "dpo", "full", train__batch_size=2)
    jobs.append(two_processes.job(config, folder / "broken-dpo", die_at=4))
    jobs.append(two_processes.job(config, folder / "broken-dpo", resume="auto"))
    first, second = two_processes.run_all(jobs, folder)
    assert first.count("first sample") == len(jobs)
    assert second == ""  # only the first process speaks
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, run.RunResult]:
    """The same by one process with twice the batch."""
    return {kind: run.run(_config(folder, kind, **STEPS), work_dir=folder / f"one-{kind}") for kind in KINDS}


def _lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def _same_bits(expected: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == other.keys()
    for name, value in expected.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(("name", "kind"), [("ddp", "lora"), *[(f"fsdp-{kind}", kind) for kind in KINDS]])
def test_two_processes_are_one_with_twice_the_batch(
    name: str, kind: str, ran: Path, one: dict[str, run.RunResult]
) -> None:
    expected, lines = _lines(one[kind].run_dir), _lines(ran / name)
    assert len(expected) == len(lines) == 4 + 2
    for key in ("loss", "eval_loss", "grad_norm"):
        # Sums in another order: fp32 noise, grown over 4 steps of AdamW.
        found = [line[key] for line in lines if key in line]
        assert found == pytest.approx([line[key] for line in expected if key in line], rel=1e-3), key
    assert _lines(ran / name, "samples.jsonl")[0] == _lines(one[kind].run_dir, "samples.jsonl")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_run_leaves_the_files_of_a_run_that_is_not(
    kind: str, ran: Path, one: dict[str, run.RunResult]
) -> None:
    artifact = one[kind].artifact.name
    for place in (artifact, "checkpoint-2", "checkpoint-4"):
        expected = {file.name for file in (one[kind].run_dir / place).iterdir()}
        found = {file.name for file in (ran / f"fsdp-{kind}" / place).iterdir()}
        assert found == expected
        theirs, ours = _weights(one[kind].run_dir / place), _weights(ran / f"fsdp-{kind}" / place)
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            assert (value.shape, value.dtype) == (ours[name].shape, ours[name].dtype)
            assert torch.allclose(ours[name], value, rtol=1e-2, atol=1e-3), name
    expected_states, states = (
        state.read(f / "checkpoint-4", "optimizer")["state"] for f in (one[kind].run_dir, ran / f"fsdp-{kind}")
    )
    assert expected_states.keys() == states.keys()
    for key, values in expected_states.items():
        for name, value in values.items():
            assert states[key][name].shape == value.shape
    # The last checkpoint and the result are the same weights.
    _same_bits(_weights(ran / f"fsdp-{kind}" / "checkpoint-4"), _weights(ran / f"fsdp-{kind}" / artifact))


@pytest.mark.parametrize(("kind", "fsdp"), BROKEN)
def test_resumed_is_bit_for_bit_the_same(kind: str, fsdp: bool, ran: Path) -> None:
    unbroken, broken = ran / f"unbroken-{kind}-{fsdp}", ran / f"broken-{kind}-{fsdp}"
    assert [found.step for found in checkpoint.find(broken)] == [6, 5]
    place = "model" if kind == "full" else "adapter"
    _same_bits(_weights(unbroken / place), _weights(broken / place))
    expected, lines = _lines(unbroken), _lines(broken)
    for line in (*expected, *lines):
        [line.pop(name, None) for name in ("tokens_per_s", "memory_gib")]
    assert lines == expected
    # What is claimed above: epochs end within the run, and step 3 is in the middle of one.
    epochs = {line["step"]: line["epoch"] for line in expected}
    assert (epochs[2] + epochs[4]) / 2 % 1 != 0
    assert epochs[6] > 1
    for number in (5, 6):
        states = [state.read(f / f"checkpoint-{number}", "optimizer")["state"] for f in (unbroken, broken)]
        for key, values in states[0].items():
            _same_bits(values, states[1][key])


def test_the_adapter_of_a_sharded_run_merges(ran: Path, tmp_path: Path) -> None:
    """`convert merge` takes a checkpoint as it is; the expected sum is W + alpha/r B A by hand."""
    from fastft.__main__ import main

    place = ran / "fsdp-lora" / "checkpoint-2"
    assert main(["convert", "merge", str(ran / "model"), str(place), str(tmp_path / "merged")]) == 0
    base, adapter, merged = _weights(ran / "model"), _weights(place), _weights(tmp_path / "merged")
    name = "model.layers.1.mlp.up_proj"
    product = adapter[f"base_model.model.{name}.lora_B.weight"] @ adapter[f"base_model.model.{name}.lora_A.weight"]
    assert product.abs().max() > 1e-4
    # One product of rank 4 and one sum in fp32: a few roundings of values below 1.
    assert torch.allclose(merged[f"{name}.weight"], base[f"{name}.weight"] + 2.0 * product, atol=1e-6)


@pytest.mark.parametrize(("task", "kind"), PREFERENCES)
def test_two_processes_compare_answers_as_one(task: str, kind: str, ran: Path, folder: Path, tmp_path: Path) -> None:
    one = run.run(_compared(folder, task, kind), work_dir=tmp_path / "one")
    expected, lines = _lines(one.run_dir), _lines(ran / f"{task}-{kind}")
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for key in ("loss", "grad_norm", "accuracy", "margin", "eval_loss", "eval_accuracy"):
        found = [line[key] for line in lines if key in line]
        # Sums in another order; a margin is a difference of sums of log probabilities, near 0 at first.
        assert found == pytest.approx([line[key] for line in expected if key in line], rel=1e-3, abs=1e-5), key
        assert found, key
    place = "model" if kind == "full" else "adapter"
    for name, value in _weights(one.artifact).items():
        assert torch.allclose(_weights(ran / f"{task}-{kind}" / place)[name], value, rtol=1e-2, atol=1e-4), name


def test_a_resumed_comparison_goes_on_with_its_reference(ran: Path) -> None:
    unbroken, broken = ran / "dpo-full", ran / "broken-dpo"
    _same_bits(_weights(unbroken / "model"), _weights(broken / "model"))
    keys = ("loss", "accuracy", "margin", "eval_loss")
    assert [[line.get(key) for key in keys] for line in _lines(broken)] == [
        [line.get(key) for key in keys] for line in _lines(unbroken)
    ]


@pytest.mark.slow
def test_the_command_starts_the_processes(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    config.write_text(show.flat_yaml(_config(folder, "lora", train__max_steps=2)))
    words = [sys.executable, "-m", "fastft", "train", str(config), "--work-dir", str(tmp_path / "two"), "--fsdp"]
    environ = {**os.environ, "NPROC_PER_NODE": "2", "PYTHONPATH": str(Path(run.__file__).parents[2])}
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("first sample") == 1
    assert "done: 2 steps" in done.stderr
    again = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stderr.count("error:") == 1
    assert "holds a finished run" in again.stderr
    assert "Traceback" not in again.stderr
