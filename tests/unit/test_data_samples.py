"""fastft.data.samples and collate: documents laid out in rows, rows in tensors."""

import numpy as np
import pytest

from fastft.data.collate import Collator
from fastft.data.dialogue import Where
from fastft.data.samples import Collection, Documents, Pairs, Places, Samples


@pytest.fixture
def samples() -> Samples:
    """Two rows: documents of 3 and 2 tokens, and one of 4."""
    documents = Documents(
        np.arange(10, 19, dtype=np.int32),
        np.asarray([0, 1, 1, 1, 1, 0, 0, 1, 1], dtype=np.bool_),
        np.asarray([0, 3, 5, 9], dtype=np.int64),
        (Where("a.json", 1), Where("a.json", 2), Where("b.jsonl", 7, "line")),
    )
    return Samples(documents, np.asarray([0, 2, 3], dtype=np.int64))


def test_a_row_has_ids_labels_and_positions(samples: Samples) -> None:
    assert len(samples) == 2
    assert samples[0] == {
        "input_ids": [10, 11, 12, 13, 14],
        "labels": [-100, 11, 12, -100, 14],  # 13 is learned, but it is the first of its document
        "position_ids": [0, 1, 2, 0, 1],
    }
    assert samples[-1] == {
        "input_ids": [15, 16, 17, 18],
        "labels": [-100, -100, 17, 18],
        "position_ids": [0, 1, 2, 3],
    }
    assert samples[0:2] == list(samples)
    for index in (2, -3):
        with pytest.raises(IndexError):
            samples[index]


def test_counts_and_places(samples: Samples) -> None:
    assert samples.num_tokens == 9
    assert samples.num_learned_tokens == 5
    assert samples.lengths().tolist() == [5, 4]
    assert [str(place) for place in samples.places(0)] == ["a.json, row 1", "a.json, row 2"]
    assert [str(place) for place in samples.places(1)] == ["b.jsonl:7"]


def test_documents_can_be_taken_in_any_order(samples: Samples) -> None:
    documents = samples.collection.parts[0]
    taken = documents.take([2, 0])
    assert taken.ids.tolist() == [15, 16, 17, 18, 10, 11, 12]
    assert taken.learned.tolist() == [False, False, True, True, False, True, True]
    assert taken.starts.tolist() == [0, 4, 7]
    assert documents.take([]).ids.tolist() == []


def test_rows_may_hold_documents_twice_or_never_and_of_several_sources(samples: Samples) -> None:
    other = Documents(
        np.asarray([1, 2], dtype=np.int32),
        np.asarray([False, True]),
        np.asarray([0, 2], dtype=np.int64),
        Places.of([Where("c.csv", 3, "line")]),
    )
    both = Collection([samples.collection.parts[0], other])
    mixed = Samples(both, np.asarray([0, 2, 4], dtype=np.int64), np.asarray([3, 1, 3, 0], dtype=np.int64))
    assert [row["input_ids"] for row in mixed] == [[1, 2, 13, 14], [1, 2, 10, 11, 12]]
    assert [row["labels"] for row in mixed] == [[-100, 2, -100, 14], [-100, 2, -100, 11, 12]]
    assert [str(place) for place in mixed.places(1)] == ["c.csv:3", "a.json, row 1"]
    assert (mixed.num_documents, mixed.num_tokens, mixed.num_learned_tokens) == (4, 9, 5)
    assert mixed.lengths().tolist() == [4, 5]


def test_pairs_stand_side_by_side(samples: Samples) -> None:
    documents = samples.collection.parts[0].take([0, 1])
    pairs = Pairs(Samples(documents, np.arange(3, dtype=np.int64)))
    assert len(pairs) == 1
    assert pairs[0]["chosen"]["input_ids"] == pairs[-1]["chosen"]["input_ids"] == [10, 11, 12]
    assert pairs[0]["rejected"]["labels"] == [-100, 14]
    with pytest.raises(IndexError):
        pairs[1]


def test_padding_is_a_document_of_its_own(samples: Samples) -> None:
    batch = Collator(pad_token_id=7)(list(samples))
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14], [15, 16, 17, 18, 7]]
    assert batch["labels"].tolist() == [[-100, 11, 12, -100, 14], [-100, -100, 17, 18, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]


def test_flattened_rows_need_no_padding(samples: Samples) -> None:
    batch = Collator(pad_token_id=7, flatten=True)(list(samples))
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14, 15, 16, 17, 18]]
    assert batch["labels"].tolist() == [[-100, 11, 12, -100, 14, -100, -100, 17, 18]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
