"""In which dtype weights are held, trained and multiplied on a GPU, and that the gradients are the right ones."""

from pathlib import Path
from typing import Any

import pytest

import tiny_run
from fastft.model import device as of_model
from fastft.model import load

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def _load(folder: Path, stored: str, kind: str, **changes: Any) -> load.Loaded:
    model = folder / stored
    if not model.exists():
        tiny_run.write_model(model, dtype=stored)
    return load.load(tiny_run.config(model, Path("unused.jsonl"), kind=kind, **changes))


@pytest.mark.usefixtures("needs_cuda")
@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_what_is_trained_is_fp32_and_products_are_bf16(kind: str, stored: str, folder: Path) -> None:
    import torch

    loaded = _load(folder, stored, kind)
    parameters = list(loaded.model.parameters())
    assert {p.device.type for p in parameters} == {"cuda"}
    assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}
    frozen = {of_model.short_name(p.dtype) for p in parameters if not p.requires_grad}
    # A checkpoint in fp32 stays so: its owner may need it. fp16 becomes bf16, whose range gradients need.
    held = "float32" if stored == "float32" else "bfloat16"
    assert frozen == {"full": set(), "lora": {held}, "qlora": {"uint8", held}}[kind]
    assert loaded.products == (None if stored == "float32" and kind != "full" else torch.bfloat16)


@pytest.mark.parametrize("double_quant", [False, True])
def test_gradients_are_those_of_the_unpacked_weights(double_quant: bool, device: str, folder: Path) -> None:
    """The reference is a plain model in fp32 whose linear weights are what bitsandbytes unpacks on this device.

    With B = 0 an adapter changes nothing, and the chain rule gives dL/dB = s dL/dW A^T from the plain model's dL/dW.
    """
    import bitsandbytes
    import torch
    from transformers import AutoModelForCausalLM

    quantization = {"type": "nf4", "double_quant": double_quant}
    loaded = _load(folder, "bfloat16", "qlora", method__quantization=quantization)
    plain = AutoModelForCausalLM.from_pretrained(folder / "bfloat16", dtype=torch.float32).to(device)
    for name, module in loaded.model.get_base_model().named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            unpacked = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name.removesuffix(".base_layer")).weight.data = unpacked.float()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 250, (2, 48), generator=generator).to(device)
    expected = plain(input_ids=ids, labels=ids, use_cache=False).loss
    expected.backward()
    products = {"device_type": device, "dtype": loaded.products or torch.bfloat16}
    with torch.autocast(**products, enabled=loaded.products is not None):
        ours = loaded.model(input_ids=ids, labels=ids, use_cache=False).loss
    ours.backward()
    # Every operand is rounded to bf16, 2^-9 of itself at most. Some 30 roundings lie on the way through 2 layers and
    # back; as independent errors they add up to sqrt(30) 2^-9 = 1.1 % of the norm, all in one direction to 6 %. A wrong
    # scale, transpose or dtype of the weights is off by 100 %, a lost layer by some 30 %.
    exact = device == "cpu"
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5 if exact else 2**-7)
    layers = 0
    for name, parameter in loaded.model.get_base_model().named_parameters():
        if "lora_B" not in name:
            continue
        at = name.split(".lora_B")[0]
        A_RI = loaded.model.get_base_model().get_submodule(f"{at}.lora_A.default").weight
        reference = 2.0 * plain.get_submodule(at).weight.grad @ A_RI.T  # s = alpha / r = 8 / 4
        off = (parameter.grad - reference).norm() / reference.norm()
        assert off < (1e-4 if exact else 0.06), (name, off.item())
        layers += 1
    assert layers == 2 * 7


@pytest.mark.usefixtures("needs_cuda")
def test_bf16_weights_trained_in_full_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    loaded = _load(folder, "bfloat16", "full", model__dtype="bf16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.products is None
    assert "small updates are lost" in capsys.readouterr().err
