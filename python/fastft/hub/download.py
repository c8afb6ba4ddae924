"""`fastft download`: a model or a data set from a hub, before it is needed or for a machine without a network.

Without a folder it goes into the hub's own cache, where training looks for it. With one it is fetched beside that folder,
checked, and put in place whole by one rename; what a broken-off try has fetched is used by the next.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastft import publish, stop
from fastft.errors import FileError
from fastft.hub import huggingface, locate, modelscope
from fastft.hub.locate import Hub


@dataclass(frozen=True)
class Fetched:
    """What lies where now.

    Attributes:
        folder: where it lies.
        num_files: files in it.
        num_bytes: their size.
        was_here: nothing was fetched, a folder on this machine has that name.
    """

    folder: Path
    num_files: int
    num_bytes: int
    was_here: bool = False

    def line(self, name: str) -> str:
        """One line for the person who asked."""
        size = f"{self.num_files} files, {_size(self.num_bytes)}"
        if self.was_here:
            return f"{name} is a folder on this machine ({size}); a folder here always comes before a hub"
        return f"{name} is in {self.folder} ({size})"


def model(name: str, *, hub: Hub, revision: str | None, to: Path | None, force: bool) -> Fetched:
    """Fetch a model: its weights once (safetensors, else pickles), its tokenizer and texts.

    Args:
        name: OWNER/NAME on the hub.
        hub: which.
        revision: branch, tag or commit; None is the hub's default.
        to: the folder to put it into; None is the hub's cache.
        force: replace that folder if it holds a model.

    Raises:
        HubError, FileError: in one line, what is wrong and what to do.
    """
    here = locate.local_model(name)
    if here is not None:
        return _local(here, name, to)
    locate.check_id(f"model {name}", name)
    fetch = modelscope.model if hub == "modelscope" else huggingface.model
    return _placed(to, lambda place: fetch(name, revision=revision, with_weights=True, to=place), force=force)


def dataset(name: str, *, hub: Hub, revision: str | None, to: Path | None, force: bool) -> Fetched:
    """Fetch all files of a data set.

    Raises:
        HubError, FileError: in one line, what is wrong and what to do.
    """
    here = locate.local_dataset(name)
    if here is not None:
        return _local(here, name, to)
    locate.check_id(f"data set {name}", name)
    if hub == "modelscope":
        return _placed(to, lambda place: modelscope.dataset(name, revision=revision, to=place), force=force)
    return _placed(to, lambda place: huggingface.files(name, "dataset", revision, None, to=place), force=force)


def _local(here: Path, name: str, to: Path | None) -> Fetched:
    if to is not None:
        raise FileError(f"download: {name} is on this machine already ({here}); copy it, or give another name")
    return _counted(here, was_here=True)


def _placed(to: Path | None, fetch: Callable[[Path | None], Path], *, force: bool) -> Fetched:
    """Fetch into the cache, or beside `to` and then put in place whole."""
    if to is None:
        return _counted(fetch(None))
    with publish.staged(to, force=force) as staging:
        # Not the staging folder, which goes when something fails: the next try goes on here.
        started = staging.parent / f".{to.name[:180]}.download"
        with stop.last_act(staging.rmdir), stop.at_once():
            fetched = fetch(started)
        publish.flush(fetched)  # which may take long, or fail: until here everything is kept
        for entry in sorted(fetched.iterdir()):
            if not entry.name.startswith("."):  # the hub's own notes about the download
                entry.rename(staging / entry.name)
        shutil.rmtree(started)
    return _counted(to)


def _counted(folder: Path, *, was_here: bool = False) -> Fetched:
    files = (
        [folder]
        if folder.is_file()
        else [path for path in folder.rglob("*") if path.is_file() and path.name != modelscope.WHOLE]
    )
    return Fetched(folder, len(files), sum(path.stat().st_size for path in files), was_here)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"
