"""Images that rows hold themselves, out of the memory: a data set of a hub has hundreds of gigabytes of them.

The bytes are appended to a file without a name, which is gone with the process, and read back when a step needs them.
"""

import hashlib
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from fastft.data.dialogue import ImageRef
from fastft.errors import FileError


class Spool:
    """Keeps bytes of images on the disk.

    Args:
        folder: where the file lies; None: where the system keeps temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._file: int | None = None
        self._size = 0

    def keep(self, ref: ImageRef) -> ImageRef:
        """The same image without its bytes, which `content` gives back.

        Raises:
            FileError: the disk is full.
        """
        if ref.content is None:
            return ref
        try:
            if self._file is None:
                self._file = self._opened()
            written = 0
            while written < len(ref.content):
                written += os.pwrite(self._file, memoryview(ref.content)[written:], self._size + written)
        except OSError as error:
            raise FileError(
                f"images of the data: cannot be kept in {self.folder or tempfile.gettempdir()} ({error.strerror or error}); "
                "make room there, or set data.cache to a folder on another disk"
            ) from error
        place = (self._size, len(ref.content))
        self._size += len(ref.content)
        digest = hashlib.blake2b(ref.content, digest_size=8).hexdigest()
        return replace(ref, content=None, stored=place, digest=digest)

    def content(self, ref: ImageRef) -> ImageRef:
        """The image with its bytes again."""
        if ref.stored is None:
            return ref
        assert self._file is not None
        offset, length = ref.stored
        read = b""
        while len(read) < length:
            piece = os.pread(self._file, length - len(read), offset + len(read))
            if not piece:
                raise FileError(f"image {ref.name}: what was kept of it is gone")
            read += piece
        return replace(ref, content=read, stored=None)

    def _opened(self) -> int:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            return os.dup(file.fileno())

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)
