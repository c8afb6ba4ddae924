"""Samples to the tensors of a training step. The only module of this room that imports torch.

Rows are padded at the right, and the padding is a document of its own: its positions start again at 0. transformers
finds the borders of documents where `position_ids` do not go up by one, as long as it gets no `attention_mask` and no
cache (so the model must be called with `use_cache=False`); then no token of a sample sees another sample or the
padding, and padding and packing are one mechanism. An attention mask, even one of all ones, would switch that off.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastft.data.samples import NOT_LEARNED, Sample

if TYPE_CHECKING:
    import torch


class Collator:
    """Joins samples into a batch.

    Args:
        pad_token_id: fills up shorter rows; any valid id will do, it is neither seen nor learned.
        flatten: lay all rows into a single one, [1, sum of T], without padding. Flash attention finds documents only
            in batches of one row; with other attention code a batch of rows needs less memory.
    """

    def __init__(self, pad_token_id: int, *, flatten: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.flatten = flatten

    def __call__(self, samples: Sequence[Sample]) -> "dict[str, torch.Tensor]":
        """input_ids, labels, position_ids; each int64 [B, T], T the longest row."""
        import torch

        if self.flatten:
            joined = [
                [token for sample in samples for token in sample["input_ids"]],
                [label for sample in samples for label in sample["labels"]],
                [position for sample in samples for position in sample["position_ids"]],
            ]
            ids, labels, positions = ([row] for row in joined)
        else:
            longest = max(len(sample["input_ids"]) for sample in samples)
            empty = [longest - len(sample["input_ids"]) for sample in samples]
            ids = [s["input_ids"] + [self.pad_token_id] * n for s, n in zip(samples, empty, strict=True)]
            labels = [s["labels"] + [NOT_LEARNED] * n for s, n in zip(samples, empty, strict=True)]
            positions = [s["position_ids"] + list(range(n)) for s, n in zip(samples, empty, strict=True)]
        return {
            "input_ids": torch.tensor(ids, dtype=torch.int64),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "position_ids": torch.tensor(positions, dtype=torch.int64),
        }
