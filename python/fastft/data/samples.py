"""The samples of a data set: flat arrays of tokens, cut into documents, joined into rows.

Made by `prepare`; read by the trainer (through `collate`) and by `preview`. The arrays lie in memory (5 bytes per token and
40 per document), or in files of `store` that are mapped, so that a data set may be larger than the memory. Which
documents a row holds is a list of numbers: mixing, packing and shuffling move no tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NotRequired, TypedDict, overload

import numpy as np
import numpy.typing as npt

from fastft.data.dialogue import PlacedImage, Where

# The label of a token that the loss does not count (torch's cross entropy ignores it by default).
NOT_LEARNED = -100

# What a document is to a preference task; the documents of a pair stand side by side, the chosen one first.
PLAIN, CHOSEN, REJECTED, GOOD, BAD = range(5)

# Tokens that are looked through together.
TOKENS_AT_ONCE = 1 << 20

Numbers = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class Sample(TypedDict):
    """One row as the collator takes it; three lists of the same length."""

    input_ids: list[int]
    labels: list[int]  # the token itself, or NOT_LEARNED; not shifted
    position_ids: list[int]  # starts again at 0 with each document of a packed row
    images: NotRequired[list[PlacedImage]]  # in the order of their tokens; not there without images


class PairSample(TypedDict):
    """The two answers to one prompt; each sample is prompt and answer, and only the answer is learned."""

    chosen: Sample
    rejected: Sample


class Places(Sequence[Where]):
    """Where each document came from, in 12 bytes each.

    Args:
        files: name and unit of the files.
        file: number of the file of each document; int32 [documents].
        number: line or row in it; int64 [documents].
    """

    def __init__(
        self, files: Sequence[tuple[str, Literal["line", "row"]]], file: npt.NDArray[np.int32], number: Numbers
    ) -> None:
        self.files = tuple(files)
        self.file = file
        self.number = number

    @classmethod
    def of(cls, places: Iterable[Where]) -> "Places":
        """The same places, stored."""
        files: dict[tuple[str, Literal["line", "row"]], int] = {}
        pairs = [(files.setdefault((place.file, place.unit), len(files)), place.number) for place in places]
        table = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
        return cls(tuple(files), table[:, 0].astype(np.int32), table[:, 1].copy())

    def __len__(self) -> int:
        return len(self.number)

    @overload
    def __getitem__(self, index: int) -> Where: ...
    @overload
    def __getitem__(self, index: slice) -> "Places": ...
    def __getitem__(self, index: int | slice) -> "Where | Places":
        if isinstance(index, slice):
            return Places(self.files, self.file[index], self.number[index])
        name, unit = self.files[int(self.file[index])]
        return Where(name, int(self.number[index]), unit)


@dataclass(frozen=True, slots=True)
class Documents:
    """Tokenised dialogues or texts, in flat arrays."""

    ids: Ids  # [tokens]
    learned: Mask  # [tokens]
    starts: Numbers  # [documents + 1]
    places: Sequence[Where]  # [documents]
    digests: npt.NDArray[np.uint64] | None = (
        None  # [documents]: of the ids before they were cut; equal ids, equal digest
    )
    kinds: npt.NDArray[np.uint8] | None = None  # [documents]: PLAIN to BAD; None is all PLAIN
    images: Mapping[int, tuple[PlacedImage, ...]] = field(default_factory=dict)  # by document; only those that have any

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Numbers:
        """Tokens per document; int64 [documents]."""
        return np.diff(self.starts)

    def document(self, index: int) -> tuple[Ids, Mask]:
        """Ids and mask of one document."""
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.ids[part], self.learned[part]

    def count(self, counted: Callable[[slice], Mask]) -> Numbers:
        """How many of each document's tokens are true in `counted`; int64 [documents].

        Args:
            counted: bool for each token of a stretch. It is asked for one stretch after the other: the tokens of a
                source may be more than the memory holds.
        """
        found = np.zeros(len(self), dtype=np.int64)
        first = 0
        while first < len(self):
            limit = int(self.starts[first]) + TOKENS_AT_ONCE
            end = max(int(np.searchsorted(self.starts, limit, side="right")) - 1, first + 1)
            tokens = slice(int(self.starts[first]), int(self.starts[end]))
            # reduceat gives the element itself for an empty stretch; there is none, `prepare` keeps no empty document.
            found[first:end] = np.add.reduceat(counted(tokens), self.starts[first:end] - tokens.start, dtype=np.int64)
            first = end
        return found

    def learned_counts(self) -> Numbers:
        """Tokens per document whose label counts: learned, and not the first; int64 [documents]."""
        return self.count(lambda tokens: self.learned[tokens]) - self.learned[self.starts[:-1]]

    def take(self, chosen: Sequence[int]) -> "Documents":
        """Only these documents, in this order."""
        parts = [self.document(i) for i in chosen]
        return Documents(
            np.concatenate([np.zeros(0, dtype=np.int32), *(ids for ids, _ in parts)]),
            np.concatenate([np.zeros(0, dtype=np.bool_), *(learned for _, learned in parts)]),
            np.cumsum([0, *(len(ids) for ids, _ in parts)], dtype=np.int64),
            tuple(self.places[i] for i in chosen),
            None if self.digests is None else self.digests[list(chosen)],
            None if self.kinds is None else self.kinds[list(chosen)],
            {new: self.images[old] for new, old in enumerate(chosen) if old in self.images},
        )


class Collection:
    """The documents of several sources, numbered through; their arrays stay where they are.

    Args:
        parts: the documents of each source.
    """

    def __init__(self, parts: Sequence[Documents]) -> None:
        self.parts = tuple(parts)
        # Number of the first document of each part, and of all.
        self.firsts: Numbers = np.cumsum([0, *(len(part) for part in parts)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.firsts[-1])

    @property
    def lengths(self) -> Numbers:
        """Tokens per document; int64 [documents]."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *(part.lengths for part in self.parts)])

    @property
    def kinds(self) -> npt.NDArray[np.uint8]:
        """What each document is; uint8 [documents]."""
        kinds = [np.full(len(p), PLAIN, dtype=np.uint8) if p.kinds is None else p.kinds for p in self.parts]
        return np.concatenate([np.zeros(0, dtype=np.uint8), *kinds])

    def digests(self) -> npt.NDArray[np.uint64]:
        """Digest of each document; uint64 [documents].

        Raises:
            AssertionError: a part was made without digests.
        """
        digests = [part.digests for part in self.parts]
        assert all(d is not None for d in digests)
        return np.concatenate([np.zeros(0, dtype=np.uint64), *(d for d in digests if d is not None)])

    def learned_counts(self) -> Numbers:
        """Tokens per document whose label counts; int64 [documents]."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *(part.learned_counts() for part in self.parts)])

    def document(self, index: int) -> tuple[Ids, Mask]:
        """Ids and mask of one document."""
        part, inside = self._find(index)
        return self.parts[part].document(inside)

    def images(self, index: int) -> tuple[PlacedImage, ...]:
        """The images of one document, placed among its tokens."""
        part, inside = self._find(index)
        return self.parts[part].images.get(inside, ())

    @property
    def all_have_images(self) -> bool:
        """Whether no document is text alone."""
        return all(len(part.images) == len(part) for part in self.parts)

    def place(self, index: int) -> Where:
        """Where a document came from."""
        part, inside = self._find(index)
        return self.parts[part].places[inside]

    def _find(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.firsts, index, side="right")) - 1
        return part, index - int(self.firsts[part])


class Samples(Sequence[Sample]):
    """Rows of one or more documents; rows are fixed for a run, their order is the trainer's affair.

    Args:
        documents: what the rows are made of.
        row_starts: place in `order` of the first document of each row, and the length of `order`; int64 [rows + 1].
        order: the documents' numbers as they stand in the rows, some perhaps twice and some never; None is each once.
    """

    def __init__(self, documents: Documents | Collection, row_starts: Numbers, order: Numbers | None = None) -> None:
        self.collection = documents if isinstance(documents, Collection) else Collection([documents])
        self.row_starts = row_starts
        self.order: Numbers = np.arange(len(documents), dtype=np.int64) if order is None else order
        self._tokens_before: Numbers = np.concatenate([[0], np.cumsum(self.collection.lengths[self.order])])

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        sample: Sample = {"input_ids": [], "labels": [], "position_ids": []}
        images: list[PlacedImage] = []
        for number in self.numbers(index):
            before = len(sample["input_ids"])
            images += [replace(image, start=image.start + before) for image in self.collection.images(number)]
            ids, learned = self.collection.document(number)
            labels = np.where(learned, ids, NOT_LEARNED)
            # The first token of a document would be predicted from the last one of its neighbour.
            labels[:1] = NOT_LEARNED
            sample["input_ids"] += ids.tolist()
            sample["labels"] += labels.tolist()
            sample["position_ids"] += range(len(ids))
        if images:
            sample["images"] = images
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def numbers(self, index: int) -> list[int]:
        """Numbers of the documents of a row.

        Raises:
            IndexError: there is no such row.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        return [int(number) for number in self.order[self.row_starts[index] : self.row_starts[index + 1]]]

    def places(self, index: int) -> tuple[Where, ...]:
        """Where the documents of a row came from."""
        return tuple(self.collection.place(number) for number in self.numbers(index))

    def lengths(self) -> Numbers:
        """Tokens per row; int64 [rows]."""
        return np.diff(self._tokens_before[self.row_starts])

    @property
    def num_documents(self) -> int:
        """Documents in all rows; one that stands in two rows counts twice."""
        return len(self.order)

    @property
    def num_tokens(self) -> int:
        """All tokens of all rows."""
        return int(self._tokens_before[-1])

    @property
    def num_learned_tokens(self) -> int:
        """Tokens whose label counts: learned, and not the first of their document."""
        return int(self.collection.learned_counts()[self.order].sum())


class Pairs(Sequence[PairSample]):
    """What a preference task compares; `samples` holds the chosen and the rejected document of each pair in turn."""

    def __init__(self, samples: Samples) -> None:
        assert len(samples) % 2 == 0
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples) // 2

    @overload
    def __getitem__(self, index: int) -> PairSample: ...
    @overload
    def __getitem__(self, index: slice) -> list[PairSample]: ...
    def __getitem__(self, index: int | slice) -> PairSample | list[PairSample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        index %= len(self)
        return {"chosen": self.samples[2 * index], "rejected": self.samples[2 * index + 1]}
