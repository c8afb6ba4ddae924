"""Chat templates for tokenizers that have none: `configs/chat_templates/NAME.jinja`, or a file of the user's.

Comes from `model.chat_template`; the text goes to the tokenizer and is saved with the result.
"""

from functools import cache
from pathlib import Path

from fastft import spelling
from fastft.errors import ConfigError, FileError

FOLDER = Path(__file__).parent.parent / "configs" / "chat_templates"
MAX_BYTES = 1_000_000


@cache
def names() -> tuple[str, ...]:
    """The templates that come with fastft."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))


def read(name_or_file: str) -> str:
    """The Jinja text of a template.

    Args:
        name_or_file: a name of `names()`, or a `.jinja` file.

    Raises:
        ConfigError: there is no such template.
        FileError: the file is there and cannot be read.
    """
    if name_or_file in names():
        return _text(FOLDER / f"{name_or_file}.jinja")
    path = Path(name_or_file)
    if path.is_file():
        if path.suffix != ".jinja":  # any other file would go, as a template, into what is saved and uploaded
            raise ConfigError(f"chat template {name_or_file}: a file of a template must end in .jinja")
        return _text(path)
    if path.suffix == ".jinja" or "/" in name_or_file:
        raise ConfigError(f"chat template {name_or_file}: no such file")
    near = spelling.nearest(name_or_file, names(), n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names())}, or a .jinja file"
    raise ConfigError(f"chat template {name_or_file}: no such template; {hint}")


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise FileError(f"chat template {path}: larger than {MAX_BYTES} bytes")
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"chat template {path}: cannot be read as UTF-8 text: {error}") from error
