"""fastft.data.byte_level: the tokens and masks of the tokenizers library, for any text and any stretch of it."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastft import _native
from fastft.config.schema import Data
from fastft.data import byte_level
from fastft.data.dialogue import Message
from fastft.data.prepare import prepare
from fastft.data.template import ChatTemplate, _mask
from fastft.errors import DataError

LLAMA3 = next(pattern for pattern, name in byte_level.PATTERNS.items() if name == "llama3")
NAMES = ("qwen2.5", "gpt2", "llama3", "trimmed", "normalized", "internlm2", "mistral_v3")


REAL = ("qwen2.5", "gpt2", "internlm2", "mistral_v3")


@pytest.fixture(scope="module")
def real_tokenizers(shared_data: Path) -> dict[str, Any]:
    """Real tokenizers with GPT-2's and Qwen's patterns, and variants of the latter."""
    from tokenizers import Regex, pre_tokenizers, processors
    from transformers import AutoTokenizer

    found = {name: AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name) for name in REAL}
    for name in ("llama3", "trimmed", "normalized"):
        found[name] = deepcopy(found["qwen2.5"])
    found["llama3"].backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found["trimmed"].backend_tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    found["normalized"].add_tokens(["hello", " wide ", "\u4f60\u597d"])
    for tokenizer in found.values():
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return found


@pytest.fixture(params=NAMES)
def tokenizer(real_tokenizers: dict[str, Any], request: pytest.FixtureRequest) -> Any:
    return real_tokenizers[request.param]


@pytest.fixture(scope="module")
def fast_roads(real_tokenizers: dict[str, Any]) -> dict[str, byte_level.ByteLevel | None]:
    """Made once: they keep what they have learned, as in a run."""
    return {name: byte_level.of(tokenizer) for name, tokenizer in real_tokenizers.items()}


SNIPPETS = st.sampled_from(
    [
        *(
            "'s",
            "'LL",
            "'re",
            "'\u017f",
            "\u2019s",
            " '",
            "12345",
            " 7",
            "\u0663",
            "\u00bd",
            "  ",
            "\n",
            "\r\n",
            "\t",
            "\u3000",
            "\xa0",
        ),
        *(
            "\n\n  ",
            " .",
            "...\n",
            "Hello",
            " world",
            "\u4f60\u597d",
            "\uff01",
            "e\u0301",
            "\u00e9",
            "\U0001f468\u200d\U0001f469",
        ),
        *(
            "<|im_start|>",
            "<|im_end|>",
            "<|endoftext|>",
            "<|im_",
            "hello",
            " wide ",
            "a" * 300,
            "\x00",
            "\u1e9e",
            "\u2028",
            "\u2581",
            " \u2581",
            "<s>",
            "[INST]",
            "\t\t  \t",
            "\n    \n",
        ),
    ]
)
TEXTS = (
    st.lists(SNIPPETS | st.text(max_size=8), max_size=12)
    .map("".join)
    .filter(lambda text: not any(0xD800 <= ord(sign) < 0xE000 for sign in text))
)


@given(data=st.data(), text=TEXTS)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("name", NAMES)
def test_any_text_has_the_librarys_tokens_and_masks(
    real_tokenizers: dict[str, Any],
    fast_roads: dict[str, byte_level.ByteLevel | None],
    name: str,
    data: st.DataObject,
    text: str,
) -> None:
    tokenizer, fast = real_tokenizers[name], fast_roads[name]
    assert fast is not None
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    spans = list(zip(borders[::2], borders[1::2], strict=False))
    (found,), others = fast.encode([text], [spans])
    ids, learned = by_the_library(tokenizer, text, spans)
    if others:
        assert others == [0]
        assert "\u017f" in text or not text.isascii()
        assert name in ("qwen2.5", "gpt2", "llama3", "trimmed", "normalized") or "\u2581" in text
        return
    assert found[0].tolist() == ids
    assert found[1].tolist() == learned


def by_the_library(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Ids, and which tokens start in a span, by the offsets that the library gives."""
    (encoding,) = tokenizer.backend_tokenizer.encode_batch([text], add_special_tokens=False)
    return encoding.ids, _mask(encoding, text, spans).tolist()


@pytest.mark.parametrize("name", ["alpaca/alpaca_en_demo.json", "alpaca/alpaca_zh_demo.json", "alpaca/identity.json"])
def test_real_texts(tokenizer: Any, shared_data: Path, name: str) -> None:
    rows = json.loads((shared_data / "instruction" / name).read_text(encoding="utf-8"))[:300]
    texts = [f"{row['instruction']}\n{row['input']}<|im_end|>\n{row['output']}" for row in rows]
    spans = [[(text.index("<|im_end|>"), len(text))] for text in texts]
    fast = byte_level.of(tokenizer)
    assert fast is not None
    found, others = fast.encode(texts, spans)
    assert len(others) < len(texts) / 10
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    for index, ((ids, _), encoding) in enumerate(zip(found, encodings, strict=True)):
        assert index in others or ids.tolist() == encoding.ids
    # What has been learned from the first batch is used for the second.
    again, _ = fast.encode(texts, spans)
    assert [ids.tolist() for ids, _ in again] == [ids.tolist() for ids, _ in found]


def test_classes_are_unicodes() -> None:
    """Of characters that every version of Unicode since 3.0 has."""
    classes = {
        chr(code): byte_level.classes_of(code >> 12)[code & 0xFFF]
        for code in map(ord, "aZ\u00e9\u4f60\u0431 \t\n\u3000\xa07\u00bd\u0663.\u3002_")
    }
    assert "".join(sign for sign, kind in classes.items() if kind == 1) == "aZ\u00e9\u4f60\u0431"
    assert "".join(sign for sign, kind in classes.items() if kind == 2) == "7\u00bd\u0663"
    assert "".join(sign for sign, kind in classes.items() if kind == 3) == " \t\n\u3000\xa0"


def test_dialogues_are_the_same_on_both_roads(real_tokenizers: dict[str, Any], shared_data: Path) -> None:
    tokenizer = real_tokenizers["qwen2.5"]
    tokenizer.chat_template = (shared_data / "chat_templates/trl/qwen2_5.jinja").read_text(encoding="utf-8")
    messages = [
        Message("user", "\u4f60\u597d"),
        Message("assistant", "\n\nHi.\n\n", learn=True),
        Message("user", " q "),
        Message("assistant", "e\u0301", learn=True),  # not normalized: the library's road
    ]
    dialogues = [messages[:2], messages]
    plain, fast = ChatTemplate(tokenizer), byte_level.of(tokenizer)
    rendered = [plain.learned_spans(dialogue) for dialogue in dialogues]
    texts, spans = [text for text, _ in rendered], [found for _, found in rendered]
    for ours, theirs in zip(plain.encode_batch(texts, spans, fast), plain.encode_batch(texts, spans), strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.learned.tolist() == theirs.learned.tolist()


def test_what_it_does_not_know_goes_the_librarys_road(
    real_tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

    def changed(change: Any, name: str = "qwen2.5") -> Any:
        other = deepcopy(real_tokenizers[name])
        change(other)
        return byte_level.of(other)

    def pattern(other: Any) -> None:
        split = pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "{1,2}")), "isolated")
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])

    def normalizer(other: Any) -> None:
        other.backend_tokenizer.normalizer = normalizers.Lowercase()

    assert changed(lambda _: None) is not None
    assert changed(pattern) is None
    assert changed(normalizer) is None
    assert changed(lambda other: other.add_tokens([AddedToken("<x>", lstrip=True)])) is None

    def replaces_more(other: Any) -> None:
        other.backend_tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Replace(" ", "\u2581"), normalizers.Replace("a", "b")]
        )

    def splits(other: Any) -> None:
        other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()

    def looks_up(other: Any) -> None:
        other.backend_tokenizer.model.ignore_merges = True

    assert changed(lambda _: None, "internlm2") is not None
    assert changed(replaces_more, "internlm2") is None
    assert changed(splits, "internlm2") is None
    assert changed(looks_up, "internlm2") is None
    assert changed(lambda other: other.add_tokens(["word"]), "mistral_v3") is None  # found in the normalized text
    monkeypatch.setenv("FASTFT_BYTE_LEVEL", "off")
    assert changed(lambda _: None) is None


def test_other_tokens_than_the_librarys_are_an_error(real_tokenizers: dict[str, Any]) -> None:
    """Should the library ever cut in another way: seen in the rows that go both roads."""
    tokenizer = real_tokenizers["gpt2"]
    fast = byte_level.of(tokenizer)
    assert fast is not None
    fast._core = _native.ByteLevel("qwen2", [], [], bytes(6) * len(tokenizer))
    with pytest.raises(DataError, match=r"gives other tokens .* FASTFT_BYTE_LEVEL=off"):
        fast.encode(["12345 12345"], [[]])


def test_the_number_of_threads_changes_nothing(
    real_tokenizers: dict[str, Any], shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = real_tokenizers["qwen2.5"]
    texts = [
        (shared_data / "pretrain/tinyshakespeare.txt").read_text(encoding="utf-8")[n * 5000 :][:5000] for n in range(60)
    ]
    found = []
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    for threads in ("1", "3"):
        monkeypatch.setenv("RAYON_NUM_THREADS", threads)
        fast = byte_level.of(tokenizer)
        assert fast is not None
        found.append([ids.tolist() for ids, _ in fast.encode(texts, [()] * len(texts))[0]])
    assert found[0] == found[1]


@pytest.mark.parametrize("task", ["sft", "pretrain"])
def test_a_data_set_is_the_same_on_both_roads(
    byte_tokenizer: Any, tmp_path: Path, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"instruction": f"q{n} \u4f60", "output": f" answer{n}'s <e> "} for n in range(400)]
    if task == "pretrain":
        rows = [{"text": row["output"]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = Data.model_validate({"train": [{"source": str(path)}], "max_length": 128})
    asked: list[Any] = []
    of = byte_level.of
    monkeypatch.setattr(byte_level, "of", lambda tokenizer: asked.append(of(tokenizer)) or asked[-1])
    fast = list(prepare(data, task, byte_tokenizer, seed=0).train)
    monkeypatch.setenv("FASTFT_BYTE_LEVEL", "off")
    assert list(prepare(data, task, byte_tokenizer, seed=0).train) == fast
    assert [isinstance(found, byte_level.ByteLevel) for found in asked] == [True, False]


WORDS = [(prepends, crossing) for prepends in (False, True) for crossing in (False, True)]


@pytest.fixture(scope="module")
def made_words() -> dict[tuple[bool, bool], Any]:
    """Tokenizers of SentencePiece's kind: with and without a blank before each text, with and without tokens across blanks."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    texts = [
        "the cat and the dog, the cat of the day",
        "a\tb  \n   c\n    d of the end",
        "\u4f60\u597d of the\u3002",
    ] * 9
    found = {}
    for prepends, crossing in WORDS:
        steps = [normalizers.Prepend("\u2581")] * prepends + [normalizers.Replace(" ", "\u2581")]
        trained = Tokenizer(models.BPE(unk_token="<unk>"))
        trained.normalizer = normalizers.Sequence(steps)
        if not crossing:
            trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>"]))
        model = json.loads(trained.to_str())["model"]
        vocabulary = {**model["vocab"]}
        for byte in range(256):
            vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
        merges = [tuple(pair) for pair in model["merges"]]
        made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        made.normalizer = normalizers.Sequence(steps)
        made.add_special_tokens(["<s>", "<e>"])
        found[prepends, crossing] = made
    return found


PARTS = [
    "the",
    " the ",
    " ",
    "  ",
    "\t",
    "\n",
    "of",
    " of the",
    "a\tb ",
    "<s>",
    "<e>",
    "z",
    "\U0001f600",
    "\u4f60",
    ". ",
]


@given(parts=st.lists(st.sampled_from(PARTS), max_size=14), data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("kind", WORDS)
def test_any_text_of_words(
    kind: tuple[bool, bool], made_words: dict[tuple[bool, bool], Any], parts: list[str], data: st.DataObject
) -> None:
    from types import SimpleNamespace

    tokenizer = SimpleNamespace(backend_tokenizer=made_words[kind])
    fast, text = byte_level.of(tokenizer), "".join(parts)
    assert fast is not None
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    spans = list(zip(borders[::2], borders[1::2], strict=False))
    (found,), others = fast.encode([text], [spans])
    assert others == []
    ids, learned = by_the_library(tokenizer, text, spans)
    assert found[0].tolist() == ids
    assert found[1].tolist() == learned


def test_what_may_stand_before_a_blank(made_words: dict[tuple[bool, bool], Any]) -> None:
    from fastft.data import sentence_pieces

    crossing, plain = (
        sentence_pieces.joiners(made_words[False, crosses].get_vocab(with_added_tokens=False))
        for crosses in (True, False)
    )
    assert {"e", "\t", "\n"} & set(crossing)
    assert plain == ""
    assert sentence_pieces.joiners({"\u2581\u2581": 0, "\n\u2581": 1, "a\u2581b": 2, "\u2581x": 3}) == "\na"
