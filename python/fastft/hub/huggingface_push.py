"""An upload to the Hugging Face hub in one commit, through `huggingface_hub`; afterwards the hub is asked what it has."""

import sys
from typing import TYPE_CHECKING, Any

from fastft import console
from fastft.config.mask import masked
from fastft.errors import HubError
from fastft.hub import huggingface, quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from huggingface_hub import CommitOperationAdd

    from fastft.hub.push import Upload

# Smaller files go within the commit, or with it.
LARGE_BYTES = 1_000_000


def send(upload: "Upload", repository: str, *, private: bool, revision: str | None, message: str) -> str:
    """Make the repository if it is not there, send the files, and compare the hub's list with them.

    Returns:
        The address of the commit.

    Raises:
        HubError: in one line, what is wrong and what to do; the repository is as it was, or new and empty.
    """
    quiet.prepare()
    from huggingface_hub import CommitOperationAdd, HfApi, constants
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: httpx's or httpx2's, by release
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalTokenNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    what = f"upload {repository}"
    if constants.HF_HUB_OFFLINE or quiet.is_offline():
        raise HubError(f"{what}: HF_HUB_OFFLINE or FASTFT_OFFLINE is set; unset it to upload.")
    on_terminal = sys.stderr.isatty()  # else the library's bars would be torn, and plain lines say how far it is
    if not on_terminal:
        disable_progress_bars()
    hub = HfApi()
    operations = [CommitOperationAdd(path_in_repo=item.name, path_or_fileobj=item.source) for item in upload.items]
    console.note(f"sending {len(operations)} files to {masked(constants.ENDPOINT)}/{repository}")
    with quiet.spoken_for():
        try:
            hub.create_repo(repository, private=private, exist_ok=True)
            if revision is not None:
                hub.create_branch(repository, branch=revision, exist_ok=True)
            if not on_terminal:
                _send_large_files(hub, operations, upload, repository, revision)
            commit = hub.create_commit(repository, operations, commit_message=message, revision=revision)
            _compare(what, hub, upload, repository, revision)
        except (
            HfHubHTTPError,
            HTTPError,
            HFValidationError,
            LocalTokenNotFoundError,
            OSError,
            ValueError,
            KeyError,
            RuntimeError,  # the library's, around what happened to one file
        ) as error:
            if isinstance(error, HubError):
                raise
            raise HubError(_reason(what, repository, error)) from error
    return masked(str(commit.commit_url))


def _send_large_files(
    hub: Any, operations: "Sequence[CommitOperationAdd]", upload: "Upload", repository: str, revision: str | None
) -> None:
    """Send one file after the other, before the commit that makes them seen, and say how far it is."""
    sizes = [item.num_bytes for item in upload.items]
    done = 0
    with console.progress(f"sending to {repository}", sum(sizes), "B") as advance:
        for operation, size in zip(operations, sizes, strict=True):
            if size >= LARGE_BYTES:
                advance(done, operation.path_in_repo)
                hub.preupload_lfs_files(repository, [operation], revision=revision)
            done += size
            advance(done)


def _compare(what: str, hub: Any, upload: "Upload", repository: str, revision: str | None) -> None:
    """Refuse to call it done when the hub does not list each file with its size."""
    info = hub.repo_info(repository, revision=revision, files_metadata=True)
    there = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    for item in upload.items:
        if there.get(item.name) != item.num_bytes:
            came = "is not there" if item.name not in there else f"has {there[item.name]} bytes there"
            raise HubError(f"{what}: {item.name} of {item.num_bytes} bytes {came}; upload it again")


def _reason(what: str, repository: str, error: BaseException) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    endpoint = masked(constants.ENDPOINT)
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    response = error.response if isinstance(error, HfHubHTTPError) else None
    status = response.status_code if response is not None else None
    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return f"{what}: {endpoint} does not know you (HTTP {status or 401}); {login}, with a token that may write."
    if status == 403:
        owner = repository.partition("/")[0]
        return (
            f"{what}: your token may not write there (HTTP 403); take one that may, and an owner of yours ({owner}?)."
        )
    if status in (409, 412):
        return f"{what}: the repository changed meanwhile (HTTP {status}); upload again."
    if isinstance(error, ValueError | KeyError) and not isinstance(error, OSError | HfHubHTTPError):
        return f"{what}: {endpoint} does not take it: {huggingface.cause(error)}"
    if isinstance(error, RuntimeError):
        return f"{what}: {endpoint} did not take it ({huggingface.cause(error)}); nothing was committed, upload again."
    if status is None:
        return (
            f"{what}: {endpoint} cannot be reached ({huggingface.cause(error)}); check the network, and upload again."
        )
    return f"{what}: {endpoint} fails (HTTP {status}); nothing was committed, upload again later."
