"""What is chosen to be faster on which machine, why, and what cannot be pinned."""

import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny_run
from fastft.config.schema import Config
from fastft.errors import ConfigError
from fastft.model import speed
from fastft.model.speed import FLASH, LIGER, Facts

BOTH = frozenset((FLASH, LIGER))
MODERN = frozenset(("sdpa", "flash_attention_2", "flex_attention"))
CPU = Facts("cpu", None, products_16bit=False, attentions=MODERN, liger=None, installed=frozenset())
# An H100 (capability 9.0) and an RTX 2080 (7.5), as NVIDIA's table of CUDA capabilities has them.
H100 = Facts("cuda", (9, 0), products_16bit=True, attentions=MODERN, liger=True, installed=BOTH)
TURING = replace(H100, capability=(7, 5))
ROCM = replace(H100, capability=None)
ASCEND = Facts("npu", None, products_16bit=True, attentions=MODERN, liger=None, installed=frozenset())


def _config(**changes: Any) -> Config:
    return tiny_run.config(Path("model"), Path("rows.jsonl"), **changes)


@pytest.mark.parametrize(
    ("facts", "attention", "liger", "tf32", "fused"),
    [
        (CPU, "sdpa", False, None, True),
        (H100, "flash_attention_2", True, True, True),
        (replace(H100, installed=frozenset()), "sdpa", False, True, True),
        (replace(H100, products_16bit=False), "sdpa", True, True, True),
        (replace(H100, attentions=frozenset(("sdpa",)), liger=False), "sdpa", False, True, True),
        (replace(H100, attentions=frozenset()), "eager", True, True, True),
        (replace(H100, attentions=None), None, True, True, True),
        (TURING, "sdpa", True, None, True),
        (ROCM, "flash_attention_2", True, None, True),
        (ASCEND, "sdpa", False, None, False),
    ],
)
def test_what_a_machine_gets(facts: Facts, attention: str | None, liger: bool, tf32: bool | None, fused: bool) -> None:
    found = speed.choose(_config(), facts)
    assert (found.attention, found.liger, found.tf32, found.fused_optimizer) == (attention, liger, tf32, fused)
    assert found.compile is False
    assert all(len(part) > 10 and part.endswith(")") for part in found.parts())
    assert len(found.parts()) == 5


def test_a_config_pins_each() -> None:
    pinned = {"liger": False, "compile": True, "tf32": False, "fused_optimizer": False}
    found = speed.choose(_config(model__attention="eager", accelerate=pinned), H100)
    assert (found.attention, found.liger, found.compile, found.tf32, found.fused_optimizer) == (
        *("eager", False),
        *(True, False, False),
    )
    assert set(found.why.values()) == {"as configured"}


def test_what_the_rest_of_the_config_decides() -> None:
    assert speed.choose(_config(task="orpo"), H100).attention == "sdpa"
    assert speed.choose(_config(model__dtype="fp32"), H100).tf32 is False
    assert speed.choose(_config(memory__mlp_tile_tokens=64), H100).liger is False
    assert speed.choose(_config(train__optimizer="adamw_8bit"), H100).fused_optimizer is False


@pytest.mark.parametrize(
    ("changes", "facts", "message"),
    [
        ({"model__attention": "flash_attention_2"}, CPU, "flash_attention_2 needs flash_attn, which is not installed"),
        ({"model__attention": "flash_attention_2"}, replace(CPU, installed=BOTH), "needs a GPU"),
        ({"model__attention": "flex_attention"}, replace(H100, attentions=frozenset(("sdpa",))), "it has eager, sdpa"),
        ({"model__attention": "flash_attention_2", "task": "orpo"}, H100, "not built for task orpo"),
        ({"model__attention": "flex_attention"}, CPU, "no backward pass on a CPU"),
        ({"accelerate__liger": True}, CPU, r"not installed: pip install 'fastft\[liger\]'"),
        ({"accelerate__liger": True}, replace(H100, liger=False), "no kernels for this kind of model"),
        ({"accelerate__liger": True}, replace(CPU, installed=BOTH, liger=True), "need a GPU"),
        ({"accelerate__tf32": True}, CPU, "this device has no TF32"),
        ({"accelerate__tf32": True}, TURING, "this device has no TF32"),
        ({"accelerate__fused_optimizer": True}, ASCEND, "torch has no such kernel for npu"),
        ({"accelerate__fused_optimizer": True, "train__optimizer": "adamw_8bit"}, H100, "has its own kernels"),
        ({"accelerate__compile": True, "distributed__fsdp": True}, H100, "not together with"),
    ],
)
def test_what_is_pinned_and_cannot_be_is_an_error(changes: dict[str, Any], facts: Facts, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        speed.choose(_config(**changes), facts)


def test_the_facts_of_a_model() -> None:
    """Llama's class has all three (its documentation says so); a class that nobody knows says nothing."""
    import torch
    from transformers import LlamaConfig, PretrainedConfig

    cpu = torch.device("cpu")
    assert speed.facts_of(LlamaConfig(), cpu, products_16bit=False).attentions == MODERN
    assert speed.facts_of(PretrainedConfig(), cpu, products_16bit=False).attentions is None


def test_liger_gets_the_model_and_leaves_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    package, patch = types.ModuleType("liger_kernel.transformers"), types.ModuleType("monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": lambda **given: seen.append(given)}  # type: ignore[attr-defined]
    package.monkey_patch = patch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    model = types.SimpleNamespace(config=types.SimpleNamespace(model_type="llama"))
    speed.install(model, speed.choose(_config(), CPU))
    assert seen == []
    speed.install(model, speed.choose(_config(), H100))
    assert seen == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_the_trainer_gets_what_was_chosen(tmp_path: Path) -> None:
    import torch

    from fastft.training import trainer

    def made(**changes: Any) -> Any:
        config = _config(**changes)
        return trainer.arguments(config, tmp_path, 3, None, torch.device("cpu"), fast=speed.choose(config, CPU))

    assert made().optim == "adamw_torch_fused"
    assert made(accelerate__fused_optimizer=False).optim == "adamw_torch"
    assert made(train__optimizer="adamw_8bit").optim == "adamw_bnb_8bit"


@pytest.mark.slow
# torch's compiler looks at each input's gradient, and torch warns of it (2.15).
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_learns_the_same(tmp_path: Path) -> None:
    import json

    import torch
    from safetensors.torch import load_file

    from fastft.training import run

    model, data = tiny_run.write_model(tmp_path / "model"), tiny_run.write_dialogues(tmp_path / "rows.jsonl")
    losses = {}
    for compiled in (False, True):
        config = tiny_run.config(model, data, train__max_steps=3, accelerate__compile=compiled)
        done = run.run(config, work_dir=tmp_path / str(compiled))
        lines = (done.run_dir / "metrics.jsonl").read_text().splitlines()
        losses[compiled] = [json.loads(line)["loss"] for line in lines]
    # The layers were compiled, as torch counts it, and the files are those of a model that was not.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    names = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors").keys() for name in ("True", "False")]
    assert names[0] == names[1]
    # fp32 sums in another order, over three steps.
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


def test_flash_attention_gets_batches_of_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks for documents only there; in several rows it would let them see each other, in silence.

    The choice is put in place of the one for a CPU; the model itself keeps sdpa.
    """
    from dataclasses import replace as changed

    from fastft.model import load
    from fastft.training import run, trainer

    model, data = tiny_run.write_model(tmp_path / "model"), tiny_run.write_dialogues(tmp_path / "rows.jsonl")
    config = tiny_run.config(model, data, train__max_steps=1, train__batch_size=3)
    shapes: list[tuple[int, ...]] = []
    step, read = trainer.FastftTrainer.training_step, load.load_weights

    def watched(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        return step(self, model, inputs, *rest)

    def with_flash(*given: Any) -> Any:
        loaded = read(*given)
        return changed(loaded, speed=changed(loaded.speed, attention="flash_attention_2"))

    monkeypatch.setattr(trainer.FastftTrainer, "training_step", watched)
    run.run(config, work_dir=tmp_path / "sdpa")
    monkeypatch.setattr(load, "load_weights", with_flash)
    run.run(config, work_dir=tmp_path / "flash")
    assert [shape[0] for shape in shapes] == [3, 1]
    assert shapes[1][1] > shapes[0][1]


def test_a_run_says_it_and_records_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from fastft.training import run

    model, data = tiny_run.write_model(tmp_path / "model"), tiny_run.write_dialogues(tmp_path / "rows.jsonl")
    run.run(tiny_run.config(model, data, train__max_steps=1), work_dir=tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert "attention sdpa (torch's own); liger off (it has no kernels for cpu)" in said
    record = json.loads((tmp_path / "run" / "fastft_training.json").read_text())
    assert record["speed"]["attention"] == "sdpa"
