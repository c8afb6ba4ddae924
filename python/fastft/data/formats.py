"""What the columns of a row mean: every format that fastft reads, and how `auto` tells them apart.

Takes the rows of `sources`, gives the dialogues and texts of `dialogue`; `preferences` reads rows of two answers or of a
judged one. A row that cannot be read raises `BadRowError` with the reason; `prepare` adds file and row, or counts it
when the config says `on_bad_row: skip`.
"""

import json
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastft.config.schema import Columns, Format, Task
from fastft.data import images
from fastft.data.dialogue import IMAGE_MARK, Dialogue, ImageRef, Judged, Message, Pair, Role, Text, Where
from fastft.data.image_rows import RowImages
from fastft.errors import ConfigError, DataError

Item = Dialogue | Text | Pair | Judged
Reader = Callable[[Any, Where], Item]
# As a format is read: what comes third takes the row's images, or is None where only text can be learned.
RowReader = Callable[[Any, Where, RowImages | None], Item]

# Tasks that learn from two answers to one prompt.
PAIR_TASKS = frozenset({"dpo", "orpo", "reward"})

# What the dialects of sharegpt and OpenAI messages call the four roles.
ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
}
# Column names of question and answer in alpaca's relatives (ms-swift, dolly, torchtune).
QUESTION_COLUMNS = ("instruction", "query", "prompt")
ANSWER_COLUMNS = ("output", "response", "completion")
PREFERENCE_COLUMNS = frozenset({"chosen", "rejected", "chosen_messages", "rejected_messages", "rejected_response"})
LABEL_COLUMNS = ("label", "kto_tag")
IMAGE_COLUMNS = ("image", "images")
OTHER_MEDIA_COLUMNS = ("audio", "audios", "video", "videos")
HUMAN_MARK, ASSISTANT_MARK = "### Human:", "### Assistant:"
# The alpaca data set's own word for "there is no answer".
NO_OUTPUT = "<nooutput>"
FORMATS_TEXT = "alpaca, sharegpt, messages, conversation, guanaco, text, or columns"


class BadRowError(DataError):
    """A row cannot be read; the message is the reason, without the place."""


def recognise(values: Sequence[Any], task: Task, file: str) -> Format:
    """Which format the first rows of a file are in.

    Args:
        values: the first rows, not empty.
        task: pretrain prefers a `text` column where a row has that and question and answer too (tatsu-lab/alpaca).
        file: the file's name, for the error.

    Raises:
        DataError: no format fits, with the columns seen and what to write into the config.
    """
    if all(isinstance(value, list) for value in values):
        return "messages"
    if not all(isinstance(value, Mapping) for value in values):
        kinds = sorted({type(value).__name__ for value in values})
        raise DataError(
            f"data {file}: rows are {', '.join(kinds)}; a row is an object with columns or a list of messages"
        )
    columns = list(dict.fromkeys(str(name) for value in values for name in value))
    if task in PAIR_TASKS or task == "kto":
        return _preference_format(columns, task, file)
    if PREFERENCE_COLUMNS & set(columns):
        raise DataError(f"data {file}: preference data (columns {', '.join(columns)}) cannot be used by task {task}")
    turns = _turn_format(values)
    if turns is not None:
        return turns
    if task == "pretrain" and (_is_text(values, "text") or _only_text_column(values, columns)):
        return "text"
    if one_of(columns, QUESTION_COLUMNS) and one_of(columns, ANSWER_COLUMNS):
        return "alpaca"
    if _is_text(values, "text"):
        if all(HUMAN_MARK in value["text"] and ASSISTANT_MARK in value["text"] for value in values):
            return "guanaco"
        raise DataError(
            f"data {file}: plain text (column text) without question and answer; set task: pretrain, "
            f"or a format by hand ({FORMATS_TEXT})"
        )
    raise DataError(
        f"data {file}: the format is not clear from the columns {', '.join(columns) or '(none)'}; set format to one of "
        f"{FORMATS_TEXT} (for example columns: {{user: '{{question}}', assistant: '{{answer}}'}})"
    )


def _preference_format(columns: Sequence[str], task: Task, file: str) -> Format:
    """The format of rows for a task that learns from preferences; kto also takes pairs, as two judged answers each."""
    if PREFERENCE_COLUMNS & set(columns):
        return "preference"
    label = one_of(columns, LABEL_COLUMNS)
    if label is not None and task == "kto":
        return "judged"
    if label is not None:
        raise DataError(f"data {file}: single answers with a {label}; task {task} needs two answers to each prompt")
    raise DataError(
        f"data {file}: task {task} needs {'a label for each answer' if task == 'kto' else 'two answers to each prompt'} "
        f"(columns chosen and rejected{', or label' if task == 'kto' else ''}); the columns are "
        f"{', '.join(columns) or '(none)'}; format: columns takes them under other names"
    )


def _turn_format(values: Sequence[Any]) -> Format | None:
    """The format of rows that hold a list of turns, by the keys of the turns."""
    for column in ("messages", "conversations", "conversation"):
        turns = [turn for value in values for turn in value.get(column) or () if isinstance(turn, Mapping)]
        if not turns:
            continue
        keys = set(turns[0])
        if {"role", "content"} <= keys:
            return "messages"
        if {"from", "value"} <= keys or {"human", "assistant"} <= keys:
            return "sharegpt"
        if {"input", "output"} <= keys or keys <= {"input", "output", "system"}:
            return "conversation"
    return None


def _is_text(values: Sequence[Any], column: str) -> bool:
    return all(isinstance(value.get(column), str) for value in values)


def _only_text_column(values: Sequence[Any], columns: Sequence[str]) -> str | None:
    """The name of the single column, if there is just one and it holds text."""
    return columns[0] if len(columns) == 1 and _is_text(values, columns[0]) else None


def one_of(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of `names` that is a column, or None."""
    return next((name for name in names if name in columns), None)


def reader(
    chosen: Format, columns: Columns | None, system: str | None, task: Task, folder: images.Folder | None = None
) -> Reader:
    """The function that reads rows of a format.

    Args:
        chosen: the format; not `auto`, which `recognise` settles first.
        columns: the templates, for format columns.
        system: system message for dialogues that have none.
        task: `pretrain` reads a dialogue whose only words are the assistant's as a text (XTuner's pre-training files).
        folder: where paths of images start; None where only text can be learned.
    """
    from fastft.data import preferences  # it reads the turns of its rows with what stands here

    if chosen == "columns":
        if columns is None:
            raise ConfigError("data: format columns needs `columns` with user and assistant")
        read: RowReader = _ColumnsReader(columns, task)
    else:
        by_name: dict[str, RowReader] = {
            "alpaca": read_alpaca,
            "sharegpt": read_sharegpt,
            "messages": read_messages,
            "conversation": read_conversation,
            "guanaco": lambda value, where, _: read_guanaco(value, where),
            "text": lambda value, where, _: read_text(value, where),
            "preference": lambda value, where, _: preferences.read_preference(value, where),
            "judged": lambda value, where, _: preferences.read_judged(value, where),
        }
        read = by_name[chosen]

    def read_checked(value: Any, where: Where) -> Item:
        pictures = None if folder is None else RowImages(folder, where)
        item = read(value, where, pictures)
        if pictures is not None and isinstance(item, Dialogue):
            item = pictures.placed(item)
        if task in PAIR_TASKS or task == "kto":
            return preferences.checked(item, system, task)
        if isinstance(item, Pair | Judged):
            raise BadRowError(f"preference data cannot be used by task {task}")
        if isinstance(item, Text):
            if task == "sft":
                raise BadRowError("plain text has no answer to learn; set task: pretrain")
            return item
        if task == "pretrain":
            spoken = [message for message in item.messages if message.content.strip() or message.tool_calls]
            if len(spoken) == 1 and spoken[0].role == "assistant":
                return Text(spoken[0].content, where)
        return checked(item, system)

    return read_checked


def checked(dialogue: Dialogue, system: str | None) -> Dialogue:
    """The dialogue with its system message, if it can be learned from.

    Raises:
        BadRowError: no turns, an empty turn, no answer at the end. Whether the order of the roles is right is for the
            chat template to say.
    """
    messages = dialogue.messages
    if not messages:
        raise BadRowError("no turns")
    if messages[0].role == "system" and not messages[0].content.strip():
        messages = messages[1:]
    if system is not None and (not messages or messages[0].role != "system"):
        messages = (Message("system", system), *messages)
    for index, message in enumerate(messages):
        if not message.content.strip() and not message.tool_calls:
            raise BadRowError(f"turn {index + 1}: the {message.role}'s text is empty")
    if not any(message.role == "assistant" for message in messages):
        raise BadRowError("no turn of the assistant, so nothing to learn")
    if messages[-1].role != "assistant":
        raise BadRowError(f"the last turn is the {messages[-1].role}'s; the assistant's answer is missing")
    return Dialogue(messages, dialogue.where, dialogue.tools)


def read_alpaca(value: Any, where: Where, pictures: RowImages | None = None) -> Dialogue:
    """A row of instruction, input (optional), output; also history (pairs of earlier turns) and system.

    The columns may be called as in `QUESTION_COLUMNS` and `ANSWER_COLUMNS`. A non-empty input follows the
    instruction on a new line.
    """
    row = mapping(value)
    _media(row, pictures)
    question, answer = one_of(list(row), QUESTION_COLUMNS), one_of(list(row), ANSWER_COLUMNS)
    if question is None or answer is None:
        raise BadRowError(f"no column {' or '.join(QUESTION_COLUMNS if question is None else ANSWER_COLUMNS)}")
    messages = _system(row)
    for index, pair in enumerate(row.get("history") or ()):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRowError(f"history, item {index + 1}: not a pair of texts")
        messages += [Message("user", pair[0]), Message("assistant", pair[1], learn=True)]
    parts = [_string(row, question), _string(row, "input", needed=False)]
    messages.append(Message("user", "\n".join(part for part in parts if part.strip())))
    output = _string(row, answer)
    if output.strip() == NO_OUTPUT:
        raise BadRowError(f"the {answer} is {NO_OUTPUT}")
    messages.append(Message("assistant", output, learn=True))
    return Dialogue(tuple(messages), where)


def read_sharegpt(value: Any, where: Where, pictures: RowImages | None = None) -> Dialogue:
    """A row of `conversations` (or `conversation`): turns {from, value}, or pairs {human, assistant} as in ms-swift.

    A `function_call` becomes the assistant's tool call; `tools` holds the schemas, as JSON or as text of JSON.
    """
    row = mapping(value)
    _media(row, pictures)
    messages = _system(row)
    for index, turn in enumerate(_turns(row, "conversations", "conversation")):
        place = f"turn {index + 1}"
        if "human" in turn and "assistant" in turn:
            messages.append(Message("user", _string(turn, "human", place=place)))
            messages.append(Message("assistant", _string(turn, "assistant", place=place), learn=True))
            continue
        role, text = _role(turn, "from", place), _string(turn, "value", place=place)
        if turn["from"] == "function_call":
            messages.append(Message(role, "", _learn(turn, place), _calls(text, place)))
        else:
            messages.append(Message(role, text, role == "assistant" and _learn(turn, place)))
    return Dialogue(tuple(messages), where, read_tools(row))


def read_messages(value: Any, where: Where, pictures: RowImages | None = None) -> Dialogue:
    """A row of OpenAI `messages` (role, content), or a bare list of them.

    Content is text or a list of text parts {type: text, text or value}. `loss_weight: 0`, `weight: 0`, `loss: false`
    and `train: false` on a turn of the assistant keep it out of the loss. `tools` and `tool_calls` are kept.
    """
    row = {"messages": value} if isinstance(value, list) else mapping(value)
    _media(row, pictures)
    messages = _system(row)
    for index, turn in enumerate(_turns(row, "messages", "conversations", "conversation")):
        place = f"turn {index + 1}"
        role, calls = _role(turn, "role", place), _tool_calls(turn, place)
        shown: list[ImageRef] = []
        content = "" if turn.get("content") is None and calls else _content(turn, place, pictures, shown)
        learn = role == "assistant" and _learn(turn, place)
        call_id = turn.get("tool_call_id")
        identity = None if call_id is None else str(call_id)
        messages.append(Message(role, content, learn, calls, identity, tuple(shown)))
    return Dialogue(tuple(messages), where, read_tools(row))


def read_conversation(value: Any, where: Where, pictures: RowImages | None = None) -> Dialogue:
    """A row of XTuner's `conversation`: turns {system, input, output}, with `output_with_loss`."""
    row = mapping(value)
    _media(row, pictures)
    messages: list[Message] = []
    for index, turn in enumerate(_turns(row, "conversation", "conversations")):
        place = f"turn {index + 1}"
        system = _string(turn, "system", needed=False, place=place)
        if system.strip():
            messages.append(Message("system", system))
        messages.append(Message("user", _string(turn, "input", needed=False, place=place)))
        learn = turn.get("output_with_loss", True)
        if not isinstance(learn, bool):
            raise BadRowError(f"{place}: output_with_loss is {learn!r}, not true or false")
        messages.append(Message("assistant", _string(turn, "output", place=place), learn))
    return Dialogue(tuple(messages), where)


def read_guanaco(value: Any, where: Where) -> Dialogue:
    """A row whose `text` holds turns marked `### Human:` and `### Assistant:` (openassistant-guanaco)."""
    text = _string(mapping(value), "text")
    messages: list[Message] = []
    rest = text
    while rest.strip():
        starts = sorted((rest.find(mark), mark) for mark in (HUMAN_MARK, ASSISTANT_MARK) if mark in rest)
        if not starts or rest[: starts[0][0]].strip():
            raise BadRowError(f"text before the first {HUMAN_MARK}")
        start, mark = starts[0]
        rest = rest[start + len(mark) :]
        ends = [place for place in (rest.find(HUMAN_MARK), rest.find(ASSISTANT_MARK)) if place >= 0]
        end = min(ends, default=len(rest))
        content, rest = rest[:end].strip(), rest[end:]
        if mark == HUMAN_MARK:
            messages.append(Message("user", content))
        else:
            messages.append(Message("assistant", content, learn=True))
    if len(messages) > 1 and messages[-1].role == "user":
        messages.pop()  # many rows end with a question: the tree of answers was cut there
    return Dialogue(tuple(messages), where)


def read_text(value: Any, where: Where) -> Text:
    """A row with a column `text`, or with one column only, whatever its name."""
    row = mapping(value)
    column = "text" if "text" in row else next(iter(row), "text")
    if column != "text" and len(row) != 1:
        raise BadRowError(f"no column text (columns {', '.join(map(str, row))})")
    text = _string(row, column)
    if not text.strip():
        raise BadRowError("the text is empty")
    return Text(text, where)


def mapping(value: Any) -> Mapping[str, Any]:
    """The row as a mapping of its columns."""
    if not isinstance(value, Mapping):
        raise BadRowError(f"the row is a {type(value).__name__}, not an object with columns")
    return value


def _string(row: Mapping[str, Any], column: str, *, needed: bool = True, place: str = "") -> str:
    """The text in a column; missing or null is "" where it is not needed."""
    before = f"{place}: " if place else ""
    value = row.get(column)
    if value is None:
        if needed:
            raise BadRowError(f"{before}{column} is missing")
        return ""
    if not isinstance(value, str):
        raise BadRowError(f"{before}{column} is a {type(value).__name__}, not text")
    return value


def _system(row: Mapping[str, Any]) -> list[Message]:
    text = _string(row, "system", needed=False)
    return [Message("system", text)] if text.strip() else []


def _media(row: Mapping[str, Any], pictures: RowImages | None) -> None:
    """Take the images of the row's own column; what else is no text is refused.

    Raises:
        BadRowError: sound or film, or an image where only text can be learned.
    """
    for column in (*OTHER_MEDIA_COLUMNS, *(IMAGE_COLUMNS if pictures is None else ())):
        if row.get(column):
            raise BadRowError(f"the row has {column}; only text can be learned{_hint(column)}")
    if pictures is not None:
        pictures.of_column(row)


def _hint(column: str) -> str:
    return (
        " (a vision-language model also learns from images, with `vision` in the config)" if "image" in column else ""
    )


def _turns(row: Mapping[str, Any], *columns: str) -> list[Mapping[str, Any]]:
    column = one_of(list(row), columns)
    if column is None:
        raise BadRowError(f"no column {columns[0]}")
    turns = row[column]
    if not isinstance(turns, list):
        raise BadRowError(f"{column} is a {type(turns).__name__}, not a list of turns")
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise BadRowError(f"turn {index + 1}: a {type(turn).__name__}, not an object")
    return turns


def _role(turn: Mapping[str, Any], column: str, place: str) -> Role:
    name = _string(turn, column, place=place)
    if name not in ROLES:
        raise BadRowError(f"{place}: unknown role {name!r}; known are {', '.join(ROLES)}")
    return ROLES[name]


def _content(turn: Mapping[str, Any], place: str, pictures: RowImages | None, shown: list[ImageRef]) -> str:
    """The text of a turn, with IMAGE_MARK for each image part; the images go into `shown`."""
    content = turn.get("content")
    if isinstance(content, list):
        return "".join(_part(part, place, pictures, shown) for part in content)
    return _string(turn, "content", place=place)


def _part(part: Any, place: str, pictures: RowImages | None, shown: list[ImageRef]) -> str:
    if isinstance(part, str):
        return part
    named = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if isinstance(part, Mapping) and pictures is not None and named in ("image", "image_url"):
        value = next((part[key] for key in ("image_url", "image", "url", "path", "value") if part.get(key)), None)
        if value is None and part.get("bytes") is None:
            return "<image>"  # the image itself stands in the row's column
        shown.append(pictures.part(part if value is None else value))
        return IMAGE_MARK
    if not isinstance(part, Mapping) or named != "text":
        raise BadRowError(f"{place}: content has a part of type {named}; only text can be learned{_hint(str(named))}")
    text = part.get("text", part.get("value"))
    if not isinstance(text, str):
        raise BadRowError(f"{place}: a text part without text")
    return text


def _learn(turn: Mapping[str, Any], place: str) -> bool:
    for column in ("loss_weight", "weight", "loss", "train"):
        weight = turn.get(column)
        if weight is None:
            continue
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            raise BadRowError(f"{place}: {column} is {weight!r}; a turn is learned (1) or not (0)")
        return bool(weight)
    return True


def _calls(text: str, place: str) -> tuple[Mapping[str, Any], ...]:
    """The calls in the text of a `function_call` turn: one, or a list of several at once."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{place}: function_call is not JSON ({_reason(error)})") from error
    return tuple(_call(call, f"{place}: function_call") for call in (found if isinstance(found, list) else [found]))


def _tool_calls(turn: Mapping[str, Any], place: str) -> tuple[Mapping[str, Any], ...]:
    """The `tool_calls` of a turn in OpenAI's form, or without the wrapper {type, function}."""
    calls = turn.get("tool_calls") or ()
    if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
        raise BadRowError(f"{place}: tool_calls is not a list of calls")
    found = []
    for call in calls:
        more = {"id": str(call["id"])} if call.get("id") is not None else {}
        found.append({**_call(call.get("function", call), f"{place}: a tool call"), **more})
    return tuple(found)


def _call(call: Any, place: str) -> Mapping[str, Any]:
    """One call; arguments that are the text of a JSON object become the object, which is what templates write."""
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or not call["name"]:
        raise BadRowError(f"{place} has no name")
    arguments = call.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise BadRowError(f"{place}: arguments are not JSON ({_reason(error)})") from error
    arguments = arguments or {}
    if not isinstance(arguments, Mapping):
        raise BadRowError(f"{place}: arguments are a {type(arguments).__name__}, not an object")
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _reason(error: Exception) -> object:
    """Why a text is not JSON; Python's own words about nesting are of its stack, those about digits of its settings."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    return error if isinstance(error, json.JSONDecodeError) else "a number of too many digits"


def read_tools(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The schemas in the column `tools`, each in OpenAI's wrapper; () without any."""
    tools = row.get("tools")
    if isinstance(tools, str):
        if not tools.strip():
            return ()
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise BadRowError(f"tools is not JSON ({_reason(error)})") from error
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRowError("tools is not a list of schemas")
    schemas = [tool if "function" in tool else {"type": "function", "function": dict(tool)} for tool in tools]
    for index, schema in enumerate(schemas):
        function = schema["function"]
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRowError(f"tools, item {index + 1}: no name")
    return tuple(schemas)


class _ColumnsReader:
    """Reads a row by the templates of format columns; `{name}` is the column `name`, `{{` a brace."""

    def __init__(self, columns: Columns, task: Task) -> None:
        pairs, judges = task in PAIR_TASKS, task == "kto"
        if pairs != (columns.rejected is not None) and not judges:
            has = "needs the worse answer: set `rejected`" if pairs else "learns from one answer: remove `rejected`"
            raise ConfigError(f"data, columns: task {task} {has}")
        if judges and (columns.rejected is None) == (columns.label is None):
            raise ConfigError("data, columns: task kto needs either `label` or `rejected`")
        if columns.label is not None and not judges:
            raise ConfigError(f"data, columns: `label` is for task kto, not {task}")
        self._label = columns.label
        texts = (
            ("system", columns.system),
            ("user", columns.user),
            ("assistant", columns.assistant),
            ("rejected", columns.rejected),
        )
        self._templates = {role: _parsed(text, f"data, columns.{role}") for role, text in texts if text is not None}

    def __call__(self, value: Any, where: Where, pictures: RowImages | None = None) -> Dialogue | Pair | Judged:
        row = mapping(value)
        _media(row, pictures)
        filled = {
            role: "".join(before + ("" if column is None else _filled(row, column)) for before, column in parts)
            for role, parts in self._templates.items()
        }
        prompt = [Message("system", filled["system"])] if "system" in filled else []
        prompt.append(Message("user", filled["user"]))

        def answered(text: str) -> Dialogue:
            return Dialogue((*prompt, Message("assistant", text, learn=True)), where)

        if "rejected" in filled:
            return Pair(answered(filled["assistant"]), answered(filled["rejected"]), where)
        if self._label is not None:
            return Judged(answered(filled["assistant"]), truth(row, self._label), where)
        return answered(filled["assistant"])


def _parsed(template: str, key: str) -> list[tuple[str, str | None]]:
    """The template as pairs of literal text and the column that follows it."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"{key}: {template!r} is no template ({error}); {{name}} is a column, {{{{ is a brace"
        ) from error
    for _, column, form, conversion in parts:
        if column is not None and (not column or form or conversion):
            raise ConfigError(
                f"{key}: {template!r}: write {{name}} with a column's name and nothing else in the braces"
            )
    return [(before, column) for before, column, _, _ in parts]


def truth(row: Mapping[str, Any], column: str) -> bool:
    """Whether a column says that an answer is good: true or false, 1 or 0, also as text (csv)."""
    value = row.get(column)
    said = {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())
    if said is None:
        raise BadRowError(f"{column} is {value!r}; an answer is good (true) or not (false)")
    return said


def _filled(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        raise BadRowError(f"no column {column} (columns {', '.join(map(str, row))})")
    value = row[column]
    if value is None:
        return ""
    if isinstance(value, bool | int | float):
        return str(value)
    if not isinstance(value, str):
        raise BadRowError(f"{column} is a {type(value).__name__}, not text")
    return value
