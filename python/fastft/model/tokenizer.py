"""The tokenizer of a base, with its chat template.

The tokenizer's own template is the truth and always wins; `model.chat_template` is for a tokenizer that has none. It
is set on the tokenizer, so that it is saved with what is trained and `chat` uses the same one.
"""

from pathlib import Path
from typing import Any

from fastft import console
from fastft.config import chat_templates, schema
from fastft.convert.json_file import read_object
from fastft.errors import ConfigError
from fastft.model import folder_check


def load_tokenizer(folder: Path, model: schema.Model) -> Any:
    """Read the tokenizer in `folder` and give it a chat template if it has none and the config names one.

    Raises:
        CheckpointError: no tokenizer can be read from the folder.
        ConfigError: the named chat template does not exist.
    """
    return with_template(read(folder, trust_remote_code=model.trust_remote_code), model)


def with_template(tokenizer: Any, model: schema.Model) -> Any:
    """The tokenizer, with the chat template that the config names if it has none of its own.

    Raises:
        ConfigError: the named chat template does not exist.
    """
    if model.chat_template is None:
        return tokenizer
    if tokenizer.chat_template:
        console.note(f"chat template: the tokenizer's own (model.chat_template: {model.chat_template} is not needed)")
        return tokenizer
    tokenizer.chat_template = chat_templates.read(model.chat_template)
    console.note(f"chat template: {model.chat_template} (the tokenizer has none)")
    return tokenizer


def read(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Read the tokenizer in `folder`; a fast one, so that the whole data set is encoded in seconds.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder_check.check_small_files(folder)
    with folder_check.library_errors(f"model {folder}: its tokenizer cannot be read"):
        # A class that only remote code knows is not needed when tokenizer.json holds the whole tokenizer.
        if _needs_remote_class(folder) and not trust_remote_code and (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def require_chat_template(tokenizer: Any, model: schema.Model) -> None:
    """Refuse a dialogue task when neither the tokenizer nor the config has a template.

    Raises:
        ConfigError: saying how to name one.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model {model.name}: its tokenizer has no chat template, so a dialogue has no form; set "
            "model.chat_template to a name in configs/chat_templates (e.g. chatml) or to a .jinja file"
        )


def pad_id(tokenizer: Any) -> int:
    """The id that fills short rows; padded places are masked, so any id that exists is right."""
    for candidate in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _needs_remote_class(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(read_object(path).get("auto_map"))
