"""Two processes train a LLaVA made of parts as one process with twice the batch does: language model, projector, tower."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_llava
import two_processes
from fastft.config.schema import Config
from fastft.training import run

TOWER_LORA = {"projector": "full", "tower": "lora", "tower_lora": {"r": 4, "alpha": 4}}
CASES = {
    # (method, what is learned, rows without an image among the others)
    "lora": ("lora", TOWER_LORA, False),
    "lora, texts among them": ("lora", TOWER_LORA, True),
    "full": ("full", TOWER_LORA, False),
    "projector": ("qlora", {"llm": "frozen", "projector": "full"}, False),
}
COLOURS = ("red", "green", "blue", "yellow")
NUM_ROWS, NUM_STEPS = 12, 4


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, a CLIP, rows with an image each, and rows of which every other one has none."""
    folder = tmp_path_factory.mktemp("llava")
    tiny_llava.write_llm(folder / "llm")
    tiny_llava.write_clip(folder / "clip")
    (folder / "images").mkdir()
    for number, colour in enumerate(COLOURS):
        tiny_llava.picture(colour, (60 + 10 * number, 40)).save(folder / "images" / f"{colour}.png")
    for name, every in (("seen.json", 1), ("mixed.json", 2)):
        rows = []
        for number in range(NUM_ROWS):
            colour = COLOURS[number % 4]
            mark, image = ("<image>\n", {"image": f"{colour}.png"}) if number % every == 0 else ("", {})
            said = [{"from": "human", "value": f"{mark}What is number {number}?"}]
            said.append({"from": "gpt", "value": f"A {colour} circle."})
            rows.append({**image, "conversations": said})
        (folder / name).write_text(json.dumps(rows))
    return folder


def config(parts: Path, case: str, batch_size: int) -> Config:
    kind, learn, mixed = CASES[case]
    method: dict[str, Any] = {"kind": kind}
    if kind != "full":
        method["lora"] = {"r": 8, "alpha": 16, "dropout": 0.0}
    source = {"source": str(parts / ("mixed.json" if mixed else "seen.json")), "images": str(parts / "images")}
    return Config.model_validate(
        {
            "name": "tiny_llava",
            "task": "sft",
            "model": {"name": str(parts / "llm")},
            "method": method,
            "data": {"train": [source], "max_length": 64, "packing": False},
            "vision": {"tower": str(parts / "clip"), "learn": learn},
            "train": {
                "max_steps": NUM_STEPS, "batch_size": batch_size, "grad_accumulation": 1, "lr": 1e-3, "log_steps": 1
            },
            "output": {"save_steps": NUM_STEPS},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def ran(parts: Path) -> Path:
    """All runs with two processes."""
    jobs = [two_processes.job(config(parts, case, 2), parts / f"two {case}") for case in CASES]
    first, second = two_processes.run_all(jobs, parts)
    assert first.count("first sample") == len(jobs)
    # Where some rows are text alone torch looks for parts without a gradient, and warns if the first batch has none.
    rest = [line for line in second.splitlines() if "find_unused_parameters" not in line]
    assert rest == []
    assert second.count("find_unused_parameters=True") <= 1
    return parts


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_twice_the_batch(case: str, parts: Path, ran: Path) -> None:
    one = run.run(config(parts, case, 4), work_dir=parts / f"one {case}")
    expected, found = lines(one.run_dir), lines(ran / f"two {case}")
    assert len(expected) == len(found) == NUM_STEPS
    for key in ("loss", "grad_norm"):
        # Sums in another order: fp32 noise, grown over 4 steps of AdamW.
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-3), key
    files = sorted(path.relative_to(one.artifact) for path in one.artifact.rglob("*.safetensors"))
    assert files == sorted(
        path.relative_to(ran / f"two {case}" / "llava")
        for path in (ran / f"two {case}" / "llava").rglob("*.safetensors")
    )
    assert Path("projector/model.safetensors") in files
    for file in files:
        theirs, ours = load_file(one.artifact / file), load_file(ran / f"two {case}" / "llava" / file)
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            assert torch.allclose(ours[name], value, rtol=1e-2, atol=1e-3), (file, name)
