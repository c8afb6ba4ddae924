"""fastft.data.prepare: from the config's section to samples, and what the report says about them."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastft.config.schema import Data
from fastft.data.prepare import Prepared, prepare
from fastft.errors import DataError, FileError

DEFAULTS: dict[str, Any] = {"max_length": 64, "packing": False}


@pytest.fixture
def tokenizer(byte_tokenizer: Any) -> Any:
    return byte_tokenizer


def prepared(tokenizer: Any, path: Path, rows: list[Any], task: str = "sft", **settings: Any) -> Prepared:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = Data.model_validate({"train": [{"source": str(path)}], **DEFAULTS, **settings})
    return prepare(data, task, tokenizer, seed=0)  # type: ignore[arg-type]


def alpaca(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"instruction": question, "output": answer} for question, answer in pairs]


def shown(tokenizer: Any, prepared: Prepared) -> list[str]:
    return [tokenizer.decode(sample["input_ids"]) for sample in prepared.train]


def test_a_dialogue_becomes_a_sample(tokenizer: Any, tmp_path: Path) -> None:
    result = prepared(tokenizer, tmp_path / "a.jsonl", alpaca(("Hi", "Hello"), ("a", "b")))
    assert shown(tokenizer, result) == ["<u>Hi<e><a>Hello<e>", "<u>a<e><a>b<e>"]
    labels = [[label for label in sample["labels"] if label >= 0] for sample in result.train]
    assert [tokenizer.decode(row) for row in labels] == ["Hello<e>", "b<e>"]
    assert result.chat_template == tokenizer.chat_template
    report = result.report
    assert (report.train.documents, report.train.tokens, report.train.learned_tokens) == (2, 11 + 6, 6 + 2)
    assert report.lines() == [
        "train data: 2 samples",
        f"  {tmp_path / 'a.jsonl'}",
        "    rows: 2, format alpaca (recognised)",
        "  tokens: 17, learned: 8 (47%), longest sample: 11",
    ]


def test_long_dialogues_are_cut_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = alpaca(("a", "b"), ("c", "x" * 20), ("d" * 20, "e"))
    result = prepared(tokenizer, tmp_path / "a.jsonl", rows, max_length=10)
    assert shown(tokenizer, result) == ["<u>a<e><a>b<e>", "<u>c<e><a>xxxxxx"]
    part = result.report.train
    # The second loses 15 of its 25 tokens; the third is only question within 10 tokens, so nothing is learned.
    assert (part.truncated, part.truncated_tokens, part.not_learned, part.longest) == (2, 15 + 15, 1, 25)
    assert "  samples cut off at max_length (10 tokens): 2, tokens lost: 30" in result.report.lines()
    assert "  samples dropped because no token in them is learned: 1" in result.report.lines()


def test_texts_end_with_eos_and_are_split(tokenizer: Any, tmp_path: Path) -> None:
    result = prepared(tokenizer, tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "x" * 20}], "pretrain", max_length=8)
    assert shown(tokenizer, result) == ["abc<e>", "x" * 8, "x" * 8, "xxxx<e>"]
    assert [sample["labels"][0] for sample in result.train] == [-100] * 4
    assert result.report.train.learned_tokens == 3 + 7 + 7 + 4
    assert result.report.train.split == 1
    assert result.chat_template is None


def test_a_last_piece_of_one_token_teaches_nothing(tokenizer: Any, tmp_path: Path) -> None:
    result = prepared(tokenizer, tmp_path / "a.jsonl", [{"text": "x" * 8}], "pretrain", max_length=8)
    assert shown(tokenizer, result) == ["x" * 8]
    assert result.report.train.not_learned == 1


def test_dialogues_in_pretraining_are_learned_whole(tokenizer: Any, tmp_path: Path) -> None:
    result = prepared(tokenizer, tmp_path / "a.jsonl", alpaca(("Hi", "Yo")), "pretrain")
    assert shown(tokenizer, result) == ["<u>Hi<e><a>Yo<e>"]
    assert result.train[0]["labels"] == [-100, *result.train[0]["input_ids"][1:]]


def test_packing_joins_samples(tokenizer: Any, tmp_path: Path) -> None:
    rows = alpaca(*((str(i), "y" * i) for i in range(1, 9)))  # 5 + i tokens each
    alone = prepared(tokenizer, tmp_path / "a.jsonl", rows, max_length=20)
    packed = prepared(tokenizer, tmp_path / "a.jsonl", rows, max_length=20, packing=True)
    assert len(packed.train) < len(alone.train) == 8
    assert packed.train.num_tokens == alone.train.num_tokens == 8 * 5 + 36
    assert packed.train.num_learned_tokens == alone.train.num_learned_tokens
    assert max(packed.train.lengths()) <= 20
    documents = [text for row in shown(tokenizer, packed) for text in row.replace("<u>", "|<u>").split("|") if text]
    assert sorted(documents) == sorted(shown(tokenizer, alone))
    assert packed.report.efficiency == pytest.approx(76 / (len(packed.train) * 20))
    again = prepared(tokenizer, tmp_path / "a.jsonl", rows, max_length=20, packing=True)
    assert list(again.train) == list(packed.train)


def test_eval_rows_are_held_back(tokenizer: Any, tmp_path: Path) -> None:
    rows = alpaca(*((f"q{i}", f"a{i}") for i in range(20)))
    result = prepared(tokenizer, tmp_path / "a.jsonl", rows, eval_rows=5)
    assert result.eval is not None
    held = {tokenizer.decode(sample["input_ids"]) for sample in result.eval}
    kept = set(shown(tokenizer, result))
    assert (len(held), len(kept), len(held & kept)) == (5, 15, 0)
    assert "  held back from the train data: 5" in result.report.lines()
    again = prepared(tokenizer, tmp_path / "a.jsonl", rows, eval_rows=5)
    assert again.eval is not None
    assert {tokenizer.decode(sample["input_ids"]) for sample in again.eval} == held
    with pytest.raises(DataError, match="eval_rows is 20, but there are only 20 samples"):
        prepared(tokenizer, tmp_path / "a.jsonl", rows, eval_rows=20)


def test_eval_sources_are_read(tokenizer: Any, tmp_path: Path) -> None:
    other = tmp_path / "eval.jsonl"
    other.write_text(json.dumps({"query": "q", "response": "r"}), encoding="utf-8")
    result = prepared(
        tokenizer, tmp_path / "a.jsonl", alpaca(("a", "b")), eval=[{"source": str(other)}], eval_rows=1, packing=True
    )
    assert result.eval is not None
    assert tokenizer.decode(result.eval[0]["input_ids"]) == "<u>q<e><a>r<e>"
    assert len(result.train) == 1


def test_a_bad_row_stops_with_its_place_or_is_counted(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [*alpaca(("a", "b")), {"instruction": "c", "output": 7}, *alpaca(("d", ""), ("e", ""))]
    with pytest.raises(
        DataError, match=r"a\.jsonl:2: output is a int, not text; mend the row, or set on_bad_row: skip"
    ):
        prepared(tokenizer, path, rows)
    result = prepared(tokenizer, path, rows, on_bad_row="skip")
    assert shown(tokenizer, result) == ["<u>a<e><a>b<e>"]
    source = result.report.train.sources[0]
    assert source.rows == 4
    assert source.skipped == {"output is a int, not text": 1, "turn 2: the assistant's text is empty": 2}
    text = "\n".join(result.report.lines())
    assert "rows left out: 2, turn 2: the assistant's text is empty" in text
    assert f"(first:\n      {path}:3)" in text or f"(first: {path}:3)" in text


def test_what_the_template_refuses_is_a_bad_row(tokenizer: Any, tmp_path: Path) -> None:
    own = tokenizer.chat_template
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + own
    try:
        rows = [*alpaca(("a", "b")), {"instruction": "c", "output": "d", "system": "S"}]
        with pytest.raises(DataError, match=r"a\.jsonl:2: the chat template refuses the dialogue: no system"):
            prepared(tokenizer, tmp_path / "a.jsonl", rows)
        assert len(prepared(tokenizer, tmp_path / "a.jsonl", rows, on_bad_row="skip").train) == 1
    finally:
        tokenizer.chat_template = own


def test_nothing_left_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing is left of the train data: 0 rows read"):
        prepared(tokenizer, tmp_path / "a.jsonl", [])
    with pytest.raises(DataError, match="1 rows read, 0 could not be read, 1 have nothing to learn"):
        prepared(tokenizer, tmp_path / "a.jsonl", alpaca(("long question" * 9, "b")), max_length=8)
    with pytest.raises(DataError, match="2 rows read, 2 could not be read"):
        prepared(tokenizer, tmp_path / "a.jsonl", alpaca(("a", ""), ("", "b")), on_bad_row="skip")
    with pytest.raises(FileError, match="no such file"):
        prepare(Data.model_validate({"train": [{"source": str(tmp_path / "none.jsonl")}]}), "sft", tokenizer, 0)


def test_sources_are_joined_and_may_be_limited(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        rows = alpaca(*((f"{name}{i}", "x") for i in range(30)))
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "aa.jsonl").touch()
    other = tmp_path / "c.json"
    other.write_text(json.dumps([{"conversation": [{"input": "c", "output": "x"}]}]), encoding="utf-8")
    sources = [{"source": str(folder), "max_rows": 40}, {"source": str(other), "system": "S"}]
    data = Data.model_validate({"train": sources, **DEFAULTS})
    result = prepare(data, "sft", tokenizer, 0)
    texts = shown(tokenizer, result)
    assert texts == [f"<u>{n}{i}<e><a>x<e>" for n, k in (("a", 30), ("b", 10)) for i in range(k)] + [
        "<a>S<e><u>c<e><a>x<e>"
    ]
    assert [source.rows for source in result.report.train.sources] == [40, 1]
    text = " ".join(" ".join(result.report.lines()).split())
    assert f"{folder} rows: 40 in 2 files, format alpaca (recognised) empty: {folder / 'aa.jsonl'}" in text
    assert str(result.train.places(39)[0]) == f"{folder / 'b.jsonl'}:10"


def test_a_config_format_wins_over_recognition(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"q": "a", "a": "b"}), encoding="utf-8")
    columns = {"user": "<{q}>", "assistant": "{a}"}
    source = {"source": str(path), "format": "columns", "columns": columns}
    result = prepare(Data.model_validate({"train": [source], **DEFAULTS}), "sft", tokenizer, 0)
    assert shown(tokenizer, result) == ["<u><a><e><a>b<e>"]
    assert "    rows: 1, format columns" in result.report.lines()


def test_no_template_and_no_eos_are_clear_errors(tokenizer: Any, tmp_path: Path) -> None:
    from copy import deepcopy

    bare = deepcopy(tokenizer)
    bare.chat_template, bare.eos_token = None, None
    with pytest.raises(DataError, match=r"has none; set model\.chat_template"):
        prepared(bare, tmp_path / "a.jsonl", alpaca(("a", "b")))
    with pytest.raises(DataError, match="the tokenizer has no eos token"):
        prepared(bare, tmp_path / "a.jsonl", [{"text": "a"}], "pretrain")
    bare.eos_token = "<e>"
    data = Data.model_validate({"train": [{"source": str(tmp_path / "b.jsonl")}], **DEFAULTS})
    (tmp_path / "b.jsonl").write_text(json.dumps(alpaca(("a", "b"))[0]), encoding="utf-8")
    assert prepare(data, "sft", bare, 0, chat_template=tokenizer.chat_template).chat_template == tokenizer.chat_template


def test_a_template_that_ends_no_turn_gets_eos_or_a_warning(tokenizer: Any, tmp_path: Path) -> None:
    own = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    try:
        result = prepared(tokenizer, tmp_path / "a.jsonl", alpaca(("a", "b")))
        assert shown(tokenizer, result) == ["user: a\nassistant: b\n<e>"]
        assert "    the chat template ends no turn; <e> is put behind the last answer" in result.report.lines()
        tokenizer.eos_token = None
        lines = prepared(tokenizer, tmp_path / "a.jsonl", alpaca(("a", "b"))).report.lines()
    finally:
        tokenizer.chat_template, tokenizer.eos_token = own, "<e>"
    assert any(line.startswith("  warning: the chat template ends no turn") for line in lines)
    assert all(len(line) <= 80 for line in lines if str(tmp_path) not in line)


def test_texts_are_what_the_tokenizer_gives(shared_data: Path) -> None:
    """Documents of the real c4 file: ids of `tokenizer(text)` (with its bos), and eos."""
    from transformers import AutoTokenizer

    real = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "internlm2")
    path = shared_data / "pretrain" / "c4_demo.jsonl"
    data = Data.model_validate({"train": [{"source": str(path), "max_rows": 20}], "max_length": 8192, "packing": False})
    result = prepare(data, "pretrain", real, 0)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:20]]
    assert [sample["input_ids"] for sample in result.train] == [
        [*real(row["text"])["input_ids"], real.eos_token_id] for row in rows
    ]
