"""TensorBoard and W&B get the lines of metrics.jsonl; nothing is asked for that is not installed."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import tiny_run
from fastft.errors import ConfigError
from fastft.training import loggers

LINES = [
    {"step": 1, "epoch": 0.5, "loss": 2.0, "lr": 1e-3},
    {"step": 2, "epoch": 1.0, "eval_loss": 1.5},
]


def _config(tmp_path: Path, *names: str) -> Any:
    return tiny_run.config(tmp_path / "model", tmp_path / "rows.jsonl", output__report_to=names)


@pytest.mark.parametrize(("name", "full"), [("tensorboard", "TensorBoard"), ("wandb", "Weights & Biases")])
def test_a_missing_one_is_said_before_anything_runs(
    name: str, full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastft.training import run

    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(
        ConfigError, match=rf"{full} is not installed: pip install 'fastft\[{name}\]', or remove {name}"
    ):
        run.run(_config(tmp_path, name), work_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    loggers.check(_config(tmp_path))


def test_none_is_asked_for_by_itself(tmp_path: Path) -> None:
    assert loggers.start(_config(tmp_path), {}, tmp_path, 0) == []


class _Writer:
    """Stands for torch's SummaryWriter."""

    made: list["_Writer"] = []  # noqa: RUF012

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        self.folder, self.purge_step, self.values = folder, purge_step, []
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.values.append((name, value, step))

    def flush(self) -> None:
        pass


def test_what_tensorboard_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = types.ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = _Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    (listen,) = loggers.start(_config(tmp_path, "tensorboard"), {}, tmp_path, 4)
    for line in LINES:
        listen(line)
    writer = _Writer.made.pop()
    assert (writer.folder, writer.purge_step) == (tmp_path / "tensorboard", 5)
    assert writer.values == [
        ("epoch", 0.5, 1),
        ("loss", 2.0, 1),
        ("lr", 1e-3, 1),
        ("epoch", 1.0, 2),
        ("eval_loss", 1.5, 2),
    ]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_itself_reads_it_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (listen,) = loggers.start(_config(tmp_path, "tensorboard"), {}, tmp_path, 0)
    for line in LINES:
        listen(line)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("eval_loss")] == [(2, 1.5)]


def _wandb_stand_in(seen: dict[str, Any]) -> types.ModuleType:
    wandb: Any = types.ModuleType("wandb")
    wandb.Settings = lambda **given: given

    def init(**given: Any) -> Any:
        seen.update(given)
        return types.SimpleNamespace(log=lambda values, step: seen.setdefault("lines", []).append((step, values)))

    wandb.init = init
    return wandb


def test_what_wandb_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "wandb", _wandb_stand_in(seen))
    settings = {"train.lr": 0.01, "data.train": "https://me:secret@host/x"}
    (listen,) = loggers.start(_config(tmp_path, "wandb"), settings, tmp_path, 0)
    for line in LINES:
        listen(line)
    assert seen["lines"] == [(1, {"epoch": 0.5, "loss": 2.0, "lr": 1e-3}), (2, {"epoch": 1.0, "eval_loss": 1.5})]
    assert (seen["name"], seen["resume"], seen["dir"]) == ("tiny", "allow", str(tmp_path))
    assert seen["id"] == (tmp_path / "wandb_id.txt").read_text()
    assert seen["config"] == {"train.lr": 0.01, "data.train": "https://***@host/x"}
    assert seen["settings"]["save_code"] is False
    # A resumed run goes on under the id of the first.
    seen.clear()
    (tmp_path / "wandb_id.txt").write_text("kept")
    loggers.start(_config(tmp_path, "wandb"), settings, tmp_path, 2)
    assert seen["id"] == "kept"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_itself_works_offline(tmp_path: Path) -> None:
    code = (
        "import sys, json; from pathlib import Path; from fastft.config.schema import Config\n"
        "from fastft.training import loggers\n"
        "folder = Path(sys.argv[1]); config = Config.model_validate_json((folder / 'c.json').read_text())\n"
        "(listen,) = loggers.start(config, {'train.lr': 1}, folder, 0)\n"
        f"[listen(line) for line in json.loads({json.dumps(LINES)!r})]\n"
    )
    (tmp_path / "c.json").write_text(_config(tmp_path, "wandb").model_dump_json())
    python = Path(loggers.__file__).parents[2]
    environ = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": str(python)}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
