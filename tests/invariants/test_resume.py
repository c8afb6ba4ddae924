"""A run that was killed and resumed ends with the same weights, bit for bit, as one that was not."""

import json
import signal
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
from fastft.training import checkpoint, resume, run, state, trainer


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
        theirs, ours = (state.read(f / f"checkpoint-{number}", "optimizer") for f in (unbroken.run_dir, killed))
        for key, values in theirs["state"].items():
            assert torch.equal(values["exp_avg_sq"], ours["state"][key]["exp_avg_sq"])
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    expected = [json.loads(line) for line in (unbroken.run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in (*lines, *expected):
        [line.pop(name, None) for name in ("tokens_per_s", "memory_gib")]
    assert lines == expected
    assert [found.step for found in checkpoint.find(killed)] == [9, 8]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("lora", {"method__lora": {"r": 4, "alpha": 8, "dropout": 0.2}}),
        ("full", {"train__schedule": "linear"}),
        ("qlora", {"train__optimizer": "adamw_8bit", "data__shuffle": False}),
    ],
)
def test_stopped_in_an_epoch_of_packed_rows(
    kind: str, changes: dict[str, object], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between two log lines, two evals and two saves; what follows is as if it had never come."""
    data = tiny_run.write_dialogues(tmp_path / "rows.jsonl", 24)
    config = tiny_run.config(
        folder / "model",
        data,
        kind=kind,
        data__packing=True,
        data__max_length=80,
        data__eval_rows=2,
        train__batch_size=1,
        train__grad_accumulation=3,
        train__max_steps=8,
        train__log_steps=4,
        train__eval_steps=4,
        train__lr=1e-3,
        output__save_steps=100,
        samples__prompts=("Hello?",),
        samples__max_new_tokens=2,
        train__sample_steps=4,
        **changes,
    )
    states = ["optimizer", "scheduler", "processes"]
    if kind == "full":
        _scale_losses(monkeypatch)
        states.append("scaler")
    unbroken = run.run(config, work_dir=tmp_path / "unbroken")
    step, sent = trainer.FastftTrainer.training_step, []

    def interrupted(self: trainer.FastftTrainer, *args: object) -> torch.Tensor:
        if self.state.global_step == 5 and not sent:
            sent.append(True)
            signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.FastftTrainer, "training_step", interrupted)
        with pytest.raises(SystemExit):
            run.run(config, work_dir=tmp_path / "stopped")
    torch.manual_seed(1)  # another process would start with other random numbers
    done = run.run(config, work_dir=tmp_path / "stopped", resume="auto")
    lines, expected = (
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (done.run_dir, unbroken.run_dir)
    )
    for line in (*lines, *expected):
        [line.pop(name, None) for name in ("tokens_per_s", "memory_gib")]
    assert lines == expected
    epochs = {line["step"]: line["epoch"] for line in expected}
    assert epochs[8] > 1
    stopped = json.loads((tmp_path / "stopped" / "checkpoint-6" / "trainer_state.json").read_text())
    assert stopped["epoch"] % 1 != 0
    (file,) = unbroken.artifact.glob("*.safetensors")
    _same(file, done.artifact / file.name)
    for name in states:
        ours, theirs = (state.read(f / "checkpoint-8", name) for f in (done.run_dir, unbroken.run_dir))
        assert ours
        _equal(ours, theirs)
    if kind == "full":
        # 8 steps: doubled four times.
        assert state.read(done.run_dir / "checkpoint-8", "scaler")["scale"] == 8.0 * 2**4


def _scale_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a CPU scale its losses as a GPU does for fp16; the scale grows every other step."""
    make = trainer.FastftTrainer.create_accelerator_and_postprocess

    def with_scaler(self: trainer.FastftTrainer) -> None:
        make(self)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    monkeypatch.setattr(trainer.FastftTrainer, "create_accelerator_and_postprocess", with_scaler)


def _equal(one: object, other: object) -> None:
    """The same nested data, tensors bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            _equal(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for value, its in zip(one, other, strict=True):
            _equal(value, its)
    else:
        assert one == other


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


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("dpo", {}),
        ("dpo", {"kind": "full"}),
        ("kto", {"kind": "freeze"}),
        ("orpo", {}),
        ("reward", {"kind": "full"}),
        ("sft", {"method__lora": {"r": 4, "dora": True, "dropout": 0.2}}),
        ("sft", {"method__lora": {"r": 4, "init": "pissa"}, "train__lora_plus_ratio": 4.0}),
        (
            "sft",
            {"kind": "full", "train__layer_lr_decay": 0.5, "train__embedding_lr": 1e-3, "train__neftune_alpha": 5.0},
        ),
    ],
    ids=["dpo", "dpo-full", "kto-freeze", "orpo", "reward-full", "dora", "pissa-lora+", "decay-neftune"],
)
def test_every_task_and_method_resumes_exactly(task: str, changes: dict[str, object], tmp_path: Path) -> None:
    """From the middle of an epoch: the newest checkpoint and the result are taken away."""
    import shutil

    if not (tmp_path / "model").exists():
        tiny_run.write_model(tmp_path / "model")
    write = {"kto": tiny_run.write_judged, "sft": tiny_run.write_dialogues}.get(task, tiny_run.write_pairs)
    settings = {"train__max_steps": 5, "output__save_steps": 3, "output__keep": 2, "data__eval_rows": 2, **changes}
    config = tiny_run.config(tmp_path / "model", write(tmp_path / "rows.jsonl", 9), task=task, **settings)
    unbroken = run.run(config, work_dir=tmp_path / "unbroken")
    broken = tmp_path / "broken"
    shutil.copytree(unbroken.run_dir, broken)
    shutil.rmtree(broken / "checkpoint-5")
    shutil.rmtree(broken / unbroken.artifact.name)
    done = run.run(config, work_dir=broken, resume="auto")
    name = "adapter_model.safetensors" if config.method.has_adapter else "model.safetensors"
    _same(unbroken.artifact / name, done.artifact / name)
    lines, expected = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (broken, unbroken.run_dir)
    )
    for line in (*lines, *expected):
        [line.pop(name, None) for name in ("tokens_per_s", "memory_gib")]
    assert lines == expected
