"""Measuring the eval loss and answering prompts changes nothing in the training, in 4 bit and with dropout.

On CPUs with AVX512-BF16 bitsandbytes repacks 4-bit weights in eval mode and then has no gradient (spec training.md
trap A); elsewhere only the random numbers could differ.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from fastft.chat import session
from fastft.config.schema import Config
from fastft.model import load, quantization
from fastft.training import run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"), dtype="bfloat16")


def _config(model: Path, folder: Path, **changes: object) -> Config:
    data = tiny_run.write_dialogues(folder / "rows.jsonl")
    lora = {"r": 4, "alpha": 8, "dropout": 0.3}
    return tiny_run.config(model, data, kind="qlora", method__lora=lora, data__eval_rows=2, **changes)


def test_training_is_bit_for_bit_the_same(model: Path, tmp_path: Path) -> None:
    quiet = run.run(_config(model, tmp_path), work_dir=tmp_path / "quiet")
    busy = run.run(
        _config(
            model,
            tmp_path,
            train__eval_steps=1,
            train__sample_steps=2,
            samples__prompts=("How many?",),
            samples__max_new_tokens=3,
        ),
        work_dir=tmp_path / "busy",
    )
    expected = load_file(quiet.artifact / "adapter_model.safetensors")
    weights = load_file(busy.artifact / "adapter_model.safetensors")
    assert expected.keys() == weights.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    assert any("lora_B" in name and value.any() for name, value in weights.items())


def test_gradients_after_an_eval_forward(model: Path, tmp_path: Path) -> None:
    loaded = load.load(_config(model, tmp_path))
    ids = torch.arange(24).reshape(1, 24)

    def gradients() -> dict[str, torch.Tensor]:
        loaded.model.train()
        torch.manual_seed(3)
        loaded.model.zero_grad()
        loaded.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in loaded.model.named_parameters() if p.grad is not None}

    before = gradients()
    loaded.model.eval()
    with torch.no_grad():
        loaded.model(input_ids=ids)
    after = gradients()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any("lora_B" in name and value.any() for name, value in after.items())


def test_no_layer_is_repacked_on_a_cpu_that_would(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every machine: bitsandbytes is told that this CPU has AVX512-BF16, and its repacking must not be reached."""
    import bitsandbytes

    def repack(*_args: object) -> None:
        raise AssertionError("bitsandbytes repacked a weight: no gradient comes through it any more")

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(bitsandbytes.nn.modules, "_convert_weight_packed_for_cpu", repack)
    loaded = load.load(_config(model, tmp_path))
    layers = [m for m in loaded.model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    loaded.model.eval()
    with torch.no_grad():
        loaded.model(input_ids=torch.arange(8).reshape(1, 8))
    talk = session.load(str(model), bits=4)
    session.answer(talk, "Hello", session.Sampling(max_new_tokens=1))


def test_the_number_of_4bit_layers(model: Path, tmp_path: Path) -> None:
    assert quantization.disable_cpu_repacking(load.load(_config(model, tmp_path)).model) == 2 * 7
