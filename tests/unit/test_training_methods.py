"""Methods: what is trained, from which start, at which rate; and that the result merges onto the original base."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from fastft.errors import ConfigError, TrainingError
from fastft.model import load, lora_start
from fastft.training import groups, run, trainer

STARTS = ("pissa", "olora")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of a multiple of 64 weights: bitsandbytes 0.50.2 unpacks others wrongly on a CPU (errors as large as weights)."""
    return tiny_run.write_model(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_dialogues(tmp_path_factory.mktemp("data") / "dialogues.jsonl")


class Kept:
    """The model of a run, kept as it was when the training ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model: Any = None
        own = load.load_weights

        def watched(*args: Any) -> Any:
            loaded = own(*args)
            self.model = loaded.model
            return loaded

        monkeypatch.setattr(load, "load_weights", watched)

    def weights(self) -> dict[str, torch.Tensor]:
        """By peft: what the trained model computes with, adapters merged into the base that it was trained on."""
        return dict(self.model.merge_and_unload().state_dict())


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    return Kept(monkeypatch)


def _merged(model: Path, adapter: Path, folder: Path) -> dict[str, torch.Tensor]:
    """By `convert merge`, onto the original base."""
    from fastft.convert import merge

    merge.execute(merge.plan(model, [(adapter, 1.0)]), folder)
    return load_file(folder / "model.safetensors")


def _close(merged: dict[str, torch.Tensor], trained: dict[str, torch.Tensor], rank: int) -> None:
    """Equal up to fp32 rounding: of W - s B0 A0, of both products of `rank` terms, of their sum with W.

    Weights are below 1 and so is each product; each of the 2 rank + 3 sums rounds by at most 2^-24 of its size, twice
    over since the trained model rounds too.
    """
    assert merged.keys() <= trained.keys()
    for name, value in merged.items():
        bound = 2 * (2 * rank + 3) * 2**-24 * max(1.0, float(value.abs().max()))
        assert (value - trained[name]).abs().max() <= bound, name


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", STARTS)
def test_a_start_inside_the_base_merges_onto_the_original(
    init: str, rslora: bool, model: Path, data: Path, tmp_path: Path, kept: Kept
) -> None:
    lora = {"r": 4, "alpha": 8, "init": init, "rslora": rslora}
    config = tiny_run.config(model, data, method__lora=lora, output__save_steps=3)
    done = run.run(config, work_dir=tmp_path / "run")
    assert json.loads((done.artifact / "adapter_config.json").read_text())["r"] == 8
    trained = kept.weights()
    _close(_merged(model, done.artifact, tmp_path / "merged"), trained, 4)
    # The test sees a difference: the adapter as it was trained, laid onto the original base, is something else.
    original = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    raw = load_file(done.run_dir / "checkpoint-6" / "adapter_model.safetensors")
    A_RI, B_OR = (raw[f"base_model.model.{name.replace('weight', f'lora_{ab}.weight')}"] for ab in "AB")
    naive = original[name] + (8 / (2 if rslora else 4)) * (B_OR @ A_RI)
    assert (naive - trained[name]).abs().max() > 0.01


@pytest.mark.parametrize("init", STARTS)
def test_a_checkpoint_of_such_a_run_is_not_merged_by_mistake(
    init: str, model: Path, data: Path, tmp_path: Path
) -> None:
    lora = {"r": 4, "alpha": 8, "init": init}
    done = run.run(tiny_run.config(model, data, method__lora=lora), work_dir=tmp_path / "run")
    with pytest.raises(Exception, match=f"init_lora_weights '{init}' changed the base"):
        _merged(model, done.run_dir / "checkpoint-6", tmp_path / "merged")


@pytest.mark.parametrize("init", STARTS)
def test_the_start_computes_what_the_base_computes(init: str, model: Path, data: Path) -> None:
    """Before the first step; and pissa's is the best of its rank (Eckart and Young), by numpy's singular values."""
    config = tiny_run.config(model, data, method__lora={"r": 4, "alpha": 8, "init": init})
    started = load.load(config).model
    ids = torch.arange(20).view(1, -1)
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        torch.testing.assert_close(started.eval()(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=1e-4)
    if init == "pissa":
        layer = started.get_base_model().model.layers[1].mlp.up_proj
        values = np.linalg.svd(plain.model.layers[1].mlp.up_proj.weight.detach().double().numpy(), compute_uv=False)
        rest = np.linalg.svd(layer.base_layer.weight.detach().double().numpy(), compute_uv=False)
        np.testing.assert_allclose(rest[: len(values) - 4], values[4:], atol=1e-5)


def test_a_start_that_comes_out_otherwise_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "alpha": 8, "init": "pissa"}
    config = tiny_run.config(model, data, method__lora=lora, output__save_steps=3)
    done = run.run(config, work_dir=tmp_path / "run")
    path = done.run_dir / "checkpoint-3" / lora_start.FILE_NAME
    begun = load_file(path)
    loaded = load.load(config)
    lora_start.check(path.parent, loaded.model)
    from safetensors.torch import save_file

    first = next(iter(begun))
    save_file({**begun, first: begun[first] + 2**-20}, path)
    with pytest.raises(TrainingError, match="start .* comes out otherwise on this machine"):
        lora_start.check(path.parent, loaded.model)


def test_loftq_starts_nearer_to_the_base_and_merges(wide: Path, data: Path, tmp_path: Path, kept: Kept) -> None:
    model = wide
    original = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    errors = {}
    for init in ("default", "loftq"):
        lora = {"r": 8, "alpha": 8, "init": init}
        layer = load.load(tiny_run.config(model, data, kind="qlora", method__lora=lora)).model.get_submodule(
            f"base_model.model.{name}"
        )
        update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        errors[init] = (
            (lora_start._held(layer.base_layer) + update - original[f"{name}.weight"]).detach().double().numpy()
        )
    # Eckart and Young: what rank 8 cannot take away is the rest of the singular values, by numpy.
    values = np.linalg.svd(errors["default"], compute_uv=False)
    assert np.linalg.norm(errors["loftq"]) == pytest.approx(np.linalg.norm(values[8:]), rel=1e-4)
    lora = {"r": 8, "alpha": 8, "init": "loftq"}
    done = run.run(tiny_run.config(model, data, kind="qlora", method__lora=lora), work_dir=tmp_path / "run")
    adapted = kept.model.get_submodule(f"base_model.model.{name}")
    update = adapted.lora_B["default"].weight @ adapted.lora_A["default"].weight
    trained = (lora_start._held(adapted.base_layer) + update).detach()
    merged = _merged(model, done.artifact, tmp_path / "merged")
    _close({f"{name}.weight": merged[f"{name}.weight"]}, {f"{name}.weight": trained}, 8)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_dora_merges(kind: str, wide: Path, data: Path, tmp_path: Path, kept: Kept) -> None:
    """Onto the weights that were trained on: the original's, or what 4 bits made of them."""
    model = wide
    lora = {"r": 4, "alpha": 8, "dora": True}
    config = tiny_run.config(model, data, kind=kind, method__lora=lora)
    done = run.run(config, work_dir=tmp_path / "run")
    assert json.loads((done.artifact / "adapter_config.json").read_text())["use_dora"] is True
    losses = [json.loads(line)["loss"] for line in (done.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.95 * losses[0]
    name = "model.layers.1.mlp.up_proj"
    layer = kept.model.get_submodule(f"base_model.model.{name}")
    moved = layer.lora_magnitude_vector["default"].weight.detach()
    base = load_file(model / "model.safetensors")[f"{name}.weight"]
    if kind == "qlora":
        base = lora_start._held(layer.base_layer)
    assert (moved - base.norm(dim=1)).abs().max() > 1e-3  # the magnitudes learn
    V = (base + 2.0 * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()).double()
    trained = (moved.double() / V.norm(dim=1))[:, None] * V  # Liu et al. 2024, equation 5
    merged = _merged(model, done.artifact, tmp_path / "merged")[f"{name}.weight"]
    # fp32: a product of 4 terms, a norm of 64 terms, a quotient and a product.
    assert (merged - trained).abs().max() <= (4 + 64 + 3) * 2**-24 * float(trained.abs().max())


def test_freeze_trains_the_last_layers_only(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run.config(model, data, kind="freeze", method__trained_layers=1)
    done = run.run(config, work_dir=tmp_path / "run")
    assert "freeze: the last 1 of 2 layers are trained; the rest stays" in capsys.readouterr().err
    before, after = load_file(model / "model.safetensors"), load_file(done.artifact / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("model.layers.1.")}
    with pytest.raises(ConfigError, match="trained_layers: 3 is more than the model's 2 layers"):
        load.load(tiny_run.config(model, data, kind="freeze", method__trained_layers=3))


def _rates(model: Path, data: Path, **changes: Any) -> dict[str, float]:
    config = tiny_run.config(model, data, train__lr=0.5, **changes)
    return groups.rates(load.load(config).model, config.train)


def test_rates_by_group(model: Path, data: Path) -> None:
    plus = _rates(model, data, train__lora_plus_ratio=16)
    assert {rate for name, rate in plus.items() if ".lora_B." in name} == {8.0}
    assert {rate for name, rate in plus.items() if ".lora_A." in name} == {0.5}
    decayed = _rates(model, data, kind="full", train__layer_lr_decay=0.5)
    layers = {found.group(1): rate for name, rate in decayed.items() if (found := re.search(r"layers\.(\d)\.", name))}
    assert layers == {"0": 0.25, "1": 0.5}
    assert (decayed["model.embed_tokens.weight"], decayed["lm_head.weight"]) == (0.125, 0.5)
    assert decayed["model.norm.weight"] == 0.5
    tables = _rates(model, data, kind="full", train__embedding_lr=0.01, train__layer_lr_decay=0.5)
    assert (tables["model.embed_tokens.weight"], tables["lm_head.weight"]) == (0.01, 0.01)
    saved = _rates(model, data, method__lora={"r": 4, "modules_to_save": ["embed_tokens"]}, train__embedding_lr=0.01)
    assert {rate for name, rate in saved.items() if "embed_tokens" in name} == {0.01}
    only_last = _rates(model, data, kind="freeze", method__trained_layers=1, train__layer_lr_decay=0.5)
    assert set(only_last.values()) == {0.5}


def test_one_step_moves_b_by_the_ratio(model: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    """AdamW's first step has the size of the rate wherever there is a gradient: B starts at 0 and is 16 times as large."""
    found = {}
    for ratio in (1.0, 16.0):
        config = tiny_run.config(
            model, data, train__lora_plus_ratio=ratio, train__max_steps=1, train__lr=1e-3, train__warmup_ratio=0.0
        )
        done = run.run(config, work_dir=tmp_path / f"run{ratio:g}")
        weights = load_file(done.artifact / "adapter_model.safetensors")
        found[ratio] = torch.cat([value.flatten() for name, value in weights.items() if "lora_B" in name])
    assert "learning rates: 0.016 for" in capsys.readouterr().err
    torch.testing.assert_close(found[16.0], 16 * found[1.0], rtol=1e-5, atol=0)


def test_neftune_is_noise_in_training_only(model: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Jain et al. 2023, algorithm 1: uniform, up to alpha / sqrt(L d)."""
    noise: list[tuple[bool, torch.Tensor]] = []
    own = trainer.FastftTrainer.training_step
    evaluate = trainer.FastftTrainer.evaluate

    def watch(self: Any) -> None:
        table = self.model.get_base_model().get_input_embeddings()
        if not getattr(self, "watched", False):
            self.watched = True
            table.register_forward_hook(
                lambda module, inputs, output: noise.append(
                    (module.training, (output - torch.nn.functional.embedding(inputs[0], module.weight)).detach())
                )
            )

    def stepped(self: Any, *args: Any) -> Any:
        watch(self)
        return own(self, *args)

    def evaluated(self: Any, **settings: Any) -> Any:
        watch(self)
        return evaluate(self, **settings)

    monkeypatch.setattr(trainer.FastftTrainer, "training_step", stepped)
    monkeypatch.setattr(trainer.FastftTrainer, "evaluate", evaluated)
    config = tiny_run.config(
        model, data, train__neftune_alpha=5, train__max_steps=4, train__eval_steps=2, data__eval_rows=2
    )
    run.run(config, work_dir=tmp_path / "run")
    assert {training for training, _ in noise} == {True, False}
    for training, added in noise:
        bound = 5 / (added.shape[1] * added.shape[2]) ** 0.5
        if training:
            assert 0.9 * bound < added.abs().max() <= 1.0001 * bound
        else:
            assert not added.any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "qlora", "method__lora": {"init": "pissa"}}, "pissa changes the base"),
        ({"method__lora": {"init": "loftq"}}, "loftq makes up for 4 bits"),
        ({"method__lora": {"init": "olora", "dora": True}}, "olora and lora.dora do not go together"),
        ({"method__lora": {"dora": True}, "memory__lora": "fused"}, "fused is for plain adapters"),
        ({"kind": "full", "train__embedding_lr": 1e-4, "distributed__fsdp": True}, "not built for rates that differ"),
        ({"task": "dpo", "distributed__fsdp": True}, "not built for task: dpo"),
        ({"method__trained_layers": 2}, "`trained_layers` has no effect with kind: lora"),
        ({"kind": "full", "train__lora_plus_ratio": 16}, "lora_plus_ratio is for adapters"),
        ({"preference__beta": 0.2}, "`preference` has no effect with task: sft"),
        ({"task": "orpo", "preference__label_smoothing": 0.1}, "label_smoothing is for task: dpo"),
        ({"task": "dpo", "preference__good_weight": 2}, "good_weight and bad_weight are for task: kto"),
    ],
)
def test_settings_that_do_nothing_are_refused(changes: dict[str, Any], said: str, model: Path, data: Path) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_run.config(model, data, **changes)
