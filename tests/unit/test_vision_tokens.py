"""Images among the tokens: ids and pixels are the processor's own, the answers are learned, images never are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_vision as tiny
from fastft.config import schema
from fastft.data import prepare
from fastft.data.vision import VisionCollator
from fastft.errors import DataError
from fastft.model import load as model_load
from fastft.training import words

ANSWERS = ["A red one.", "Blue, I think.", "Paris"]


@pytest.fixture(scope="module", params=tiny.KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(request.param, tmp_path_factory.mktemp("tokens") / request.param)


def _dialogue(folder: Path) -> list[dict[str, Any]]:
    """Two images in a question, one in the next, none in the last."""
    shown = [{"type": "image", "image": str(folder / "images" / f"{name}.png")} for name in ("red", "blue", "green")]
    text = [{"type": "text", "text": question} for question in tiny.QUESTIONS[:3]]
    return [
        {"role": "user", "content": [shown[0], text[0], shown[1]]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[0]}]},
        {"role": "user", "content": [shown[2], text[1]]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[1]}]},
        {"role": "user", "content": [text[2]]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[2]}]},
    ]


def _read(model: Path, rows: list[Any], folder: Path, **changes: Any) -> tuple[words.Words, prepare.Prepared]:
    tiny.write_images(folder / "images")
    data = folder / "rows.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    config = tiny.config(model, data, **changes)
    read = words.read(config, model_load.locate(config.model))
    return read, prepare.prepare(config.data, config.task, read.tokenizer, 0, seer=read.seer)


def test_ids_and_pixels_are_the_processors(model: Path, tmp_path: Path) -> None:
    messages = _dialogue(tmp_path)
    read, prepared = _read(model, [messages], tmp_path)
    expected = read.processor.apply_chat_template(
        [messages], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=False
    )
    sample = prepared.train[0]
    ids = expected["input_ids"][0].tolist()
    eos = read.tokenizer.eos_token_id
    # The one place where ids are more than the processor's: a template that ends no turn gets an end.
    assert sample["input_ids"] == (ids if "llava" not in model.name else [*ids, eos])
    batch = VisionCollator(read.seer, 0)([sample])
    for key in set(expected) - {"input_ids", "attention_mask"}:
        assert batch[key].dtype == expected[key].dtype, key
        if key in {"mm_token_type_ids", "token_type_ids"}:
            assert batch[key][0].tolist() == expected[key][0].tolist()
        else:
            assert (batch[key] == expected[key]).all(), key
    assert set(batch) == set(expected) | {"labels"}


def test_answers_are_learned_and_images_are_not(model: Path, tmp_path: Path) -> None:
    read, prepared = _read(model, [_dialogue(tmp_path)], tmp_path)
    sample = prepared.train[0]
    ids, labels = np.array(sample["input_ids"]), np.array(sample["labels"])
    assert len(sample["images"]) == 3
    token = read.seer.image_token_id
    inside = np.zeros(len(ids), dtype=bool)
    for image in sample["images"]:
        inside[image.start : image.start + image.length] = True
        assert (ids[image.start : image.start + image.length] == token).sum() >= 1
    assert inside[ids == token].all()
    assert (labels[inside] == -100).all()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], labels != -100, [0]]).astype(int)))
    said = [read.tokenizer.decode(ids[start:end]) for start, end in edges.reshape(-1, 2)]
    assert len(said) == 3
    for text, answer in zip(said, ANSWERS, strict=True):
        assert text.strip().startswith(answer)
    assert len(said[-1].strip()) > len(ANSWERS[-1]), "the end of the last turn is learned too"


def test_a_long_dialogue_ends_before_an_image_that_does_not_fit(model: Path, tmp_path: Path) -> None:
    _, whole = _read(model, [_dialogue(tmp_path)], tmp_path)
    third = whole.train[0]["images"][2]
    for length in (third.start + 1, third.start + third.length - 1):
        _, cut = _read(model, [_dialogue(tmp_path)], tmp_path, data__max_length=length)
        sample = cut.train[0]
        assert len(sample["images"]) == 2
        assert len(sample["input_ids"]) == third.start
        assert sample["input_ids"] == whole.train[0]["input_ids"][: third.start]
        assert cut.report.train.images_lost == 1
        assert any("images left out" in line for line in cut.report.lines())
    _, fits = _read(model, [_dialogue(tmp_path)], tmp_path, data__max_length=third.start + third.length)
    assert len(fits.train[0]["images"]) == 3
    assert fits.report.train.images_lost == 0


def test_a_text_that_writes_the_models_own_mark_is_refused(model: Path, tmp_path: Path) -> None:
    tiny.write_images(tmp_path / "images")
    base = model_load.locate(schema.Model(name=str(model)))
    config = tiny.config(model, tmp_path / "rows.json")
    mark = words.read(config, base).seer.mark
    rows = [[{"role": "user", "content": f"What does {mark} mean?"}, {"role": "assistant", "content": "Nothing."}]]
    with pytest.raises(DataError, match=r"row 1: .*image mark"):
        _read(model, rows, tmp_path)


def test_padded_rows_learn_what_single_rows_learn(model: Path, tmp_path: Path) -> None:
    """The mean over a batch of rows of different lengths and images equals that of the rows one by one."""
    import torch
    from transformers import AutoModelForImageTextToText

    from fastft.training import loss

    dialogue = _dialogue(tmp_path)
    read, prepared = _read(model, [dialogue, dialogue[2:], dialogue[4:]], tmp_path)
    network = AutoModelForImageTextToText.from_pretrained(model).eval()
    assert loss.install(network), "the chunked loss serves this model"
    collate = VisionCollator(read.seer, 0)
    with torch.no_grad():
        together = network(**collate(list(prepared.train)), num_items_in_batch=1).loss
        apart = sum(network(**collate([row]), num_items_in_batch=1).loss for row in prepared.train)
        own = 0.0
        fresh = AutoModelForImageTextToText.from_pretrained(model).eval()
        for row in prepared.train:
            batch = collate([row])
            own += float(fresh(**batch).loss) * int((batch["labels"][:, 1:] != -100).sum())
    # fp32 sums of some twenty losses in another order.
    assert float(together) == pytest.approx(float(apart), rel=1e-5)
    assert float(apart) == pytest.approx(own, rel=1e-5)
