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
    read, prepared = _read(model, [messages], tmp_path, data__packing=False)
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


def test_padded_or_packed_rows_learn_what_single_rows_learn(model: Path, tmp_path: Path) -> None:
    """Losses of rows of different lengths and images: one by one by the model's own loss, in a batch, in one row."""
    import torch
    from transformers import AutoModelForImageTextToText

    from fastft.training import loss

    dialogue = _dialogue(tmp_path)
    rows = [dialogue, dialogue[4:], dialogue[2:], dialogue[4:]]
    read, prepared = _read(model, rows, tmp_path, data__packing=False)
    plain = AutoModelForImageTextToText.from_pretrained(model).eval()
    network = AutoModelForImageTextToText.from_pretrained(model).eval()
    assert loss.install(network), "the chunked loss serves this model"
    collate = VisionCollator(read.seer, 0)

    def total(batch: dict[str, torch.Tensor]) -> float:
        with torch.no_grad():
            return float(network(**batch, num_items_in_batch=1).loss)

    own = 0.0
    for row in prepared.train:
        batch = collate([row])
        with torch.no_grad():
            own += float(plain(**batch).loss) * int((batch["labels"][:, 1:] != -100).sum())
    # fp32 sums of some thirty losses in another order.
    expected = pytest.approx(own, rel=1e-5)
    assert total(collate(list(prepared.train))) == expected
    if not read.seer.packs:
        assert model.name == "gemma3"
        return
    length = len(prepared.train[0]["input_ids"]) + len(prepared.train[1]["input_ids"]) + 5
    _, packed = _read(model, rows, tmp_path, data__max_length=length)
    assert packed.report.packing
    assert len(packed.train) == 2
    for flatten in (False, True):
        batch = VisionCollator(read.seer, 0, packed=True, flatten=flatten)(list(packed.train))
        assert "attention_mask" not in batch
        assert batch["input_ids"].shape[0] == (1 if flatten else 2)
        assert total(batch) == expected


def test_positions_of_packed_rows_are_the_models(model: Path, tmp_path: Path) -> None:
    """Rows and columns of images, as Qwen-VL counts them itself for a sample alone."""
    import torch
    from transformers import AutoModelForImageTextToText

    if not model.name.startswith("qwen"):
        pytest.skip("this model counts positions in a line")
    dialogue = _dialogue(tmp_path)
    read, apart = _read(model, [dialogue, dialogue[2:], dialogue[4:]], tmp_path, data__packing=False)
    _, packed = _read(model, [dialogue, dialogue[2:], dialogue[4:]], tmp_path)
    assert len(packed.train) == 1
    network = AutoModelForImageTextToText.from_pretrained(model)
    found = []
    for row in apart.train:
        batch = VisionCollator(read.seer, 0)([row])
        given = {name: batch.get(name) for name in ("mm_token_type_ids", "image_grid_thw", "attention_mask")}
        positions, _ = network.model.get_rope_index(batch["input_ids"], **given)
        found.append(positions)
    batch = VisionCollator(read.seer, 0, packed=True)(list(packed.train))
    assert torch.equal(batch["position_ids"][1:], torch.cat(found, dim=2))
    assert batch["position_ids"][0, 0].tolist() == packed.train[0]["position_ids"]


@pytest.mark.parametrize(
    ("kind", "template", "real"),
    [
        ("qwen2_5_vl", "trl/qwen2_5_vl.jinja", True),
        ("qwen2_vl", "trl/qwen2_5_vl.jinja", False),
        ("gemma3", "trl/gemma3.jinja", False),
        ("llava_next", "trl/llava_next.jinja", False),
    ],
)
def test_real_templates_and_images(shared_data: Path, tmp_path: Path, kind: str, template: str, *, real: bool) -> None:
    """The families' published templates, Qwen's own tokenizer, photographs."""
    tokenizer = None
    if real:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen2.5")
    text = (shared_data / "chat_templates" / template).read_text(encoding="utf-8")
    model = tiny.write_model(kind, tmp_path / "model", tokenizer=tokenizer, template=text)
    source = shared_data / "multimodal" / "mllm_demo.json"
    config = tiny.config(model, source, data__max_length=4096, data__packing=False)
    read = words.read(config, model_load.locate(config.model))
    prepared = prepare.prepare(config.data, config.task, read.tokenizer, 0, seer=read.seer)
    rows = json.loads(source.read_text(encoding="utf-8"))
    assert len(prepared.train) == len(rows)
    for sample, row in zip(prepared.train, rows, strict=True):
        shown = iter(row["images"])
        messages = []
        for turn in row["messages"]:
            before, *after = turn["content"].split("<image>")
            parts = [{"type": "text", "text": before}] if before else []
            for rest in after:
                parts.append({"type": "image", "image": str(source.parent / next(shown))})
                parts += [{"type": "text", "text": rest}] if rest else []
            messages.append({"role": turn["role"], "content": parts})
        expected = read.processor.apply_chat_template([messages], tokenize=True, return_dict=True)["input_ids"][0]
        assert sample["input_ids"] == list(expected)
        labels = sample["labels"]
        said = read.tokenizer.decode([label for label in labels if label != -100])
        for turn in row["messages"]:
            assert (turn["content"] in said) == (turn["role"] == "assistant")
        opened = read.processor.apply_chat_template(
            [messages[:1]], tokenize=True, return_dict=True, add_generation_prompt=True
        )["input_ids"][0]
        first = next(place for place, label in enumerate(labels) if label != -100)
        assert sample["input_ids"][:first] == list(opened)[:first]
        assert len(opened) - first in {0, 1}, "a space may belong to the answer's first token"
