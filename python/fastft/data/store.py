"""Documents while they are collected: in memory, or in files so that a source may be larger than the memory.

`prepare` adds documents; `Store.documents` gives them back in flat arrays, of files as read-only maps. The files are plain
.npy (no pickle can be in them): ids.npy, learned.npy, starts.npy, digests.npy, kinds.npy, file.npy and number.npy.
"""

import hashlib
from array import array
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import numpy as np
import numpy.typing as npt

from fastft.data.dialogue import PlacedImage, Where
from fastft.data.samples import PLAIN, Documents, Ids, Mask, Places
from fastft.errors import FileError

# Bytes that a header of numpy's format 1.0 takes for an array of one dimension, whatever its length.
NPY_HEADER_BYTES = 128
# What each array is called, and its dtype.
ARRAYS = {
    "ids": np.int32,
    "learned": np.bool_,
    "starts": np.int64,
    "digests": np.uint64,
    "kinds": np.uint8,
    "file": np.int32,
    "number": np.int64,
}


class Store:
    """Collects documents.

    Args:
        folder: where ids and masks are written as they come; None keeps them in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._ids: list[Ids] = []
        self._learned: list[Mask] = []
        self._open: dict[str, BinaryIO] = {}
        if folder is not None:
            for name in ("ids", "learned"):
                self._open[name] = (folder / f"{name}.npy").open("xb")
                self._open[name].write(bytes(NPY_HEADER_BYTES))
        self._starts = array("q", [0])
        self._digests = array("Q")
        self._kinds = array("B")
        self._file = array("i")
        self._number = array("q")
        self._files: dict[tuple[str, Literal["line", "row"]], int] = {}
        # By the document's number; sources with images are not kept in files.
        self._images: dict[int, tuple[PlacedImage, ...]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._open.values():
            stream.close()

    def __len__(self) -> int:
        return len(self._digests)

    def add(
        self,
        ids: Ids,
        learned: Mask,
        where: Where,
        digest: int,
        *,
        kind: int = PLAIN,
        images: tuple[PlacedImage, ...] = (),
    ) -> None:
        """Add a document.

        Args:
            ids: int32 [T], T at least 1.
            learned: bool [T].
            where: the row it came from.
            digest: `digest(ids)` of the ids before they were cut.
            kind: what it is to a preference task.
            images: its images; only in memory.
        """
        if images:
            assert self._folder is None
            self._images[len(self)] = images
        if self._open:
            self._open["ids"].write(np.ascontiguousarray(ids, dtype=np.int32).data)
            self._open["learned"].write(np.ascontiguousarray(learned, dtype=np.bool_).data)
        else:
            self._ids.append(ids)
            self._learned.append(learned)
        self._starts.append(self._starts[-1] + len(ids))
        self._digests.append(digest)
        self._kinds.append(kind)
        self._file.append(self._files.setdefault((where.file, where.unit), len(self._files)))
        self._number.append(where.number)

    @property
    def files(self) -> list[tuple[str, Literal["line", "row"]]]:
        """Names and units of the files that documents came from; `file.npy` counts in it."""
        return list(self._files)

    def documents(self) -> Documents:
        """All that was added; nothing can be added afterwards."""
        if self._folder is None:
            found: dict[str, npt.NDArray[Any]] = {
                "ids": np.concatenate([np.zeros(0, dtype=np.int32), *self._ids]),
                "learned": np.concatenate([np.zeros(0, dtype=np.bool_), *self._learned]),
                **self._small(),
            }
            self._ids.clear()
            self._learned.clear()
            return replace(_documents(found, self.files), images=self._images)
        for name, stream in self._open.items():
            dtype = np.dtype(ARRAYS[name])
            header = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": (self._starts[-1],),
            }
            stream.seek(0)
            np.lib.format.write_array_header_1_0(stream, header)
            assert stream.tell() == NPY_HEADER_BYTES
            stream.close()
        for name, values in self._small().items():
            np.save(self._folder / f"{name}.npy", values, allow_pickle=False)
        return read(self._folder, self.files)

    def _small(self) -> dict[str, npt.NDArray[Any]]:
        values = {
            "starts": self._starts,
            "digests": self._digests,
            "kinds": self._kinds,
            "file": self._file,
            "number": self._number,
        }
        return {name: np.asarray(value, dtype=ARRAYS[name]) for name, value in values.items()}


def read(folder: Path, files: list[tuple[str, Literal["line", "row"]]]) -> Documents:
    """The documents in a folder that a `Store` wrote; ids and masks stay in their files and are mapped.

    Raises:
        FileError: a file is missing, or is not what a `Store` writes.
    """
    found: dict[str, npt.NDArray[Any]] = {}
    for name, dtype in ARRAYS.items():
        path = folder / f"{name}.npy"
        try:
            # A map of nothing is an error for the operating system.
            mapped = name in ("ids", "learned") and path.stat().st_size > NPY_HEADER_BYTES
            values = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise FileError(f"{path}: cannot be read ({error})") from error
        if not isinstance(values, np.ndarray) or values.dtype != dtype or values.ndim != 1:
            raise FileError(f"{path}: not a list of {np.dtype(dtype).name}")
        found[name] = values
    starts, num_documents = found["starts"], len(found["digests"])
    fits = (
        len(starts) == num_documents + 1
        and all(len(found[name]) == num_documents for name in ("kinds", "file", "number"))
        and int(starts[0]) == 0
        and bool((np.diff(starts) > 0).all())
        and int(starts[-1]) == len(found["ids"]) == len(found["learned"])
        and (not num_documents or 0 <= int(found["file"].min()) <= int(found["file"].max()) < len(files))
    )
    if not fits:
        raise FileError(f"{folder}: its arrays do not fit together")
    return _documents(found, files)


def digest(ids: Ids) -> int:
    """64 bits that are equal for equal ids (and for others in one of 10^19 pairs)."""
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


def _documents(found: dict[str, npt.NDArray[Any]], files: list[tuple[str, Literal["line", "row"]]]) -> Documents:
    places = Places(files, found["file"], found["number"])
    return Documents(found["ids"], found["learned"], found["starts"], places, found["digests"], found["kinds"])
