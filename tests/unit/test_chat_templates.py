"""Our chat templates against the models' own, as far as these lie in shared/data, and against their written formats."""

import json

import jinja2
import jinja2.ext
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastft.config import chat_templates
from fastft.config.xtuner_names import TEMPLATES
from fastft.data.dialogue import Message
from fastft.data.template import ChatTemplate
from fastft.errors import ConfigError, FileError
from fastft.hub.locate import DEMO_MODEL

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


# Their form has the role's own name in it, so that every role has one.
ROLE_IS_WRITTEN = {"chatglm3", "chatml", "glm4", "internlm2_chat", "llama3_chat", "phi3_chat"}
# XTuner's names whose form is another one here: that of the model itself, which XTuner changes (a system message in a turn
# of its own, a space less before the answer). wizardlm is Vicuna's form, code_llama_chat is that of Llama 2.
OWN_FORM = {
    "chatglm3", "code_llama_chat", "deepseek_moe", "gemma", "llama2_chat", "llama_2_chat", "mistral", "mixtral", "vicuna", "wizardlm",
}  # fmt: skip


def joined_as_xtuner(parts, turns):
    """XTuner joins format strings: system, instruction, output, suffix (or the end token), separator."""
    text, rounds = "", 0
    for role, content in turns:
        if role == "system":
            text += parts["SYSTEM"].replace("{system}", content)
        elif role == "user":
            rounds += 1
            text += parts["INSTRUCTION"].replace("{input}", content).replace("{round}", str(rounds))
        else:
            text += content + parts.get("SUFFIX", "</s>") + parts.get("SEP", "")
    return text


@pytest.mark.parametrize("turns", DIALOGUES.values(), ids=DIALOGUES)
@pytest.mark.parametrize("xtuner", sorted(TEMPLATES.keys() - OWN_FORM))
def test_renders_as_xtuner_did(shared_data, xtuner, turns):
    known = json.loads((shared_data / "chat_templates" / "xtuner_prompt_templates_v0.1.23.json").read_text("utf-8"))
    # A name of 0.1.0, and one of 0.2.0 that repeats Qwen's strings.
    parts = known["templates"][{"chatglm": "chatglm2", "minicpm3": "qwen_chat"}.get(xtuner, xtuner)]
    if xtuner == "deepseek_v2":
        # It spells that model's end token out; the template takes the tokenizer's.
        parts = {**parts, "SUFFIX": "</s>"}
    if turns[0][0] == "system" and "SYSTEM" not in parts:
        turns = turns[1:]
    got = render(chat_templates.read(TEMPLATES[xtuner]), turns)
    start = "[gMASK]sop" if TEMPLATES[xtuner] == "chatglm2" else "<s>"
    expected = joined_as_xtuner(parts, turns)
    assert got.removeprefix(start).removesuffix("</s>" if xtuner == "phi3_chat" else "") == expected


def test_every_prompt_template_of_xtuner_has_a_counterpart(shared_data):
    known = json.loads((shared_data / "chat_templates" / "xtuner_prompt_templates_v0.1.23.json").read_text("utf-8"))
    assert known["templates"].keys() <= TEMPLATES.keys()
    assert set(TEMPLATES.values()) <= set(chat_templates.names())


TWO = [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C")]
HELPFUL = (
    "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeekCompany, and you only"
    " answer questions related to computer science. For politically sensitive questions, security and privacy issues, and"
    " other non-computer science questions, you will refuse to answer."
)
TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("zephyr", "<s><|system|>\nS\n<|user|>\nA\n<|assistant|>\nB</s>\n<|user|>\nC\n<|assistant|>\n"),
        ("moss_sft", "<s>S\n<|Human|>: A<eoh>\nB</s>\n<|Human|>: C<eoh>\n"),
        ("chatglm2", "[gMASK]sopS\n[Round 1]\n\n问：A\n\n答：B</s>\n\n[Round 2]\n\n问：C\n\n答："),  # noqa: RUF001  as ChatGLM2 has it
        ("baichuan_chat", "<s>S\n<reserved_102>A<reserved_103>B</s>\n<reserved_102>C<reserved_103>"),
        ("baichuan2_chat", "<s>S\n<reserved_106>A<reserved_107>B</s>\n<reserved_106>C<reserved_107>"),
        (
            "wizardcoder",
            f"<s>{TASK}\n\nS\n ### Instruction:\nA\n\n### Response:B</s>\n\n### Instruction:\nC\n\n### Response:",
        ),
        (
            "deepseek_coder",
            f"<s>{HELPFUL} S\n### Instruction:\nA\n### Response:\nB</s>\n### Instruction:\nC\n### Response:\n",
        ),
        (
            "cohere_chat",
            (
                "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|>"
                "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>A<|END_OF_TURN_TOKEN|>"
                "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>B<|END_OF_TURN_TOKEN|>"
                "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>C<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
            ),
        ),
    ],
)
def test_renders_as_xtuner_did_in_short(name, text):
    assert render(chat_templates.read(name), TWO, prompt=True) == text


def test_minicpm_has_no_place_for_a_system_message():
    """Nor has XTuner's: it has no SYSTEM."""
    text = chat_templates.read("minicpm")
    assert render(text, TWO[1:], prompt=True) == "<s><用户> A <AI>B</s>\n<用户> C <AI>"
    with pytest.raises(jinja2.TemplateError, match="user and assistant, not system"):
        render(text, TWO)


# No template of these lies in shared/data; the strings follow the model cards.
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vicuna", "<s>S USER: A ASSISTANT: B</s>USER: C ASSISTANT:"),
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
        if name == "minicpm" and turns[0][0] == "system":
            continue
        prompt = render(chat_templates.read(name), turns, prompt=True)
        whole = render(chat_templates.read(name), [*turns, ("assistant", "Answer")])
        assert whole.startswith(prompt)
        assert whole.removeprefix(prompt).lstrip().startswith("Answer")


@pytest.mark.parametrize("name", sorted(set(chat_templates.names()) - ROLE_IS_WRITTEN))
def test_a_role_without_a_form_is_refused(name):
    with pytest.raises(jinja2.TemplateError, match="not tool"):
        render(chat_templates.read(name), [("user", "A"), ("tool", "B")])


@pytest.mark.parametrize("name", chat_templates.names())
def test_answers_and_their_ends_are_learned(name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template, tokenizer.bos_token = None, "<s>"
    tokenizer.add_tokens(["<|user|>"], special_tokens=True)
    template = ChatTemplate(tokenizer, chat_templates.read(name))
    turns = DIALOGUES["two turns"] if name == "minicpm" else DIALOGUES["system"]
    text, spans = template.learned_spans([Message(role, content, learn=role == "assistant") for role, content in turns])
    answers = [content for role, content in turns if role == "assistant"]
    ends = [text[start:end].lstrip().removeprefix(answer) for (start, end), answer in zip(spans, answers, strict=True)]
    assert template.learns_to_stop
    # GLM's answers end where the next turn begins, the last one with the end token put behind the text.
    assert ends == (["<|user|>", tokenizer.eos_token] if name in ("chatglm3", "glm4") else [ends[0]] * 2)
    assert ends[0]


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
