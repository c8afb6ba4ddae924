"""The run folder: what lies in it, and whether a run may start there.

adapter/ or model/ (the result), checkpoint-N/, config.yaml, metrics.jsonl, samples.jsonl, loss.png, report.html,
log.txt, fastft_training.json.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fastft import publish
from fastft.errors import BusyError, FileError

RESULTS = ("adapter", "model")
# Less than this and not even the files of a tiny run fit.
_LEAST_FREE_BYTES = 50_000_000


@contextmanager
def held(run_dir: Path, *, resume: bool) -> Iterator[None]:
    """`prepare` the folder, and keep other trainings out of it meanwhile.

    Raises:
        BusyError: another process trains there.
        FileError: see `prepare`.
    """
    prepare(run_dir, resume=resume)
    with ExitStack() as stack:
        try:
            stack.enter_context(publish.claimed(run_dir / "run"))
        except BusyError:
            raise BusyError(
                f"run folder {run_dir}: another process trains there; wait until it is done, or choose another --work-dir"
            ) from None
        prepare(run_dir, resume=resume)  # the one before us may have ended in between
        yield


def prepare(run_dir: Path, *, resume: bool) -> None:
    """Make the folder and see that it can be written and holds no other run.

    Raises:
        FileError: it cannot be made or written, the disk is full, or it holds a run and `resume` is False.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise FileError(f"run folder {run_dir}: this is a file; choose another --work-dir")
    if not resume:
        _refuse_a_run(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # A file, because os.access says yes to root and on some network disks that then refuse. It has no name, so
        # that nothing can be left of it.
        with tempfile.TemporaryFile(dir=run_dir):
            pass
        free = shutil.disk_usage(run_dir).free
    except OSError as cause:
        raise FileError(
            f"run folder {run_dir}: cannot be written: {cause.strerror}; choose another --work-dir"
        ) from cause
    if free < _LEAST_FREE_BYTES:
        raise FileError(
            f"run folder {run_dir}: {free / 1e6:.0f} MB are free on that disk, at least "
            f"{_LEAST_FREE_BYTES / 1e6:.0f} MB are needed; free some or choose another --work-dir"
        )


def require_space(run_dir: Path, checkpoint_bytes: int, keep: int) -> None:
    """See that the checkpoints that stay, the one being written and the result fit on the disk.

    Raises:
        FileError: they do not, with both numbers.
    """
    needed = checkpoint_bytes * (keep + 2)
    free = shutil.disk_usage(run_dir).free
    if needed > free:
        raise FileError(
            f"run folder {run_dir}: {keep} checkpoints, one being written and the result need about "
            f"{needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; lower output.keep, or choose another --work-dir"
        )


def _refuse_a_run(run_dir: Path) -> None:
    if not run_dir.is_dir():
        return
    finished = [name for name in RESULTS if (run_dir / name).exists()]
    unfinished = sorted(f.name for f in run_dir.glob("checkpoint-*"))
    if not finished and not unfinished and not (run_dir / "metrics.jsonl").exists():
        return
    what = f"a finished run ({finished[0]}/)" if finished else "an unfinished run"
    go_on = "--resume auto goes on with it" if not finished else "--resume auto goes on with it if it shall run longer"
    raise FileError(
        f"run folder {os.fspath(run_dir)}: it holds {what}; {go_on}, another --work-dir starts anew beside it"
    )
