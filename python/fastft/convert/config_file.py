"""config.json of a model: read, and held against what every model's must be.

Only what the house and transformers build on is checked here: kinds and ranges of the settings that sizes follow from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.convert.json_file import read_object
from fastft.errors import CheckpointError, FileError

# A list of labels makes the largest ones; most have some KB.
_MAX_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a setting may be."""

    allowed: str
    holds: Callable[[object], bool]


def _whole(low: int, high: int) -> _Kind:
    """A number from `low` to `high`, or a list of such (one for each layer)."""

    def holds(value: object) -> bool:
        numbers = value if isinstance(value, list) else [value]
        return all(type(number) is int and low <= number <= high for number in numbers)

    return _Kind(f"a whole number from {low} to {high}", holds)


_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_SECTION = _Kind("an object", lambda value: isinstance(value, dict))
_TEXT = _Kind("a short text", lambda value: isinstance(value, str) and len(value) <= 200 and value.isprintable())
_TEXTS = _Kind(
    "a list of names", lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value)
)
_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float", "half", "auto")
_DTYPE = _Kind(
    f"one of {', '.join(_DTYPES)}",
    lambda value: isinstance(value, str) and value.removeprefix("torch.") in _DTYPES,
)
_FINITE = _Kind("a number from 0 to 1", lambda value: type(value) in (int, float) and 0 <= value <= 1)  # type: ignore[operator]
_TOKENS = _whole(0, 2**31)
_SIZE, _COUNT, _LAYERS = _whole(1, 2**24), _whole(1, 2**16), _whole(1, 10_000)

# None means "not set" for all of them.
_SETTINGS: Mapping[str, _Kind] = {
    "model_type": _TEXT,
    "architectures": _TEXTS,
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "tie_word_embeddings": _FLAG,
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "vocab_size": _whole(1, 2**28),
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _COUNT,
    "num_key_value_heads": _COUNT,
    "head_dim": _COUNT,
    "max_position_embeddings": _whole(1, 2**40),
    "rms_norm_eps": _FINITE,
    "layer_norm_eps": _FINITE,
    "bos_token_id": _TOKENS,
    "eos_token_id": _TOKENS,
    "pad_token_id": _whole(-1, 2**31),
    "text_config": _SECTION,
    "vision_config": _SECTION,
    "llm_config": _SECTION,
    "auto_map": _SECTION,
}
# What says how many of something there are in parts, too.
_PARTS = ("text_config", "vision_config", "llm_config")


def read_config(path: Path) -> dict[str, Any]:
    """Read and check a config.json.

    Raises:
        FileError: it cannot be opened or is no regular file.
        CheckpointError: it is no JSON object, or a setting is not what it must be.
    """
    config = read_object(path, _MAX_BYTES)
    _check(config, path)
    return config


def config_of(folder: Path) -> dict[str, Any]:
    """Read and check the config.json of a model's folder.

    Raises:
        CheckpointError: see `read_config`; or the file cannot be had.
    """
    try:
        return read_config(folder / "config.json")
    except FileError as error:
        raise CheckpointError(f"model {folder}: {error}; is this a model folder?") from error


def _check(config: Mapping[str, Any], path: Path, part: str = "") -> None:
    for key, kind in _SETTINGS.items():
        value = config.get(key)
        if value is not None and not kind.holds(value):
            raise CheckpointError(f"{path}: {part}{key} must be {kind.allowed}, it is {value!r}")
    for key in _PARTS:
        if isinstance(config.get(key), dict) and not part:
            _check(config[key], path, f"{key}.")
