"""DeepSpeed's settings: the bundled files, whoever asks for them by which name, and what reaches transformers."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

import tiny_run
from fastft.errors import ConfigError
from fastft.training import deepspeed

# ZeRO's stage, and where the optimizer's states and the weights lie, as the DeepSpeed papers name them.
MEANING = {
    "zero1": (1, None, None),
    "zero2": (2, None, None),
    "zero2_offload": (2, "cpu", None),
    "zero3": (3, None, None),
    "zero3_offload": (3, "cpu", "cpu"),
}


def _config(tmp_path: Path, **changes: Any) -> Any:
    return tiny_run.config(tmp_path, tmp_path / "rows.jsonl", **changes)


def test_the_bundled_files_are_what_their_names_say() -> None:
    assert deepspeed.names() == sorted(MEANING)
    for name, (stage, optimizer, weights) in MEANING.items():
        zero = deepspeed.read(name)["zero_optimization"]
        assert zero["stage"] == stage == deepspeed.stage(name)
        assert zero.get("offload_optimizer", {}).get("device") == optimizer
        assert zero.get("offload_param", {}).get("device") == weights
        assert deepspeed.read(f"deepspeed_{name}") == deepspeed.read(name)  # XTuner's name


def test_a_file_of_the_users_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    assert deepspeed.stage(str(tmp_path / "mine.json")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is neither a file nor one of zero1, zero2, zero2_offload, zero3, zero3_offload"),
        ("{", "not JSON: "),
        ("[]", "a JSON object is expected"),
        (
            '{"train_micro_batch_size_per_gpu": 4}',
            "train_micro_batch_size_per_gpu is 4; .*the value is that of train.batch_size",
        ),
        ('{"gradient_clipping": 0.5}', "the value is that of train.max_grad_norm"),
        ('{"zero_optimization": {"stage": 3}}', "no checkpoint and no result would hold the weights"),
        ('{"zero_optimization": 3}', "zero_optimization must be a JSON object"),
    ],
)
def test_what_would_train_otherwise_than_the_config_is_refused(
    content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        deepspeed.read(str(path))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a":' * 50_000, "nested too deep"),
        (b'{"a":' + b"9" * 10_000 + b"}", "not JSON that can be read"),
        (b"[]", "a JSON object is expected"),
        (b"\xff", "not UTF-8"),
        (b'{"zero_optimization": {"stage": "three"}}', "stage must be 0, 1, 2 or 3"),
        (b'{"zero_optimization": {"stage": 4}}', "stage must be 0, 1, 2 or 3"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "mine.json").write_bytes(text)
    with pytest.raises(ConfigError, match=rf"mine\.json: .*{reason}"):
        deepspeed.read(str(tmp_path / "mine.json"))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.json")
    with pytest.raises(ConfigError, match=r"mine\.json: not a regular file"):
        deepspeed.read(str(tmp_path / "mine.json"))


def test_an_ignored_optimizer_or_schedule_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda _name: object())
    assert deepspeed.settings(_config(tmp_path, distributed__deepspeed="zero2"))["zero_optimization"]["stage"] == 2
    config = _config(tmp_path, distributed__deepspeed="zero2_offload", train__optimizer="adamw_8bit")
    with pytest.raises(ConfigError, match="train.optimizer: adamw_8bit would be ignored"):
        deepspeed.settings(config)
    (tmp_path / "mine.json").write_text('{"scheduler": {"type": "WarmupLR"}}')
    with pytest.raises(ConfigError, match="would replace train.schedule"):
        deepspeed.settings(_config(tmp_path, distributed__deepspeed=str(tmp_path / "mine.json")))


def test_a_missing_library_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'fastft\[deepspeed\]'"):
        deepspeed.settings(_config(tmp_path, distributed__deepspeed="zero2"))


def test_the_settings_reach_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TrainingArguments gets the file as it stands; it is caught there, since the library may not be installed."""
    import torch

    from fastft.training import trainer

    seen: dict[str, Any] = {}

    class Caught(Exception):  # noqa: N818 - no error
        pass

    def arguments(**given: Any) -> None:
        seen.update(given)
        raise Caught

    monkeypatch.setattr(trainer, "TrainingArguments", arguments)
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda _name: object())
    config = _config(tmp_path, distributed__deepspeed="deepspeed_zero3_offload", train__max_grad_norm=0.7)
    with pytest.raises(Caught):
        trainer.arguments(config, tmp_path, 5, None, torch.device("cpu"))
    assert seen["deepspeed"] == json.loads((deepspeed.FOLDER / "zero3_offload.json").read_text())
    # What "auto" in the file takes its value from.
    assert (seen["per_device_train_batch_size"], seen["gradient_accumulation_steps"]) == (2, 1)
    assert (seen["max_grad_norm"], seen["learning_rate"]) == (0.7, 0.01)
