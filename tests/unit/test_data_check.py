"""fastft.data.check: every count of `check-dataset` against rows counted by hand, and the limits of data.check."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastft.config.schema import Data
from fastft.data import check
from fastft.data.prepare import Prepared, prepare
from fastft.errors import DataError

# Bytes as tokens (see byte_tokenizer), so "<u>" + question + "<e>" + "<a>" + answer + "<e>" has 4 tokens and the letters.
ROWS: list[Any] = [
    {"instruction": "a", "output": "b"},  # 6 tokens
    {"instruction": "c", "output": "d" * 10},  # 15
    {"instruction": "a", "output": "b"},  # 6, as the first
    {"instruction": "e" * 30, "output": "f"},  # 35: cut to 20, and only question is left
    {"instruction": "g", "output": "h" * 20},  # 25: cut to 20, its end is lost
    {"instruction": "", "output": "i"},  # unreadable
    {"instruction": "j", "output": ""},  # unreadable
    {
        "messages": [
            {"role": "user", "content": "k"},
            {"role": "user", "content": "l"},
            {"role": "assistant", "content": "m"},
        ]
    },  # 9, with a turn that nobody answers
]


def prepared(tokenizer: Any, folder: Path, rows: list[Any] = ROWS, **settings: Any) -> tuple[Prepared, Data]:
    sources = []
    for number, name in enumerate(("instruction", "messages")):
        path = folder / f"{number}.jsonl"
        chosen = [row for row in rows if name in row]
        path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        sources += [{"source": str(path)}] if chosen else []
    data = Data.model_validate({"train": sources, "max_length": 20, "cache": None, **settings})
    return prepare(data, "sft", tokenizer, seed=0, batch_size=2, keep_going=True), data


def in_one_line(text: str) -> str:
    """Without the line ends that keep the report narrow."""
    return " ".join(text.split())


def test_every_count_is_the_one_made_by_hand(byte_tokenizer: Any, tmp_path: Path) -> None:
    result, data = prepared(byte_tokenizer, tmp_path, packing=False)
    part, (first, second) = result.report.train, result.report.train.sources
    assert [(source.rows, source.samples, source.files[0].format) for source in (first, second)] == [
        (7, 4, "alpaca"),
        (1, 1, "messages"),
    ]
    assert first.skipped == {"turn 1: the user's text is empty": 1, "turn 2: the assistant's text is empty": 1}
    assert part.lengths == {6: 2, 15: 1, 35: 1, 25: 1, 9: 1}
    assert (part.truncated, part.truncated_tokens, part.not_learned, part.unanswered) == (2, 15 + 5, 1, 1)
    assert str(part.first("truncated")) == f"{tmp_path / '0.jsonl'}:4"
    assert part.duplicates == 1
    assert [str(place) for place in part.first_duplicate or ()] == [
        f"{tmp_path / '0.jsonl'}:3",
        f"{tmp_path / '0.jsonl'}:1",
    ]
    assert (part.documents, part.distinct, part.tokens, part.stops) == (5, 5, 6 + 15 + 6 + 20 + 9, 4)
    # Learned: the answer and <e>, but of the one that is cut only the 16 letters that are left.
    assert part.learned_tokens == 2 + 11 + 2 + 16 + 2
    told = check.lines(result.report, data, 2)
    assert all(len(line) <= 80 for line in told if str(tmp_path) not in line)
    text = "\n".join(told).replace(f"{tmp_path}/", "")
    for line in (
        "  rows that cannot be read: 2",
        "  cut off at max_length: 2 (first: 0.jsonl:4)",
        "  all masked, dropped: 1 (first: 0.jsonl:4)",
        "  with a user's turn that nobody answers: 1 (first: 1.jsonl:1)",
        "  tokens lost by cutting: 20, 10 from each",
        "  the end of a turn is learned in: 4 of 5",
        "     1 - 16          4  ################################",
        "    17 - 20          0",
        "    21 - 32          1  ########  cut off",
        "    33 - 64          1  ########  cut off",
        "    half have at most 9, nine of ten 35, 99 of 100 35, longest 35",
        "  tokens: 56, learned: 33",
    ):
        assert in_one_line(line) in in_one_line(text)


def test_packing_is_compared_with_padding(byte_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b" * length} for length in (5, 5, 5, 5)]  # 10 tokens each, two to a row
    result, data = prepared(byte_tokenizer, tmp_path, rows)
    assert in_one_line("\n".join(check.lines(result.report, data, 2))).endswith(
        "an epoch: tokens: 40, learned: 24 "
        "without packing: 4 rows, batches of 2, 40 tokens with padding, filled to 100.0% "
        "with packing: 2 rows of 20, 40 tokens with padding, filled to 100.0%"
    )
    # Lengths 10 and 6 in one batch: 4 of 20 places are padding.
    result, data = prepared(byte_tokenizer, tmp_path, [rows[0], {"instruction": "a", "output": "b"}])
    assert result.report.train.padded_tokens == 20
    assert "20 tokens with padding, filled to 80.0%" in in_one_line("\n".join(check.lines(result.report, data, 2)))


@pytest.mark.parametrize(
    ("limits", "phrase"),
    [
        ({"min_samples": 6}, "5 samples to learn from; check.min_samples is 6"),
        ({"max_bad_rows": 0.2}, "2 of 8 rows cannot be read (25.0%); check.max_bad_rows is 20.0%"),
        ({"max_truncated": 0.3}, "2 of 6 samples are cut off (33.3%); check.max_truncated is 30.0%"),
        ({"max_not_learned": 0}, "1 of 6 samples have no learned token (16.7%); check.max_not_learned is 0.0%"),
        ({"max_duplicates": 0.1}, "1 of 5 samples repeat an earlier one (20.0%); check.max_duplicates is 10.0%"),
        ({"max_unanswered": 0.1}, "1 of 6 samples have a turn without answer (16.7%); check.max_unanswered is 10.0%"),
        ({"min_stops": 0.9}, "the end of a turn is learned in 4 of 5 samples; check.min_stops is 90.0%"),
    ],
)
def test_a_limit_that_is_not_kept_is_named(
    byte_tokenizer: Any, tmp_path: Path, limits: dict[str, Any], phrase: str
) -> None:
    result, data = prepared(byte_tokenizer, tmp_path, packing=False, check=limits)
    assert check.problems(result.report, data) == [phrase]
    with pytest.raises(DataError, match="mend the data, or the limits in data.check") as caught:
        check.require(result.report, data)
    assert phrase in str(caught.value)


def test_limits_that_are_just_kept(byte_tokenizer: Any, tmp_path: Path) -> None:
    limits = {
        "min_samples": 5,
        "max_bad_rows": 0.25,
        "max_truncated": 0.34,
        "max_not_learned": 0.17,
        "max_duplicates": 0.2,
        "max_unanswered": 0.17,
        "min_stops": 0.8,
        "min_filled": 0.5,
    }
    result, data = prepared(byte_tokenizer, tmp_path, check=limits)
    assert check.problems(result.report, data) == []
    check.require(result.report, data)


def test_poorly_filled_rows(byte_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": letter * 9} for letter in "bc"]  # 14 tokens: only one fits into a row of 20
    result, data = prepared(byte_tokenizer, tmp_path, rows, check={"min_filled": 0.8})
    assert check.problems(result.report, data) == ["packed rows are filled to 70.0%; check.min_filled is 80.0%"]


def test_eval_rows_that_stand_in_the_train_data(byte_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(ROWS[i]) + "\n" for i in (0, 1)) + '{"prompt": "new", "completion": "b"}\n')
    result, data = prepared(byte_tokenizer, tmp_path, eval=[{"source": str(path)}], check={"max_eval_in_train": 0.5})
    assert result.report.eval is not None
    assert result.report.eval.in_train == 2
    assert check.problems(result.report, data) == [
        "2 of 3 eval samples stand in the train data too (66.7%); check.max_eval_in_train is 50.0%"
    ]
    assert "  stand in the train data too: 2" in check.lines(result.report, data, 1)


def test_real_duplicates(byte_tokenizer: Any, shared_data: Path) -> None:
    """Of the Alpaca file, counted from its JSON: rows whose question, input and answer all stood before."""
    path = shared_data / "instruction/alpaca/alpaca_en_demo.json"
    rows = [(r["instruction"], r["input"], r["output"]) for r in json.loads(path.read_text(encoding="utf-8"))]
    data = Data.model_validate({"train": [{"source": str(path)}], "max_length": 100_000, "packing": False})
    part = prepare(data, "sft", byte_tokenizer, seed=0).report.train
    assert part.duplicates == len(rows) - len(set(rows))
