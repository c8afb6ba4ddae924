"""fastft.data.preview: what log-dataset prints."""

from pathlib import Path
from typing import Any

import pytest

from fastft.config.schema import Data
from fastft.data import preview
from fastft.data.prepare import prepare
from fastft.data.samples import Samples


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "internlm2")


@pytest.fixture
def samples(tokenizer: Any, tmp_path: Path) -> Samples:
    """One packed row of two dialogues; the second answer holds a code that would colour the terminal."""
    path = tmp_path / "rows.csv"
    path.write_text("instruction,output\nHello there,Hi \u4f60\u597d\nQ,A\x1b[31m\n", encoding="utf-8")
    data = Data.model_validate({"train": [{"source": str(path)}], "max_length": 128})
    return prepare(data, "sft", tokenizer, 0).train


FIRST = "<s><|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n{0}Hi \u4f60\u597d<|im_end|>{1}\n"
SECOND = "<s><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n{0}A\\x1b[31m<|im_end|>{1}\n"


def test_learned_text_stands_in_place(samples: Samples, tokenizer: Any) -> None:
    shown = preview.masked_text(samples[0], tokenizer, colour=False).plain
    assert shown == (FIRST + preview.DOCUMENT_BORDER + SECOND).format("[[", "]]")


def test_colour_marks_what_is_learned(samples: Samples, tokenizer: Any) -> None:
    text = preview.masked_text(samples[0], tokenizer)
    assert text.plain == (FIRST + preview.DOCUMENT_BORDER + SECOND).format("", "")
    learned = [text.plain[span.start : span.end] for span in text.spans if span.style == preview.LEARNED_STYLE]
    assert learned == ["Hi \u4f60\u597d<|im_end|>", "A\\x1b[31m<|im_end|>"]


def test_the_header_says_where_a_sample_came_from(samples: Samples, tmp_path: Path) -> None:
    sample = samples[0]
    learned = sum(label >= 0 for label in sample["labels"])
    assert preview.header(samples, 0) == (
        f"sample 0, from {tmp_path / 'rows.csv'}:2 and 1 more: {len(sample['labels'])} tokens, {learned} learned"
    )


def test_each_view(samples: Samples, tokenizer: Any) -> None:
    def shown(show: preview.Show) -> str:
        return preview.view(samples, 0, tokenizer, show, colour=False).plain

    head = preview.header(samples, 0) + "\n"
    assert shown("input_ids") == head + str(samples[0]["input_ids"])
    assert shown("labels") == head + str(samples[0]["labels"])
    assert shown("text") == head + (FIRST + preview.DOCUMENT_BORDER + SECOND).format("", "")
    everything = shown("all")
    assert [line for line in everything.splitlines() if line in ("text:", "masked_text:", "input_ids:", "labels:")] == [
        "text:",
        "masked_text:",
        "input_ids:",
        "labels:",
    ]
