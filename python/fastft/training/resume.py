"""From which checkpoint a run goes on, and whether it is still the same run.

`auto` takes the newest whole checkpoint and says which ones it skipped and why; a path takes that one. What decides
the position in the data (rows, batch, seed, model, method) must not have changed; the rest may, and is said aloud.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastft import console
from fastft.config import schema
from fastft.convert.folder import INDEX, SINGLE, read_safetensors, read_weights
from fastft.convert.json_file import read_object
from fastft.errors import CheckpointError, ConfigError, FileError, TrainingError
from fastft.training import checkpoint, progress, state
from fastft.training.checkpoint import Checkpoint

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# A change here means other rows, other batches or other weights: the checkpoint's numbers mean nothing then.
_FIXED = (
    *("task", "model.", "method.", "data.", "preference."),
    *("train.lora_plus_ratio", "train.embedding_lr", "train.layer_lr_decay"),
    *("train.batch_size", "train.grad_accumulation", "train.seed", "train.optimizer"),
)
# Where files go and what is shown says nothing about the result.
_FREE = (
    *("name", "output.", "samples.", "data.cache", "data.check."),
    *("train.log_steps", "train.eval_steps", "train.sample_steps"),
)


def choose(run_dir: Path, wanted: str) -> Checkpoint | None:
    """The checkpoint that `--resume WANTED` means.

    Args:
        run_dir: the run folder.
        wanted: `auto`, or the path of a checkpoint folder.

    Returns:
        None when `auto` finds no checkpoint at all: the run starts at the beginning.

    Raises:
        TrainingError: the path is no whole checkpoint, or every checkpoint of the run is broken.
    """
    if wanted != "auto":
        found = _read_through(Path(wanted))
        if found.fault is not None:
            raise TrainingError(f"--resume {wanted}: this is no whole checkpoint: {found.fault}")
        return found
    newest = None
    for seen in checkpoint.find(run_dir):
        found = _read_through(seen.path)
        if found.fault is None:
            return found
        console.warn(f"{found.path.name} is skipped: {found.fault}")
        newest = newest or found
    if newest is not None:
        raise TrainingError(
            f"--resume auto: no checkpoint in {run_dir} is whole (the newest, {newest.path.name}: {newest.fault}); start "
            "anew with another --work-dir, or remove the folder"
        )
    console.note(f"--resume auto: no checkpoint in {run_dir} yet, the run starts at the beginning")
    return None


def _read_through(path: Path) -> Checkpoint:
    """A checkpoint, its files hashed and their headers read: what would be refused in the middle of loading has a fault."""
    found = checkpoint.examine(path, with_hashes=True)
    if found.fault is not None:
        return found
    try:
        progress.read(path / progress.FILE_NAME, found.step)
        state.check(path, found.step, found.record.get("data", {}).get("processes"))
        _check_weights(path)
    except (CheckpointError, FileError) as cause:
        return replace(found, fault=str(cause).removeprefix(f"{path}/"))
    return found


def _check_weights(folder: Path) -> None:
    """See that a checkpoint has weights, and no other files of weights than safetensors that have a whole header.

    Raises:
        CheckpointError, FileError: it is not so; a pickle is refused because transformers would read it instead.
    """
    if pickles := sorted(folder.rglob("*.bin")):
        raise CheckpointError(f"{pickles[0]}: is a pickle, which no checkpoint of fastft holds")
    for path in sorted(folder.glob("*.safetensors")):
        read_safetensors(path)
    if (folder / "config.json").exists():
        read_object(folder / "config.json")
    if not (folder / ADAPTER_WEIGHTS).exists():
        if not ((folder / SINGLE).exists() or (folder / INDEX).exists()):
            raise FileError(f"{folder}: it holds no weights")
        read_weights(folder)


def flat(config: schema.Config) -> dict[str, Any]:
    """All values of a config by dotted key, as plain data; what a checkpoint remembers of it."""
    return _flatten(config.model_dump(mode="json"), "")


def check_same_run(found: Checkpoint, config: schema.Config, data: Mapping[str, int]) -> None:
    """Refuse to go on with a checkpoint of another run; say what else has changed.

    Args:
        found: the checkpoint.
        config: the config of now.
        data: `rows`, `tokens` and `processes` of now.

    Raises:
        ConfigError: something changed that makes the checkpoint's position meaningless.
    """
    before, now = dict(found.record.get("config", {})), flat(config)
    changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    changed = {key for key in changed if not _starts(key, _FREE)}
    fixed = sorted(key for key in changed if _starts(key, _FIXED))
    if fixed:
        raise ConfigError(
            f"--resume {found.path}: the checkpoint was made with {_was(fixed, before)}; now it is {_was(fixed, now)}. "
            "Go on with the old values, or start anew with another --work-dir"
        )
    then = found.record.get("data", {})
    if dict(then) != dict(data):
        raise ConfigError(
            f"--resume {found.path}: the checkpoint was made with {_counts(then)}; now there are {_counts(data)}. "
            "The position in the data would be wrong; start anew with another --work-dir"
        )
    if changed:
        console.warn(
            f"changed since {found.path.name}: {_was(sorted(changed), before)} -> {_was(sorted(changed), now)}"
        )


def _flatten(value: Any, prefix: str) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        parts = [_flatten(part, f"{prefix}.{key}" if prefix else str(key)) for key, part in value.items()]
        return {key: part for block in parts for key, part in block.items()}
    return {prefix: value}


def _starts(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == k or (k.endswith(".") and key.startswith(k)) or key.startswith(f"{k}.") for k in keys)


def _was(keys: list[str], values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={values.get(key)}" for key in keys)


def _counts(data: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in data.items()) or "unknown data"
