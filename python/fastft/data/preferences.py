"""Rows that say which answer is better: pairs of a chosen and a rejected one, and single answers with a label.

The dialects of trl (prompt, chosen, rejected as text or as messages; with or without a prompt of their own; prompt,
completion, label), LLaMA-Factory (alpaca and sharegpt rows with chosen and rejected, chosen_messages, kto_tag), ms-swift
(messages with rejected_response or rejected_messages) and Anthropic's hh-rlhf (one text with marks). Part of `formats`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastft.config.schema import Task
from fastft.data import formats
from fastft.data.dialogue import Dialogue, Judged, Message, Pair, Where
from fastft.data.formats import BadRowError, Item

# The marks of turns in hh-rlhf.
HUMAN_MARK, ASSISTANT_MARK = "\n\nHuman:", "\n\nAssistant:"


def read_preference(value: Any, where: Where) -> Pair:
    """A row with two answers to one prompt."""
    row = formats.mapping(value)
    chosen, rejected = _answers(row, where)
    prompt = _prompt(row, chosen, where)
    tools = formats.read_tools(row)
    return Pair(
        Dialogue((*prompt, *chosen), where, tools),
        Dialogue((*prompt, *rejected), where, tools),
        where,
    )


def read_judged(value: Any, where: Where) -> Judged:
    """A row with an answer and whether it is good (`label` or `kto_tag`)."""
    row = formats.mapping(value)
    column = formats.one_of(list(row), formats.LABEL_COLUMNS)
    if column is None:
        raise BadRowError(f"no column {' or '.join(formats.LABEL_COLUMNS)}")
    good = formats.truth(row, column)
    if "prompt" in row and "completion" in row:
        answer = _said(row["completion"], "assistant", "completion", where)
        dialogue = Dialogue((*_prompt(row, answer, where), *answer), where, formats.read_tools(row))
    elif any(isinstance(row.get(name), list) for name in ("messages", "conversations", "conversation")):
        dialogue = _turns(row, where)
    else:
        dialogue = formats.read_alpaca(row, where)
    return Judged(dialogue, good, where)


def checked(item: Item, system: str | None, task: Task) -> Item:
    """The item with its system message; only what follows the prompt is learned.

    Raises:
        BadRowError: no two answers (or no judged one), two equal ones, or what `formats.checked` refuses.
    """
    if isinstance(item, Judged) and task == "kto":
        dialogue = formats.checked(item.dialogue, system)
        last = len(dialogue.messages) - 1
        return replace(item, dialogue=_learned_from(dialogue, _answer_start(dialogue.messages, last)))
    if not isinstance(item, Pair):
        wanted = "a judged answer" if task == "kto" else "two answers to one prompt"
        raise BadRowError(f"task {task} needs {wanted}")
    chosen, rejected = formats.checked(item.chosen, system), formats.checked(item.rejected, system)
    if _plain(chosen) == _plain(rejected):
        raise BadRowError("chosen and rejected are equal")
    shared = 0
    for one, other in zip(_plain(chosen), _plain(rejected), strict=False):
        if one != other:
            break
        shared += 1
    # The prompt ends with a question: an answer that both begin with is part of what is compared.
    for dialogue in (chosen, rejected):
        shared = min(shared, _answer_start(dialogue.messages, min(shared, len(dialogue.messages) - 1)))
    if shared == 0:
        raise BadRowError("chosen and rejected share no prompt")
    return Pair(_learned_from(chosen, shared), _learned_from(rejected, shared), item.where)


def _plain(dialogue: Dialogue) -> list[Message]:
    return [replace(message, learn=False) for message in dialogue.messages]


def _answer_start(messages: Sequence[Message], index: int) -> int:
    """The first turn of the answer that turn `index` belongs to: the one after the last word of the user before it."""
    while index and messages[index - 1].role not in ("user", "system"):
        index -= 1
    return index


def _learned_from(dialogue: Dialogue, start: int) -> Dialogue:
    """Learn the assistant's turns from `start` on, and none before."""
    messages = tuple(
        replace(message, learn=index >= start and message.role == "assistant")
        for index, message in enumerate(dialogue.messages)
    )
    return replace(dialogue, messages=messages)


def _answers(row: Mapping[str, Any], where: Where) -> tuple[list[Message], list[Message]]:
    """What each side says: only the answer, or the whole dialogue."""
    if "chosen" in row and "rejected" in row:
        return _said(row["chosen"], "assistant", "chosen", where), _said(
            row["rejected"], "assistant", "rejected", where
        )
    if "chosen_messages" in row and "rejected_messages" in row:
        names = ("chosen_messages", "rejected_messages")
        chosen, rejected = (_said(row[name], "assistant", name, where) for name in names)
        return chosen, rejected
    if "messages" in row and ("rejected_response" in row or "rejected_messages" in row):
        chosen = list(_turns(row, where).messages)
        if "rejected_messages" in row:
            return chosen, _said(row["rejected_messages"], "assistant", "rejected_messages", where)
        return chosen, [*chosen[:-1], *_said(row["rejected_response"], "assistant", "rejected_response", where)]
    if formats.one_of(list(row), formats.ANSWER_COLUMNS) and "rejected_response" in row:
        chosen = list(formats.read_alpaca(row, where).messages)
        return chosen, [*chosen[:-1], *_said(row["rejected_response"], "assistant", "rejected_response", where)]
    raise BadRowError(f"no two answers (columns {', '.join(map(str, row))}); there are chosen and rejected, or others")


def _said(value: Any, role: str, column: str, where: Where) -> list[Message]:
    """The messages in a column: a text, one turn, or a list of turns."""
    if isinstance(value, str):
        if role == "assistant" and value.lstrip("\n").startswith(HUMAN_MARK.strip()):
            return _marked(value, column)
        return [Message("assistant", value, learn=True) if role == "assistant" else Message("user", value)]
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRowError(f"{column} is {'missing' if value is None else 'no text and no list of turns'}")
    try:
        return list(_turns({"conversations": value}, where).messages)
    except BadRowError as error:
        raise BadRowError(f"{column}, {error}") from error


def _turns(row: Mapping[str, Any], where: Where) -> Dialogue:
    """A list of turns in either dialect."""
    column = formats.one_of(list(row), ("messages", "conversations", "conversation"))
    turns = row[column] if column is not None else None
    first = turns[0] if isinstance(turns, list) and turns else None
    shares_gpt = isinstance(first, Mapping) and "from" in first
    return formats.read_sharegpt(row, where) if shares_gpt else formats.read_messages(row, where)


def _prompt(row: Mapping[str, Any], chosen: Sequence[Message], where: Where) -> list[Message]:
    """The turns before the answers, if the row holds them apart; [] if the answers are whole dialogues."""
    if chosen and chosen[0].role != "assistant":
        said = row.get("prompt")
        # ultrafeedback repeats the question as `prompt` beside whole dialogues; another text there would be lost.
        if isinstance(said, str) and all(said.strip() != message.content.strip() for message in chosen):
            raise BadRowError("prompt is not part of chosen, which is a whole dialogue itself")
        return []
    if isinstance(row.get("prompt"), list):
        return _said(row["prompt"], "user", "prompt", where)
    for column in ("conversations", "conversation", "messages"):
        if isinstance(row.get(column), list):
            return list(_turns(row, where).messages)
    if formats.one_of(list(row), formats.QUESTION_COLUMNS) is None:
        raise BadRowError("no prompt: chosen and rejected are single answers")
    # The question's columns as alpaca has them (instruction, input, history, system), with an answer that is dropped.
    question = {name: value for name, value in row.items() if name not in formats.ANSWER_COLUMNS}
    return list(formats.read_alpaca({**question, "output": "-"}, where).messages[:-1])


def _marked(text: str, column: str) -> list[Message]:
    """Turns of a text in the form of hh-rlhf."""
    messages: list[Message] = []
    rest = "\n\n" + text.lstrip("\n")
    while rest:
        mark = HUMAN_MARK if rest.startswith(HUMAN_MARK) else ASSISTANT_MARK
        if not rest.startswith(mark):
            raise BadRowError(f"{column}: text before the first {HUMAN_MARK.strip()}")
        rest = rest[len(mark) :]
        ends = [place for place in (rest.find(HUMAN_MARK), rest.find(ASSISTANT_MARK)) if place >= 0]
        end = min(ends, default=len(rest))
        content, rest = rest[:end].strip(), rest[end:]
        messages.append(Message("user", content) if mark == HUMAN_MARK else Message("assistant", content, learn=True))
    return messages
