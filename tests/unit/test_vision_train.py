"""Vision-language models trained from a config: a tiny random one of each architecture, with drawn images."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_vision as tiny
from fastft.chat import session
from fastft.errors import ConfigError, DataError
from fastft.model import load as model_load
from fastft.model import vision
from fastft.training import run, words

# One of each way to be built: CLIP and a projector, Qwen's tower that holds its projector (one, and a list of them).
FEW = ("llava", "qwen2_5_vl", "qwen3_vl")
# Which run in every test; the others in `make test-all`.
QUICK = ("qwen2_5_vl", "gemma3")
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: tiny.write_model(kind, folder / kind) for kind in tiny.KINDS}


def _losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


def _load(models: dict[str, Path], kind: str, folder: Path, method: str, **changes: Any) -> model_load.Loaded:
    config = tiny.config(models[kind], tiny.write_rows(folder), kind=method, **changes)
    base = model_load.locate(config.model)
    return model_load.load_weights(config, base, words.read(config, base).tokenizer)


def _trained(model: Any) -> set[str]:
    """Which parts have weights with a gradient, and whether whole or by adapters."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = vision.parts(plain)
    return {
        f"{found.of(name)} {'adapter' if 'lora_' in name else 'whole'}"
        for name, parameter in plain.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("kind", [kind if kind in QUICK else pytest.param(kind, marks=SLOW) for kind in tiny.KINDS])
def test_a_run_learns_from_images_and_its_adapter_answers(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    settings = {
        "train__max_steps": 10,
        "train__batch_size": 8,
        "train__warmup_ratio": 0.0,
        "train__gradient_checkpointing": True,
    }
    config = tiny.config(models[kind], tiny.write_rows(tmp_path), **settings, train__sample_steps=5)
    config = config.model_copy(
        update={
            "samples": config.samples.model_copy(
                update={"prompts": ("What colour is it?",), "images": (str(tmp_path / "images" / "red.png"),)}
            )
        }
    )
    result = run.run(config, work_dir=tmp_path / "run")
    losses = _losses(tmp_path / "run")
    # Every batch holds all rows, in another order: it is the same batch.
    assert losses[1] < losses[0]
    assert losses[-1] < losses[1]
    assert len((tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()) == 3

    files = {path.name for path in result.artifact.iterdir()}
    assert {"adapter_model.safetensors", "preprocessor_config.json", "chat_template.jinja"} <= files
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (models[kind] / name).exists():
            assert (result.artifact / name).read_bytes() == (models[kind] / name).read_bytes()
    names = load_file(result.artifact / "adapter_model.safetensors")
    assert names
    assert all("language_model" in name for name in names)

    one, two = (session.load(str(result.artifact)) for _ in range(2))
    base = session.load(str(models[kind]))
    question = session.question("What colour is it?", images=[session.image(str(tmp_path / "images" / "red.png"))])
    with torch.no_grad():
        logits = [talk.model(**talk.inputs(question)).logits for talk in (one, two, base)]
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)


@pytest.mark.parametrize("kind", FEW)
def test_the_saved_adapter_is_the_trained_model(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """LLM by adapters, projector whole, tower by adapters of another rank: all of it comes back."""
    learn = {"projector": "full", "tower": "lora", "tower_lora": {"r": 2, "alpha": 4}}
    loaded = _load(models, kind, tmp_path, "lora", vision={"learn": learn})
    assert _trained(loaded.model) == {"llm adapter", "projector whole", "tower adapter"}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
    loaded.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ranks = {
        name: value.shape[0]
        for name, value in load_file(tmp_path / "adapter/adapter_model.safetensors").items()
        if "lora_A" in name
    }
    assert {ranks[name] for name in ranks if "language_model" in name} == {4}
    assert {ranks[name] for name in ranks if "language_model" not in name} == {2}
    back = session.load(str(models[kind]), adapter=str(tmp_path / "adapter"))
    question = session.question("What colour is it?", images=[session.image(str(tmp_path / "images" / "red.png"))])
    inputs = back.inputs(question)
    loaded.model.eval()
    with torch.no_grad():
        assert torch.equal(back.model(**inputs).logits, loaded.model(**inputs).logits)


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
@pytest.mark.parametrize(
    ("method", "learn", "expected"),
    [
        ("lora", {}, {"llm adapter"}),
        ("lora", {"projector": "full"}, {"llm adapter", "projector whole"}),
        ("lora", {"llm": "frozen", "tower": "lora"}, {"tower adapter"}),
        ("lora", {"projector": "full", "tower": "full"}, {"llm adapter", "projector whole", "tower whole"}),
        ("full", {}, {"llm whole"}),
        ("full", {"projector": "full", "tower": "full"}, {"llm whole", "projector whole", "tower whole"}),
        ("full", {"llm": "frozen", "projector": "full"}, {"projector whole"}),
    ],
)
def test_what_is_trained(
    models: dict[str, Path], tmp_path: Path, kind: str, method: str, learn: Any, expected: set[str]
) -> None:
    loaded = _load(models, kind, tmp_path, method, vision={"learn": learn})
    found = _trained(loaded.model)
    if expected >= {"tower whole", "llm adapter"} and kind.startswith("qwen"):
        expected = expected - {"projector whole"}  # it lies in the tower, and goes by that name
    assert found == expected


def test_qlora_leaves_tower_and_projector_as_they_are(models: dict[str, Path], tmp_path: Path) -> None:
    loaded = _load(models, "qwen2_5_vl", tmp_path, "qlora")
    packed = [name for name, module in loaded.model.named_modules() if type(module).__name__.startswith("Linear4bit")]
    assert packed
    assert all("language_model" in name for name in packed)
    assert loaded.quantized is not None
    assert any("visual" in name for name in loaded.quantized.skip)
    result = run.run(
        tiny.config(
            models["qwen2_5_vl"], tmp_path / "rows.json", kind="qlora", train__max_steps=8, train__batch_size=8
        ),
        work_dir=tmp_path / "run",
    )
    losses = _losses(tmp_path / "run")
    assert losses[-1] < losses[0]
    assert (result.artifact / "preprocessor_config.json").is_file()


def test_a_tower_that_holds_its_projector_is_not_trained_without_it(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set vision.learn.projector: full too"):
        _load(models, "qwen3_vl", tmp_path, "lora", vision={"learn": {"tower": "full"}})


def test_full_training_writes_a_whole_model(models: dict[str, Path], tmp_path: Path) -> None:
    config = tiny.config(models["llava"], tiny.write_rows(tmp_path), kind="full", train__lr=1e-3, data__eval_rows=2)
    result = run.run(config, work_dir=tmp_path / "run")
    talk = session.load(str(result.artifact))
    image = session.image(str(tmp_path / "images" / "red.png"))
    said = session.answer(talk, session.question("What colour?", images=[image]), session.Sampling(max_new_tokens=3))
    assert isinstance(said, str)
    before, after = (load_file(folder / "model.safetensors") for folder in (models["llava"], result.artifact))
    assert before.keys() == after.keys()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"language_model"}


@pytest.mark.parametrize("kind", [pytest.param("llava", marks=SLOW), "qwen2_vl"])
def test_a_resumed_run_is_the_unbroken_one(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    def config(**changes: Any) -> Any:
        settings = {
            "method__lora": {"r": 4, "alpha": 8, "dropout": 0.2},
            "train__max_steps": 6,
            "train__grad_accumulation": 2,
            "vision": {"learn": {"projector": "full"}},
            "output__save_steps": 3,
        }
        return tiny.config(models[kind], tiny.write_rows(tmp_path), **{**settings, **changes})

    whole = run.run(config(), work_dir=tmp_path / "whole")
    run.run(config(), work_dir=tmp_path / "broken")
    for folder in (tmp_path / "broken" / "checkpoint-6", tmp_path / "broken" / "adapter"):
        shutil.rmtree(folder)
    again = run.run(config(), work_dir=tmp_path / "broken", resume="auto")
    one, two = (load_file(result.artifact / "adapter_model.safetensors") for result in (whole, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_bad_image_is_named_with_its_row_before_anything_is_trained(models: dict[str, Path], tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path)
    (tmp_path / "images" / "blue.png").write_bytes(b"%PDF-1.7")
    with pytest.raises(DataError, match=r"rows.json, row 3: image images/blue.png: a PDF.*vision.on_bad_image: skip"):
        run.run(tiny.config(models["llava"], rows), work_dir=tmp_path / "run")
    settings = {"vision": {"on_bad_image": "skip"}, "train__max_steps": 2, "data__packing": False}
    config = tiny.config(models["llava"], rows, **settings)
    base = model_load.locate(config.model)
    read = words.read(config, base)
    from fastft.data import prepare

    prepared = prepare.prepare(config.data, "sft", read.tokenizer, 0, seer=read.seer)
    source = prepared.report.train.sources[0]
    assert sum(source.skipped.values()) == 2
    assert len(prepared.train) == 6
    assert "rows left out: 2, image images/blue.png: a PDF" in " ".join(map(str.strip, prepared.report.lines()))
    run.run(config, work_dir=tmp_path / "run2")


def test_an_image_that_goes_bad_during_the_training_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    config = tiny.config(models["llava"], tiny.write_rows(tmp_path))
    base = model_load.locate(config.model)
    read = words.read(config, base)
    from fastft.data import prepare
    from fastft.data.vision import VisionCollator

    prepared = prepare.prepare(config.data, "sft", read.tokenizer, 0, seer=read.seer)
    (tmp_path / "images" / "red.png").unlink()
    with pytest.raises(DataError, match=r"images/red.png: no such file"):
        VisionCollator(read.seer, 0)([prepared.train[0]])


def test_a_vision_model_without_the_section_says_what_to_set(models: dict[str, Path], tmp_path: Path) -> None:
    config = tiny.config(models["qwen2_vl"], tiny.write_rows(tmp_path)).model_copy(update={"vision": None})
    with pytest.raises(ConfigError, match=r"qwen2_vl is a vision-language model; set vision=\{\}"):
        run.run(config, work_dir=tmp_path / "run")
    with pytest.raises(DataError, match="with `vision` in the config"):
        run.run(
            config.model_copy(update={"model": config.model.model_copy(update={"name": str(models["gemma3"])})}),
            work_dir=tmp_path / "run",
        )


def test_a_text_model_with_the_section_says_what_to_set(tmp_path: Path) -> None:
    import tiny_run

    model = tiny_run.write_model(tmp_path / "text")
    with pytest.raises(ConfigError, match="reads text only; use a vision-language model, or set vision.tower"):
        run.run(tiny.config(model, tiny.write_rows(tmp_path)), work_dir=tmp_path / "run")


def test_bounds_on_pixels_bound_the_tokens_and_go_with_the_adapter(models: dict[str, Path], tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path)
    config = tiny.config(models["qwen2_vl"], rows, vision={"max_pixels": 1024}, train__max_steps=1)
    result = run.run(config, work_dir=tmp_path / "run")
    image = session.image(str(tmp_path / "images" / "red.png"))
    base, adapted = session.load(str(models["qwen2_vl"])), session.load(str(result.artifact))
    pixels = [
        int(talk.inputs(session.question("?", images=[image]))["image_grid_thw"].prod()) * 64
        for talk in (base, adapted)
    ]
    assert pixels[0] == 48 * 32
    assert pixels[1] <= 1024
    with pytest.raises(ConfigError, match="vision.max_pixels: .* scales images to a size of its own"):
        run.run(tiny.config(models["llava"], rows, vision={"max_pixels": 1024}), work_dir=tmp_path / "other")


def test_images_in_parquet_are_learned_from(models: dict[str, Path], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = tiny.write_images(tmp_path / "images")
    rows = [
        {
            "image": {"bytes": (tmp_path / "images" / f"{name}.png").read_bytes(), "path": f"{name}.png"},
            "query": "What colour is it?",
            "response": name,
        }
        for name in names
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    config = tiny.config(
        models["qwen2_vl"], tmp_path / "rows.parquet", train__max_steps=2, data__cache=str(tmp_path / "c")
    )
    result = run.run(config, work_dir=tmp_path / "run")
    assert result.steps == 2
    assert "red.png 48x40" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_memory_switches_do_not_change_what_is_learned(models: dict[str, Path], tmp_path: Path, kind: str) -> None:
    saving = {"embedding": "host", "head": "host", "mlp_tile_tokens": 16, "lora": "fused", "checkpoints": "host"}
    losses = []
    for number, memory in enumerate(({}, saving)):
        settings = {"train__max_steps": 3, "train__batch_size": 8, "train__warmup_ratio": 0.0, "memory": memory}
        config = tiny.config(models[kind], tiny.write_rows(tmp_path), **settings)
        run.run(config, work_dir=tmp_path / f"run{number}")
        losses.append(_losses(tmp_path / f"run{number}"))
    # fp32 sums in another order, in three steps of AdamW.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
