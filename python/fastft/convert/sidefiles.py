"""The small files of a model folder that travel with its weights: tokenizer, templates, processors, code, licence.

Those of the adapter's folder win over the base's, because a training saves the tokenizer it used there
(spec/formats.md 6.3). config.json is not among them: it is edited by `model_config`.
"""

import shutil
import stat
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from fastft.convert.json_file import read_object
from fastft.convert.source import check_unchanged, fingerprint
from fastft.errors import FileError

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
# The one of them that is a folder, of files.
_FOLDERS = frozenset({"additional_chat_templates"})
# The largest tokenizer has some 40 MB.
_MAX_BYTES = 1 << 30
_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
_IMAGE_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
_BASE_ONLY = ("generation_config.json", "*.py", *_LICENCES, "modules.json")
# Settings over a tokenizer's own; stale beside a tokenizer that the training saved.
_OVERLAYS = ("special_tokens_map.json", "added_tokens.json")
_TOKENIZER_CONFIG = "tokenizer_config.json"


def side_files(base: Path, winners: Sequence[Path] = (), *, vision_only: bool = False) -> dict[str, Path]:
    """Choose the side files of a new model folder.

    Args:
        base: the model's folder.
        winners: folders whose tokenizer, template and processor files win, the first one most.
        vision_only: the new folder is a vision tower, which has an image processor and no tokenizer.

    Returns:
        Name in the new folder to the file (or folder of templates) to copy.
    """
    chosen = _matching(base, (*_TOKENIZER, *_TEMPLATES, *_PROCESSORS, *_BASE_ONLY))
    for winner in reversed(winners):
        own = _matching(winner, (*_TOKENIZER, *_TEMPLATES, *_PROCESSORS))
        if _has_template(own):
            chosen = {name: path for name, path in chosen.items() if name not in _TEMPLATES}
        if _TOKENIZER_CONFIG in own:
            chosen = {name: path for name, path in chosen.items() if name not in _OVERLAYS}
        chosen |= own
    if vision_only:
        chosen = {name: path for name, path in chosen.items() if name in _IMAGE_PROCESSORS or _is_licence(name)}
    for name, path in chosen.items():
        _check(path, is_folder=name in _FOLDERS)
    return dict(sorted(chosen.items()))


def _check(path: Path, *, is_folder: bool = False) -> None:
    """Refuse what is no small regular file, or no folder of them.

    Raises:
        FileError: a pipe, a device, a folder in a file's place, a link that leads nowhere, or a file too large.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from error
    if is_folder and stat.S_ISDIR(status.st_mode):
        for child in sorted(path.iterdir()):
            _check(child)
    elif not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path}: not a regular file; it cannot be copied")
    elif status.st_size > _MAX_BYTES:
        raise FileError(
            f"{path}: {status.st_size} bytes are too many for a file beside the weights; at most {_MAX_BYTES}"
        )


def copy_side_files(chosen: dict[str, Path], folder: Path) -> None:
    """Copy side files into a new folder; links are followed, rights and times are not carried over.

    Raises:
        FileError: a file cannot be read or written, or changed while it was copied.
    """
    for name, path in chosen.items():
        try:
            if path.is_dir():
                (folder / name).mkdir()
                copy_side_files({child.name: child for child in sorted(path.iterdir())}, folder / name)
            elif path.is_file():
                before = fingerprint(path)
                shutil.copyfile(path, folder / name)
                check_unchanged((before,))
            else:
                raise FileError(f"{path}: not a regular file; it cannot be copied")
        except OSError as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"{path}: cannot be copied to {folder / name}: {error.strerror}") from error


def _is_licence(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _LICENCES)


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if any(fnmatchcase(path.name, pattern) for pattern in patterns)
    }


def _has_template(files: dict[str, Path]) -> bool:
    """Tell whether the files bring a chat template of their own, as a file or inside tokenizer_config.json."""
    if any(name in files for name in _TEMPLATES):
        return True
    return _TOKENIZER_CONFIG in files and bool(read_object(files[_TOKENIZER_CONFIG]).get("chat_template"))
