"""DeepSpeed's settings: one of the files in configs/deepspeed by name, or a file of the user's.

Batch size, accumulation, clipping and dtype are the config's: the file says `auto` there, and transformers fills them
in. A file that says something else is refused, so that nothing is trained otherwise than the config reads.
"""

import importlib.util
from pathlib import Path
from typing import Any

from fastft.config import recipes, schema
from fastft.convert.json_file import read_object
from fastft.errors import CheckpointError, ConfigError

FOLDER = recipes.FOLDER / "deepspeed"

_MAX_BYTES = 1_000_000

# What the config decides. DeepSpeed's names, and whose value they carry.
_DECIDED = {
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.grad_accumulation",
    "gradient_clipping": "train.max_grad_norm",
    "train_batch_size": "train.batch_size times grad_accumulation times processes",
}


def names() -> list[str]:
    """The names that need no file: zero1, zero2, ..."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read(wanted: str) -> dict[str, Any]:
    """DeepSpeed's settings by name (XTuner's `deepspeed_zero2` too) or from a file.

    Raises:
        ConfigError: no such name or file, no JSON object, or a value that contradicts the config.
    """
    bundled = FOLDER / f"{wanted.removeprefix('deepspeed_')}.json"
    is_bundled = "/" not in wanted and bundled.is_file()
    path = bundled if is_bundled else Path(wanted).expanduser()
    try:
        if not path.exists():
            raise ConfigError(f"distributed.deepspeed: {wanted} is neither a file nor one of {', '.join(names())}")
        found = read_object(path, _MAX_BYTES)
    except OSError as cause:  # FileError is one
        raise ConfigError(f"distributed.deepspeed: {wanted} cannot be read: {cause}") from cause
    except CheckpointError as cause:
        raise ConfigError(f"distributed.deepspeed: {cause}") from cause
    for key, ours in _DECIDED.items():
        if found.get(key, "auto") != "auto":
            raise ConfigError(
                f'distributed.deepspeed: {path}: {key} is {found[key]}; write "auto" there, the value is that of {ours}'
            )
    zero = found.get("zero_optimization")
    if zero is not None and not isinstance(zero, dict):
        raise ConfigError(f"distributed.deepspeed: {path}: zero_optimization must be a JSON object")
    if _stage(found) not in (0, 1, 2, 3):
        raise ConfigError(f"distributed.deepspeed: {path}: zero_optimization.stage must be 0, 1, 2 or 3")
    if _stage(found) == 3 and (zero or {}).get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise ConfigError(
            f"distributed.deepspeed: {path}: stage 3 needs zero_optimization.stage3_gather_16bit_weights_on_model_save: "
            "true, or no checkpoint and no result would hold the weights"
        )
    return found


def stage(wanted: str) -> int:
    """The ZeRO stage of these settings, 0 to 3."""
    return _stage(read(wanted))


def settings(config: schema.Config) -> dict[str, Any]:
    """What transformers' TrainingArguments get.

    Raises:
        ConfigError: DeepSpeed is not installed, the settings are wrong, or they bring an optimizer of their own beside
            the config's.
    """
    wanted = config.distributed.deepspeed
    assert wanted is not None
    found = read(wanted)
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"distributed.deepspeed: {wanted} needs DeepSpeed, which is not installed: pip install 'fastft[deepspeed]'; "
            "--fsdp shares the weights out without it"
        )
    if "optimizer" in found and config.train.optimizer != "adamw":
        raise ConfigError(
            f"distributed.deepspeed: {wanted} brings DeepSpeed's own AdamW; train.optimizer: {config.train.optimizer} "
            "would be ignored; set it to adamw, or use settings without an optimizer"
        )
    if "scheduler" in found:
        raise ConfigError(
            f"distributed.deepspeed: {wanted} has a scheduler, which would replace train.schedule and train.warmup_ratio; "
            "remove it"
        )
    return found


def _stage(found: dict[str, Any]) -> int:
    """The stage in the file; -1 for what is no integer."""
    stage = (found.get("zero_optimization") or {}).get("stage", 0)
    return stage if type(stage) is int else -1
