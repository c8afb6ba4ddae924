"""All or nothing: a folder or a file appears whole at its place, or what stood there before stays.

Every writer of fastft works in a staging folder beside its target, and a rename puts it in place when it is whole and
on the disk. Killed at any moment, a run leaves the old target as it was and at most one staging folder, which the next
run removes. Why each step is needed, with the measurements: rivals that write in place lose or mix models.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastft import _native, console
from fastft.errors import BusyError, FileError

# Endings of files that model, adapter and checkpoint folders hold. A folder with anything else in it is not replaced.
_KNOWN_ENDINGS = frozenset(
    [
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".json",
        ".jsonl",
        ".model",
        ".txt",
        ".jinja",
        ".py",
        ".md",
        ".yaml",
        ".yml",
        ".png",
        ".log",
        ".tiktoken",
        ".gguf",
        ".msgpack",
        ".spm",
        ".vocab",
    ]
)
_KNOWN_NAMES = frozenset(("LICENSE", "NOTICE", "USE_POLICY", ".gitattributes", "vocab", "merges", "latest"))

# What file systems say that cannot exchange or refuse to overwrite: overlay (lower layers), NFS, FUSE.
_CANNOT = frozenset((errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP))


@contextmanager
def staged(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target`; when the body ends well it becomes `target`, else it is removed.

    Checks everything before the body runs: see `check_target`. Files written in the body need not be flushed.

    Args:
        target: the folder that shall be there in the end; its parents are made.
        force: replace a folder of models that exists. It stays as it is until the new one is whole.

    Raises:
        FileError: the target is refused, another process writes it, or the disk failed.
    """
    target = _absolute(target)
    check_target(target, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target):
        _clean_up(target)
        check_target(target, force=force)
        staging = _beside(target, f"partial-{secrets.token_hex(4)}")
        staging.mkdir()
        in_use = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # a file system without locks: the random name keeps writers apart
                fcntl.flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield staging
            try:
                _sync_tree(staging)
                _put_in_place(staging, target, force=force)
            except OSError as error:
                if isinstance(error, FileError):
                    raise
                raise FileError(f"cannot put {target} in place: {error}") from error
        finally:
            os.close(in_use)
            # The body's own failure matters more than a leftover, which the next run removes.
            shutil.rmtree(staging, ignore_errors=True)


def check_target(target: Path, *, force: bool = False) -> None:
    """Refuse a target that `staged` would refuse; planners call it before they read anything.

    Args:
        target: a folder that does not exist, or an empty one.
        force: accept a folder that holds nothing but files of models, adapters and checkpoints.

    Raises:
        FileError: the target is a file, a link, a folder in use, or cannot be replaced; the text says what to do.
    """
    target = _absolute(target)
    if target.is_symlink():
        raise FileError(f"{target} is a link; give the folder itself, or another one")
    if not target.name or Path.cwd().is_relative_to(target):
        raise FileError(
            f"{target} cannot be written as a whole: it is the current folder or holds it; give a folder of its own"
        )
    for parent in target.parents:
        if parent.exists():
            if not parent.is_dir():
                raise FileError(f"{target} cannot be made: {parent} is a file")
            break
    if not target.exists():
        return
    if not target.is_dir():
        raise FileError(f"{target} is a file; give a folder")
    if not any(target.iterdir()):
        return
    if not force:
        raise FileError(f"{target} exists already; choose another folder, or add --force to replace it")
    if (foreign := _foreign_file(target)) is not None:
        raise FileError(
            f"{target} is not replaced: {foreign} is no file of a model; move it away, or choose another folder"
        )


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuse to begin what the disk of `folder` (which need not exist yet) has no room for.

    Raises:
        FileError: fewer than `num_bytes` bytes are free there.
    """
    place = _absolute(folder)
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < num_bytes:
        raise FileError(
            f"{folder}: {num_bytes / 1e9:.2f} GB are needed, {free_bytes / 1e9:.2f} GB are free; "
            "make room there, or choose a folder on another disk"
        )


def write_text(path: Path, text: str) -> None:
    """Put a file of UTF-8 text in place at once, whole and on the disk; a file that exists is replaced.

    Raises:
        FileError: `path` is a folder or the disk failed; an older file is as it was.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for bytes."""
    path = _absolute(path)
    partial = _beside(path, f"partial-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _sync(path.parent)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error}") from error


def _absolute(path: Path) -> Path:
    """Absolute, with links in the folders above resolved but not in the last name, which must be seen as a link."""
    path = Path(os.path.abspath(path))  # noqa: PTH100  Path.resolve would follow the last link
    return path.parent.resolve() / path.name if path.name else path


def _beside(target: Path, ending: str) -> Path:
    """A hidden name in the same folder, shortened so that long names of targets fit the file system's limit."""
    return target.parent / f".{target.name[:180]}.{ending}"


def _foreign_file(folder: Path) -> Path | None:
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            hidden_folder = name in folders and name.startswith(".")
            known = (
                name in folders or path.suffix in _KNOWN_ENDINGS or path.stem in _KNOWN_NAMES or name in _KNOWN_NAMES
            )
            if path.is_symlink() or hidden_folder or not known:
                return path
    return None


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Hold the lock file of `target`; it is removed at the end."""
    path = _beside(target, "lock")
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise FileError(f"cannot write beside {target}: {error}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise BusyError(
                f"another process is writing {target}; wait until it is done, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            break
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(lock).st_ino:
                break
        os.close(lock)  # the one before us removed the file between our open and our lock
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _clean_up(target: Path) -> None:
    """Mend what a killed run left: put the old target back if it was between two renames, remove staging folders."""
    old = _beside(target, "old")
    if old.is_dir() and not target.exists():
        console.note(f"{target}: an earlier run was killed while it replaced this folder; the old one is put back")
        old.rename(target)
    elif old.is_dir():
        shutil.rmtree(old)
    prefix = _beside(target, "partial-").name
    for path in target.parent.iterdir():
        if path.name.startswith(prefix) and path.is_dir() and not path.is_symlink() and not _is_in_use(path):
            console.note(f"{target}: removing what an earlier run left unfinished ({path.name})")
            shutil.rmtree(path)


def _is_in_use(staging: Path) -> bool:
    folder = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: better a leftover than another's work
        return True
    finally:
        os.close(folder)
    return False


def _sync_tree(folder: Path) -> None:
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(place, name)
            if not path.is_symlink():
                _sync(path)
        _sync(Path(place))


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _put_in_place(staging: Path, target: Path, *, force: bool) -> None:
    if target.is_dir() and not target.is_symlink():
        check_target(target, force=force)
        if any(target.iterdir()):
            _exchange(staging, target)
            _sync(target.parent)
            return
        target.rmdir()
    try:
        _native.rename_noreplace(staging, target)
    except FileExistsError:
        raise FileError(
            f"{target} appeared while it was being made; nothing was replaced, choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        if os.path.lexists(target):
            raise FileError(
                f"{target} appeared while it was being made; nothing was replaced, choose another folder"
            ) from None
        staging.rename(target)
    _sync(target.parent)


def _exchange(staging: Path, target: Path) -> None:
    """Put `staging` in the place of `target`; the old target is then at `staging` or gone."""
    try:
        _native.rename_exchange(staging, target)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        # Two renames: a kill between them leaves no target, which `_clean_up` mends.
        old = _beside(target, "old")
        target.rename(old)
        try:
            staging.rename(target)
        except OSError:
            old.rename(target)
            raise
        _sync(target.parent)
        shutil.rmtree(old)
