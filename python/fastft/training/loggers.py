"""TensorBoard and Weights & Biases, for runs that ask for them (`output.report_to`).

They get the lines of metrics.jsonl as they are written, nothing else: no code, no weights, no environment. TensorBoard
writes into the run folder; W&B talks to its server, or with WANDB_MODE=offline to the run folder only.
"""

import importlib.util
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastft import publish
from fastft.config import schema
from fastft.config.mask import masked
from fastft.errors import ConfigError

Listener = Callable[[Mapping[str, Any]], None]

_NAMES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}
# Holds the id under which W&B knows the run, so that a resumed one goes on there.
WANDB_ID = "wandb_id.txt"


def check(config: schema.Config) -> None:
    """Refuse a logger that is not installed, before the hours are spent.

    Raises:
        ConfigError: with what to install.
    """
    for name in config.output.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"output.report_to: {_NAMES[name]} is not installed: pip install 'fastft[{name}]', or remove {name}"
            )


def start(config: schema.Config, settings: Mapping[str, Any], run_dir: Path, step: int) -> list[Listener]:
    """Open the loggers that the config asks for.

    Args:
        config: the run's config.
        settings: the config by dotted key; passwords in URLs are masked here.
        run_dir: the run folder.
        step: steps done before, 0 for a new run; what a killed run wrote after them is dropped where possible.

    Returns:
        functions that take a line of metrics.jsonl.
    """
    makers = {"tensorboard": _tensorboard, "wandb": _wandb}
    shown = {key: masked(value) if isinstance(value, str) else value for key, value in settings.items()}
    return [makers[name](config, shown, run_dir, step) for name in dict.fromkeys(config.output.report_to)]


def _tensorboard(_config: schema.Config, _settings: Mapping[str, Any], run_dir: Path, step: int) -> Listener:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(run_dir / "tensorboard", purge_step=step + 1 if step else None)

    def listen(line: Mapping[str, Any]) -> None:
        for name, value in _values(line).items():
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return listen


def _wandb(config: schema.Config, settings: Mapping[str, Any], run_dir: Path, _step: int) -> Listener:
    import wandb

    path = run_dir / WANDB_ID
    if not path.is_file():
        publish.write_text(path, secrets.token_hex(8))
    run: Any = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "fastft"),
        name=config.name,
        id=path.read_text(encoding="utf-8"),
        resume="allow",
        dir=str(run_dir),
        config=dict(settings),
        settings=wandb.Settings(save_code=False, disable_git=True, console="off"),
    )

    def listen(line: Mapping[str, Any]) -> None:
        run.log(_values(line), step=line["step"])

    return listen


def _values(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}
