"""Looks at the files of a model's folder before the libraries read them.

transformers and its helpers wait for ever at a pipe, read any amount, and say of a broken file what their own code
met. So each file that they would read is held against its format here, by the readers that conversions use; it takes
milliseconds. What they themselves refuse is said as one line by `library_errors`.
"""

import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastft.convert.json_file import read_object, read_regular_file
from fastft.errors import CheckpointError, FastftError, FileError

# JSON that is read as an object of settings, and may be missing.
_SETTINGS = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
)
# tokenizer_config.json may list some 100,000 added tokens.
_MAX_SETTINGS_BYTES = 32 * 1024 * 1024
_TEMPLATE = "chat_template.jinja"
_MAX_TEMPLATE_BYTES = 1_000_000
# The largest tokenizer.json has some 40 MB.
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")
_MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
# Others would be read as if their integers, or their 8 bits without a scale, were the weights.
_NUMBERS = ("F32", "F16", "BF16", "F64")
_TEXTS = ("tokenizer_class", "processor_class", "padding_side")


def check_small_files(folder: Path) -> None:
    """Refuse a folder in which a file of the tokenizer, its template or the settings is not what it should be.

    Raises:
        FileError: a pipe, a device, a folder or a link to nowhere in the place of a file.
        CheckpointError: too large, not UTF-8, no JSON object.
    """
    for name in _SETTINGS:
        if _is_there(folder / name):
            _check_settings(read_object(folder / name, _MAX_SETTINGS_BYTES), folder / name)
    template = folder / _TEMPLATE
    if _is_there(template):
        try:
            read_regular_file(template, _MAX_TEMPLATE_BYTES).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{template}: not UTF-8 text (byte {error.start})") from error
    for name in _TOKENIZER:
        path = folder / name
        if _is_there(path):
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise FileError(f"{path}: not a regular file")
            if status.st_size > _MAX_TOKENIZER_BYTES:
                raise CheckpointError(
                    f"{path}: {status.st_size} bytes are too many for a tokenizer; at most {_MAX_TOKENIZER_BYTES} are read"
                )


def check_weights(folder: Path) -> None:
    """Refuse a folder whose files of weights are broken, or disagree with their index; only headers are read.

    Raises:
        FileError: there are none, or one is missing.
        CheckpointError: see `convert.folder.read_weights`; or a weight is of integers.
    """
    from fastft.convert.folder import read_weights

    tensors = read_weights(folder)[0]
    for name, tensor in tensors.items():
        # Buffers of integers (masks, counters) have other names, and packed 4-bit weights their scales beside them.
        is_weight = name.endswith(".weight") or (name.endswith(".bias") and len(tensor.shape) == 1)
        if is_weight and tensor.dtype not in _NUMBERS and f"{name}.absmax" not in tensors:
            raise CheckpointError(
                f"{folder}: {name} is {tensor.dtype}; weights are {', '.join(_NUMBERS)}, or bitsandbytes' 4 bits"
            )


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Say in one line what a library refuses: "WHAT: REASON". What is no fault of a file goes on as it is.

    Raises:
        CheckpointError: for any error of a library.
    """
    import torch

    try:
        yield
    except (FastftError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as cause:  # libraries raise dozens of kinds, and bare Exception for a broken tokenizer.json
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        raise CheckpointError(f"{what}: {' '.join(lines[:2]) or type(cause).__name__}") from cause


def _is_there(path: Path) -> bool:
    """Whether the name is in the folder; a link that leads nowhere or to itself is refused.

    Raises:
        FileError: it is such a link.
    """
    try:
        path.stat()
    except OSError as error:
        if path.is_symlink():
            raise FileError(f"{path}: cannot be read: {error.strerror}") from error
        return False
    return True


def _check_settings(settings: Mapping[str, Any], path: Path) -> None:
    for key in _TEXTS:
        value = settings.get(key)
        if value is not None and not isinstance(value, str):
            raise CheckpointError(f"{path}: {key} must be a text, it is {value!r}")
    if not isinstance(settings.get("auto_map", {}), dict | list):
        raise CheckpointError(f"{path}: auto_map must be an object, it is {settings['auto_map']!r}")
    longest = settings.get("model_max_length")
    if longest is not None and type(longest) not in (int, float):
        raise CheckpointError(f"{path}: model_max_length must be a number, it is {longest!r}")
    template = settings.get("chat_template")
    named = [item.get("template") for item in template if isinstance(item, dict)] if isinstance(template, list) else []
    texts = named if isinstance(template, list) and len(named) == len(template) else [template]
    if template is not None and not all(isinstance(text, str) and len(text) <= _MAX_TEMPLATE_BYTES for text in texts):
        raise CheckpointError(f"{path}: chat_template must be a text of at most {_MAX_TEMPLATE_BYTES} characters")
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        numbers = settings.get(key)
        numbers = numbers if isinstance(numbers, list) else [numbers]
        if not all(number is None or (type(number) is int and -1 <= number < 2**31) for number in numbers):
            raise CheckpointError(f"{path}: {key} must be the number of a token, it is {settings[key]!r}")
