"""Vision-language models trained from a config: a tiny random one of each architecture, with drawn images."""

import json

import pytest

import tiny_vision as tiny
from fastft.training import run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_run_learns_from_images(tmp_path, kind):
    model = tiny.write_model(kind, tmp_path / "model")
    config = tiny.config(model, tiny.write_rows(tmp_path), train__max_steps=8)
    result = run.run(config, work_dir=tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert {"adapter_model.safetensors", "preprocessor_config.json"} <= {
        path.name for path in result.artifact.iterdir()
    }
