"""Models and data sets from the Hugging Face hub, through `huggingface_hub`.

The library keeps the cache (HF_HOME), the token (HF_TOKEN or `hf auth login`), the mirror (HF_ENDPOINT) and the
offline mode (HF_HUB_OFFLINE), and goes on within a file when a connection breaks. Here stand the choice of files, the room
on the disk, the check of what came, and a plain word for every failure.
"""

import errno
import threading
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from fastft import console, publish
from fastft.config.mask import masked
from fastft.errors import FileError, HubError
from fastft.hub import checksum, quiet
from fastft.hub.checksum import Listed
from fastft.hub.weights import IGNORED, PICKLES, SAFETENSORS, SIDE_FILES, require_whole

Kind = Literal["model", "dataset"]
WORDS = {"model": "model", "dataset": "data set"}


def model(repository: str, *, revision: str | None, with_weights: bool, to: Path | None = None) -> Path:
    """The folder of a model in the cache, fetched as far as it is missing there.

    Args:
        repository: OWNER/NAME.
        revision: branch, tag or commit; None is the hub's default.
        with_weights: False leaves the weights out (for `init: random`).
        to: fetch into this folder instead of the cache; what an earlier try left there is kept.

    Raises:
        HubError: in one line, what is wrong and what to do.
    """
    patterns = [*SIDE_FILES, *(SAFETENSORS if with_weights else ())]
    folder = files(repository, "model", revision, patterns, to=to)
    if with_weights and not any(folder.glob("*.safetensors")):
        folder = files(repository, "model", revision, [*SIDE_FILES, *PICKLES], to=to)
        if not any(folder.glob("*.bin")):
            raise HubError(
                f"model {repository}: the repository holds no weights (*.safetensors or pytorch_model*.bin); is it an "
                "adapter, or a model in another form such as GGUF?"
            )
    if with_weights:
        require_whole(f"model {repository}", folder)
    return folder


def files(
    repository: str, kind: Kind, revision: str | None, patterns: Sequence[str] | None, *, to: Path | None = None
) -> Path:
    """The folder with a repository's files that match `patterns` (None: all), fetched as far as they are missing.

    Raises:
        HubError: in one line, what is wrong and what to do; a file that came with another content is removed.
        FileError: the disk has no room for them.
    """
    quiet.prepare()
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx's or httpx2's, by release
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
    )

    with quiet.spoken_for():
        what = f"{WORDS[kind]} {repository}"
        failures = (HfHubHTTPError, HTTPError, EntryNotFoundError, HFValidationError, OSError)
        offline = constants.HF_HUB_OFFLINE or quiet.is_offline()
        try:
            listed = [] if offline else _listing(repository, kind, revision, patterns)
        except failures as error:
            # The download below meets the same and knows whether the cache will do; but a model that is not there, or
            # not for us, is not asked for twice.
            if _is_final(error):
                raise HubError(reason(what, repository, revision, error)) from error
            listed = []
        unchecked = _Unchecked(Path(constants.HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}")
        here = (lambda file: _is_whole(to / file.path, file)) if to else unchecked.is_done
        missing = [file for file in listed if not here(file)]
        total = sum(file.size_bytes or 0 for file in missing)
        _require_room(what, to or Path(constants.HF_HUB_CACHE), total)
        if to is None:
            unchecked.add(missing)
        try:
            with console.progress(f"fetching {repository}", total, "B") as advance:
                found = snapshot_download(
                    repository,
                    repo_type=kind,
                    revision=revision,
                    local_dir=to,
                    allow_patterns=None if patterns is None else list(patterns),
                    ignore_patterns=list(IGNORED) if kind == "model" else None,
                    tqdm_class=_counting(advance),
                    local_files_only=offline,
                )
        except failures as error:
            raise HubError(reason(what, repository, revision, error, to=to)) from error
    folder = Path(found)
    # In a folder of its own everything is read once more: an earlier try may have been killed before its check.
    _check(what, folder, missing if to is None else listed)
    if to is None:
        unchecked.remove(missing)
    return folder


def reason(
    what: str,
    repository: str,
    revision: str | None,
    error: BaseException,
    *,
    is_gated: bool = False,
    to: Path | None = None,
) -> str:
    """What went wrong in one line, and what to do.

    Args:
        what: was wanted, as it is called in messages.
        repository: its id.
        revision: the one that was asked for.
        error: what the library raised.
        is_gated: whether it is known that the owner restricts access.
        to: the folder that it was fetched into; None is the cache.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    noun = what.removesuffix(f" {repository}")
    endpoint = masked(constants.ENDPOINT)
    login = "log in with `hf auth login` or set HF_TOKEN"
    response = error.response if isinstance(error, HfHubHTTPError) else None
    status = response.status_code if response is not None else None
    if is_gated or isinstance(error, GatedRepoError) or status == 403:
        page = f"{endpoint}/{'datasets/' if noun == 'data set' else ''}{repository}"
        return f"{what}: its owner restricts access; accept the terms at {page}, then {login}."
    if isinstance(error, RevisionNotFoundError):
        return f"{what}: no revision {revision!r} at {endpoint}; null takes the default one."
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return (
            f"{what}: no such folder here, and none at {endpoint} that you may read (HTTP {status}); check the "
            f"spelling, and if the {noun} is private, {login}."
        )
    if status == 429:
        return (
            f"{what}: {endpoint} answers no more for now (HTTP 429: too many requests); wait some minutes, and {login}."
        )
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE or quiet.is_offline():
            variable = "FASTFT_OFFLINE" if quiet.is_offline() else "HF_HUB_OFFLINE"
            return (
                f"{what}: {variable} is set and the {noun} is not, or not wholly, in {constants.HF_HUB_CACHE}; "
                "unset it to download, or give a folder."
            )
        if (busy := _status_behind(error)) is not None:
            return (
                f"{what}: {endpoint} fails (HTTP {busy}) and the {noun} is not, or not wholly, in "
                f"{constants.HF_HUB_CACHE}; try again later, or set HF_ENDPOINT to a mirror."
            )
        return (
            f"{what}: {endpoint} cannot be reached ({cause(error)}) and the {noun} is not, or not wholly, in "
            f"{constants.HF_HUB_CACHE}; check the network, set HF_ENDPOINT to a mirror, or give a folder."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        if to is not None:
            return f"{what}: the disk is full; make room at {to.parent}, or choose a folder on another disk."
        return f"{what}: the disk is full; free space at {constants.HF_HUB_CACHE}, or set HF_HOME to a larger disk."
    if isinstance(error, PermissionError):
        return (
            f"{what}: {error.filename or constants.HF_HUB_CACHE} cannot be written; set HF_HOME to a folder of yours."
        )
    if status is not None and status >= 500:
        return f"{what}: {endpoint} fails (HTTP {status}); start again later, what is complete is kept."
    return f"{what}: the download from {endpoint} failed: {cause(error)}; start again, what is complete is kept."


def dataset_reason(name: str, repository: str, revision: str | None, error: BaseException) -> str:
    """Why `datasets` could not give a data set, in one line.

    Args:
        name: the data set with subset and split.
        repository: its id.
        revision: the one that was asked for.
        error: what `datasets` raised; the hub's own answer may lie behind it.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    for cause in _chain(error):
        if isinstance(cause, HfHubHTTPError | LocalEntryNotFoundError | OfflineModeIsEnabled) or (
            isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        ):
            return reason(f"data set {repository}", repository, revision, cause)
    lines = masked(str(error)).strip().splitlines()
    if type(error).__name__ == "DatasetNotFoundError" and "gated" in str(error):
        return reason(f"data set {repository}", repository, revision, error, is_gated=True)
    return f"data set {name}: {lines[0] if lines else type(error).__name__}"


def _listing(repository: str, kind: Kind, revision: str | None, patterns: Sequence[str] | None) -> list[Listed]:
    """What the hub says of the files that are wanted, in one request."""
    from huggingface_hub import HfApi

    info: Any = HfApi().repo_info(repository, repo_type=kind, revision=revision, files_metadata=True)
    ignored = IGNORED if kind == "model" else ()
    listed = []
    for sibling in info.siblings or ():
        name = sibling.rfilename
        if any(fnmatch(name, pattern) for pattern in ignored):
            continue
        if patterns is None or any(fnmatch(name, pattern) for pattern in patterns):
            digest = sibling.lfs.sha256 if sibling.lfs is not None else sibling.blob_id
            listed.append(Listed(name, sibling.size, digest))
    return listed


def _is_whole(place: Path, file: Listed) -> bool:
    return place.is_file() and file.size_bytes in (None, place.stat().st_size)


def _require_room(what: str, place: Path, num_bytes: int) -> None:
    try:
        publish.require_space(place, num_bytes)
    except FileError as error:
        raise FileError(f"{what}: {error}") from error


def _check(what: str, folder: Path, fetched: Sequence[Listed]) -> None:
    """Compare what came with what the hub lists; remove what is something else."""
    wrong = []
    for file in fetched:
        place = folder / file.path
        complaint = checksum.complaint(place, file) if place.is_file() else "it is not there"
        if complaint is not None:
            place.resolve().unlink(missing_ok=True)
            place.unlink(missing_ok=True)
            wrong.append(f"{file.path} did not come as it is on the hub ({complaint}) and was removed")
    if wrong:
        more = f", and {len(wrong) - 1} more files likewise" if len(wrong) > 1 else ""
        raise HubError(
            f"{what}: {wrong[0]}{more}; start again, and if that happens twice, the network or the mirror changes files."
        )


def _counting(advance: console.Advance) -> Any:
    """The library's bars without the bars: their bytes move ours."""
    import huggingface_hub.utils

    tqdm: Any = huggingface_hub.utils.tqdm  # type: ignore[attr-defined]
    lock = threading.Lock()
    done = 0

    class Counting(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **named: Any) -> None:
            name = named.get("name") or ""
            self._counts = named.get("unit") == "B" and not name.endswith("transfer")
            super().__init__(*arguments, **{**named, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            if self._counts:
                with lock:
                    done += int(n or 0)
                    advance(done)

    return Counting


def _is_final(error: BaseException) -> bool:
    """Whether asking once more cannot help: there is no such thing, or it is not for us."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code in (404, 429)
    return isinstance(error, HFValidationError)


def _status_behind(error: BaseException | None) -> int | None:
    """The HTTP status of the answer behind an error, if there was an answer."""
    from huggingface_hub.errors import HfHubHTTPError

    answers = [cause.response for cause in _chain(error) if isinstance(cause, HfHubHTTPError)]
    return next((int(answer.status_code) for answer in answers if answer is not None), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what lies behind it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def cause(error: BaseException) -> str:
    """The first line of the innermost reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = masked(str(error).strip())
    return text.splitlines()[0] if text else type(error).__name__


class _Unchecked:
    """Files of a repository in the cache that were asked for and have not been compared with the hub's list yet.

    Their digests stand in a file beside the blobs, so that a run that was killed before its check leaves nothing unchecked.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._note = folder / ".fastft_unchecked"

    def is_done(self, file: Listed) -> bool:
        """Whether the file is in the cache and has been checked, or was put there by another program."""
        if file.digest is None or file.digest in self._digests():
            return False
        return _is_whole(self._folder / "blobs" / file.digest, file)

    def add(self, files: Sequence[Listed]) -> None:
        self._write(self._digests() | {file.digest for file in files if file.digest})

    def remove(self, files: Sequence[Listed]) -> None:
        self._write(self._digests() - {file.digest for file in files if file.digest})

    def _digests(self) -> set[str]:
        return set(self._note.read_text(encoding="utf-8").split()) if self._note.is_file() else set()

    def _write(self, digests: set[str]) -> None:
        if digests:
            publish.write_text(self._note, "\n".join(sorted(digests)) + "\n")
        else:
            self._note.unlink(missing_ok=True)
