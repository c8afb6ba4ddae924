"""The two stages of a LLaVA put together from a language model and a CLIP, as XTuner trains it."""

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_llava
from fastft.config.schema import Config
from fastft.convert import llava as convert
from fastft.convert.adapter import read_adapter
from fastft.convert.folder import read_checkpoint
from fastft.training import run

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
    "ignore:.*_check_is_size.*:FutureWarning",
)

COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A language model, a CLIP, and four rows in LLaVA's form."""
    folder = tmp_path_factory.mktemp("parts")
    rows = []
    (folder / "images").mkdir()
    for colour in COLOURS:
        tiny_llava.picture(colour).save(folder / "images" / f"{colour}.png")
        said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"A {colour} circle."}]
        rows.append({"image": f"{colour}.png", "conversations": said})
    (folder / "rows.json").write_text(json.dumps(rows))
    return tiny_llava.write_llm(folder / "llm"), tiny_llava.write_clip(folder / "clip"), folder / "rows.json"


def config(parts: tuple[Path, Path, Path], kind: str, learn: dict[str, Any], **vision: Any) -> Config:
    llm, clip, rows = parts
    method: dict[str, Any] = {"kind": kind}
    if kind != "full":
        method["lora"] = {"r": 8, "alpha": 16, "dropout": 0.0}
    return Config.model_validate(
        {
            "name": "tiny_llava",
            "task": "sft",
            "model": {"name": str(llm)},
            "method": method,
            "data": {"train": [{"source": str(rows), "images": str(rows.parent / "images")}], "max_length": 64},
            "vision": {"tower": str(clip), "learn": learn, **vision},
            "train": {"max_steps": 6, "batch_size": 4, "grad_accumulation": 1, "lr": 0.01, "log_steps": 1},
            "output": {"save_steps": 3},
        }
    )


STAGE_1 = {"llm": "frozen", "projector": "full"}
TOWER_LORA = {"projector": "full", "tower": "lora", "tower_lora": {"r": 4, "alpha": 4}}
CASES = {
    "stage 1, plain": ("lora", STAGE_1),
    "stage 1, on 4 bit": ("qlora", STAGE_1),
    "stage 1, full": ("full", STAGE_1),
    "lora and tower": ("lora", TOWER_LORA),
    "qlora and tower": ("qlora", TOWER_LORA),
    "full": ("full", {"projector": "full"}),
    "lora, tower whole": ("lora", {"projector": "full", "tower": "full"}),
    "tower alone": ("lora", {"llm": "frozen", "projector": "frozen", "tower": "lora"}),
}


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("case", CASES)
def test_each_stage_learns_and_leaves_its_parts(parts: tuple[Path, Path, Path], tmp_path: Path, case: str) -> None:
    kind, learn = CASES[case]
    done = run.run(config(parts, kind, learn), work_dir=tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
    assert done.artifact == tmp_path / "run" / "llava"
    names = {path.name for path in done.artifact.iterdir()}
    wanted = {"projector", "processor_config.json", "tokenizer.json", "chat_template.jinja", "fastft_training.json"}
    trains_llm = learn.get("llm") != "frozen"
    if trains_llm and kind != "full":
        wanted.add("llm_adapter")
    if trains_llm and kind == "full":
        wanted |= {"config.json", "model.safetensors", "generation_config.json"}
    if learn.get("tower") == "lora":
        wanted.add("visual_encoder_adapter")
    if learn.get("tower") == "full":
        wanted.add("visual_encoder")
    assert names - {"tokenizer_config.json"} == wanted
    assert convert.read_projector(done.artifact / "projector").config["llm_hidden_size"] == 64


def test_frozen_parts_stay_as_they_are(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Stage 1 in 16-bit weights and full: what is written is the projector, and a second run from it starts lower."""
    first = run.run(config(parts, "lora", STAGE_1), work_dir=tmp_path / "first")
    second_config = config(parts, "lora", STAGE_1, projector=str(first.artifact / "projector"))
    run.run(second_config, work_dir=tmp_path / "second")
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "first")[0]
