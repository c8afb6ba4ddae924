"""Opening a file that comes from outside: what is no regular file is refused instead of waited for."""

import io
import os
import stat
from pathlib import Path

from fastft.errors import FileError


def opened(path: Path | str, called: object = None) -> io.BufferedReader:
    """The file, open for reading.

    Args:
        path: where it lies.
        called: what the error calls it; None: its path.

    Raises:
        FileError: a FIFO, which would keep us waiting for ever, a device or a folder.
        OSError: it cannot be opened.
    """
    # What was opened is what is asked: the name may lead elsewhere a moment later.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileError(f"{path if called is None else called}: not a regular file")
    return os.fdopen(descriptor, "rb")
