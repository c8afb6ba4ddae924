"""All or nothing: a folder or a file appears whole at its place, or what stood there before stays.

Every writer of fastft works in a staging folder (or file) beside its target, and a rename puts it in place when it is
whole and on the disk. Killed at any moment, a run leaves the old target as it was and at most one staging folder, which
the next run removes. Why each step is needed, with the measurements: rivals that write in place lose or mix models.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastft import _native, console, stop
from fastft.errors import BusyError, FastftError, FileError

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
# A folder is a model's, an adapter's, a checkpoint's or a LLaVA result only if one of these stands in it, directly: notes and
# scripts alone have known endings, too, and are somebody's work.
_MARK_ENDINGS = frozenset((".safetensors", ".bin", ".pt", ".pth", ".gguf"))
_MARK_NAMES = frozenset(
    (
        "config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "trainer_state.json",
        "fastft_checkpoint.json", "fastft_training.json", "llm_adapter", "visual_encoder_adapter", "visual_encoder",
        "projector",
    )
)  # fmt: skip
_KNOWN_NAMES = frozenset(("LICENSE", "NOTICE", "USE_POLICY", ".gitattributes", "vocab", "merges", "latest"))

# What file systems say that cannot exchange or refuse to overwrite: overlay (lower layers), NFS, FUSE.
_CANNOT = frozenset((errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP))

# What a disk says that takes no more, and what to do about it.
_DISK_ADVICE = {
    errno.ENOSPC: "make room on that disk and run again",
    errno.EDQUOT: "your quota there is used up",
    errno.EFBIG: "no file may be so large there (ulimit -f, or the file system's own limit)",
    errno.EIO: "the disk failed, the system's log may say more",
}

# Longest part of a target's name in the names beside it, so that these fit the file system's limit of 255.
_MOST_OF_NAME = 180
_BESIDE = re.compile(r"\.(.+)\.(?:partial-[0-9a-f]{8}|old|lock)", re.DOTALL)


@contextmanager
def staged(target: Path, *, force: bool = False, num_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty folder beside `target`; when the body ends well it becomes `target`, else it is removed.

    Checks everything before the body runs: see `check_target`. Files written in the body need not be flushed.

    Args:
        target: the folder that shall be there in the end; its parents are made.
        force: replace a folder of models that exists. It stays as it is until the new one is whole.
        num_bytes: that the body will write, where that is known: so much room must be there before it begins.

    Raises:
        FileError: the target is refused, another process writes it, or the disk failed.
    """
    target = _absolute(target)
    check_target(target, force=force)
    require_space(target, num_bytes)
    with stop.deferred(), _parents(target), claimed(target):
        staging = _beside(target, f"partial-{secrets.token_hex(4)}")
        in_use: int | None = None
        try:
            with stop.allowed():
                _clean_up(target)
                check_target(target, force=force)
            staging.mkdir()
            in_use = _marked_in_use(staging)
            with stop.allowed(), _disk_errors():
                yield staging
                flush(staging)
            _put_in_place(staging, target, force=force)
        except OSError as error:
            if (clear := _told(error, staging, target, num_bytes)) is error:
                raise
            raise clear from error
        finally:
            # The body's own failure matters more than a leftover, which the next run removes.
            _discard(staging)
            if in_use is not None:
                os.close(in_use)


@contextmanager
def claimed(target: Path) -> Iterator[None]:
    """Keep other processes of fastft from writing `target` meanwhile, by a lock file beside it.

    Raises:
        BusyError: another process holds it.
        FileError: nothing can be written beside the target.
    """
    target = _absolute(target)
    path = _beside(target, "lock")
    lock: int | None = None
    with contextlib.ExitStack() as stack:
        try:
            with stop.deferred():
                lock = _locked(path, target)
                stack.enter_context(stop.last_act(path.unlink))
            yield
        finally:
            with stop.deferred():
                if lock is not None:
                    with contextlib.suppress(OSError):  # an empty file that does no harm
                        path.unlink(missing_ok=True)
                    os.close(lock)


def _locked(path: Path, target: Path) -> int:
    """Open and lock a lock file; its descriptor."""
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise _told(error, path, target, 0) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise BusyError(
                f"another process is writing {target}; wait until it is done, or choose another folder"
            ) from None
        except OSError:  # a file system without locks: the random names of staging folders keep writers apart
            return lock
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(lock).st_ino:
                return lock
        os.close(lock)  # the one before us removed the file between our open and our lock


def check_target(target: Path, *, force: bool = False) -> None:
    """Refuse a target that `staged` would refuse; planners call it before they read anything.

    Args:
        target: a folder that does not exist, or an empty one.
        force: accept a folder of a model, an adapter or a checkpoint in which there is nothing else.

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
    if not any(path.suffix in _MARK_ENDINGS or path.name in _MARK_NAMES for path in target.iterdir()):
        raise FileError(
            f"{target} is not replaced: there is no model in it (no weights, no config.json); move what is there away, or "
            "choose another folder"
        )


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuse to begin what the disk of `folder` (which need not exist yet) has no room for.

    What killed runs left beside the folder counts as free: it is removed before the writing begins.

    Raises:
        FileError: fewer than `num_bytes` bytes are free there.
    """
    folder = _absolute(folder)
    free_bytes = _free_bytes(folder)
    if free_bytes < num_bytes and free_bytes + _leftover_bytes(folder) < num_bytes:
        raise FileError(
            f"{folder}: {_readable(num_bytes)} are needed, {_readable(free_bytes)} are free; "
            "make room there, or choose a folder on another disk"
        )


def write_text(path: Path, text: str) -> None:
    """Put a file of UTF-8 text in place at once, whole and on the disk; a file that exists is replaced.

    Raises:
        FileError: `path` is a folder, another process writes it, or the disk failed; an older file is as it was.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for bytes."""
    with staged_file(path, num_bytes=len(content)) as partial, partial.open("wb") as file:
        file.write(content)


@contextmanager
def staged_file(path: Path, *, num_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty file beside `path`; when the body ends well it becomes `path`, else it is removed.

    Args:
        path: a file that exists is replaced; its parents are made.
        num_bytes: that the body will write, where that is known.

    Raises:
        FileError: see `write_text`.
    """
    path = _absolute(path)
    require_space(path, num_bytes)
    with stop.deferred(), _parents(path), claimed(path):
        partial = _beside(path, f"partial-{secrets.token_hex(4)}")
        in_use: int | None = None
        try:
            with stop.allowed():
                _clean_up(path)
            partial.touch(exist_ok=False)
            in_use = _marked_in_use(partial)
            with stop.allowed():
                yield partial
                _sync(partial)
            _put_file_in_place(partial, path)
        except OSError as error:
            clear = _told(error, partial, path, num_bytes)
            if not isinstance(clear, FileError):
                clear = FileError(f"cannot write {path}: {error.strerror or error}")
            raise clear from error
        finally:
            _discard(partial)
            if in_use is not None:
                os.close(in_use)


def told(error: OSError, target: Path) -> OSError:
    """An error of the disk as the user shall read it: with a path below `target`, and what is free there.

    Errors that are not about writing the target come back as they are.
    """
    return _told(error, target, target, 0)


def remove(folder: Path) -> None:
    """Remove a folder of ours; killed in the middle, it leaves a staging folder and no half one under the old name.

    Raises:
        OSError: the disk refuses.
    """
    doomed = _beside(_absolute(folder), f"partial-{secrets.token_hex(4)}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Mend what killed runs left in `folder` of any target in it; what another process writes just now is left alone."""
    if not folder.is_dir():
        return
    names = {match[1] for path in folder.iterdir() if (match := _BESIDE.fullmatch(path.name))}
    for name in sorted(names):
        if len(name) < _MOST_OF_NAME:  # a longer one may be cut off
            with contextlib.suppress(BusyError), claimed(folder / name):
                _clean_up(folder / name)


def flush(folder: Path) -> None:
    """Have the disk take every file of a folder, and the folders.

    Raises:
        OSError: it refuses.
    """
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(place, name)
            if not path.is_symlink():
                _sync(path)
        _sync(Path(place))


def _absolute(path: Path) -> Path:
    """Absolute, with links in the folders above resolved but not in the last name, which must be seen as a link."""
    path = Path(os.path.abspath(path))  # noqa: PTH100  Path.resolve would follow the last link
    return path.parent.resolve() / path.name if path.name else path


def _beside(target: Path, ending: str) -> Path:
    """A hidden name in the same folder, shortened so that long names of targets fit the file system's limit."""
    return target.parent / f".{target.name[:_MOST_OF_NAME]}.{ending}"


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make the folders above a target; those that were made are removed again when the body fails."""
    made: list[Path] = []
    try:
        try:
            for parent in reversed([parent for parent in target.parents if not parent.exists()]):
                with contextlib.suppress(FileExistsError):
                    parent.mkdir()
                    made.append(parent)
                    _sync(parent.parent)
        except OSError as error:
            raise _told(error, target, target, 0) from error
        yield
    except BaseException:
        for parent in reversed(made):
            with contextlib.suppress(OSError):  # somebody else uses it by now
                parent.rmdir()
        raise


def _marked_in_use(staging: Path) -> int:
    """Open a staging folder or file and lock it, so that no other run takes it for a leftover."""
    opened = os.open(staging, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # a file system without locks: the random name keeps writers apart
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return opened


def _discard(staging: Path) -> None:
    """Remove a staging folder or file, or what an exchange left in its place; a disk that refuses is no failure."""
    try:
        if staging.is_dir():
            shutil.rmtree(staging)
        else:
            staging.unlink(missing_ok=True)
    except OSError as error:
        console.warn(f"{staging}: cannot be removed ({error.strerror}); the next run that writes here removes it")


def _told(error: OSError, staging: Path, target: Path, num_bytes: int) -> OSError:
    """The error as the user shall read it: with the target's path, and what a full disk lacks.

    Errors that are not about writing the target come back as they are.
    """
    cause = error.__cause__
    number = error.errno or (cause.errno if isinstance(cause, OSError) else None)
    about_disk = number in _DISK_ADVICE
    if isinstance(error, FileError):
        text = str(error)
    elif isinstance(error, FastftError):
        return error
    elif about_disk or str(error.filename or "").startswith(str(target.parent)):
        name = str(error.filename or "")  # a bare one comes from within a folder that is removed
        text = f"cannot write {name if '/' in name else target}: {error.strerror or error}"
    else:
        return error
    text = text.replace(str(staging), str(target))
    if about_disk:
        assert number is not None
        advice = "" if _DISK_ADVICE[number] in text else f"; {_DISK_ADVICE[number]}"
        needed = f"{_readable(num_bytes)} are needed, " if num_bytes else ""
        text += f"{advice}; {needed}{_readable(_free_bytes(target))} are free there"
    if text == str(error):
        return error
    clear = type(error)(text) if isinstance(error, FileError) else FileError(text)
    clear.errno = number
    return clear


@contextmanager
def _disk_errors() -> Iterator[None]:
    """What libraries make of a disk that refuses, as the OSError that it was.

    Those in Rust (safetensors, tokenizers) tell the system's number in the text of an error of their own, or of a plain
    Exception; torch tells none, which comes out as EIO.
    """
    try:
        yield
    except Exception as error:
        text, kind = str(error), type(error)
        if isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
            raise OSError(errno.EIO, "torch could not write all of a file") from error
        found = re.search(r"os error (\d+)", text)
        if found is None or (kind is not Exception and kind.__name__ != "SafetensorError"):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def _readable(num_bytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:,} bytes"


def _free_bytes(place: Path) -> int:
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _leftovers(target: Path) -> Iterator[Path]:
    """Staging folders and files of `target` whose process is dead."""
    prefix = _beside(target, "partial-").name
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        if path.name.startswith(prefix) and not path.is_symlink() and not _is_in_use(path):
            yield path


def _leftover_bytes(target: Path) -> int:
    def size(path: Path) -> int:
        return path.lstat().st_blocks * 512

    with contextlib.suppress(OSError):  # another process removes it just now
        return sum(size(path) + sum(map(size, path.rglob("*"))) for path in _leftovers(target))
    return 0


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


def _clean_up(target: Path) -> None:
    """Mend what a killed run left: put the old target back if it was between two renames, remove staging folders.

    The caller holds the target's lock.
    """
    old = _beside(target, "old")
    if old.is_dir() and not target.exists():
        console.note(f"{target}: an earlier run was killed while it replaced this folder; the old one is put back")
        old.rename(target)
    elif old.is_dir():
        shutil.rmtree(old)
    for path in list(_leftovers(target)):
        console.note(f"{target}: removing what an earlier run left unfinished ({path.name})")
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_in_use(staging: Path) -> bool:
    """Whether a living process holds a staging folder or file; what cannot be asked is taken for held."""
    try:
        if not stat.S_ISDIR(mode := staging.lstat().st_mode) and not stat.S_ISREG(mode):
            return True  # no work of ours
        opened = os.open(staging, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held; or a file system without locks: better a leftover than another's work
        return True
    finally:
        os.close(opened)
    return False


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    except OSError as error:
        # Some network file systems cannot flush a folder; they have nothing to flush.
        if error.errno not in _CANNOT or not path.is_dir():
            raise
    finally:
        os.close(opened)


def _put_in_place(staging: Path, target: Path, *, force: bool) -> None:
    """Rename; when this fails, the target is what it was, and when it ends well, the disk has it."""
    was_there = target.is_dir() and not target.is_symlink()
    if was_there:
        check_target(target, force=force)
        if any(target.iterdir()):
            _exchange(staging, target)
            return
    _rename_to_nothing(staging, target, onto_empty=was_there)

    def undo() -> None:
        target.rename(staging)
        if was_there:
            target.mkdir()

    _undone_unless_synced(target.parent, undo)


def _rename_to_nothing(staging: Path, target: Path, *, onto_empty: bool) -> None:
    """Rename to a name that is free, or that is an empty folder; never onto anything else."""
    try:
        if onto_empty:
            staging.rename(target)  # the system refuses where a file came into it
            return
        try:
            _native.rename_noreplace(staging, target)
        except OSError as error:
            if error.errno not in _CANNOT or os.path.lexists(target):
                raise
            staging.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) and not (
            error.errno in _CANNOT and os.path.lexists(target)
        ):
            raise
        raise FileError(
            f"{target} appeared while it was being made; nothing was replaced, choose another folder"
        ) from None


def _put_file_in_place(partial: Path, path: Path) -> None:
    """As `_put_in_place` for a file; one that is there is replaced."""
    if not path.is_file() or path.is_symlink():
        partial.replace(path)
        _undone_unless_synced(path.parent, lambda: path.rename(partial))
        return
    try:
        _native.rename_exchange(partial, path)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        partial.replace(path)  # the old one is gone, the new one is whole, whatever the disk says from here on
        _sync(path.parent)
        return
    _undone_unless_synced(path.parent, lambda: _native.rename_exchange(partial, path))


def _undone_unless_synced(folder: Path, undo: Callable[[], object]) -> None:
    """Flush a folder after a rename, which is undone when that fails or is stopped.

    So nothing is removed before the disk knows the new one.
    """
    try:
        _sync(folder)
    except BaseException:
        undo()
        raise


def _exchange(staging: Path, target: Path) -> None:
    """Put `staging` in the place of `target`; the old target is then at `staging` or gone."""
    try:
        _native.rename_exchange(staging, target)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        _exchange_in_two_steps(staging, target)
        return
    _undone_unless_synced(target.parent, lambda: _native.rename_exchange(staging, target))


def _exchange_in_two_steps(staging: Path, target: Path) -> None:
    """The same by two renames: a kill between them leaves no target, which `_clean_up` mends."""
    old = _beside(target, "old")
    target.rename(old)
    try:
        staging.rename(target)
        _undone_unless_synced(target.parent, lambda: target.rename(staging))
    except BaseException:
        old.rename(target)
        raise
    _discard(old)
