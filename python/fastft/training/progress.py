"""How far a run had come, as transformers' Trainer notes it in each checkpoint (`trainer_state.json`).

The Trainer builds its TrainerState of whatever stands there; here it is looked at before.
"""

import math
from pathlib import Path
from typing import Any

from fastft.convert.json_file import read_object
from fastft.errors import CheckpointError, FileError

FILE_NAME = "trainer_state.json"
# With the kinds of value that the Trainer writes; what else is there must be nothing or plain.
_COUNTS = ("global_step", "max_steps", "num_train_epochs", "num_input_tokens_seen")
_INTERVALS = ("logging_steps", "eval_steps", "save_steps")
_LISTS = {"log_history": list, "stateful_callbacks": dict}
_OTHERS = frozenset(
    {
        *("epoch", "train_batch_size", "total_flos", "best_metric", "best_global_step", "best_model_checkpoint"),
        *("is_local_process_zero", "is_world_process_zero", "is_hyper_param_search", "trial_name", "trial_params"),
    }
)
_PLAIN = (bool, int, float, str, type(None))


def read(path: Path, step: int) -> dict[str, Any]:
    """Read the file of a checkpoint that was made after `step` optimizer steps.

    Raises:
        FileError: it is not there, or no regular file.
        CheckpointError: it is broken, or that of another step.
    """
    if not path.exists():
        raise FileError(f"{path}: is missing")
    found = read_object(path)
    for key, value in found.items():
        if (reason := _what_is_wrong(key, value)) is not None:
            raise CheckpointError(f"{path}: {key[:100]} {reason}")
    if found.get("global_step") != step:
        raise CheckpointError(f"{path}: is that of step {found.get('global_step')}, the checkpoint is of step {step}")
    return found


def _what_is_wrong(key: str, value: Any) -> str | None:
    if key in _COUNTS:
        return None if type(value) is int and value >= 0 else f"is {_short(value)}; a count is expected"
    if key in _INTERVALS:
        return (
            None if type(value) in (int, float) and value > 0 else f"is {_short(value)}; a count of steps is expected"
        )
    if key in _LISTS:
        kind = _LISTS[key]
        return None if isinstance(value, kind) else f"is {_short(value)}; a {kind.__name__} is expected"
    if key not in _OTHERS:
        return "is nothing that a training notes"
    if key == "epoch" and not (type(value) in (int, float) and math.isfinite(value) and value >= 0):
        return f"is {_short(value)}; a number of epochs is expected"
    return None if isinstance(value, _PLAIN) else f"is {_short(value)}; that is no plain value"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
