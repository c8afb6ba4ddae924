"""Merges onto 4-bit bases, into 4 bit, and with PEFT's own roundings."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_convert_architectures import make, tensors
from test_convert_merge_peft import build
from test_convert_quantize import loaded, run, saved_by_transformers

import tiny_run
from fastft.convert import merge, verify
from fastft.convert.four_bit import FourBit
from fastft.errors import PlanError
from fastft.training import run as training

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
    "ignore:.*(tie|tied).*:UserWarning",
    "ignore:The following .*_pattern keys did not match:RuntimeWarning",
    "ignore:.*_check_is_size.*:FutureWarning",
    "ignore:Merge lora module to 4-bit linear may get different generations.*:UserWarning",
)


def merged(base: Path, adapter: Path, out: Path, **options: Any) -> dict[str, Any]:
    merge.execute(merge.plan(base, [(adapter, 1.0)], **options), out)
    kept = {key: value for key, value in options.items() if key in ("four_bit", "match_peft")}
    report = verify.verify(out, base, [(adapter, 1.0)], **kept)
    assert report.good, report.text()
    return tensors(out)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("case", ["lora", "bias"])
def test_onto_a_4_bit_folder(tmp_path: Path, case: str, kind: Any, *, double_quant: bool) -> None:
    """round(dequantize(W4) + s B A) with bitsandbytes' numbers, taken flat (spec/formats.md 0.8); config.json is plain."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit
    from safetensors.torch import load_file

    bias = {"bias": "all"} if case == "bias" else {}
    base, adapter, _ = build(tmp_path, torch.bfloat16, None, **bias)
    settings = {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double_quant}
    packed = saved_by_transformers(base, tmp_path / "packed", **settings)
    mine = merged(packed, adapter, tmp_path / "mine")
    assert "quantization_config" not in json.loads((tmp_path / "mine" / "config.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    for path, module in loaded(packed).named_modules():
        if not isinstance(module, Linear4bit):
            continue
        state = module.weight.quant_state
        shape, state.shape = state.shape, torch.Size([state.shape.numel()])
        weight = functional.dequantize_4bit(module.weight, state).reshape(shape).float()
        at = f"base_model.model.{path}"
        weight += (factors[f"{at}.lora_B.weight"] @ factors[f"{at}.lora_A.weight"]) * 2.0
        assert torch.equal(mine[f"{path}.weight"], weight.bfloat16()), path
        trained_bias = factors.get(f"{at}.base_layer.bias", module.bias)
        if trained_bias is not None:
            assert torch.equal(mine[f"{path}.bias"], trained_bias.bfloat16())
    with pytest.raises(PlanError, match="in 4 bit already"):
        merge.plan(packed, [(adapter, 1.0)], four_bit=FourBit())


@pytest.mark.parametrize("quantize", [FourBit("nf4"), FourBit("nf4", double_quant=True), FourBit("fp4", blocksize=128)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "llava"])
def test_merged_and_quantized_in_one_pass(tmp_path: Path, name: str, quantize: FourBit) -> None:
    """The same bytes as a merge and then a quantization, which is transformers' own (test_convert_quantize)."""
    made = make(name, tmp_path, torch.bfloat16)
    merged(made.base, made.adapter, tmp_path / "plain")
    two = run(tmp_path / "plain", tmp_path / "two passes", quantize)
    merged(made.base, made.adapter, tmp_path / "one pass", quantize=quantize)
    one = tmp_path / "one pass"
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert json.loads((one / "config.json").read_text()) == json.loads((two / "config.json").read_text())
    loaded(one)


def test_a_quantized_base_is_no_merge(tmp_path: Path) -> None:
    base, adapter, _ = build(tmp_path, torch.bfloat16, None)
    run(base, tmp_path / "quantized", FourBit())
    report = verify.verify(tmp_path / "quantized", base, [(adapter, 1.0)])
    found = {check.name: check.status for check in report.checks if not check.good}
    assert set(found.values()) == {"base"}
    assert all("proj" in name for name in found)


# Kinds whose update PEFT rounds before it adds it: experts (bare parameters), embeddings.
ROUNDED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "mixtral": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "llama": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ROUNDED)
def test_the_roundings_of_peft(tmp_path: Path, name: str, dtype: str) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file, save_file
    from tiny_models import BUILDERS

    made = make(name, tmp_path, getattr(torch, dtype), **ROUNDED[name])
    # Whole numbers still, but too long for 16 bit, so that the rounding of their products shows.
    factors = load_file(made.adapter / "adapter_model.safetensors")
    for key, value in factors.items():
        if "lora_" in key:
            value.mul_(37 / 32 if "_A" in key else 29 / 32)
    save_file(factors, made.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    model = type(BUILDERS[name]()).from_pretrained(made.base, dtype=getattr(torch, dtype))
    PeftModel.from_pretrained(model, made.adapter).merge_and_unload().save_pretrained(tmp_path / "theirs")
    theirs = tensors(tmp_path / "theirs")
    mine = merged(made.base, made.adapter, tmp_path / "mine", match_peft=True)
    once = merged(made.base, made.adapter, tmp_path / "once")
    assert sorted(mine) == sorted(theirs)
    assert [key for key in theirs if not torch.equal(mine[key], theirs[key])] == []
    assert any(not torch.equal(once[key], theirs[key]) for key in theirs)


def test_the_base_of_the_training_by_itself(tmp_path: Path) -> None:
    """fastft_training.json chooses; the option wins; the notes say which."""
    base, adapter, _ = build(tmp_path, torch.bfloat16, None, target_modules=["q_proj"])
    said = {"quantization": {"type": "nf4", "double_quant": True, "blocksize": 64, "skip": []}}
    (adapter / "fastft_training.json").write_text(json.dumps(said))
    plan = merge.plan(base, [(adapter, 1.0)])
    assert any("nf4 with double quantization" in note and "--dequantized-base none" in note for note in plan.notes)
    merge.execute(plan, tmp_path / "by itself")
    merged(base, adapter, tmp_path / "asked", four_bit=FourBit("nf4", double_quant=True))
    merged(base, adapter, tmp_path / "plain", four_bit=None)
    by_itself, asked, plain = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("by itself", "asked", "plain")
    )
    assert by_itself == asked != plain
    assert verify.verify(tmp_path / "by itself", base, [(adapter, 1.0)]).good
    assert not verify.verify(tmp_path / "plain", base, [(adapter, 1.0)]).good
    other = shutil.copytree(adapter, tmp_path / "other")
    (other / "fastft_training.json").unlink()
    with pytest.raises(PlanError, match="--dequantized-base"):
        merge.plan(base, [(adapter, 0.5), (other, 0.5)])
    (adapter / "fastft_training.json").write_text('{"quantization": {"type": "int8"}}')
    with pytest.raises(PlanError, match="int8"):
        merge.plan(base, [(adapter, 1.0)])


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("stored", "held"), [("float16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_weights_held_in_another_dtype(tmp_path: Path, stored: str, held: str, *, double_quant: bool) -> None:
    """A training rounds the files' weights to its dtype, packs them, and unpacks them to that dtype."""
    from bitsandbytes import functional
    from safetensors.torch import load_file

    base, adapter, _ = build(tmp_path, getattr(torch, stored), None, target_modules=["q_proj"])
    said = {"quantization": {"type": "nf4", "double_quant": double_quant, "blocksize": 64, "weights_dtype": held}}
    (adapter / "fastft_training.json").write_text(json.dumps(said))
    mine = merged(base, adapter, tmp_path / "mine")
    weights = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, weight in weights.items():
        assert mine[name].dtype == getattr(torch, stored)
        if "_proj.weight" not in name:
            assert torch.equal(mine[name], weight)
            continue
        packed, state = functional.quantize_4bit(
            weight.to(getattr(torch, held)).reshape(-1), quant_type="nf4", compress_statistics=double_quant
        )
        seen = functional.dequantize_4bit(packed, state).reshape(weight.shape).float()
        at = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{at}A.weight" in factors:
            seen += (factors[f"{at}B.weight"] @ factors[f"{at}A.weight"]) * 2.0
        assert torch.equal(mine[name], seen.to(getattr(torch, stored))), name


def test_a_training_on_a_quantized_folder(tmp_path: Path) -> None:
    """QLoRA on the folder gives the losses of QLoRA on the base that it was made from."""
    data = tiny_run.write_dialogues(tmp_path / "data.jsonl")
    base = tiny_run.write_model(tmp_path / "base")
    packed = run(base, tmp_path / "packed", FourBit("nf4", double_quant=True))
    losses = []
    for name, model in (("on base", base), ("on packed", packed)):
        done = training.run(tiny_run.config(model, data, kind="qlora"), work_dir=tmp_path / name)
        lines = (done.run_dir / "metrics.jsonl").read_text().splitlines()
        losses.append([step["loss"] for step in map(json.loads, lines)])
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
