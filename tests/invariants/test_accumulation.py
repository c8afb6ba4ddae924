"""Four rows at once, or one after the other with accumulated gradients: the same step, weighted by learned tokens."""

import copy
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tiny_run
from fastft.training import run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


def test_accumulation_equals_a_big_batch(model: Path, tmp_path: Path) -> None:
    data = tiny_run.write_dialogues(tmp_path / "rows.jsonl", 11)  # 11: the last step of an epoch is smaller
    results = []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        config = tiny_run.config(
            model,
            data,
            kind="full",
            train__batch_size=batch,
            train__grad_accumulation=accumulation,
            train__epochs=2,
            train__max_steps=None,
            train__lr=1e-3,
        )
        done = run.run(copy.deepcopy(config), work_dir=tmp_path / f"{batch}x{accumulation}")
        lines = [json.loads(line) for line in (done.run_dir / "metrics.jsonl").read_text().splitlines()]
        results.append((load_file(done.artifact / "model.safetensors"), [line["loss"] for line in lines]))
    (expected, losses), *others = results
    assert len(losses) == 6
    for weights, other_losses in others:
        # AdamW divides by the gradient's own size, so the fp32 noise of sums in another order (2^-24 relative) moves a
        # weight whose gradient is near zero by up to the rate, 1e-3, of which 1 % is allowed here.
        assert other_losses == pytest.approx(losses, rel=1e-4)
        for name, value in expected.items():
            assert (weights[name] - value).abs().max() < 1e-5, name
