"""Merges held against PEFT's own merge_and_unload, on random Llamas made on the spot, and against golden answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastft.convert import merge, verify
from fastft.convert.matching import NameOptions
from fastft.errors import PlanError

torch = pytest.importorskip("torch")

# peft 0.21 asks transformers 5.23 for a name that it will drop in version 6.
# It also says that it saves embeddings which are trained, and that a merge of tied ones is wrong (ours is not).
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
    "ignore:.*(tie|tied).*:UserWarning",
    # It takes a bias of lora_B for a matrix that was saved in pieces.
    "ignore:.*LoRA tensor.s. have invalid shape",
)


def build(folder: Path, dtype: Any, adapter_dtype: Any, *, tied: bool = False, **lora: Any) -> tuple[Path, Path, Any]:
    """Save a random Llama and a random adapter; returns both folders and PEFT's merged model."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder / "base", max_shard_size="40KB")
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "init_lora_weights": False} | lora
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter.data) * 0.05
            assert "lora" in name or "modules_to_save" in name or "bias" in name or "token" in name
    if adapter_dtype is not None:
        peft_model.to(adapter_dtype)
    peft_model.save_pretrained(folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    return folder / "base", folder / "adapter", merged


def saved(model: Any, folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return dict(load_file(folder / "model.safetensors"))


def ours(base: Path, adapter: Path, folder: Path, **options: Any) -> dict[str, Any]:
    from safetensors.torch import load_file

    merge.execute(merge.plan(base, [(adapter, 1.0)], **options), folder)
    assert verify.verify(folder, base, [(adapter, 1.0)]).good
    return dict(load_file(folder / "model.safetensors"))


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"v_proj": 7}},
    "some layers": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "saved modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "tokens": {"trainable_token_indices": [3, 5, 90]},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "lora bias": {"lora_bias": True, "target_modules": ["q_proj", "k_proj", "o_proj"]},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_bit_for_bit_in_16_bit(tmp_path: Path, case: str, dtype: str) -> None:
    base, adapter, merged = build(tmp_path, getattr(torch, dtype), None, **CASES[case])
    theirs = saved(merged, tmp_path / "theirs")
    mine = ours(base, adapter, tmp_path / "mine")
    assert set(mine) == set(theirs)
    before = {name for name, tensor in theirs.items() if not torch.equal(tensor, mine[name])}
    assert not before


@pytest.mark.parametrize("adapter_dtype", ["bfloat16", "float16"])
def test_bit_for_bit_with_adapters_of_16_bit(tmp_path: Path, adapter_dtype: str) -> None:
    base, adapter, merged = build(tmp_path, torch.bfloat16, getattr(torch, adapter_dtype))
    theirs = saved(merged, tmp_path / "theirs")
    mine = ours(base, adapter, tmp_path / "mine")
    assert all(torch.equal(theirs[name], mine[name]) for name in theirs)


def test_within_the_order_of_the_sum_in_f32(tmp_path: Path) -> None:
    """|error| <= (r + 3) 2^-24 (|W| + s sum |b||a|), spec/formats.md 2.2."""
    from safetensors.torch import load_file

    base, adapter, merged = build(tmp_path, torch.float32, None)
    theirs = saved(merged, tmp_path / "theirs")
    mine = ours(base, adapter, tmp_path / "mine")
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in theirs.items():
        at = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{at}A.weight" not in factors:
            assert torch.equal(tensor, mine[name])
            continue
        a, b = factors[f"{at}A.weight"].double(), factors[f"{at}B.weight"].double()
        bound = (8 + 3) * 2.0**-24 * (tensor.double().abs() + 2 * 2.0 * (b.abs() @ a.abs()))
        assert ((tensor.double() - mine[name].double()).abs() <= bound).all()


TIED: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "neither": {"target_modules": ["q_proj"]},
    "dora on the embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
}


@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings_by_logits(tmp_path: Path, case: str) -> None:
    """The merged folder, loaded by transformers, answers as base + adapter does (PEFT's own merge does not)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter, _ = build(tmp_path, torch.float32, None, tied=True, **TIED[case])
    ids = torch.arange(1, 30).reshape(1, -1)
    with torch.no_grad():
        trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        truth = trained(ids).logits
        merge.execute(merge.plan(base, [(adapter, 1.0)]), tmp_path / "mine")
        mine = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")(ids).logits
    assert verify.verify(tmp_path / "mine", base, [(adapter, 1.0)]).good
    untied = case not in ("neither", "tokens")
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["tie_word_embeddings"] is not untied
    # f32 through two layers; a delta gone astray shows as > 0.1
    assert (mine - truth).abs().max() < 1e-4 * truth.abs().max()


@pytest.mark.parametrize("dora", [False, True])
def test_gpt2_whose_weights_are_transposed(tmp_path: Path, *, dora: bool) -> None:
    """Conv1D stores (in, out): fan_in_fan_out decides, also for square weights; DoRA scales columns."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)).bfloat16()
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["c_attn", "c_proj", "c_fc"],
        init_lora_weights=False,
        fan_in_fan_out=True,
        use_dora=dora,
    )
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    theirs = saved(merged, tmp_path / "theirs")
    mine = ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "mine")
    assert {name for name, tensor in theirs.items() if not torch.equal(tensor, mine[name])} == set()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_onto_what_qlora_saw(tmp_path: Path, kind: Any, *, double_quant: bool) -> None:
    """round(bf16(dequantize(quantize(W))) + s B A), by bitsandbytes and torch; skipped layers start from W."""
    from bitsandbytes import functional
    from safetensors.torch import load_file

    from fastft.convert.four_bit import FourBit

    base, adapter, _ = build(tmp_path, torch.bfloat16, None, target_modules=["q_proj", "down_proj"])
    skip = ["model.layers.1.mlp.gate_proj", "model.layers.1.self_attn.q_proj"]
    (adapter / "fastft_training.json").write_text(json.dumps({"quantization": {"type": kind, "skip": skip}}))
    weights = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    factors = load_file(adapter / "adapter_model.safetensors")
    four_bit = FourBit(kind, double_quant)
    plan = merge.plan(base, [(adapter, 1.0)], four_bit=four_bit)
    assert kind in plan.as_table()
    merge.execute(plan, tmp_path / "mine")
    assert verify.verify(tmp_path / "mine", base, [(adapter, 1.0)], four_bit=four_bit).good
    mine = load_file(tmp_path / "mine" / "model.safetensors")
    for name, weight in weights.items():
        path = name.removesuffix(".weight")
        seen = weight
        if name.endswith("proj.weight") and path not in skip:
            # Flat: bitsandbytes' CPU code is wrong for rows that are no multiple of the block.
            packed, state = functional.quantize_4bit(
                weight.reshape(-1), blocksize=64, quant_type=kind, compress_statistics=double_quant
            )
            seen = functional.dequantize_4bit(packed, state).reshape(weight.shape)
        at = f"base_model.model.{path}.lora_"
        if f"{at}A.weight" in factors:
            seen = (seen.float() + (factors[f"{at}B.weight"] @ factors[f"{at}A.weight"]) * 2.0).bfloat16()
        assert torch.equal(mine[name], seen), name


def vision_language_model(kind: str) -> Any:
    """A random model of a class whose files are named otherwise than its parameters."""
    import transformers

    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64,
    }  # fmt: skip
    if kind == "llava":
        config = transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**text),
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=16,
                patch_size=8,
            ),
        )
        return transformers.LlavaForConditionalGeneration(config)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2VLConfig(
        text_config=text | {"rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 8},
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_renamed_models(tmp_path: Path, kind: str, *, old_names: bool) -> None:
    """Files in transformers 4's naming; adapters in that of 5, or of 4, which PEFT itself does not load any more."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    model = vision_language_model(kind).bfloat16()
    model.save_pretrained(tmp_path / "base")
    lora = LoraConfig(
        target_modules=r".*(language_model|visual|vision_tower).*\.(q_proj|down_proj|qkv)", init_lora_weights=False
    )
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    base = type(model).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    theirs = saved(merged, tmp_path / "theirs")
    if old_names:
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        to_old = {
            "llava": ("model.language_model.", "language_model.model."),
            "qwen2_vl": ("model.language_model.", "model."),
        }
        new, old = to_old[kind]
        renamed = {
            key.replace(f"base_model.model.{new}", f"base_model.model.{old}")
            .replace("base_model.model.model.vision_tower.", "base_model.model.vision_tower.")
            .replace("base_model.model.model.visual.", "base_model.model.visual."): tensor
            for key, tensor in load_file(file).items()
        }
        save_file(renamed, file)
    mine = ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "mine")
    assert set(mine) == set(theirs)
    assert {name for name, tensor in theirs.items() if not torch.equal(tensor, mine[name])} == set()


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_clip_vision_tower(tmp_path: Path, prefix: str, *, full: bool) -> None:
    """An adapter of CLIPVisionModel, named as transformers 4 or 5 does, onto a full CLIP or the tower alone."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=sizes | {"vocab_size": 60})).save_pretrained(
        tmp_path / "full"
    )
    tower = CLIPVisionModel.from_pretrained(tmp_path / "full")
    tower.save_pretrained(tmp_path / "tower")
    base = tmp_path / ("full" if full else "tower")
    (base / "preprocessor_config.json").write_text("{}")
    (base / "tokenizer.json").write_text("{}")
    lora = LoraConfig(target_modules=["q_proj", "fc1"], r=4, init_lora_weights=False)
    get_peft_model(tower, lora).save_pretrained(tmp_path / "adapter")
    pixels = torch.randn(1, 3, 16, 16)
    trained = PeftModel.from_pretrained(CLIPVisionModel.from_pretrained(tmp_path / "tower"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    at = "base_model.model."
    renamed = {
        at + prefix + key.removeprefix(at).removeprefix("vision_model."): t for key, t in load_file(file).items()
    }
    save_file(renamed, file)
    adapters = [(tmp_path / "adapter", 1.0)]
    merge.execute(merge.plan(base, adapters, names=NameOptions(is_clip=True)), tmp_path / "merged")
    assert verify.verify(tmp_path / "merged", base, adapters, names=NameOptions(is_clip=True)).good
    assert not (tmp_path / "merged" / "tokenizer.json").exists()
    assert (tmp_path / "merged" / "preprocessor_config.json").exists()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "clip_vision_model"
    model, told = CLIPVisionModel.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    with torch.no_grad():
        found, truth = model(pixels).last_hidden_state, trained(pixel_values=pixels).last_hidden_state
    assert (found - truth).abs().max() < 1e-5


@pytest.mark.parametrize("case", ["lora_qv_r8", "lora_all_linear_r4", "rslora_all7_r16"])
def test_golden_answers_of_stories260k(shared_data: Path, tmp_path: Path, case: str) -> None:
    """Norms and logits that PEFT 0.21.2 gave on a real little model."""
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    golden = shared_data / "known_answers" / "peft_merge_stories260K" / case
    base = shared_data / "tiny_models" / "stories260K"
    plan = merge.plan(base, [(golden, 1.0)], max_shard_size_bytes=200_000)
    merge.execute(plan, tmp_path / "mine")
    mine = {k: v for file in sorted((tmp_path / "mine").glob("*.safetensors")) for k, v in load_file(file).items()}
    truth = json.loads((golden / "expected.json").read_text())
    changed = {name for name, numbers in truth["tensors"].items() if numbers["changed"]}
    assert changed == set(plan.changed)
    tensors = {name: numbers for name, numbers in truth["tensors"].items() if name != "lm_head.weight"}  # tied
    assert set(tensors) == set(mine)
    for name, numbers in tensors.items():
        assert np.linalg.norm(mine[name].astype(np.float64)) == pytest.approx(numbers["norm"], rel=1e-6)
        assert mine[name].astype(np.float64).sum() == pytest.approx(numbers["sum"], abs=1e-3)
    logits = load_file(golden / "expected_logits.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine")
    with torch.no_grad():
        found = model(torch.from_numpy(logits["input_ids"])).logits.numpy()
    np.testing.assert_allclose(found, logits["merged_logits"], atol=1e-3)


def test_onto_what_pissa_left_of_the_base(tmp_path: Path) -> None:
    """PEFT's own merge in the training process; onto the original base it is refused."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = small_llama()
    model.save_pretrained(tmp_path / "original")
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    peft_model.save_pretrained(tmp_path / "adapter")
    residual = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor.contiguous()
        for name, tensor in peft_model.state_dict().items()
        if "lora_" not in name
    }
    small_llama().save_pretrained(tmp_path / "residual", state_dict=residual)
    merged = saved(peft_model.merge_and_unload(), tmp_path / "theirs")
    with pytest.raises(PlanError, match="--base-is-residual"):
        merge.plan(tmp_path / "original", [(tmp_path / "adapter", 1.0)])
    plan = merge.plan(tmp_path / "residual", [(tmp_path / "adapter", 1.0)], base_is_residual=True)
    merge.execute(plan, tmp_path / "mine")
    mine = load_file(tmp_path / "mine" / "model.safetensors")
    for name, tensor in merged.items():
        # (r + 3) 2^-24 (|W| + s sum |b||a|) in f32, and the weights are below 1
        assert torch.allclose(mine[name], tensor, rtol=0, atol=7 * 2.0**-22), name
    name = "model.layers.0.self_attn.q_proj.weight"
    original, left = (load_file(tmp_path / folder / "model.safetensors")[name] for folder in ("original", "residual"))
    assert not torch.allclose(left, original, atol=1e-3)


def small_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=64,
            tie_word_embeddings=False,
        )
    )
