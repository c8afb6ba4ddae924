"""fastft.data.formats: what each format means, how it is recognised, and what is refused with which reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastft.config.schema import Columns
from fastft.data import formats, sources
from fastft.data.dialogue import Dialogue, Message, Text, Where
from fastft.errors import ConfigError, DataError

WHERE = Where("rows.json", 1)
USER, ANSWER = Message("user", "Q"), Message("assistant", "A", learn=True)


def turns(item: formats.Item) -> list[tuple[str, str]]:
    assert isinstance(item, Dialogue)
    return [(message.role, message.content) for message in item.messages]


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        ({"instruction": "Q", "input": "", "output": "A"}, "alpaca", [USER, ANSWER]),
        ({"instruction": "Q", "input": None, "output": "A", "text": "Q A"}, "alpaca", [USER, ANSWER]),
        ({"instruction": "Q", "input": "I", "output": "A"}, "alpaca", [Message("user", "Q\nI"), ANSWER]),
        ({"query": "Q", "response": "A", "history": []}, "alpaca", [USER, ANSWER]),
        ({"prompt": "Q", "completion": "A"}, "alpaca", [USER, ANSWER]),
        (
            {"instruction": "Q", "output": "A", "history": [["q", "a"]], "system": "S"},
            "alpaca",
            [Message("system", "S"), Message("user", "q"), Message("assistant", "a", learn=True), USER, ANSWER],
        ),
        (
            {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
            "sharegpt",
            [USER, ANSWER],
        ),
        (
            {"system": "S", "conversation": [{"human": "Q", "assistant": "A"}]},
            "sharegpt",
            [Message("system", "S"), USER, ANSWER],
        ),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            "messages",
            [USER, ANSWER],
        ),
        ([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "messages", [USER, ANSWER]),
        (
            {
                "messages": [
                    {"role": "developer", "content": "S"},
                    {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                    {"role": "assistant", "content": [{"type": "text", "value": "A"}], "loss_weight": 1.0},
                ]
            },
            "messages",
            [Message("system", "S"), USER, ANSWER],
        ),
        (
            {"conversation": [{"system": "S", "input": "Q", "output": "A"}]},
            "conversation",
            [Message("system", "S"), USER, ANSWER],
        ),
        ({"text": "### Human: Q### Assistant: A"}, "guanaco", [USER, ANSWER]),
        ({"text": "### Human: Q\n### Assistant: A### Human: and now?"}, "guanaco", [USER, ANSWER]),
    ],
)
def test_a_row_is_recognised_and_read(row: Any, name: formats.Format, expected: list[Message]) -> None:
    assert formats.recognise([row], "sft", "rows.json") == name
    item = formats.reader(name, None, None, "sft")(row, WHERE)
    assert isinstance(item, Dialogue)
    assert list(item.messages) == expected


@pytest.mark.parametrize(
    ("turn", "name"),
    [
        ({"role": "assistant", "content": "A", "loss_weight": 0.0}, "messages"),
        ({"role": "assistant", "content": "A", "weight": 0}, "messages"),
        ({"role": "assistant", "content": "A", "train": False}, "messages"),
        ({"from": "gpt", "value": "A", "loss": False}, "sharegpt"),
    ],
)
def test_a_turn_can_be_kept_out_of_the_loss(turn: dict[str, Any], name: formats.Format) -> None:
    first = {"role": "user", "content": "Q"} if name == "messages" else {"from": "human", "value": "Q"}
    column = "messages" if name == "messages" else "conversations"
    item = formats.reader(name, None, None, "sft")({column: [first, turn]}, WHERE)
    assert isinstance(item, Dialogue)
    assert item.messages[1] == Message("assistant", "A", learn=False)


def test_xtuner_output_with_loss() -> None:
    row = {"conversation": [{"input": "Q", "output": "A", "output_with_loss": False}, {"input": "Q", "output": "A"}]}
    item = formats.read_conversation(row, WHERE)
    assert [message.learn for message in item.messages] == [False, False, False, True]


def test_tool_calls_are_kept() -> None:
    row = {
        "tools": json.dumps([{"name": "add", "parameters": {}}]),
        "conversations": [
            {"from": "human", "value": "1+1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "Two"},
        ],
    }
    item = formats.reader("sharegpt", None, None, "sft")(row, WHERE)
    assert isinstance(item, Dialogue)
    assert item.messages[1].tool_calls == ({"type": "function", "function": {"name": "add", "arguments": {"a": 1}}},)
    assert item.messages[2].role == "tool"
    assert item.tools == ({"type": "function", "function": {"name": "add", "parameters": {}}},)


@pytest.mark.parametrize(("text", "reason"), [("[" * 100_000, "nested too deep"), ("9" * 10_000, "too many digits")])
def test_hostile_json_in_a_text_is_a_bad_row(text: str, reason: str) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}
    called = [{"from": "human", "value": "x"}, {"from": "function_call", "value": text}]
    rows: list[tuple[formats.Format, Any, str]] = [
        ("messages", {"messages": turns, "tools": text}, "tools is not JSON"),
        ("messages", {"messages": [*turns, call]}, "arguments are not JSON"),
        ("sharegpt", {"conversations": called}, "function_call is not JSON"),
    ]
    for name, row, what in rows:
        with pytest.raises(formats.BadRowError, match=rf"{what} \({reason}\)|{what} \(a number of {reason}\)"):
            formats.reader(name, None, None, "sft")(row, WHERE)


def test_columns_fill_templates() -> None:
    columns = Columns(system="You know {topic}", user="{question}\n{{{context}}}", assistant="{answer}")
    read = formats.reader("columns", columns, None, "sft")
    row = {"topic": "sums", "question": "1+1?", "context": None, "answer": 2}
    assert turns(read(row, WHERE)) == [("system", "You know sums"), ("user", "1+1?\n{}"), ("assistant", "2")]
    with pytest.raises(formats.BadRowError, match=r"no column topic \(columns question\)"):
        read({"question": "a"}, WHERE)
    for template in ("{}", "{a", "{a!r}", "{a:>3}", "{0"):
        with pytest.raises(ConfigError, match=r"columns\.user"):
            formats.reader("columns", Columns(user=template, assistant="{a}"), None, "sft")


def test_the_sources_system_message_is_for_dialogues_without_one() -> None:
    read = formats.reader("alpaca", None, "S", "sft")
    assert turns(read({"instruction": "Q", "output": "A"}, WHERE))[0] == ("system", "S")
    assert turns(read({"instruction": "Q", "output": "A", "system": "T"}, WHERE))[0] == ("system", "T")


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("alpaca", {"instruction": "Q"}, "no column output or response or completion"),
        ("alpaca", {"instruction": "Q", "output": ""}, "turn 2: the assistant's text is empty"),
        ("alpaca", {"instruction": " ", "input": "", "output": "A"}, "turn 1: the user's text is empty"),
        ("alpaca", {"instruction": "Q", "output": 7}, "output is a int, not text"),
        ("alpaca", {"instruction": "Q", "output": None}, "output is missing"),
        ("alpaca", {"instruction": "Q", "output": "<nooutput>"}, "the output is <nooutput>"),
        ("alpaca", {"instruction": "Q", "output": "A", "history": [["q"]]}, "history, item 1: not a pair"),
        ("alpaca", {"instruction": "Q", "output": "A", "images": ["a.png"]}, "the row has images"),
        ("alpaca", "text", "the row is a str"),
        ("sharegpt", {"conversations": []}, "no turns"),
        ("sharegpt", {"conversations": "Q"}, "conversations is a str"),
        ("sharegpt", {"conversations": ["Q"]}, "turn 1: a str"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "Q"}]}, "turn 1: unknown role 'alien'"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Q"}]}, "no turn of the assistant"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "{"}]}, "turn 1: function_call is not JSON"),
        ("messages", {"messages": [{"role": "user"}]}, "turn 1: content is missing"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part of type image_url"),
        (
            "messages",
            [{"role": "assistant", "content": "A"}, {"role": "user", "content": "Q"}],
            "the last turn is the user's; the assistant's answer is missing",
        ),
        ("messages", [{"role": "assistant", "content": "A", "loss_weight": 0.5}], "loss_weight is 0.5"),
        ("conversation", {"conversation": [{"input": "Q"}]}, "turn 1: output is missing"),
        (
            "conversation",
            {"conversation": [{"input": "Q", "output": "A", "output_with_loss": 1}]},
            "output_with_loss is 1",
        ),
        ("guanaco", {"text": "Hello ### Human: Q"}, "text before the first ### Human:"),
        ("text", {"text": "words"}, "plain text has no answer to learn"),
    ],
)
def test_a_bad_row_has_a_reason(name: formats.Format, row: Any, reason: str) -> None:
    with pytest.raises(formats.BadRowError) as caught:
        formats.reader(name, None, None, "sft")(row, WHERE)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"question": "Q", "answer": "A"}], "columns question, answer; set format to one of alpaca"),
        ([{"text": "just words"}], "set task: pretrain"),
        ([{"prompt": "Q", "chosen": "A", "rejected": "B"}], "preference data"),
        ([{}], r"columns \(none\)"),
        (["Q"], "rows are str"),
        ([["Q"], {"text": "Q"}], "rows are dict, list"),
        ([{"messages": [{"toy_input": "Q"}]}], "columns messages"),
    ],
)
def test_an_unclear_format_is_an_error_that_names_the_columns(rows: list[Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        formats.recognise(rows, "sft", "rows.json")


@pytest.mark.parametrize(
    "row",
    [
        {"text": "words"},
        {"text": "words", "url": "u", "instruction": "Q", "output": "A"},
        {"toy_text": "words"},
        {"conversation": [{"input": "", "output": "words"}]},
        [{"role": "user", "content": ""}, {"role": "assistant", "content": "words"}],
    ],
)
def test_texts_for_pretraining(row: Any) -> None:
    name = formats.recognise([row], "pretrain", "rows.json")
    assert formats.reader(name, None, None, "pretrain")(row, WHERE) == Text("words", WHERE)


# What the real files hold, counted with `json.load` (or by eye); None: not for task sft.
SHARED_FILES = {
    "alpaca/alpaca_en_demo.json": ("alpaca", 999),
    "alpaca/alpaca_zh_demo.json": ("alpaca", 1000),
    "alpaca/identity.json": ("alpaca", 91),
    "alpaca/torchtune_alpaca_tiny.json": ("alpaca", 100),
    "axolotl_fixtures/alpaca.json": ("alpaca", 2),
    "axolotl_fixtures/conversation.json": ("sharegpt", 1),
    "ms_swift_formats/alpaca.csv": ("alpaca", 3),
    "ms_swift_formats/alpaca.jsonl": ("alpaca", 3),
    "ms_swift_formats/alpaca2.csv": ("alpaca", 3),
    "ms_swift_formats/chatml.jsonl": ("messages", 3),
    "ms_swift_formats/conversations.jsonl": ("sharegpt", 3),
    "ms_swift_formats/sharegpt.jsonl": ("sharegpt", 3),
    "ms_swift_formats/swift_multi.json": ("alpaca", 3),
    "ms_swift_formats/swift_multi.jsonl": ("alpaca", 3),
    "ms_swift_formats/swift_single.csv": ("alpaca", 3),
    "ms_swift_formats/swift_single.jsonl": ("alpaca", 3),
    "openai_messages/llamafactory_v1_sft_demo.jsonl": ("messages", 500),
    "openai_messages/xtuner_openai_sft.jsonl": ("messages", 128),
    "openai_messages/xtuner_sft_text.jsonl": ("messages", 200),
    "sharegpt/fastchat_dummy_conversation.json": ("sharegpt", 500),
    "toolcall/glaive_toolcall_en_demo.json": ("sharegpt", 300),
    "torchtune_formats/chat_tiny.json": ("sharegpt", 1),
    "torchtune_formats/instruct_tiny.json": ("alpaca", 2),
    "xtuner_legacy/demo_multi_turn_2.json": ("messages", 2),
    "xtuner_legacy/toy_custom_multi_turn_data.json": ("conversation", 2),
    "xtuner_legacy/toy_custom_single_turn_data.json": ("conversation", 2),
    "axolotl_fixtures/conversation.missingturns.json": (None, "text is empty"),
    "ms_swift_formats/multi_modal_2.jsonl": (None, "the row has images"),
    "ms_swift_formats/swift_pre.csv": (None, "columns response"),
    "preference/dpo_en_demo.json": (None, "preference data"),
    "preference/llamafactory_v1_dpo_demo.jsonl": (None, "preference data"),
    "torchtune_formats/hh_rlhf_tiny.json": (None, "preference data"),
    "torchtune_formats/stack_exchange_paired_tiny.json": (None, "columns question"),
    "torchtune_formats/vqa_tiny.json": (None, "columns input, output, image"),
    "xtuner_legacy/demo_multi_turn_1.json": (None, "columns messages"),
    "xtuner_legacy/demo_single_turn.json": (None, "columns toy_system"),
    "xtuner_legacy/multi_modal.json": (None, "part of type image_url"),
    "xtuner_legacy/toy_custom_incremental_data.json": (None, "the user's text is empty"),
}


@pytest.mark.parametrize("name", SHARED_FILES)
def test_real_files(shared_data: Path, name: str) -> None:
    rows = list(sources.rows(shared_data / "instruction" / name))
    chosen, expected = SHARED_FILES[name]

    def read_all() -> tuple[str, list[formats.Item]]:
        found = formats.recognise([row.value for row in rows[:20]], "sft", name)
        read = formats.reader(found, None, None, "sft")
        return found, [read(row.value, row.where) for row in rows]

    if chosen is None:
        with pytest.raises(DataError, match=str(expected)):
            read_all()
        return
    found, items = read_all()
    assert (found, len(items)) == (chosen, expected)


def test_real_toy_columns(shared_data: Path) -> None:
    rows = list(sources.rows(shared_data / "instruction/xtuner_legacy/demo_single_turn.json"))
    columns = Columns(system="{toy_system}", user="{toy_input}", assistant="{toy_output}")
    read = formats.reader("columns", columns, None, "sft")
    assert turns(read(rows[0].value, rows[0].where)) == [
        ("system", "You are a helpful AI assistant."),
        ("user", "Give three tips for staying healthy."),
        ("assistant", "1.Eat a balanced diet. 2. Exercise regularly. 3. Get enough sleep."),
    ]
