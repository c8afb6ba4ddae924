"""fastft.data.preferences: pairs and judged answers in every dialect, what is learned of them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastft.config.schema import Columns, Data, Task
from fastft.data import check, formats, preview, sources
from fastft.data.dialogue import Dialogue, Judged, Message, Pair, Where
from fastft.data.prepare import Prepared, prepare
from fastft.data.samples import BAD, GOOD
from fastft.errors import ConfigError, DataError

WHERE = Where("rows.json", 1)
SYSTEM, USER = Message("system", "S"), Message("user", "Q")
GOOD_ANSWER, BAD_ANSWER = Message("assistant", "A", learn=True), Message("assistant", "B", learn=True)


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def gpt(*texts: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


# Each dialect of the row: question Q, better answer A, worse answer B.
PAIRS = {
    "trl, texts": {"prompt": "Q", "chosen": "A", "rejected": "B"},
    "trl, messages": {"prompt": said("Q"), "chosen": said("", "A")[1:], "rejected": said("", "B")[1:]},
    "trl, whole dialogues": {"chosen": said("Q", "A"), "rejected": said("Q", "B")},
    "ultrafeedback": {"prompt": "Q", "chosen": said("Q", "A"), "rejected": said("Q", "B"), "score_chosen": 9.0},
    "LLaMA-Factory, alpaca": {"instruction": "Q", "input": "", "chosen": "A", "rejected": "B"},
    "LLaMA-Factory, sharegpt": {
        "conversations": gpt("Q"),
        "chosen": {"from": "gpt", "value": "A"},
        "rejected": {"from": "gpt", "value": "B"},
    },
    "LLaMA-Factory, v1": {"chosen_messages": said("Q", "A"), "rejected_messages": said("Q", "B")},
    "ms-swift": {"messages": said("Q", "A"), "rejected_response": "B"},
    "ms-swift, messages": {"messages": said("Q", "A"), "rejected_messages": said("Q", "B")},
    "ms-swift, columns": {"query": "Q", "response": "A", "rejected_response": "B"},
    "hh-rlhf": {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
}


@pytest.mark.parametrize("dialect", PAIRS)
@pytest.mark.parametrize("task", ["dpo", "orpo", "reward"])
def test_a_pair_in_every_dialect(dialect: str, task: Task) -> None:
    row = PAIRS[dialect]
    assert formats.recognise([row], task, "rows.json") == "preference"
    pair = formats.reader("preference", None, None, task)(row, WHERE)
    assert pair == Pair(Dialogue((USER, GOOD_ANSWER), WHERE), Dialogue((USER, BAD_ANSWER), WHERE), WHERE)


def test_a_source_has_a_system_message_for_both() -> None:
    pair = formats.reader("preference", None, "S", "dpo")(PAIRS["trl, texts"], WHERE)
    assert isinstance(pair, Pair)
    assert pair.chosen.messages == (SYSTEM, USER, GOOD_ANSWER)
    assert pair.rejected.messages == (SYSTEM, USER, BAD_ANSWER)


def test_only_what_follows_the_shared_prompt_is_learned() -> None:
    row = {"chosen": said("Q", "A", "R", "C", "T", "E"), "rejected": said("Q", "A", "R", "D", "T", "E")}
    pair = formats.reader("preference", None, None, "dpo")(row, WHERE)
    assert isinstance(pair, Pair)
    assert [message.learn for message in pair.chosen.messages] == [False, False, False, True, False, True]
    assert [message.learn for message in pair.rejected.messages] == [False, False, False, True, False, True]


def test_an_answer_that_one_side_goes_on_with_is_not_prompt() -> None:
    """Both call the same tool; then they differ. The call is part of what is compared."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    result = {"role": "tool", "content": "7"}
    row = {
        "chosen": [*said("Q"), call, result, {"role": "assistant", "content": "A"}],
        "rejected": [*said("Q"), call, result, {"role": "assistant", "content": "B"}],
    }
    pair = formats.reader("preference", None, None, "dpo")(row, WHERE)
    assert isinstance(pair, Pair)
    assert [message.learn for message in pair.chosen.messages] == [False, True, False, True]


JUDGED = {
    "trl, texts": {"prompt": "Q", "completion": "A", "label": True},
    "trl, messages": {"prompt": said("Q"), "completion": said("", "A")[1:], "label": True},
    "LLaMA-Factory, alpaca": {"instruction": "Q", "input": "", "output": "A", "kto_tag": True},
    "LLaMA-Factory, sharegpt": {"conversations": gpt("Q", "A"), "kto_tag": True},
    "ms-swift": {"messages": said("Q", "A"), "label": True},
    "csv": {"prompt": "Q", "completion": "A", "label": "True"},
}


@pytest.mark.parametrize("dialect", JUDGED)
def test_a_judged_answer_in_every_dialect(dialect: str) -> None:
    row: dict[str, Any] = JUDGED[dialect]
    assert formats.recognise([row], "kto", "rows.json") == "judged"
    read = formats.reader("judged", None, None, "kto")
    assert read(row, WHERE) == Judged(Dialogue((USER, GOOD_ANSWER), WHERE), True, WHERE)
    name = "label" if "label" in row else "kto_tag"
    bad = read({**row, name: 0}, WHERE)
    assert isinstance(bad, Judged)
    assert not bad.good


def test_only_the_last_answer_is_judged() -> None:
    row = {"messages": said("Q", "A", "R", "B"), "label": False}
    item = formats.reader("judged", None, None, "kto")(row, WHERE)
    assert isinstance(item, Judged)
    assert [message.learn for message in item.dialogue.messages] == [False, False, False, True]


def test_columns_make_pairs_and_judged_answers() -> None:
    row = {"question": "Q", "j": "A", "k": "B", "ok": 1}
    read = formats.reader("columns", Columns(user="{question}", assistant="{j}", rejected="{k}"), None, "dpo")
    assert read(row, WHERE) == Pair(Dialogue((USER, GOOD_ANSWER), WHERE), Dialogue((USER, BAD_ANSWER), WHERE), WHERE)
    read = formats.reader("columns", Columns(user="{question}", assistant="{j}", label="ok"), None, "kto")
    assert read(row, WHERE) == Judged(Dialogue((USER, GOOD_ANSWER), WHERE), True, WHERE)
    for task, settings, reason in (
        ("dpo", {}, "task dpo needs the worse answer: set `rejected`"),
        ("sft", {"rejected": "{k}"}, "task sft learns from one answer: remove `rejected`"),
        ("kto", {}, "task kto needs either `label` or `rejected`"),
        ("sft", {"label": "ok"}, "`label` is for task kto, not sft"),
    ):
        with pytest.raises(ConfigError, match=reason):
            formats.reader("columns", Columns(user="{question}", assistant="{j}", **settings), None, task)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        ("dpo", {"prompt": "Q", "chosen": "A", "rejected": "A"}, "chosen and rejected are equal"),
        ("dpo", {"prompt": "Q", "chosen": "A", "rejected": ""}, "turn 2: the assistant's text is empty"),
        ("dpo", {"prompt": "Q", "chosen": "A", "rejected": None}, "rejected is missing"),
        ("dpo", {"prompt": "Q", "chosen": "A", "rejected": 7}, "rejected is no text and no list of turns"),
        ("dpo", {"chosen": "A", "rejected": "B"}, "no prompt"),
        ("dpo", {"chosen": said("Q", "A"), "rejected": said("R", "B")}, "chosen and rejected share no prompt"),
        ("dpo", {"chosen": said("Q"), "rejected": said("Q", "B")}, "no turn of the assistant"),
        ("dpo", {"chosen": [{"role": "alien"}], "rejected": said("Q", "B")}, "chosen, turn 1: unknown role 'alien'"),
        ("dpo", {"prompt": "other", "chosen": said("Q", "A"), "rejected": said("Q", "B")}, "prompt is not part of"),
        ("dpo", {"prompt": "Q", "completion": "A"}, "no two answers (columns prompt, completion)"),
        (
            "kto",
            {"prompt": "Q", "completion": "A", "label": "good"},
            "label is 'good'; an answer is good (true) or not",
        ),
        ("kto", {"prompt": "Q", "completion": "A"}, "no column label or kto_tag"),
    ],
)
def test_a_bad_row_has_a_reason(task: Task, row: dict[str, Any], reason: str) -> None:
    name: formats.Format = "judged" if task == "kto" else "preference"
    with pytest.raises(formats.BadRowError) as caught:
        formats.reader(name, None, None, task)(row, WHERE)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        ("dpo", {"prompt": "Q", "completion": "A", "label": True}, "single answers with a label"),
        ("dpo", {"question": "Q", "a": "A"}, "needs two answers to each prompt .* the columns are question, a"),
        ("kto", {"messages": []}, "needs a label for each answer"),
        ("sft", {"prompt": "Q", "chosen": "A", "rejected": "B"}, "preference data .* cannot be used by task sft"),
    ],
)
def test_the_wrong_data_for_a_task_is_refused(task: Task, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        formats.recognise([row], task, "rows.json")


def prepared(tokenizer: Any, path: Path, rows: list[Any], task: Task, **settings: Any) -> Prepared:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = Data.model_validate({"train": [{"source": str(path)}], "max_length": 20, **settings})
    return prepare(data, task, tokenizer, seed=0)


# Bytes as tokens: "<u>Q<e><a>A<e>" has 6.
ROWS = [
    {"prompt": "Q", "chosen": "A", "rejected": "BB"},
    {"prompt": "q" * 18, "chosen": "only in", "rejected": "the question"},  # nothing of the answers within 20
    {"prompt": "R", "chosen": "A" * 30, "rejected": "B"},  # cut
    {"prompt": "Q", "chosen": "A", "rejected": "BB"},  # again
]


def test_pairs_are_prepared_and_counted(byte_tokenizer: Any, tmp_path: Path) -> None:
    result = prepared(byte_tokenizer, tmp_path / "a.jsonl", ROWS, "dpo")
    pairs, part = result.pairs(), result.report.train
    assert len(pairs) == 3

    def texts(pair: Any) -> tuple[str, str]:
        return byte_tokenizer.decode(pair["chosen"]["input_ids"]), byte_tokenizer.decode(pair["rejected"]["input_ids"])

    assert [texts(pair) for pair in pairs] == [
        ("<u>Q<e><a>A<e>", "<u>Q<e><a>BB<e>"),
        ("<u>R<e><a>" + "A" * 16, "<u>R<e><a>B<e>"),
        ("<u>Q<e><a>A<e>", "<u>Q<e><a>BB<e>"),
    ]
    learned = [label for label in pairs[0]["rejected"]["labels"] if label >= 0]
    assert byte_tokenizer.decode(learned) == "BB<e>"
    # Lost: of the second 29 - 20 and 34 - 20 tokens, of the third 35 - 20.
    assert (part.documents, part.truncated, part.truncated_tokens) == (3, 2, 9 + 14 + 15)
    assert (part.not_learned, part.duplicates) == (1, 1)
    # Chosen: A<e>, 16 letters, A<e>; rejected: BB<e>, B<e>, BB<e>. An end on both sides: the first and the third.
    assert (part.chosen_tokens, part.rejected_tokens, part.stops) == (2 + 16 + 2, 3 + 2 + 3, 2)
    text = "\n".join(check.lines(result.report, Data.model_validate({"train": [{"source": "a"}]}), 1))
    assert text.startswith("train data: 3 pairs\n")
    assert "  learned tokens of an answer: 6.7 chosen, 2.7 rejected" in text


def test_pairs_are_shown_side_by_side(byte_tokenizer: Any, tmp_path: Path) -> None:
    result = prepared(byte_tokenizer, tmp_path / "a.jsonl", ROWS, "dpo")
    shown = preview.view_of("dpo", result.train, 0, byte_tokenizer, "masked_text", colour=False).plain
    assert shown.splitlines() == [
        "pair 0, chosen:",
        f"sample 0, from {tmp_path / 'a.jsonl'}:1: 6 tokens, 2 learned",
        "<u>Q<e><a>[[A<e>]]",
        "pair 0, rejected:",
        f"sample 1, from {tmp_path / 'a.jsonl'}:1: 7 tokens, 3 learned",
        "<u>Q<e><a>[[BB<e>]]",
    ]


def test_pairs_are_held_back_and_weighted_whole(byte_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "chosen": f"A{n}", "rejected": f"B{n}"} for n in range(6)]
    source = {"source": str(tmp_path / "a.jsonl"), "weight": 2}
    result = prepared(byte_tokenizer, tmp_path / "a.jsonl", rows, "dpo", eval_rows=2, train=[source])
    assert result.eval is not None
    assert (len(result.pairs()), len(result.eval)) == (8, 4)
    for pair in result.pairs():
        chosen, rejected = (byte_tokenizer.decode(pair[side]["input_ids"]) for side in ("chosen", "rejected"))
        assert chosen == rejected.replace("B", "A")


def test_kto_takes_judged_answers_and_pairs(byte_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "Q", "completion": "A", "label": True}, {"prompt": "Q", "completion": "B", "label": False}]
    result = prepared(byte_tokenizer, tmp_path / "a.jsonl", rows, "kto")
    other = prepared(byte_tokenizer, tmp_path / "b.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "B"}], "kto")
    for found in (result, other):
        assert [byte_tokenizer.decode(sample["input_ids"]) for sample in found.train] == [
            "<u>Q<e><a>A<e>",
            "<u>Q<e><a>B<e>",
        ]
        assert found.train.collection.kinds.tolist() == [GOOD, BAD]
        assert found.report.train.good == 1
    shown = preview.view_of("kto", result.train, 1, byte_tokenizer, "text", colour=False).plain
    assert shown.splitlines()[0] == "called bad:"


# What the real files hold, counted with `json.load`.
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("preference/dpo_en_demo.json", 300),
        ("preference/llamafactory_v1_dpo_demo.jsonl", 10),
        ("torchtune_formats/hh_rlhf_tiny.json", 1),
    ],
)
def test_real_files(shared_data: Path, name: str, count: int) -> None:
    rows = list(sources.rows(shared_data / "instruction" / name))
    chosen = formats.recognise([row.value for row in rows[:20]], "dpo", name)
    read = formats.reader(chosen, None, None, "dpo")
    pairs = [read(row.value, row.where) for row in rows]
    assert (chosen, len(pairs)) == ("preference", count)
    for pair in pairs:
        assert isinstance(pair, Pair)
        assert pair.chosen.messages[-1].learn
        assert pair.chosen.messages[:-1] == pair.rejected.messages[:-1]


def test_the_real_stack_exchange_columns(shared_data: Path) -> None:
    path = shared_data / "instruction/torchtune_formats/stack_exchange_paired_tiny.json"
    columns = Columns(user="{question}", assistant="{response_j}", rejected="{response_k}")
    rows = list(sources.rows(path))
    read = formats.reader("columns", columns, None, "dpo")
    for row in rows:
        pair = read(row.value, row.where)
        assert isinstance(pair, Pair)
        assert pair.chosen.messages[1].content == row.value["response_j"]
        assert pair.rejected.messages[1].content == row.value["response_k"]
