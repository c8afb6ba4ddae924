"""A linear layer with its adapter as one operation: y = W x + b + s B A drop(x), forward and backward.

peft computes the same in steps that each make a tensor of the size of the output (a clone, B's product, its scaling,
the sum; three of them are written and read again), and without autocast a copy of the input in fp32. Here the update is
added into the base's output by the product itself, and only x, the R numbers of A x per token and a dropout mask of one
byte are kept. A and B stay fp32 and are rounded to the dtype of the products at each use.

Exact up to rounding: the sum is rounded once where peft rounds three times; the numbers that dropout draws are peft's.
Costs nothing. Modules, parameter names and files stay peft's: only the class of each layer is changed, to a subclass
that hands everything special (several adapters, DoRA, merged weights) to peft.

Letters: N tokens, I in, O out, R rank.
Source: Hu et al. 2021 (LoRA), section 4.1; backward by the chain rule.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _LoraLinear(Function):
    """y = base(x) + s (drop(x) A^T) B^T; the base is frozen."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd hands arguments on by place
        ctx: Any,
        x: torch.Tensor,
        A_RI: torch.Tensor,
        B_OR: torch.Tensor,
        base: nn.Module,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        products = products_dtype(base, x)
        with torch.autocast(x.device.type, enabled=False):
            y = _base_output(base, x, products)
            x_NI = x.reshape(-1, x.shape[-1]).to(products)
            dropped_NI, mask_NI = _drop(x_NI, dropout)
            u_NR = dropped_NI @ A_RI.t().to(products)
            if y.dtype == products:
                y.view(-1, y.shape[-1]).addmm_(u_NR, B_OR.t().to(products), alpha=scale)
            else:
                y += (scale * (u_NR @ B_OR.t().to(products))).view(y.shape).to(y.dtype)
        ctx.save_for_backward(x, u_NR, A_RI, B_OR, *(() if mask_NI is None else (mask_NI,)))
        ctx.base, ctx.scale, ctx.dropout, ctx.products = base, scale, dropout, products
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, u_NR, A_RI, B_OR, *masks = ctx.saved_tensors
        products, kept = ctx.products, 1.0 / (1.0 - ctx.dropout) if ctx.dropout < 1 else 0.0
        dx = dA_RI = dB_OR = None
        with torch.autocast(dy.device.type, enabled=False):
            dy_NO = dy.reshape(-1, dy.shape[-1]).to(products)
            du_NR = (dy_NO @ B_OR.to(products)).mul_(ctx.scale)
            if ctx.needs_input_grad[2]:
                dB_OR = (dy_NO.t() @ u_NR).to(B_OR.dtype).mul_(ctx.scale)
            if ctx.needs_input_grad[1]:
                x_NI = x.reshape(-1, x.shape[-1]).to(products)
                dropped_NI = x_NI * masks[0] * kept if masks else x_NI
                dA_RI = (du_NR.t() @ dropped_NI).to(A_RI.dtype)
                del x_NI, dropped_NI
            if ctx.needs_input_grad[0]:
                dx_NI = dy_NO @ weight_of(ctx.base, products)
                if masks:
                    dx_NI.add_((du_NR @ A_RI.to(products)).mul_(masks[0]), alpha=kept)
                else:
                    dx_NI.addmm_(du_NR, A_RI.to(products))
                dx = dx_NI.view(x.shape).to(x.dtype)
        return dx, dA_RI, dB_OR, None, None, None


def _drop(x_NI: torch.Tensor, dropout: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dropout, and its mask (bool); the same draws from the same random state as functional.dropout."""
    if dropout == 0.0:
        return x_NI, None
    if x_NI.device.type == "cuda":
        return torch.native_dropout(x_NI, dropout, train=True)
    mask_NI = torch.empty_like(x_NI, dtype=torch.bool).bernoulli_(1.0 - dropout)
    return x_NI * mask_NI * (1.0 / (1.0 - dropout) if dropout < 1 else 0.0), mask_NI


def products_dtype(base: nn.Module, x: torch.Tensor) -> torch.dtype:
    """The dtype of the products: the 4-bit layer's own; else autocast's; else the weight's."""
    if _is_4bit(base):
        own = getattr(base, "compute_dtype", None)
        return own if isinstance(own, torch.dtype) else x.dtype
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    assert isinstance(base.weight, torch.Tensor)
    return base.weight.dtype


def _base_output(base: nn.Module, x: torch.Tensor, products: torch.dtype) -> torch.Tensor:
    """What the frozen layer gives for x; a new tensor."""
    if _is_4bit(base):
        y: torch.Tensor = base(x)
        return y
    bias: Any = base.bias
    return functional.linear(x.to(products), weight_of(base, products), None if bias is None else bias.to(products))


def weight_of(base: nn.Module, products: torch.dtype) -> torch.Tensor:
    """The base's weight [O, I] in the dtype of the products; a 4-bit one is unpacked anew each time."""
    weight: Any = base.weight
    if not _is_4bit(base):
        return weight.detach().to(products)  # type: ignore[no-any-return]
    from bitsandbytes import functional as four_bit

    unpacked: torch.Tensor = four_bit.dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)
    return unpacked.to(products)


def _is_4bit(base: nn.Module) -> bool:
    return getattr(base.weight, "quant_state", None) is not None


def _is_plain(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the layer has one ordinary adapter that is switched on and nothing else is asked."""
    if args or any(value is not None for value in kwargs.values()):
        return False
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    return (
        name in layer.lora_A
        and name not in getattr(layer, "lora_variant", {})
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
    )


def _fused_forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    name = layer.active_adapters[0]
    dropout = layer.lora_dropout[name]
    A_RI, B_OR = layer.lora_A[name].weight, layer.lora_B[name].weight
    p = float(dropout.p) if isinstance(dropout, nn.Dropout) and layer.training else 0.0
    y: torch.Tensor = _LoraLinear.apply(x, A_RI, B_OR, layer.base_layer, float(layer.scaling[name]), p)
    return y


def _fused_class(own: type) -> type:
    """A subclass of a peft layer class whose forward is ours where it can be."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_plain(self, args, kwargs):
            return _fused_forward(self, x)
        y: torch.Tensor = own.forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]
        return y

    return type(f"Fused{own.__name__}", (own,), {"forward": forward, "__module__": __name__})


def install(adapted: nn.Module) -> tuple[int, int]:
    """Let the adapters of a peft model be computed in one operation each.

    Returns:
        numbers of adapters that are, and of those that stay peft's: other layers than linear, a base with a gradient.
    """
    from peft.tuners.lora import LoraLayer

    fused = left = 0
    classes: dict[type, type] = {}
    for module in adapted.modules():
        if not isinstance(module, LoraLayer):
            continue
        base = module.base_layer
        linear = isinstance(base, nn.Linear) and base.weight.dim() == 2
        trained = any(p.requires_grad for p in base.parameters())
        if not linear or trained or getattr(module, "fan_in_fan_out", False):
            left += 1
            continue
        own = type(module)
        module.__class__ = classes.setdefault(own, _fused_class(own))
        fused += 1
    return fused, left
