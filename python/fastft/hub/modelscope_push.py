"""An upload to ModelScope through its client `modelscope_hub`; afterwards the hub is asked what it has."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft import console, stop
from fastft.config.mask import masked
from fastft.errors import FileError, HubError
from fastft.hub import modelscope, quiet

if TYPE_CHECKING:
    from fastft.hub.push import Upload

MAIN = "master"


def send(upload: "Upload", repository: str, *, private: bool, revision: str | None, message: str) -> str:
    """Make the repository if it is not there, send the files, and compare the hub's list with them.

    Returns:
        The address of the model.

    Raises:
        HubError: in one line, what is wrong and what to do.
    """
    what = f"upload {repository}"
    hub = modelscope.client(what)
    if quiet.is_offline():
        raise HubError(f"{what}: FASTFT_OFFLINE is set; unset it to upload.")
    endpoint = (os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn").rstrip("/")
    console.note(f"sending {len(upload.items)} files to {masked(endpoint)}/models/{repository}")
    with quiet.spoken_for(), _scratch() as scratch:
        folder = scratch / "files"
        _lay_out(upload, folder)
        try:
            _make(hub, what, repository, private=private, revision=revision)
            with console.progress(f"sending to {repository}", upload.num_bytes, "B") as advance:
                hub.upload_folder(
                    repository,
                    "model",
                    folder,
                    commit_message=message,
                    revision=revision,
                    use_cache=False,
                    tracker_path=scratch / "tracker",
                    disable_tqdm=True,
                    progress_callback=_counting(advance),
                )
            there = {file.path: file.size for file in hub.list_repo_files(repository, "model", revision=revision)}
        except HubError:
            raise
        except Exception as error:  # requests', urllib3's and its own classes, by release
            raise HubError(modelscope.reason(what, revision, error)) from error
    for item in upload.items:
        if there.get(item.name) != item.num_bytes:
            came = "is not there" if item.name not in there else f"has {there[item.name]} bytes there"
            raise HubError(f"{what}: {item.name} of {item.num_bytes} bytes {came}; upload it again")
    return f"{masked(endpoint)}/models/{repository}"


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder that is gone at the end, also when the process is stopped: the client's threads wait for no exception."""
    with ExitStack() as stack:
        with stop.deferred():
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fastft-upload-"))
            stack.enter_context(stop.last_act(lambda: shutil.rmtree(folder, ignore_errors=True)))
        yield Path(folder)


def _make(hub: Any, what: str, repository: str, *, private: bool, revision: str | None) -> None:
    """Make the repository if it is not there.

    Raises:
        HubError: it has no such branch, and the client cannot make one.
    """
    from modelscope_hub import Visibility
    from modelscope_hub.errors import AlreadyExistsError

    is_there = hub.repo_exists(repository, "model")
    if revision not in (None, MAIN):
        branches = (
            [branch["Revision"] for branch in hub.legacy.list_revisions_detail(repository, "model")[0]]
            if is_there
            else [MAIN]
        )
        if revision not in branches:
            raise HubError(
                f"{what}: there is no branch {revision!r} ({', '.join(branches)}), and ModelScope makes branches on its"
                " website only; leave --revision away, or make the branch there"
            )
    if is_there:
        return
    try:
        hub.create_repo(repository, "model", visibility=Visibility.PRIVATE if private else Visibility.PUBLIC)
    except AlreadyExistsError:
        console.note(f"{repository} is there already")


def _counting(advance: console.Advance) -> Callable[[dict[str, Any]], None]:
    """Move our bar by what the client tells after each file and each commit."""

    def heard(event: dict[str, Any]) -> None:
        # What goes within a commit is counted with it; a file that the hub has already is not sent.
        advance(max(event.get("uploaded_bytes", 0), event.get("committed_bytes", 0)))

    return heard


def _lay_out(upload: "Upload", folder: Path) -> None:
    """The files as the client wants them, in one folder: links to those here, and the few that differ."""
    for item in upload.items:
        target = folder / item.name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(item.source, bytes):
                target.write_bytes(item.source)
            else:
                target.symlink_to(item.source.resolve())
        except OSError as error:
            raise FileError(f"upload: {target} cannot be written: {error.strerror}") from error
