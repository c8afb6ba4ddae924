"""A run that was killed and resumed ends with the same weights, bit for bit, as one that was not."""

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from fastft.config.schema import Config
from fastft.errors import ConfigError, TrainingError
from fastft.training import checkpoint, resume, run


def _config(folder: Path, **changes: object) -> Config:
    model = folder / "model"
    if not model.exists():
        tiny_run.write_model(model)
    data = tiny_run.write_dialogues(folder / "rows.jsonl", 12)
    settings = {
        "method__lora": {"r": 4, "alpha": 8, "dropout": 0.2},
        "train__batch_size": 2,
        "train__grad_accumulation": 2,
        "train__max_steps": 9,  # three epochs of three steps
        "train__eval_steps": 2,
        "data__eval_rows": 2,
        "output__save_steps": 2,
        "output__keep": 2,
    }
    return tiny_run.config(model, data, **{**settings, **changes})


KILLED = """
    import os, signal, sys
    from pathlib import Path

    sys.path[:0] = sys.argv[1:3]
    from fastft.config.schema import Config
    from fastft.training import run, trainer

    step = trainer.FastftTrainer.training_step
    calls = 0

    def killed(self, *args):
        global calls
        calls += 1
        if calls == 12:  # an epoch is five batches in three steps: the second half of step 7
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    trainer.FastftTrainer.training_step = killed
    config = Config.model_validate_json(Path(sys.argv[3]).read_text())
    run.run(config, work_dir=Path(sys.argv[4]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> run.RunResult:
    return run.run(_config(folder), work_dir=folder / "unbroken")


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    """A run folder whose process was ended by SIGKILL within step 7."""
    tests, python = Path(__file__).parents[1], Path(run.__file__).parents[2]
    (folder / "config.json").write_text(_config(folder).model_dump_json())
    words = [sys.executable, "-c", dedent(KILLED), tests, python, folder / "config.json", folder / "killed"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    return folder / "killed"


def _same(expected: Path, other: Path) -> None:
    weights, others = load_file(expected), load_file(other)
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name


def test_killed_and_resumed_is_bit_for_bit_the_same(folder: Path, unbroken: run.RunResult, killed: Path) -> None:
    assert [found.step for found in checkpoint.find(killed)] == [6, 4]
    done = run.run(_config(folder), work_dir=killed, resume="auto")
    _same(unbroken.artifact / "adapter_model.safetensors", done.artifact / "adapter_model.safetensors")
    for number in (8, 9):
        name = f"checkpoint-{number}/optimizer.pt"
        theirs, ours = (torch.load(f / name, weights_only=True) for f in (unbroken.run_dir, killed))
        for key, state in theirs["state"].items():
            assert torch.equal(state["exp_avg_sq"], ours["state"][key]["exp_avg_sq"])
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (unbroken.run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in (*lines, *expected):
        line.pop("tokens_per_s", None)
    assert lines == expected
    assert [found.step for found in checkpoint.find(killed)] == [9, 8]


def test_auto_skips_a_broken_checkpoint_and_says_so(
    folder: Path, unbroken: run.RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest checkpoint loses its last bytes, as on a disk that was full."""
    import shutil

    broken = folder / "broken"
    shutil.copytree(unbroken.run_dir, broken)
    shutil.rmtree(broken / "adapter")
    weights = broken / "checkpoint-9" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    done = run.run(_config(folder), work_dir=broken, resume="auto")
    assert "checkpoint-9 is skipped: adapter_model.safetensors has" in capsys.readouterr().err
    _same(unbroken.artifact / "adapter_model.safetensors", done.artifact / "adapter_model.safetensors")
    assert checkpoint.examine(broken / "checkpoint-9").fault is None


def test_another_run_is_refused(folder: Path, unbroken: run.RunResult) -> None:
    found = resume.choose(unbroken.run_dir, "auto")
    assert found is not None
    data = dict(found.record["data"])
    with pytest.raises(ConfigError, match=r"made with train.batch_size=2; now it is train.batch_size=4"):
        resume.check_same_run(found, _config(folder, train__batch_size=4), data)
    with pytest.raises(ConfigError, match="made with 10 rows"):
        resume.check_same_run(found, _config(folder), {**data, "rows": 11})
    resume.check_same_run(found, _config(folder, samples__prompts=("Hello?",)), data)


def test_a_longer_run_is_allowed_and_said(
    folder: Path, unbroken: run.RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    found = resume.choose(unbroken.run_dir, str(unbroken.run_dir / "checkpoint-8"))
    assert found is not None
    resume.check_same_run(found, _config(folder, train__max_steps=20), found.record["data"])
    assert "changed since checkpoint-8: train.max_steps=9 -> train.max_steps=20" in capsys.readouterr().err


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(TrainingError, match=r"fastft_checkpoint\.json is missing"):
        resume.choose(tmp_path, str(tmp_path / "checkpoint-3"))
    with pytest.raises(TrainingError, match=r"no checkpoint in .* is whole"):
        resume.choose(tmp_path, "auto")
    assert resume.choose(tmp_path / "nothing", "auto") is None
