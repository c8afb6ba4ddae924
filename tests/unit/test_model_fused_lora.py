"""The fused adapter: gradients by finite differences, peft's numbers and random draws, and what is left to peft."""

from typing import Any

import pytest
import torch
from torch import nn

from fastft.model import fused_lora, quiet

I, O, R = 48, 64, 4  # noqa: E741 - I and O are in and out


def _adapted(base: nn.Module, dropout: float = 0.0, **settings: Any) -> Any:
    """A peft model of one linear layer, with an adapter whose B is not zero."""
    quiet.prepare_libraries()
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = nn.Sequential()
    model.add_module("linear", base)
    model.requires_grad_(False)
    if hasattr(base.weight, "quant_state"):
        model.is_loaded_in_4bit = True
    config = LoraConfig(r=R, lora_alpha=6, lora_dropout=dropout, target_modules=["linear"], **settings)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    layer = adapted.base_model.model.linear
    if "default" in layer.lora_B:
        nn.init.normal_(layer.lora_B["default"].weight)
    return adapted


def _four_bit(dtype: torch.dtype) -> nn.Module:
    quiet.prepare_libraries()
    import bitsandbytes

    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(I, O, bias=True, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(nn.Linear(I, O, dtype=dtype).state_dict())
    layer = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False
    return layer


def _step(adapted: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of one step with fixed random numbers."""
    adapted.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    y = adapted(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    (y * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    base = nn.Linear(5, 7, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    A, B = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 5), (7, 2)))

    def fused(dropout: float) -> Any:
        def of(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(3)
            return fused_lora._LoraLinear.apply(x, A, B, base, 1.7, dropout)

        return of

    assert torch.autograd.gradcheck(fused(0.0), (x, A, B))
    assert torch.autograd.gradcheck(fused(0.4), (x, A, B))
    expected = base(x) + 1.7 * (x @ A.T) @ B.T
    assert torch.allclose(fused(0.0)(x, A, B), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_it_is_pefts_step(kind: str, dropout: float) -> None:
    torch.manual_seed(0)
    adapted = _adapted(nn.Linear(I, O) if kind == "linear" else _four_bit(torch.float32), dropout)
    x = torch.randn(2, 9, I)
    plain = _step(adapted, x)
    names = [name for name, _ in adapted.named_parameters()]
    assert fused_lora.install(adapted) == (1, 0)
    assert [name for name, _ in adapted.named_parameters()] == names
    assert type(adapted.base_model.model.linear).__name__.startswith("Fused")
    fused = _step(adapted, x)
    assert fused.keys() == plain.keys()
    assert len(plain) == 4
    for name, value in plain.items():
        # fp32 sums of at most 64 terms (18 tokens for the weights), each rounded by 2^-24, in another order.
        assert (fused[name] - value).abs().max() <= 64 * 2**-24 * value.abs().max(), name


def test_16_bit_inputs_with_fp32_adapters_give_16_bit_outputs() -> None:
    adapted = _adapted(_four_bit(torch.bfloat16))
    x = torch.randn(1, 9, I).bfloat16()
    plain = _step(adapted, x)
    fused_lora.install(adapted)
    fused = _step(adapted, x)
    assert fused["y"].dtype == fused["x"].dtype == torch.bfloat16
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    for name, value in plain.items():
        # Output, its gradient and the input's are rounded to bf16, 2^-9, a few times, at different places.
        assert (fused[name] - value).norm() <= 3 * 2**-8 * value.norm(), name


def test_only_the_input_and_little_else_is_kept() -> None:
    adapted = _adapted(_four_bit(torch.float32))
    fused_lora.install(adapted)
    kept: list[torch.Size] = []
    x = torch.randn(1, 100, I, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        adapted(x)
    assert kept == [(1, 100, I), (100, R), (R, I), (O, R)]


def test_what_is_special_is_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = _adapted(nn.Linear(I, O))
    x = torch.randn(3, I)
    base, plain = adapted.base_model.model.linear.base_layer(x), adapted(x)
    fused_lora.install(adapted)
    assert torch.allclose(adapted(x), plain, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(fused_lora, "_fused_forward", None)  # not reached from here
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), base)
    adapted.merge_adapter()
    assert torch.allclose(adapted(x), plain, rtol=1e-5, atol=1e-6)
    dora = _adapted(nn.Linear(I, O), use_dora=True)
    plain = dora(x)
    fused_lora.install(dora)
    assert torch.equal(dora(x), plain)


def test_what_is_not_linear_is_counted() -> None:
    assert fused_lora.install(_adapted(nn.Embedding(10, 8))) == (0, 1)
    trained = _adapted(nn.Linear(I, O))
    trained.base_model.model.linear.base_layer.weight.requires_grad_(True)
    assert fused_lora.install(trained) == (0, 1)
