"""Our chat templates against the models' own, as far as these lie in shared/data, and against their written formats."""

import json

import jinja2
import jinja2.ext
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastft.config import chat_templates
from fastft.errors import ConfigError, FileError

DIALOGUES = {
    "one turn": [("user", "Hi, who are you?"), ("assistant", "A model.")],
    "two turns": [("user", "1+1?"), ("assistant", "2"), ("user", "And\n\ntwice?"), ("assistant", "4: {x} <b> 汉字")],
    "system": [("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"), ("user", "Sure?"), ("assistant", "Yes.")],
}
QUESTION = {
    "one": [("user", "Hi")],
    "after a turn": [("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")],
    "with system": [("system", "Be brief."), ("user", "Hi")],
}


def render(text, turns, *, prompt=False):
    """Render as transformers does (`chat_template_utils._compile_jinja_template`)."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = raise_exception
    messages = [{"role": role, "content": content} for role, content in turns]
    return environment.from_string(text).render(
        messages=messages,
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",  # no password
    )


def reference(shared_data, where):
    path = shared_data / "chat_templates" / where if not where.startswith("tokenizers") else shared_data / where
    text = path.read_text(encoding="utf-8")
    return json.loads(text)["chat_template"] if path.suffix == ".json" else text


@pytest.mark.parametrize("turns", [*DIALOGUES.values(), *QUESTION.values()], ids=[*DIALOGUES, *QUESTION])
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("internlm2_chat", "tokenizers/internlm2/tokenizer_config.json"),
        ("chatml", "tokenizers/qwen2.5/tokenizer_config.json"),
        ("chatml", "trl/qwen2_5.jinja"),
        ("llama3_chat", "trl/llama3.jinja"),
        ("gemma", "trl/gemma.jinja"),
        ("gemma", "trl/gemma3.jinja"),
        ("gemma", "llama.cpp/google-gemma-2-2b-it.jinja"),
        ("phi3_chat", "trl/phi3.jinja"),
        ("phi3_chat", "trl/phi3_5.jinja"),
        ("chatglm3", "onnxruntime/chatglm3_tokenizer_config.json"),
    ],
)
def test_renders_as_the_models_own_template(shared_data, name, where, turns):
    system = turns[0][0] == "system"
    if system and where in ("trl/gemma.jinja", "llama.cpp/google-gemma-2-2b-it.jinja"):
        return  # they refuse a system message
    if not system and name == "chatml":
        return  # Qwen2.5 puts in a system message of its own
    prompt = turns[-1][0] == "user"
    expected = render(reference(shared_data, where), turns, prompt=prompt)
    assert render(chat_templates.read(name), turns, prompt=prompt) == expected


@pytest.mark.parametrize("turns", DIALOGUES.values(), ids=DIALOGUES)
@pytest.mark.parametrize(
    ("name", "xtuner", "end"),
    [
        ("default", "default", "</s>"),
        ("internlm_chat", "internlm_chat", ""),
        ("internlm2_chat", "internlm2_chat", ""),
        ("chatml", "qwen_chat", ""),
        ("llama3_chat", "llama3_chat", ""),
        ("phi3_chat", "phi3_chat", ""),
        ("deepseek", "deepseek_v2", ""),
    ],
)
def test_renders_as_xtuner_did(shared_data, name, xtuner, end, turns):
    """XTuner joins format strings: system, instruction, output, suffix (or the end token), separator."""
    templates = json.loads((shared_data / "chat_templates" / "xtuner_prompt_templates_v0.1.23.json").read_text("utf-8"))
    parts = templates["templates"][xtuner]
    # Its deepseek_v2 spells that model's end token out; the template takes the tokenizer's.
    suffix = "</s>" if xtuner == "deepseek_v2" else parts.get("SUFFIX", end)
    expected = ""
    for role, content in turns:
        if role == "system":
            expected += parts["SYSTEM"].replace("{system}", content)
        elif role == "user":
            expected += parts["INSTRUCTION"].replace("{input}", content)
        else:
            expected += content + suffix + parts.get("SEP", "")
    got = render(chat_templates.read(name), turns)
    assert got.removeprefix("<s>").removesuffix("</s>" if name == "phi3_chat" else "") == expected


# No template of these lies in shared/data; the strings follow the model cards.
TWO = [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama2_chat", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nA [/INST] B </s><s>[INST] C [/INST]"),
        ("mistral", "<s>[INST] S\n\nA [/INST] B</s>[INST] C [/INST]"),
        ("glm4", "[gMASK]<sop><|system|>\nS<|user|>\nA<|assistant|>\nB<|user|>\nC<|assistant|>"),
        ("deepseek", "<s>S\n\nUser: A\n\nAssistant: B</s>User: C\n\nAssistant:"),
    ],
)
def test_renders_as_the_model_card_says(name, text):
    assert render(chat_templates.read(name), TWO, prompt=True) == text


@pytest.mark.parametrize("name", chat_templates.names())
def test_a_prompt_is_the_start_of_the_answered_dialogue(name):
    """Else a model would be asked in another form than it was taught."""
    for turns in QUESTION.values():
        prompt = render(chat_templates.read(name), turns, prompt=True)
        whole = render(chat_templates.read(name), [*turns, ("assistant", "Answer")])
        assert whole.startswith(prompt)
        assert whole.removeprefix(prompt).lstrip().startswith("Answer")


@pytest.mark.parametrize("name", ["default", "internlm_chat", "llama2_chat", "mistral", "gemma", "deepseek"])
def test_a_role_without_a_form_is_refused(name):
    with pytest.raises(jinja2.TemplateError, match="not tool"):
        render(chat_templates.read(name), [("user", "A"), ("tool", "B")])


def test_names_and_files(tmp_path):
    assert "internlm2_chat" in chat_templates.names()
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages }}", encoding="utf-8")
    assert chat_templates.read(str(file)) == "{{ messages }}"
    with pytest.raises(ConfigError, match="did you mean gemma"):
        chat_templates.read("gema")
    with pytest.raises(ConfigError, match="no such file"):
        chat_templates.read("nothere.jinja")
    file.write_bytes(b"\xff")
    with pytest.raises(FileError, match="cannot be read as UTF-8"):
        chat_templates.read(str(file))
