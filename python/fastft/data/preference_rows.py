"""The rows of tasks dpo, orpo, reward and kto as a trainer takes them, and the batches made of them.

From the samples of `prepare`, where the documents of a pair stand side by side. A row holds two samples: the chosen and
the rejected answer; or, for kto, the judged answer and the answer of another row to this row's question.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from fastft.config.schema import Task
from fastft.data.collate import Collator
from fastft.data.formats import PAIR_TASKS
from fastft.data.samples import GOOD, NOT_LEARNED, Sample, Samples
from fastft.errors import DataError

if TYPE_CHECKING:
    import torch


class Row(NamedTuple):
    """Two samples that are looked at together."""

    number: int
    first: Sample
    second: Sample
    good: bool  # kto: what somebody called the first; else True


class Rows(Sequence[Row]):
    """The rows of a preference task.

    Args:
        samples: one document each.
        task: dpo, orpo, reward or kto.
        max_length: longest sample in tokens.
        seed: kto: chooses whose answer is put to which question.

    Raises:
        DataError: kto with a single row, which has no other.
    """

    def __init__(self, samples: Samples, task: Task, *, max_length: int, seed: int) -> None:
        self.samples = samples
        self.pairs = task in PAIR_TASKS
        self.max_length = max_length
        if self.pairs:
            return
        if len(samples) < 2:
            raise DataError("data: task kto compares with answers to other questions, and there is only one row")
        # Everyone's other is the next one on a round through all rows.
        round_trip = np.random.default_rng(seed).permutation(len(samples))
        self.others = np.empty(len(samples), dtype=np.int64)
        self.others[round_trip] = np.roll(round_trip, -1)

    def __len__(self) -> int:
        return num_rows(self.samples, pairs=self.pairs)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        if self.pairs:
            return Row(index, self.samples[2 * index], self.samples[2 * index + 1], good=True)
        own = self.samples[index]
        good = bool(self.samples.collection.kinds[self.samples.numbers(index)[0]] == GOOD)
        return Row(index, own, _answered_by(own, self.samples[int(self.others[index])], self.max_length), good)


def num_rows(samples: Samples, *, pairs: bool) -> int:
    """Rows of a preference task: pairs, or judged answers."""
    return len(samples) // 2 if pairs else len(samples)


def _answered_by(asked: Sample, other: Sample, max_length: int) -> Sample:
    """The prompt of one sample with the answer of another, cut to length."""
    start, answer = _answer_start(asked), _answer_start(other)
    ids = (asked["input_ids"][:start] + other["input_ids"][answer:])[:max_length]
    labels = ([NOT_LEARNED] * start + other["labels"][answer:])[:max_length]
    return {"input_ids": ids, "labels": labels, "position_ids": list(range(len(ids)))}


def _answer_start(sample: Sample) -> int:
    return next(place for place, label in enumerate(sample["labels"]) if label != NOT_LEARNED)


class RowCollator:
    """Joins rows into a batch: all first samples, then all second ones.

    Args:
        pad_token_id: as for `Collator`.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.collate = Collator(pad_token_id)

    def __call__(self, rows: Sequence[Row]) -> "dict[str, torch.Tensor]":
        """As `Collator` for 2 B samples; and `rows` int64 [B], `good` bool [B], `last` int64 [2 B], the last tokens' places."""
        import torch

        samples = [row.first for row in rows] + [row.second for row in rows]
        more: dict[str, Any] = {
            "rows": torch.tensor([row.number for row in rows], dtype=torch.int64),
            "good": torch.tensor([row.good for row in rows], dtype=torch.bool),
            "last": torch.tensor([len(sample["input_ids"]) - 1 for sample in samples], dtype=torch.int64),
        }
        return self.collate(samples) | more
