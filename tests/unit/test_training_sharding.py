"""What was asked for and is not in force is an error; what cannot be shared out is refused before the weights are read."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tiny_run  # noqa: E402 - after the check for torch
from fastft.errors import ConfigError, TrainingError  # noqa: E402
from fastft.training import run, sharding  # noqa: E402


def _config(tmp_path: Path, **changes: Any) -> Any:
    return tiny_run.config(tmp_path / "model", tmp_path / "rows.jsonl", **changes)


def test_one_process_shares_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is one process, so nothing can be shared out; add --nproc-per-node"):
        sharding.check(_config(tmp_path, distributed__fsdp=True), processes=1)
    sharding.check(_config(tmp_path, distributed__fsdp=True), processes=2)


@pytest.mark.parametrize("way", [{"distributed__fsdp": True}, {"distributed__deepspeed": "zero2"}])
def test_a_table_in_ram_is_not_shared_out(way: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"memory\.embedding: host keeps a whole table in every process"):
        _config(tmp_path, memory__embedding="host", **way)
    with pytest.raises(ValueError, match=r"memory\.head: nf4 keeps a whole table"):
        _config(tmp_path, memory__head="nf4", **way)


def test_it_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    """Neither the model nor the rows exist."""
    for changes in ({"distributed__fsdp": True}, {"distributed__deepspeed": "zero9"}):
        with pytest.raises(ConfigError, match="distributed"):
            run.run(_config(tmp_path, **changes), work_dir=tmp_path / "run")
        with pytest.raises(ConfigError, match="distributed"):
            run.dry_run(_config(tmp_path, **changes), work_dir=tmp_path / "run")


def test_states_of_8_bit_are_not_shared_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="train.optimizer adamw_8bit cannot be sharded"):
        sharding.check(_config(tmp_path, distributed__fsdp=True, train__optimizer="adamw_8bit"), processes=2)


@pytest.mark.parametrize(
    ("changes", "processes", "says", "holds"),
    [
        ({}, 1, "NO", True),
        ({}, 1, "FSDP", False),
        ({}, 2, "NO", False),  # WORLD_SIZE is set, and nobody has met
        ({"distributed__fsdp": True}, 1, "NO", False),  # whole weights
        ({"distributed__fsdp": True}, 1, "FSDP", False),
        ({"distributed__deepspeed": "zero2"}, 1, "NO", False),
        ({"distributed__deepspeed": "zero2"}, 1, "DEEPSPEED", True),
    ],
)
def test_what_is_not_in_force_is_an_error(
    changes: dict[str, Any],
    processes: int,
    says: str,
    holds: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config, model = _config(tmp_path, **changes), torch.nn.Linear(2, 2)
    if holds:
        sharding.require_in_force(config, model, says)
        return
    with pytest.raises(TrainingError, match=r"not in force|have not found each other"):
        sharding.require_in_force(config, model, says)
