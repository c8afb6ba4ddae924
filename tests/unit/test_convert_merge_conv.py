"""LoRA on convolutions (Conv1d, Conv2d, Conv3d) of real little models, bit for bit against PEFT's merge_and_unload."""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import BUILDERS

from fastft.convert import merge, verify
from fastft.errors import CheckpointError, PlanError

torch = pytest.importorskip("torch")

# peft 0.21 asks transformers 5.23 for a name that it will drop in version 6; it takes the bias of lora_B for a matrix
# saved in pieces, and says at the training that grouped convolutions cannot be merged.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:.*LoRA tensor.s. have invalid shape",
    "ignore:LoRA adapter added to ConvNd layer with groups > 1:UserWarning",
)

# Kernels of 4x4, 2x2, 7x7, 3x3 and 1x1; of 10, 3 and 2 samples; of 2x14x14 pixels of a film. Linear layers beside them.
MODELS: dict[str, list[str]] = {
    "convnext": ["patch_embeddings", "downsampling_layer.1", "pwconv1"],
    "resnet": ["convolution"],
    "wav2vec2": ["conv_layers.0.conv", "conv_layers.1.conv", "q_proj"],
    "clip_vision": ["patch_embedding", "q_proj"],
    "qwen2_vl": ["patch_embed.proj", "qkv", "q_proj"],
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {
        "use_rslora": True,
        "rank_pattern": {".*(0|embedding|embeddings|embedder.convolution|proj)": 3},
        "lora_alpha": 5,
    },
    "dora": {"use_dora": True},
}


def made(name: str, folder: Path, dtype: Any, **lora: Any) -> tuple[Path, Path, dict[str, Any]]:
    """Save a random base and a random adapter; returns both folders and the tensors that PEFT's merge saves."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(3)
    model = BUILDERS[name]().to(dtype)
    model.save_pretrained(folder / "base")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": MODELS[name], "init_lora_weights": False} | lora
    peft_model = get_peft_model(model, LoraConfig(**settings))
    for key, parameter in peft_model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn_like(parameter) * 0.1
    peft_model.save_pretrained(folder / "adapter")
    base = type(model).from_pretrained(folder / "base", dtype=dtype)
    merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    merged.save_pretrained(folder / "theirs")
    return folder / "base", folder / "adapter", tensors(folder / "theirs" / "model.safetensors")


def tensors(file: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(file))


def ours(base: Path, adapter: Path, folder: Path) -> dict[str, Any]:
    merge.execute(merge.plan(base, [(adapter, 1.0)]), folder)
    report = verify.verify(folder, base, [(adapter, 1.0)])
    assert report.good, report.text()
    return tensors(folder / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_bit_for_bit_in_16_bit(tmp_path: Path, name: str, kind: str) -> None:
    dtype = torch.float16 if kind == "rslora" else torch.bfloat16
    base, adapter, theirs = made(name, tmp_path, dtype, **KINDS[kind])
    mine = ours(base, adapter, tmp_path / "mine")
    assert set(mine) == set(theirs)
    assert {key for key, tensor in theirs.items() if not torch.equal(tensor, mine[key])} == set()
    changed = {key for key, tensor in tensors(base / "model.safetensors").items() if not torch.equal(tensor, mine[key])}
    assert any(mine[key].dim() > 2 for key in changed)


@pytest.mark.parametrize("name", ["resnet", "wav2vec2"])
def test_within_the_order_of_the_sum_in_f32(tmp_path: Path, name: str) -> None:
    """Both are sums in f32: |difference| <= 2 (r + 3) 2^-24 (|W| + s sum |b||a|), spec/formats.md 2.2."""
    base, adapter, theirs = made(name, tmp_path, torch.float32)
    mine, before = ours(base, adapter, tmp_path / "mine"), tensors(base / "model.safetensors")
    factors = tensors(adapter / "adapter_model.safetensors")
    num_updated = 0
    for key, tensor in theirs.items():
        at = f"base_model.model.{key.removesuffix('.weight')}.lora_"
        if f"{at}A.weight" not in factors:
            assert torch.equal(tensor, mine[key])
            continue
        num_updated += 1
        B_OR, A_RI = factors[f"{at}B.weight"].flatten(1).abs(), factors[f"{at}A.weight"].flatten(1).abs()
        magnitude = before[key].double().abs() + 2 * (B_OR.double() @ A_RI.double()).reshape(tensor.shape)
        assert ((tensor.double() - mine[key].double()).abs() <= 2 * (4 + 3) * 2.0**-24 * magnitude).all()
    assert num_updated == len(factors) / 2


def test_lora_bias_of_a_convolution(tmp_path: Path) -> None:
    base, adapter, theirs = made("wav2vec2", tmp_path, torch.bfloat16, lora_bias=True)
    mine = ours(base, adapter, tmp_path / "mine")
    assert {key for key, tensor in theirs.items() if not torch.equal(tensor, mine[key])} == set()


def test_groups_are_refused(tmp_path: Path) -> None:
    """PEFT trains them and says only at its own merge that it cannot."""
    from peft import LoraConfig, get_peft_model

    model = BUILDERS["wav2vec2"]()
    model.save_pretrained(tmp_path / "base")
    conv = "encoder.pos_conv_embed.conv"
    adapted = get_peft_model(model, LoraConfig(target_modules=[conv], r=8))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(PlanError, match=r"pos_conv_embed.conv: a LoRA on a convolution of 2 groups"):
        merge.plan(tmp_path / "base", [(tmp_path / "adapter", 1.0)])


def test_a_window_of_another_shape_is_refused(tmp_path: Path) -> None:
    """2x4 is no 4x2, though they have as many numbers."""
    from safetensors.torch import save_file

    base, adapter, _ = made("clip_vision", tmp_path, torch.float32, target_modules=["patch_embedding"])
    file = adapter / "adapter_model.safetensors"
    turned = {key: t.reshape(4, 3, 28, 7) if t.shape[-1] == 14 else t for key, t in tensors(file).items()}
    save_file(turned, file)
    with pytest.raises(CheckpointError, match=r"the update is 32 x 3 x 28 x 7, but .* of the base is 32 x 3 x 14 x 14"):
        merge.plan(base, [(adapter, 1.0)])
