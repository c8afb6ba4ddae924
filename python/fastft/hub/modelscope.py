"""Models and data sets from ModelScope, through its client `modelscope_hub` (extra `modelscope`).

The package keeps the cache (MODELSCOPE_CACHE), the token (MODELSCOPE_API_TOKEN) and the mirror (MODELSCOPE_ENDPOINT), goes on
within a file when a connection breaks, also in the next run, and compares SHA-256. Here stand the choice of files, the
room on the disk, the offline mode (FASTFT_OFFLINE), and a plain word for every failure.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fastft import console, publish
from fastft.config.mask import masked
from fastft.errors import FileError, HubError
from fastft.hub import quiet
from fastft.hub.weights import IGNORED, PICKLES, SAFETENSORS, SIDE_FILES, require_whole

# Beside what was fetched: the names of the files, once all of them were there. A folder without it may be half a model.
WHOLE = ".fastft_whole"


def model(repository: str, *, revision: str | None, with_weights: bool, to: Path | None = None) -> Path:
    """The folder of a model in the cache, fetched as far as it is missing there.

    Args:
        repository: OWNER/NAME; owners often differ from those on the Hugging Face hub.
        revision: branch or tag; None is the hub's default.
        with_weights: False leaves the weights out (for `init: random`).
        to: fetch into this folder instead of the cache; what an earlier try left there is kept.

    Raises:
        HubError: in one line, what is wrong and what to do.
    """
    what = f"model {repository}"
    patterns = [*SIDE_FILES, *(SAFETENSORS if with_weights else ())]
    folder = files(repository, "model", revision, patterns, to=to)
    if with_weights and not any(folder.glob("*.safetensors")):
        folder = files(repository, "model", revision, [*SIDE_FILES, *PICKLES], to=to)
        if not any(folder.glob("*.bin")):
            raise HubError(f"{what}: the repository holds no weights (*.safetensors or pytorch_model*.bin).")
    if with_weights:
        require_whole(what, folder)
    return folder


def dataset(repository: str, *, revision: str | None, to: Path | None = None) -> Path:
    """The folder of a data set in the cache, with all of its files.

    Raises:
        HubError: in one line, what is wrong and what to do.
    """
    return files(repository, "dataset", revision, None, to=to)


def files(repository: str, kind: str, revision: str | None, patterns: Sequence[str] | None, *, to: Path | None) -> Path:
    """The folder with a repository's files that match `patterns` (None: all), fetched as far as they are missing.

    Raises:
        HubError: in one line, what is wrong and what to do.
        FileError: the disk has no room for them.
    """
    wanted = _Wanted(repository, kind, revision, None if patterns is None else tuple(patterns))
    what = wanted.what
    hub = client(what)
    with quiet.spoken_for():
        if quiet.is_offline():
            return _cached(hub, wanted)
        try:
            listed = _listing(hub, wanted)
            missing = [(name, size) for name, size in listed if to is None or not _is_whole(to / name, size)]
            _require_room(what, to or _cache(), sum(size for _, size in missing))
            with console.progress(f"fetching {repository}", sum(size for _, size in listed), "B") as advance:
                folder = Path(
                    hub.download_repo(
                        repository,
                        kind,
                        revision=revision,
                        local_dir=to,
                        allow_patterns=None if patterns is None else list(patterns),
                        ignore_patterns=list(wanted.ignored) or None,
                        progress_callbacks=[_counting(advance)],
                    )
                )
        except FileError:
            raise
        except Exception as error:  # requests', urllib3's and its own classes, by release
            failure = HubError(reason(what, revision, error, to=to))
            if to is None and _is_away(error):
                with contextlib.suppress(HubError):  # then the first failure says more
                    folder = _cached(hub, wanted)
                    console.note(f"{what}: ModelScope cannot be reached; taking what was fetched before ({folder})")
                    return folder
            raise failure from error
    for name, size in listed:
        if not _is_whole(folder / name, size):
            raise HubError(f"{what}: {name} did not come whole from ModelScope; start again, what is complete is kept.")
    if to is None:
        _mark_whole(folder, [name for name, _ in listed])
    return folder


def reason(what: str, revision: str | None, error: BaseException, *, to: Path | None = None) -> str:
    """What went wrong in one line, and what to do; `to` is the folder that it was fetched into, None the cache."""
    login = "set MODELSCOPE_API_TOKEN"
    place = masked(os.environ.get("MODELSCOPE_ENDPOINT") or "ModelScope")
    for cause in _causes(error):
        status = getattr(cause, "status_code", None)
        if status is None:
            status = getattr(getattr(cause, "response", None), "status_code", None)
        name = type(cause).__name__
        if status in (401, 403):
            return f"{what}: {place} does not let you read it (HTTP {status}); accept its terms there, and {login}."
        if status == 404 or name == "NotExistError":
            at = f", or no revision {revision!r} of it" if revision else ""
            return (
                f"{what}: not on {place}{at} (HTTP 404); check the id (owners often differ from Hugging Face's), and if it "
                f"is private, {login}."
            )
        if status == 429:
            return f"{what}: {place} answers no more for now (HTTP 429: too many requests); wait some minutes."
        if isinstance(status, int) and status >= 500:
            return f"{what}: {place} fails (HTTP {status}); start again later, what is complete is kept."
        if "Integrity" in name or "hash mismatch" in str(cause).lower():
            return (
                f"{what}: a file did not come as it is on {place} ({_line(cause)}) and was not kept; start again, and if "
                "that happens twice, the network or the mirror changes files."
            )
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            if to is not None:
                return f"{what}: the disk is full; make room at {to.parent}, or choose a folder on another disk."
            return f"{what}: the disk is full; free space at {_cache()}, or set MODELSCOPE_CACHE to a larger disk."
        if isinstance(cause, ConnectionError) and hasattr(error, "failed_files"):
            return f"{what}: the connection to {place} broke off; start again, it goes on where it broke."
        if isinstance(cause, ConnectionError):
            return (
                f"{what}: {place} cannot be reached ({_network(error)}); check the network, set MODELSCOPE_ENDPOINT to a "
                "mirror, or give a folder."
            )
    return (
        f"{what}: not fetched from {place}: {_line(error)}; check the id (owners often differ from Hugging Face's), the "
        "network and MODELSCOPE_ENDPOINT."
    )


def client(what: str) -> Any:
    """ModelScope's own client, which reads token, mirror and cache from the environment."""
    quiet.prepare()
    os.environ.setdefault("TQDM_DISABLE", "1")  # its bars, read when tqdm is imported; ours stands for all files
    try:
        from modelscope_hub import HubApi
    except ImportError as error:
        raise HubError(
            f"{what}: ModelScope needs its own package; install it with `pip install fastft[modelscope]`, or take "
            "the Hugging Face hub (hub: huggingface)."
        ) from error
    return HubApi()


def _listing(hub: Any, wanted: "_Wanted") -> list[tuple[str, int]]:
    """The files that are wanted, with their sizes in bytes."""
    return [
        (file.path, file.size)
        for file in hub.list_repo_files(wanted.repository, wanted.kind, revision=wanted.revision, recursive=True)
        if not file.is_dir and wanted.takes(file.path)
    ]


def _counting(advance: console.Advance) -> type:
    """A class whose objects, one a file, move our bar."""
    from modelscope_hub import ProgressCallback

    lock = threading.Lock()
    done = 0

    class Counting(ProgressCallback):  # type: ignore[misc]
        def update(self, size: int) -> None:
            nonlocal done
            with lock:
                done += size
                advance(done)

    return Counting


def _cached(hub: Any, wanted: "_Wanted") -> Path:
    """The folder in the cache, without the network, if it was once fetched whole."""
    try:
        folder = Path(
            hub.download_repo(wanted.repository, wanted.kind, revision=wanted.revision, local_files_only=True)
        )
    except Exception as error:  # as in `files`
        raise HubError(
            f"{wanted.what}: FASTFT_OFFLINE is set and it is not in {_cache()}; unset it to download, or give a folder."
        ) from error
    mark = folder / WHOLE
    names = mark.read_text(encoding="utf-8").splitlines() if mark.is_file() else []
    taken = [name for name in names if wanted.takes(name)]
    if not taken or not all((folder / name).is_file() for name in taken):
        raise HubError(
            f"{wanted.what}: FASTFT_OFFLINE is set and what is in {folder} is not whole; unset it to download the rest."
        )
    return folder


def _mark_whole(folder: Path, names: Sequence[str]) -> None:
    mark = folder / WHOLE
    before = mark.read_text(encoding="utf-8").splitlines() if mark.is_file() else []
    text = "".join(f"{name}\n" for name in sorted({*before, *names}))
    if before != text.splitlines():
        publish.write_text(mark, text)


def _is_whole(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _require_room(what: str, place: Path, num_bytes: int) -> None:
    try:
        publish.require_space(place, num_bytes)
    except FileError as error:
        raise FileError(f"{what}: {error}") from error


def _cache() -> Path:
    return Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()


def _is_away(error: BaseException) -> bool:
    """Whether the hub could not be reached, or fails itself: then what was fetched before may do."""
    return any(
        isinstance(cause, ConnectionError) or (getattr(cause, "status_code", None) or 0) >= 500
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, those of the single files, and what lies behind each."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        current = waiting.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += getattr(current, "failed_files", {}).values()
        waiting += [current.__cause__, current.__context__]


def _network(error: BaseException) -> str:
    """What the operating system said of the connection, else the first line."""
    said = [cause.strerror for cause in _causes(error) if isinstance(cause, OSError) and cause.strerror]
    return said[-1] if said else _line(error)


def _line(error: BaseException) -> str:
    lines = masked(str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@dataclass(frozen=True)
class _Wanted:
    """Which files of which repository."""

    repository: str
    kind: str
    revision: str | None
    patterns: tuple[str, ...] | None

    @property
    def what(self) -> str:
        """As it is called in messages."""
        return f"{'model' if self.kind == 'model' else 'data set'} {self.repository}"

    @property
    def ignored(self) -> tuple[str, ...]:
        """Files that hold the same weights once more."""
        return IGNORED if self.kind == "model" else ()

    def takes(self, name: str) -> bool:
        """Whether a file is wanted."""
        if any(fnmatch(name, pattern) for pattern in self.ignored):
            return False
        return self.patterns is None or any(fnmatch(name, pattern) for pattern in self.patterns)
