"""fastft.data.template: the same ids as transformers, and the mask on what the assistant says, for real templates.

The templates are those of shared/data/chat_templates, on the Qwen2.5 and InternLM2 tokenizers, to which the marks of all
templates are added as special tokens, as the models that the templates belong to have them.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data import formats, sources
from fastft.data.dialogue import Message
from fastft.data.formats import BadRowError
from fastft.data.template import ChatTemplate
from fastft.errors import DataError

MARKS = re.compile(r"<\|[a-z_]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|\[/?INST\]|\[gMASK\]")  # noqa: RUF001  DeepSeek's bars
THINK = "<think>\n\n</think>\n\n"

# file: what ends a turn, whether contents are stripped, what the assistant says first (in the last turn, in others)
CHATML, GEMMA, LLAMA = ("<|im_end|>", False, "", ""), ("<end_of_turn>", True, "", ""), ("<|eot_id|>", True, "", "")
PHI = ("<|end|>", False, "", "")
TEMPLATES = {
    "llama.cpp/Qwen-Qwen2.5-7B-Instruct.jinja": CHATML,
    "llama.cpp/Qwen-Qwen3-0.6B.jinja": ("<|im_end|>", False, THINK, ""),
    "llama.cpp/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B.jinja": ("<｜end▁of▁sentence｜>", False, "", ""),  # noqa: RUF001
    "llama.cpp/google-gemma-2-2b-it.jinja": GEMMA,
    "llama.cpp/meta-llama-Llama-3.1-8B-Instruct.jinja": LLAMA,
    "llama.cpp/meta-llama-Llama-3.2-3B-Instruct.jinja": LLAMA,
    "llama.cpp/microsoft-Phi-3.5-mini-instruct.jinja": PHI,
    "llama.cpp/mistralai-Mistral-Nemo-Instruct-2407.jinja": ("EOS", False, "", ""),
    "onnxruntime/chatglm3_tokenizer_config.json": ("", False, "\n ", "\n "),
    "onnxruntime/gemma3_chat_template.json": GEMMA,
    "onnxruntime/phi3_tokenizer_config.json": PHI,
    "trl/gemma.jinja": GEMMA,
    "trl/gemma3.jinja": GEMMA,
    "trl/gemma3_training.jinja": GEMMA,
    "trl/gemma_training.jinja": GEMMA,
    "trl/llama3.jinja": LLAMA,
    "trl/llama3_1.jinja": LLAMA,
    "trl/llama3_2.jinja": LLAMA,
    "trl/llama3_training.jinja": LLAMA,
    "trl/llava_next.jinja": ("</s>", False, "", ""),
    "trl/llava_next_training.jinja": ("</s>", False, "", ""),
    "trl/phi3.jinja": PHI,
    "trl/phi3_5.jinja": PHI,
    "trl/phi3_5_training.jinja": PHI,
    "trl/phi3_training.jinja": PHI,
    "trl/qwen2_5.jinja": CHATML,
    "trl/qwen2_5_training.jinja": CHATML,
    "trl/qwen2_5_vl.jinja": CHATML,
    "trl/qwen2_5_vl_training.jinja": CHATML,
    "trl/qwen3.jinja": ("<|im_end|>", False, THINK, ""),
    "trl/qwen3_training.jinja": ("<|im_end|>", False, THINK, THINK),
    "own": CHATML,
}
# Templates that take no system message (Gemma), or leave it out in silence.
NO_SYSTEM = {
    "llama.cpp/google-gemma-2-2b-it.jinja",
    "trl/gemma.jinja",
    "trl/gemma_training.jinja",
    "onnxruntime/phi3_tokenizer_config.json",
}
NEMO = "llama.cpp/mistralai-Mistral-Nemo-Instruct-2407.jinja"


def said(*texts: str, system: str | None = None) -> list[Message]:
    """A dialogue of question, answer, question, answer; all answers are learned."""
    start = [] if system is None else [Message("system", system)]
    return start + [
        Message("assistant", text, learn=True) if index % 2 else Message("user", text)
        for index, text in enumerate(texts)
    ]


DIALOGUES = {
    "single": said("Hello there", "Hi. How are you?"),
    "chinese": said(
        "\u4f60\u597d",
        "\u4f60\u597d\uff01\u6709\u4ec0\u4e48\u53ef\u4ee5\u5e2e\u4f60\uff1f",
        "\u8c22\u8c22",
        "\u4e0d\u5ba2\u6c14",
    ),
    "alike": said("A", "A", "A", "A", "A", "A"),
    "white space": said("  a\n", " \n b  ", "\tc", "d \n\n"),
    "template words": said("assistant\n", "user\nassistant: no", "model\n\nuser", "<b>bold</b> & {{x}} {% y %}"),
    "system": said("Hi", "Hello", "Bye", "See you", system="You are brief."),
}


def template_text(folder: Path, name: str) -> str | None:
    path = folder / "chat_templates" / name
    if name == "own":
        return None
    text = path.read_text(encoding="utf-8")
    return json.loads(text)["chat_template"] if path.suffix == ".json" else text


@pytest.fixture(scope="module", params=["qwen2.5", "internlm2"])
def real_tokenizer(request: pytest.FixtureRequest, shared_data: Path) -> Any:
    """A real tokenizer that knows the marks of every template; loaded once."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / request.param)
    marks = {mark for name in TEMPLATES for mark in MARKS.findall(template_text(shared_data, name) or "")}
    tokenizer.add_tokens(sorted(marks), special_tokens=True)
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": "<|endoftext|>"})  # Qwen has none, Llama's template demands one
    return tokenizer


@pytest.fixture
def tokenizer(real_tokenizer: Any) -> Iterator[Any]:
    """The tokenizer, with its own template put back at the end."""
    own = real_tokenizer.chat_template
    yield real_tokenizer
    real_tokenizer.chat_template = own


def with_template(tokenizer: Any, folder: Path, name: str) -> ChatTemplate:
    text = template_text(folder, name)
    if text is not None:
        tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


def as_dicts(messages: Sequence[Message], name: str) -> list[dict[str, Any]]:
    """What transformers is given; llava's template takes contents in parts only."""
    if "llava" in name:
        return [{"role": m.role, "content": [{"type": "text", "text": m.content}]} for m in messages]
    return [{"role": m.role, "content": m.content} for m in messages]


def learned_texts(tokenizer: Any, ids: Sequence[int], mask: Sequence[bool]) -> list[str]:
    """The learned runs, decoded."""
    runs: list[list[int]] = []
    for place, (token, learned) in enumerate(zip(ids, mask, strict=True)):
        if learned and (place == 0 or not mask[place - 1]):
            runs.append([])
        if learned:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_equal_transformers_and_answers_are_learned(
    tokenizer: Any, shared_data: Path, name: str, dialogue: str
) -> None:
    template, messages = with_template(tokenizer, shared_data, name), DIALOGUES[dialogue]
    if dialogue == "system" and name in NO_SYSTEM:
        with pytest.raises(BadRowError, match=r"System role not supported|leaves out the text of turn 1 \(system\)"):
            template.encode(messages)
        return
    if dialogue == "system" and name == NEMO:
        return  # test_a_system_message_that_only_the_prompt_shows
    ids, mask = template.encode(messages)
    end, strips, lead_last, lead = TEMPLATES[name]
    end = tokenizer.eos_token if end == "EOS" else end
    # A template without any end: the last answer gets eos, the others are ended by what opens the user's turn.
    appended = [] if end else [tokenizer.eos_token_id]
    assert ids.tolist() == tokenizer.apply_chat_template(as_dicts(messages, name), return_dict=False) + appended
    assert mask.shape == ids.shape

    text, spans = template.learned_spans(messages)
    answers = [message.content for message in messages if message.learn]
    last = len(answers) - 1
    expected = [
        (lead_last if index == last else lead)
        + (answer.strip() if strips else answer)
        + (end or (tokenizer.eos_token if index == last else "<|user|>"))
        for index, answer in enumerate(answers)
    ]
    if "llava" in name:  # the template writes " ANSWER</s> "; the model's first token is the blank
        expected = [f" {answer}" for answer in expected]
    assert [text[start:stop] for start, stop in spans] == expected
    if end in tokenizer.get_added_vocab() and dialogue != "white space":
        # White space melts into one token with the template's own, which then belongs to where it starts.
        # InternLM2's decoder turns the low bars inside DeepSeek's marks into blanks.
        learned = learned_texts(tokenizer, ids.tolist(), mask.tolist())
        assert [run.replace("\u2581", " ") for run in learned] == [run.replace("\u2581", " ") for run in expected]
    assert template.end_of_turn == end


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.endswith("_training.jinja")])
def test_the_mask_is_that_of_templates_with_generation_tags(tokenizer: Any, shared_data: Path, name: str) -> None:
    """trl's training templates mark what is learned themselves; they count white space and eos after the end too."""
    template = with_template(tokenizer, shared_data, name)
    for key in ("single", "chinese", "alike"):
        messages = DIALOGUES[key]
        ids, mask = template.encode(messages)
        theirs = tokenizer.apply_chat_template(
            as_dicts(messages, name), return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"]
        more = [
            token for token, ours, other in zip(ids.tolist(), mask.tolist(), theirs, strict=True) if other and not ours
        ]
        less = [
            token for token, ours, other in zip(ids.tolist(), mask.tolist(), theirs, strict=True) if ours and not other
        ]
        assert not tokenizer.decode(more).replace(tokenizer.eos_token, "").strip()
        # llava's template has the blank before the answer outside its tags.
        assert not tokenizer.decode(less).strip()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_what_transformers_opens(tokenizer: Any, shared_data: Path, name: str) -> None:
    template = with_template(tokenizer, shared_data, name)
    messages = DIALOGUES["alike"][:3]
    expected = tokenizer.apply_chat_template(as_dicts(messages, name), add_generation_prompt=True, return_dict=False)
    assert template.prompt(messages) == expected


@pytest.mark.parametrize("name", ["llama.cpp/Qwen-Qwen3-0.6B.jinja", "trl/qwen3.jinja"])
def test_rewritten_turns_are_found(tokenizer: Any, shared_data: Path, name: str) -> None:
    """Qwen3 drops what earlier turns thought and rewrites the white space around the last turn's thoughts."""
    template = with_template(tokenizer, shared_data, name)
    messages = said("q", "<think>\nsecret\n</think>\n\nA1", "r", "<think>open</think>\nA2")
    ids, mask = template.encode(messages)
    assert ids.tolist() == tokenizer.apply_chat_template(as_dicts(messages, name), return_dict=False)
    assert learned_texts(tokenizer, ids.tolist(), mask.tolist()) == [
        "A1<|im_end|>",
        "<think>\nopen\n</think>\n\nA2<|im_end|>",
    ]


def test_turns_that_are_not_learned_are_masked(tokenizer: Any, shared_data: Path) -> None:
    template = with_template(tokenizer, shared_data, "own")
    messages = said("q", "first", "r", "second")
    messages[1] = Message("assistant", "first", learn=False)
    ids, mask = template.encode(messages)
    assert learned_texts(tokenizer, ids.tolist(), mask.tolist()) == ["second<|im_end|>"]


ADD = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}


def call(name: str, identity: str | None = None, **arguments: Any) -> dict[str, Any]:
    """A tool call in OpenAI's form."""
    plain = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return plain if identity is None else {**plain, "id": identity}


def with_calls(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """What transformers is given for a dialogue with calls."""
    found = []
    for message in messages:
        plain: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            plain["tool_calls"] = list(message.tool_calls)
        if message.tool_call_id is not None:
            plain["tool_call_id"] = message.tool_call_id
        found.append(plain)
    return found


# What the assistant says when it calls add(a=1, b="\u4f60"), written down by hand from the templates.
CALLS = {
    "trl/qwen2_5.jinja": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "\u4f60"}}\n</tool_call><|im_end|>',
    "trl/qwen3.jinja": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "\u4f60"}}\n</tool_call><|im_end|>',
    "trl/llama3_1.jinja": '{"name": "add", "parameters": {"a": 1, "b": "\u4f60"}}<|eot_id|>',
    "trl/llama3_2.jinja": '{"name": "add", "parameters": {"a": 1, "b": "\u4f60"}}<|eot_id|>',
    NEMO: '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": "\u4f60"}, "id": "call00000"}]EOS',
}
CALLS["trl/qwen2_5_training.jinja"] = CALLS["llama.cpp/Qwen-Qwen2.5-7B-Instruct.jinja"] = CALLS["trl/qwen2_5.jinja"]
CALLS["trl/qwen3_training.jinja"] = CALLS["llama.cpp/Qwen-Qwen3-0.6B.jinja"] = CALLS["trl/qwen3.jinja"]
CALLS["llama.cpp/meta-llama-Llama-3.1-8B-Instruct.jinja"] = CALLS["trl/llama3_1.jinja"]
CALLS["llama.cpp/meta-llama-Llama-3.2-3B-Instruct.jinja"] = CALLS["trl/llama3_2.jinja"]


@pytest.mark.parametrize("name", CALLS)
def test_tool_calls_are_learned(tokenizer: Any, shared_data: Path, name: str) -> None:
    template = with_template(tokenizer, shared_data, name)
    messages = [
        Message("user", "Hi"),
        Message("assistant", "Hello", learn=True),
        Message("user", "1+\u4f60?"),
        Message("assistant", "", learn=True, tool_calls=(call("add", a=1, b="\u4f60"),)),
        Message("tool", '{"sum": 2}'),
        Message("assistant", "\u4e8c", learn=True),
    ]
    ids, mask = template.encode(messages, [ADD])
    dicts = with_calls(messages)
    if name == NEMO:  # it refuses calls without ids of nine signs; ours are call00000 and so on
        dicts[3]["tool_calls"] = [call("add", "call00000", a=1, b="\u4f60")]
        dicts[4]["tool_call_id"] = "call00000"
    assert ids.tolist() == tokenizer.apply_chat_template(dicts, tools=[ADD], return_dict=False)
    text, spans = template.learned_spans(messages, [ADD])
    expected = CALLS[name].replace("EOS", tokenizer.eos_token)
    end = {"T": "<|eot_id|>", "E": tokenizer.eos_token}["T" if "llama" in name.lower().split("/")[1] else "E"]
    end = "<|im_end|>" if "wen" in name else end
    thoughts = "<think>\n\n</think>\n\n" if "wen3" in name else ""
    early = thoughts if name == "trl/qwen3_training.jinja" else ""
    called = early + expected if name == "trl/qwen3_training.jinja" else expected
    assert [text[start:stop] for start, stop in spans] == [
        f"{early}Hello{end}",
        called,
        f"{thoughts}\u4e8c{end}",
    ]
    learned = learned_texts(tokenizer, ids.tolist(), mask.tolist())
    assert learned == [f"{early}Hello{end}", called, f"{thoughts}\u4e8c{end}"]


@pytest.mark.parametrize("name", ["trl/qwen2_5.jinja", NEMO])
def test_several_calls_with_words_before_them(tokenizer: Any, shared_data: Path, name: str) -> None:
    template = with_template(tokenizer, shared_data, name)
    calls = (call("add", "abcdefgh1", a=1), call("mul", "abcdefgh2", a=2))
    messages = [
        Message("user", "1+1?"),
        Message("assistant", "" if name == NEMO else "Let me see.", learn=True, tool_calls=calls),
        Message("tool", "2", tool_call_id="abcdefgh1"),
        Message("tool", "4", tool_call_id="abcdefgh2"),
        Message("assistant", "Two", learn=True),
    ]
    ids, mask = template.encode(messages, [ADD])
    assert ids.tolist() == tokenizer.apply_chat_template(with_calls(messages), tools=[ADD], return_dict=False)
    learned = learned_texts(tokenizer, ids.tolist(), mask.tolist())
    assert len(learned) == 2
    if name == NEMO:
        eos = tokenizer.eos_token
        assert learned[0] == (
            '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}, "id": "abcdefgh1"}, '
            '{"name": "mul", "arguments": {"a": 2}, "id": "abcdefgh2"}]' + eos
        )
    else:
        assert learned[0] == (
            'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>\n'
            '{"name": "mul", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
        )


@pytest.mark.parametrize("name", ["trl/qwen2_5.jinja", "trl/qwen3.jinja", "trl/llama3_1.jinja", NEMO])
def test_real_tool_calls(tokenizer: Any, shared_data: Path, name: str) -> None:
    """Glaive's dialogues: ids are transformers', every turn of the assistant is learned from its start to its end."""
    template = with_template(tokenizer, shared_data, name)
    rows = list(sources.rows(shared_data / "instruction/toolcall/glaive_toolcall_en_demo.json"))[:40]
    end = {"trl/llama3_1.jinja": "<|eot_id|>", NEMO: tokenizer.eos_token}.get(name, "<|im_end|>")
    calls = 0
    for row in rows:
        item = formats.read_sharegpt(row.value, row.where)
        dicts, given = with_calls(item.messages), 0
        for plain in dicts:
            if name != NEMO:
                continue
            if "tool_calls" in plain:
                plain["tool_calls"] = [
                    {**one, "id": f"call{given + n:05d}"} for n, one in enumerate(plain["tool_calls"])
                ]
                given += len(plain["tool_calls"])
            if plain["role"] == "tool":
                plain["tool_call_id"] = f"call{given - 1:05d}"
        ids, _ = template.encode(item.messages, item.tools)
        tools = list(item.tools) or None
        assert ids.tolist() == tokenizer.apply_chat_template(dicts, tools=tools, return_dict=False)
        text, spans = template.learned_spans(item.messages, item.tools)
        answers = [message for message in item.messages if message.role == "assistant"]
        assert len(spans) == len(answers)
        for (start, stop), message in zip(spans, answers, strict=True):
            said_there = text[start:stop]
            assert said_there.endswith(end)
            assert said_there.count(end) == 1
            assert text[:start].endswith(("assistant\n", "<|end_header_id|>\n\n", "[/INST]", "[/TOOL_RESULTS]"))
            assert message.content.strip() in said_there
            calls += len(message.tool_calls)
            for one in message.tool_calls:
                assert one["function"]["name"] in said_there
    assert calls == sum(turn["from"] == "function_call" for row in rows for turn in row.value["conversations"]) > 20


@pytest.mark.parametrize("name", ["trl/gemma.jinja", "trl/phi3.jinja", "trl/llama3.jinja"])
def test_what_a_template_leaves_out_is_refused(tokenizer: Any, shared_data: Path, name: str) -> None:
    """These know no tools: transformers renders such a dialogue without a word of the call."""
    template = with_template(tokenizer, shared_data, name)
    calls = [Message("user", "1+1?"), Message("assistant", "", learn=True, tool_calls=(call("add", a=1),))]
    with pytest.raises(BadRowError, match=r"leaves out (or repeats )?the tool call of turn 2"):
        template.encode(calls)
    with pytest.raises(BadRowError, match=r"leaves out the tools \(add\)"):
        template.encode(said("Hi", "Hello"), [ADD])


def test_a_token_across_a_border_belongs_to_where_it_starts(shared_data: Path) -> None:
    """Qwen joins the template's line end with the answer's, and a full stop with the line ends after it."""
    from transformers import AutoTokenizer

    qwen = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen2.5")
    assert [qwen.decode([token]) for token in qwen("a\n\nb.\n\n")["input_ids"]] == ["a", "\n\n", "b", ".\n\n"]
    qwen.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}.\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    template = ChatTemplate(qwen)
    text, spans = template.learned_spans(said("a", "\nb"))
    assert [text[start:end] for start, end in spans] == ["\nb."]
    ids, mask = template.encode(said("a", "\nb"))
    assert learned_texts(qwen, ids.tolist(), mask.tolist()) == ["b.\n\n"]


def test_stop_tokens(tokenizer: Any, shared_data: Path) -> None:
    template = with_template(tokenizer, shared_data, "own")
    expected = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id}
    assert set(template.stop_token_ids) == expected
    assert template.learns_to_stop


def test_a_template_that_ends_with_eos_only_teaches_to_stop_in_the_last_turn(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% else %}{{ eos_token }}{% endif %}"
    )
    template = ChatTemplate(tokenizer)
    text, spans = template.learned_spans(said("a", "b", "c", "d"))
    assert [text[start:end] for start, end in spans] == ["b", "d\n\n" + tokenizer.eos_token]
    assert template.learns_to_stop


def test_a_template_without_any_end_says_so(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template = ChatTemplate(tokenizer)
    assert template.learns_to_stop
    text, spans = template.learned_spans(said("a", "b"))
    assert list(template.notes) == [
        f"the chat template ends no turn; {tokenizer.eos_token} is put behind the last answer"
    ]
    # It opens no turn for the assistant either, so that the model has to say who speaks.
    assert [text[start:end] for start, end in spans] == ["assistant: b\n" + tokenizer.eos_token]
    eos, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        assert not ChatTemplate(tokenizer).learns_to_stop
    finally:
        tokenizer.eos_token = eos


def test_glm_stops_where_the_user_would_speak(tokenizer: Any, shared_data: Path) -> None:
    """GLM's generation_config names the same two stops: eos and <|user|>."""
    template = with_template(tokenizer, shared_data, "onnxruntime/chatglm3_tokenizer_config.json")
    assert set(template.stop_token_ids) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")}


def test_a_system_message_that_only_the_prompt_shows(tokenizer: Any, shared_data: Path) -> None:
    """Mistral-Nemo writes it before the last question of a prompt: so the model is asked, and so it is taught."""
    template = with_template(tokenizer, shared_data, NEMO)
    messages = DIALOGUES["system"]
    ids, mask = template.encode(messages)
    prompt = tokenizer.apply_chat_template(as_dicts(messages[:-1], NEMO), add_generation_prompt=True, return_dict=False)
    eos = tokenizer.eos_token_id
    assert ids.tolist() == [*prompt, *tokenizer("See you", add_special_tokens=False)["input_ids"], eos]
    bos = tokenizer.bos_token
    assert template.learned_spans(messages)[0] == (
        f"{bos}[INST]Hi[/INST]Hello{tokenizer.eos_token}[INST]You are brief.\n\nBye[/INST]See you{tokenizer.eos_token}"
    )
    assert learned_texts(tokenizer, ids.tolist(), mask.tolist()) == [
        f"Hello{tokenizer.eos_token}",
        f"See you{tokenizer.eos_token}",
    ]
    assert any(note.startswith("the system message stands where") for note in template.notes)
    unlearned = [*messages[:-1], Message("assistant", "See you", learn=False)]
    assert template.encode(unlearned)[0].tolist() == ids.tolist()
    text, spans = template.learned_spans(unlearned)
    assert [text[start:end] for start, end in spans] == [f"Hello{tokenizer.eos_token}"]


def test_a_dialogue_that_begins_with_the_assistant(tokenizer: Any, shared_data: Path) -> None:
    template = with_template(tokenizer, shared_data, "own")
    messages = [Message("assistant", "Welcome", learn=True), *said("a", "b")]
    ids, mask = template.encode(messages)
    assert learned_texts(tokenizer, ids.tolist(), mask.tolist()) == ["Welcome<|im_end|>", "b<|im_end|>"]


def test_without_a_template_there_is_a_clear_error_or_the_fallback(tokenizer: Any) -> None:
    own, tokenizer.chat_template = tokenizer.chat_template, None
    with pytest.raises(DataError, match=r"has none; set model\.chat_template"):
        ChatTemplate(tokenizer)
    template = ChatTemplate(tokenizer, own)
    assert template.text == own
    ids, _ = template.encode(DIALOGUES["single"])
    tokenizer.chat_template = own
    assert ids.tolist() == tokenizer.apply_chat_template(as_dicts(DIALOGUES["single"], ""), return_dict=False)


def test_the_tokenizers_own_template_wins(tokenizer: Any) -> None:
    assert ChatTemplate(tokenizer, "{{ 1/0 }}").text == tokenizer.chat_template


def test_a_template_that_takes_nothing_is_refused(tokenizer: Any) -> None:
    for text in ("{{ raise_exception('never') }}", "{{ messages[0].missing.field }}", "{% if %}", "no contents"):
        tokenizer.chat_template = text
        with pytest.raises(DataError, match="does not take one question and one answer"):
            ChatTemplate(tokenizer)


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1).filter(str.strip) | st.sampled_from(
    [
        "<|im_end|>",
        "<|im_start|>assistant\n",
        " a ",
        "\n",
        "<think>",
        "</think>\n\n",
        "a\u0301 \U0001f468\u200d\U0001f469",
    ]
)


@given(texts=st.lists(TEXTS, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", ["own", "trl/qwen3.jinja", "trl/gemma3.jinja"])
def test_any_text_is_found_again(real_tokenizer: Any, shared_data: Path, name: str, texts: list[str]) -> None:
    """Whatever people and models say, also the template's own marks: ids are transformers', each answer is learned."""
    own = real_tokenizer.chat_template
    try:
        template = with_template(real_tokenizer, shared_data, name)
        messages = said(*texts)
        ids, mask = template.encode(messages)
        assert ids.tolist() == real_tokenizer.apply_chat_template(as_dicts(messages, name), return_dict=False)
        text, spans = template.learned_spans(messages)
        assert len(spans) == len(texts) // 2
        assert mask.any()
        if name == "own":
            assert [text[start:end] for start, end in spans] == [f"{answer}<|im_end|>" for answer in texts[1::2]]
        if name == "trl/gemma3.jinja":
            # Jinja's trim is Python's strip.
            assert [text[start:end] for start, end in spans] == [f"{a.strip()}<end_of_turn>" for a in texts[1::2]]
    finally:
        real_tokenizer.chat_template = own
