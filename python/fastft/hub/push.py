"""`fastft upload`: what of a folder goes to a hub, worked out and looked through before anything is sent.

Takes a run folder, an adapter or a model folder; gives an `Upload`, which the command prints and, with --yes, one of the hubs'
modules sends in one commit. Refused: folders that are not whole, files that are no part of a model, links, pickles, and
anything that holds a token.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastft.config import mask
from fastft.errors import FastftError, FileError, HubError
from fastft.hub import card
from fastft.hub.card import About, Kind
from fastft.hub.weights import require_whole

RECORD = "fastft_training.json"
CARD = "README.md"
PLOT = "loss.png"
# What belongs to a model or an adapter. Weights only as safetensors: a pickle may hold code.
_KNOWN = (
    "*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "*.py", "LICENSE*", "NOTICE*",
    "USE_POLICY*", CARD, PLOT, ".gitattributes",
)  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.distcp")
# Of a run folder only the result is sent, with the plot; checkpoints, logs and samples stay here.
_RESULTS: tuple[tuple[str, Kind], ...] = (("adapter", "adapter"), ("model", "model"))
_STAGING = re.compile(r"^\..*\.(partial-[0-9a-f]+|old|download)$")
# Files that are searched for tokens are texts; vocabularies hold every string there is.
_MAX_SEARCHED_BYTES = 50_000_000
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class Item:
    """One file that is sent.

    Attributes:
        name: its path in the repository.
        source: the file here, or the bytes themselves where they differ from the file's.
    """

    name: str
    source: Path | bytes

    @property
    def num_bytes(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def content(self) -> bytes:
        """The bytes; of small files only."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


@dataclass(frozen=True)
class Upload:
    """What is sent.

    Attributes:
        kind: adapter or model.
        items: the files, the card among them.
        card: the text of README.md.
        notes: what was left out or changed, a line each.
    """

    kind: Kind
    items: tuple[Item, ...]
    card: str
    notes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for item in self.items)

    def lines(self, repository: str, hub: str, *, private: bool, revision: str | None) -> list[str]:
        """The plan for a person to read."""
        seen = "private" if private else "for everybody to see"
        at = f", branch {revision}" if revision else ""
        width = max(len(item.name) for item in self.items)
        return [
            f"{self.kind} to {repository} on {hub} ({seen}{at}): {len(self.items)} files, {_size(self.num_bytes)}",
            *(f"  {item.name:<{width}}  {_size(item.num_bytes):>10}" for item in self.items),
            *(f"  note: {note}" for note in self.notes),
        ]


def plan(folder: Path, repository: str, *, base: str | None = None, hub: str = "huggingface") -> Upload:
    """Work out what is sent.

    Args:
        folder: a run folder, an adapter or a model.
        repository: OWNER/NAME, for the card.
        base: the base model's id on the hub, where the folder knows it only as a folder of this machine.
        hub: which hub the card is for.

    Raises:
        FileError: nothing to send, a broken or unfinished result, a foreign file, a link.
        HubError: a file holds a token.
    """
    if not folder.is_dir():
        raise FileError(
            f"upload: {folder}: {'is a file' if folder.exists() else 'no such folder'}; give a run's folder"
        )
    if _STAGING.match(folder.resolve().name):
        raise FileError(f"upload: {folder} is what a broken-off run has left, not a result")
    result, kind, run = _result(folder)
    files = [Item(str(path.relative_to(result)), path) for path in _files(result)]
    _require_result(result, kind)
    about = card.read_about(result, run, kind, repository, base)
    notes = list(about.notes)
    text = card.text(about, hub=hub)
    kept = [_rewritten(item, about) for item in files if item.name not in (CARD, PLOT)]
    if any(item.name == CARD for item in files):
        notes.append("README.md of the folder is replaced by the card")
    plot = run / PLOT if run is not None else result / PLOT
    extra = [Item(PLOT, plot)] if plot.is_file() and about.has_plot else []
    items = (Item(CARD, text.encode()), *sorted([*kept, *extra], key=lambda item: item.name))
    _refuse_secrets(items)
    return Upload(kind, items, text, tuple(notes))


def _result(folder: Path) -> tuple[Path, Kind, Path | None]:
    """The folder that is sent, its kind, and the run folder around it if there is one.

    Raises:
        FileError: neither a finished run, nor an adapter, nor a model.
    """
    for name, kind in _RESULTS:
        if (folder / name).is_dir() and ((folder / RECORD).is_file() or (folder / "metrics.jsonl").is_file()):
            return folder / name, kind, folder
    if (folder / "metrics.jsonl").is_file() or any(folder.glob("checkpoint-*")):
        raise FileError(f"upload: {folder}: this run has no result yet; go on with `fastft train ... --resume`")
    run = folder.parent if (folder.parent / "metrics.jsonl").is_file() else None
    if (folder / "trainer_state.json").is_file() or folder.name.startswith("checkpoint-"):
        raise FileError(f"upload: {folder} is a checkpoint of a training; upload its result (adapter/ or model/)")
    if (folder / "adapter_config.json").is_file():
        return folder, "adapter", run
    if (folder / "config.json").is_file():
        return folder, "model", run
    raise FileError(
        f"upload: {folder}: neither a run with a result, nor an adapter (adapter_config.json), nor a model (config.json)"
    )


def _files(folder: Path) -> Iterator[Path]:
    """All files of a result.

    Raises:
        FileError: one of them is no part of a model.
    """
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            raise FileError(f"upload: {path} is a link; upload a folder of plain files")
        if path.is_dir():
            if path.name.startswith(".") or path.name == "__pycache__":
                raise FileError(f"upload: {path} is no part of a model; move it away")
            continue
        if any(fnmatchcase(path.name, pattern) for pattern in _PICKLES):
            raise FileError(
                f"upload: {path} is a pickle, which may hold code; only safetensors are sent (`fastft convert` writes them)"
            )
        if not any(fnmatchcase(path.name, pattern) for pattern in _KNOWN):
            raise FileError(f"upload: {path} is no part of a model ({name}); move it away")
        yield path


def _require_result(folder: Path, kind: Kind) -> None:
    """Refuse weights that are missing or broken; only headers are read."""
    from fastft.convert.folder import read_safetensors, read_weights

    weights = folder / "adapter_model.safetensors"
    if kind == "adapter" and not weights.is_file():
        raise FileError(f"upload: {folder}: {weights.name} is missing")
    try:
        if kind == "adapter":
            read_safetensors(weights)
        else:
            require_whole(f"upload: {folder}", folder)
            read_weights(folder)
    except FileError:
        raise
    except FastftError as error:
        raise FileError(f"upload: {folder}: not a whole result: {error}") from error


def _rewritten(item: Item, about: About) -> Item:
    """The file without this machine's folders: they say where somebody lives and are of no use to others."""
    if item.name == RECORD:
        record: dict[str, Any] = json.loads(item.content())
        base = record.get("base")
        if isinstance(base, dict):
            base.pop("folder", None)
            base["name"] = about.base_name
        return Item(item.name, (json.dumps(record, indent=2) + "\n").encode())
    if item.name == "adapter_config.json":
        settings: dict[str, Any] = json.loads(item.content())
        settings["base_model_name_or_path"] = about.base_name
        return Item(item.name, (json.dumps(settings, indent=2) + "\n").encode())
    if item.name == "config.json" and "_name_or_path" in json.loads(item.content()):
        settings = {key: value for key, value in json.loads(item.content()).items() if key != "_name_or_path"}
        return Item(item.name, (json.dumps(settings, indent=2) + "\n").encode())
    return item


def _refuse_secrets(items: tuple[Item, ...]) -> None:
    secrets = [value.encode() for value in mask.secrets()]
    for item in items:
        if item.name.endswith((".safetensors", ".png")) or item.num_bytes > _MAX_SEARCHED_BYTES:
            continue
        content = item.content()
        found = any(secret in content for secret in secrets)
        if not found and not any(fnmatchcase(item.name, pattern) for pattern in _VOCABULARIES):
            text = content.decode("utf-8", errors="replace")
            found = mask.masked(text) != text
        if found:
            raise HubError(
                f"upload: {item.name} holds what looks like a token or a password; remove it, and withdraw the token if "
                "the file was ever shared"
            )


def _size(num_bytes: int) -> str:
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"
