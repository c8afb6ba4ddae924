"""fastft.data against XTuner 0.1.23: token ids and labels that XTuner's own functions made from the same files.

Known differences, on purpose: XTuner joins instruction and an empty input with a line end, we do not (format columns
does, which is used here); XTuner's packing chops samples at the row's end, ours keeps them whole.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fastft.config.schema import Data
from fastft.data.prepare import prepare

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "internlm2")


def known_samples(shared_data: Path, name: str) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of each sample, as XTuner gave them."""
    from safetensors.numpy import load_file

    tensors = load_file(shared_data / "known_answers/xtuner_0.1" / f"internlm2.internlm2_chat.{name}.safetensors")
    ids, labels, offsets = tensors["input_ids"].tolist(), tensors["labels"].tolist(), tensors["offsets"].tolist()
    return [(ids[a:b], labels[a:b]) for a, b in pairwise(offsets)]


def test_multi_turn_dialogues_are_xtuners(tokenizer: Any, shared_data: Path) -> None:
    source = {"source": str(shared_data / "instruction/xtuner_legacy/toy_custom_multi_turn_data.json")}
    data = Data.model_validate({"train": [source], "packing": False})
    ours = [(sample["input_ids"], sample["labels"]) for sample in prepare(data, "sft", tokenizer, 0).train]
    assert ours == known_samples(shared_data, "multi_turn_toy")


def test_alpaca_is_xtuners(tokenizer: Any, shared_data: Path) -> None:
    expected = known_samples(shared_data, "alpaca_en")
    source = {
        "source": str(shared_data / "instruction/alpaca/alpaca_en_demo.json"),
        "max_rows": len(expected),
        "format": "columns",
        "columns": {"user": "{instruction}\n{input}", "assistant": "{output}"},
    }
    data = Data.model_validate({"train": [source], "packing": False})
    ours = [(sample["input_ids"], sample["labels"]) for sample in prepare(data, "sft", tokenizer, 0).train]
    assert len(ours) == 50
    assert ours == expected
