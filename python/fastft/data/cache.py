"""Tokenised sources on the disk, so that the next run of the same data starts at once.

An entry is a folder of a `store` and manifest.json. Its name is a hash of everything that decides the tokens: the bytes of
the source's files, its settings, the tokenizer, the chat template, the task, max_length, the code of this room and the
versions of the libraries; so a changed source is another entry, and nothing stale can be found. Entries are put in place
whole (`publish`), and checked against the hashes in their manifest before they are used; one that does not hold is said
aloud and made anew. Of two processes that want the same entry, one makes it and the other waits. Nothing in it is code
(no pickle), and any entry may be deleted at any time.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastft import console, publish
from fastft.config.schema import Source
from fastft.data import store
from fastft.data.report import SourceReport
from fastft.data.samples import Documents
from fastft.data.store import Store
from fastft.errors import BusyError, DataError, FileError

MANIFEST = "manifest.json"
MANIFEST_MAX_BYTES = 256 * 2**20
# Smaller sources are tokenised faster than anybody notices; `cache: auto` does not keep them.
AUTO_BYTES = 10_000_000
# Settings of a source that say nothing about its tokens.
NOT_ABOUT_TOKENS = {"weight", "hub"}
WAIT_S = 0.3

# Reads a source, adds its documents to the store, and reports.
Make = Callable[[Store], SourceReport]


@dataclass(frozen=True, slots=True)
class Entry:
    """Where the tokens of one source are kept, and what decides them."""

    folder: Path
    about: Mapping[str, Any]  # JSON; the folder's name is its hash
    inputs: Mapping[Path, tuple[int, int, int]]  # size, time of change and inode of each file when it was hashed

    def get(self, make: Make) -> tuple[Documents, SourceReport]:
        """The documents from the entry, or made now and kept in it.

        Raises:
            DataError: what `make` refuses, or a file of the source that changed while it was read.
            FileError: the entry cannot be written.
        """
        waiting = made = False
        while True:
            found = self._load()
            if found is not None:
                found[1].from_cache = not made
                return found
            if made:
                raise FileError(
                    f"cache {self.folder}: what was written cannot be read back; set data.cache to another disk"
                )
            try:
                self._write(make)
                made = True
            except BusyError:
                if not waiting:
                    console.note(f"cache {self.folder}: waiting for another process that prepares the same data")
                waiting = True
                time.sleep(WAIT_S)
            except FileError:
                # Another process may have put it in place a moment ago; then it is read in the next round.
                if not (self.folder / MANIFEST).exists():
                    raise

    def _write(self, make: Make) -> None:
        publish.remove_leftovers(self.folder.parent)
        with publish.staged(self.folder) as staging:
            try:
                with Store(staging) as collected:
                    report = make(collected)
                    collected.documents()
                require_unchanged(self.inputs)
                manifest = {
                    "about": self.about,
                    "files": collected.files,
                    "report": report.as_json(),
                    "arrays": {name: _stated(staging / f"{name}.npy") for name in store.ARRAYS},
                }
                (staging / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
            except OSError as error:
                if isinstance(error, FileError):
                    raise
                raise FileError(
                    f"cache {self.folder.parent}: cannot be written ({error.strerror or error}); make room there, or set "
                    "data.cache to a folder on another disk, or to null"
                ) from error

    def _load(self) -> tuple[Documents, SourceReport] | None:
        """What the entry holds; None if there is none, or none that can be trusted."""
        if not self.folder.exists():
            return None
        try:
            manifest = self._manifest()
            documents = store.read(self.folder, [(name, unit) for name, unit in manifest["files"]])
            report = SourceReport.of_json(manifest["report"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            console.warn(f"cache {self.folder}: not used and made anew, {error}")
            shutil.rmtree(self.folder)
            return None
        return documents, report

    def _manifest(self) -> dict[str, Any]:
        """The manifest, after it and the arrays that it names have been checked.

        Raises:
            ValueError, TypeError, KeyError, OSError: something is not as it was written.
        """
        manifest = _read_manifest(self.folder / MANIFEST)
        if manifest["about"] != self.about:
            raise ValueError("it is about other data")
        for name in store.ARRAYS:
            if _stated(self.folder / f"{name}.npy") != manifest["arrays"][name]:
                raise ValueError(f"{name}.npy is not what was written")
        return manifest


def folder(setting: str) -> Path:
    """The folder of `data.cache`; auto is `fastft/data` under XDG_CACHE_HOME, else under ~/.cache."""
    if setting != "auto":
        return Path(setting).expanduser()
    configured = os.environ.get("XDG_CACHE_HOME")
    return (Path(configured) if configured else Path.home() / ".cache") / "fastft" / "data"


def entry(
    setting: str | None, source: Source, files: Sequence[Path], encoding: Callable[[], Mapping[str, Any]]
) -> Entry | None:
    """The entry of a source, or None where it is not to be kept.

    Args:
        setting: `data.cache`.
        source: its settings.
        files: all files it is made of.
        encoding: tells what besides the rows decides the tokens; JSON.
    """
    if setting is None or not files:
        return None
    size_bytes = sum(file.stat().st_size for file in files)
    if setting == "auto" and size_bytes < AUTO_BYTES:
        return None
    place = folder(setting)
    if not _has_room(place, size_bytes):
        return None
    inputs = {file: fingerprint(file) for file in files}
    about = {
        "source": source.model_dump(mode="json", exclude=NOT_ABOUT_TOKENS),
        "files": [[str(file), file.stat().st_size, digest] for file, digest in _hashed(files, size_bytes)],
        "encoding": dict(encoding()),
        "code": _code(),
        "libraries": {name: version(name) for name in ("tokenizers", "transformers", "jinja2", "numpy")},
    }
    # As it will be read back: tuples become lists.
    about = json.loads(json.dumps(about))
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    return Entry(place / name, about, inputs)


def fingerprint(path: Path) -> tuple[int, int, int]:
    """Size, time of change and inode of a file."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns, state.st_ino


def require_unchanged(inputs: Mapping[Path, tuple[int, int, int]]) -> None:
    """Refuse files that are not what they were.

    Args:
        inputs: the `fingerprint` of each before it was read.

    Raises:
        DataError: naming the file.
    """
    for path, state in inputs.items():
        if not path.exists() or fingerprint(path) != state:
            raise DataError(f"data {path}: the file changed while it was read; start again when it is complete")


def _has_room(place: Path, source_bytes: int) -> bool:
    """Whether the cache can be written and holds the tokens: 5 bytes each, and seldom less than 2 bytes of text."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(place).free
    except OSError as error:
        console.warn(f"data.cache {place}: not used, {error.strerror or error}; the tokens stay in memory")
        return False
    if free_bytes < 3 * source_bytes:
        console.warn(
            f"data.cache {place}: not used, {free_bytes / 1e9:.1f} GB are free and up to {3 * source_bytes / 1e9:.1f} GB "
            "may be needed; the tokens stay in memory"
        )
        return False
    return True


def _hashed(files: Sequence[Path], size_bytes: int) -> list[tuple[Path, str]]:
    found, done = [], 0
    with console.progress("looking for changes in the data", max(size_bytes, 1), "B") as advance:
        for file in files:
            found.append((file, _sha256(file)))
            done += file.stat().st_size
            advance(done)
    return found


def _stated(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error


def _code() -> str:
    """A hash of the modules that make tokens of rows."""
    hashed = hashlib.sha256()
    for name in (
        "byte_level",
        "dialogue",
        "formats",
        "packing",
        "preferences",
        "prepare",
        "samples",
        "sentence_pieces",
        "sources",
        "store",
        "template",
    ):
        hashed.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return hashed.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    # Asked first: a `read` of so many bytes would take that much memory at once.
    if path.stat().st_size > MANIFEST_MAX_BYTES:
        raise ValueError(f"{path.name} is too large")
    raw = path.read_bytes()
    found = json.loads(raw)
    if not isinstance(found, dict):
        raise TypeError(f"{path.name} holds a {type(found).__name__}")
    return found
