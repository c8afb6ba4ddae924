"""Models from the Hugging Face hub, through `huggingface_hub`.

The library keeps the cache (HF_HOME), the token (HF_TOKEN or `hf auth login`), the mirror (HF_ENDPOINT) and the
offline mode (HF_HUB_OFFLINE); here stand the choice of files and a plain word for every failure.
"""

import errno
import os
from pathlib import Path

from fastft.errors import HubError
from fastft.hub.weights import IGNORED, PICKLES, SAFETENSORS, SIDE_FILES


def model(repository: str, *, revision: str | None, with_weights: bool) -> Path:
    """The folder of a model in the cache, fetched as far as it is missing there.

    Args:
        repository: OWNER/NAME.
        revision: branch, tag or commit; None is the hub's default.
        with_weights: False leaves the weights out (for `init: random`).

    Raises:
        HubError: in one line, what is wrong and what to do.
    """
    patterns = [*SIDE_FILES, *(SAFETENSORS if with_weights else ())]
    folder = _snapshot(repository, revision, patterns)
    if not with_weights or any(folder.glob("*.safetensors")):
        return folder
    folder = _snapshot(repository, revision, [*SIDE_FILES, *PICKLES])
    if not any(folder.glob("*.bin")):
        raise HubError(
            f"model {repository}: the repository holds no weights (*.safetensors or pytorch_model*.bin); is it an "
            "adapter, or a model in another form such as GGUF?"
        )
    return folder


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is imported
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx's or httpx2's, by release
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
    )

    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=list(IGNORED))
    except (HfHubHTTPError, HTTPError, EntryNotFoundError, HFValidationError, OSError) as error:
        raise HubError(_reason(repository, revision, error)) from error
    return Path(found)


def _reason(repository: str, revision: str | None, error: Exception) -> str:
    """What went wrong in one line, and what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what, endpoint = f"model {repository}", constants.ENDPOINT
    login = "log in with `hf auth login` or set HF_TOKEN"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError) or status == 403:
        return f"{what}: its owner restricts access; accept the terms at {endpoint}/{repository}, then {login}."
    if isinstance(error, RevisionNotFoundError):
        return f"{what}: no revision {revision!r} at {endpoint}; null takes the default one."
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return (
            f"{what}: no such folder here, and none at {endpoint} that you may read (HTTP {status}); check the "
            f"spelling, and if the model is private, {login}."
        )
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return (
                f"{what}: HF_HUB_OFFLINE is set and the model is not, or not wholly, in {constants.HF_HUB_CACHE}; "
                "unset it to download, or give a folder."
            )
        return (
            f"{what}: {endpoint} cannot be reached ({_cause(error)}) and the model is not, or not wholly, in "
            f"{constants.HF_HUB_CACHE}; check the network, set HF_ENDPOINT to a mirror, or give a folder."
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{what}: the disk is full; free space at {constants.HF_HUB_CACHE}, or set HF_HOME to a larger disk."
    return f"{what}: the download from {endpoint} failed: {_cause(error)}; start again, what is complete is kept."


def _cause(error: BaseException) -> str:
    """The first line of the innermost reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
