"""fastft.data.mixing and data.train.N.weight: how often each sample stands in an epoch."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.config.schema import Data
from fastft.data.mixing import repeated
from fastft.data.prepare import prepare

NUMBERS = np.asarray([3, 5, 7, 11], dtype=np.int64)


@pytest.mark.parametrize(
    ("weight", "counts"),
    [
        (1.0, [1, 1, 1, 1]),
        (2.0, [2, 2, 2, 2]),
        (0.5, [0, 0, 1, 1]),
        (2.25, [2, 2, 2, 3]),
        (0.01, [0, 0, 0, 1]),  # at least one: a source is never left out in silence
    ],
)
def test_weights(weight: float, counts: list[int]) -> None:
    taken = Counter(repeated(NUMBERS, weight, 0).tolist())
    assert sorted(taken[number] for number in NUMBERS.tolist()) == counts


def test_the_seed_chooses() -> None:
    many = np.arange(1000, dtype=np.int64)
    assert repeated(many, 0.1, 1).tolist() == repeated(many, 0.1, 1).tolist()
    assert repeated(many, 0.1, 1).tolist() != repeated(many, 0.1, 2).tolist()
    assert repeated(np.zeros(0, dtype=np.int64), 3.0, 1).tolist() == []


@given(st.integers(1, 200), st.floats(0.01, 5), st.integers(0, 3))
def test_no_sample_stands_more_than_once_more_than_another(count: int, weight: float, seed: int) -> None:
    taken = Counter(repeated(np.arange(count, dtype=np.int64), weight, seed).tolist())
    times = [taken[number] for number in range(count)]
    assert max(times) - min(times) <= 1
    assert sum(times) == max(round(weight * count), 1)


def test_sources_are_mixed_by_weight(byte_tokenizer: Any, tmp_path: Path) -> None:
    sources = []
    for name, weight in (("a", 2.0), ("b", 0.5), ("c", 1.0)):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"instruction": f"{name}{n}", "output": "x"} for n in range(4)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sources.append({"source": str(path), "weight": weight})
    data = Data.model_validate({"train": sources, "max_length": 64, "packing": False})
    result = prepare(data, "sft", byte_tokenizer, seed=0)
    texts = Counter(byte_tokenizer.decode(sample["input_ids"])[3:5] for sample in result.train)
    assert {text: count for text, count in texts.items() if text[0] == "a"} == {f"a{n}": 2 for n in range(4)}
    assert sorted(count for text, count in texts.items() if text[0] == "b") == [1, 1]
    assert {text: count for text, count in texts.items() if text[0] == "c"} == {f"c{n}": 1 for n in range(4)}
    part = result.report.train
    assert (part.documents, part.distinct, part.duplicates) == (8 + 2 + 4, 4 + 2 + 4, 0)
    assert "    weight 2: 8 from 4 samples" in result.report.lines()
    # What is held back is not in the train part, however large its weight.
    held = prepare(data.model_copy(update={"eval_rows": 3}), "sft", byte_tokenizer, seed=0)
    assert held.eval is not None
    assert held.report.eval is not None
    assert held.report.eval.in_train == 0
    kept = {tuple(sample["input_ids"]) for sample in held.train}
    assert not kept & {tuple(sample["input_ids"]) for sample in held.eval}
