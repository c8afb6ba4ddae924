"""The samples of a data set in memory: one flat array of tokens, cut into documents, joined into rows.

Made by `prepare`; read by the trainer (through `collate`) and by `preview`. 5 bytes per token and 24 per document.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, overload

import numpy as np
import numpy.typing as npt

from fastft.data.dialogue import Where

# The label of a token that the loss does not count (torch's cross entropy ignores it by default).
NOT_LEARNED = -100


class Sample(TypedDict):
    """One row as the collator takes it; three lists of the same length."""

    input_ids: list[int]
    labels: list[int]  # the token itself, or NOT_LEARNED; not shifted
    position_ids: list[int]  # starts again at 0 with each document of a packed row


@dataclass(frozen=True, slots=True)
class Documents:
    """Tokenised dialogues or texts, in flat arrays."""

    ids: npt.NDArray[np.int32]  # [tokens]
    learned: npt.NDArray[np.bool_]  # [tokens]
    starts: npt.NDArray[np.int64]  # [documents + 1]
    places: tuple[Where, ...]  # [documents]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens per document; int64 [documents]."""
        return np.diff(self.starts)

    def take(self, chosen: Sequence[int]) -> "Documents":
        """Only these documents, in this order."""
        parts = [slice(int(self.starts[i]), int(self.starts[i + 1])) for i in chosen]
        empty_ids, empty_learned = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.bool_)
        return Documents(
            np.concatenate([empty_ids, *(self.ids[part] for part in parts)]),
            np.concatenate([empty_learned, *(self.learned[part] for part in parts)]),
            np.cumsum([0, *(part.stop - part.start for part in parts)], dtype=np.int64),
            tuple(self.places[i] for i in chosen),
        )


class Samples(Sequence[Sample]):
    """Rows of one or more documents; rows are fixed for a run, their order is the trainer's affair.

    Args:
        documents: in the order in which they stand in the rows.
        row_starts: number of the first document of each row, and the number of documents; int64 [rows + 1].
    """

    def __init__(self, documents: Documents, row_starts: npt.NDArray[np.int64]) -> None:
        self.documents = documents
        self.row_starts = row_starts

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first, last = self._document_range(index)
        starts = self.documents.starts[first : last + 1]
        ids = self.documents.ids[starts[0] : starts[-1]]
        labels = np.where(self.documents.learned[starts[0] : starts[-1]], ids, NOT_LEARNED)
        # The first token of a document would be predicted from the last one of its neighbour.
        labels[starts[:-1] - starts[0]] = NOT_LEARNED
        positions = np.arange(starts[0], starts[-1]) - np.repeat(starts[:-1], np.diff(starts))
        return {"input_ids": ids.tolist(), "labels": labels.tolist(), "position_ids": positions.tolist()}

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def places(self, index: int) -> tuple[Where, ...]:
        """Where the documents of a row came from."""
        first, last = self._document_range(index)
        return self.documents.places[first:last]

    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens per row; int64 [rows]."""
        return np.diff(self.documents.starts[self.row_starts])

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return len(self.documents.ids)

    @property
    def num_learned_tokens(self) -> int:
        """Tokens whose label counts: learned, and not the first of their document."""
        firsts = self.documents.starts[:-1]
        return int(self.documents.learned.sum() - self.documents.learned[firsts].sum())

    def _document_range(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        return int(self.row_starts[index]), int(self.row_starts[index + 1])
