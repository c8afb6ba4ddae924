"""The tiled MLP: the gradients of the whole one, one tile held at a time, no product twice under checkpointing."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastft.model import tiled_mlp

D, F = 8, 20


class Mlp(nn.Module):
    """Llama's shape, with a note of how many tokens came at once."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(D, F, bias=False, dtype=torch.float64) for _ in range(2))
        self.down_proj = nn.Linear(F, D, bias=False, dtype=torch.float64)
        self.act_fn, self.drop = nn.SiLU(), nn.Dropout(dropout)
        self.tokens: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.tokens.append(x.numel() // D)
        return self.down_proj(self.act_fn(self.gate_proj(self.drop(x))) * self.up_proj(x))


def _mlp(dropout: float = 0.0) -> Mlp:
    torch.manual_seed(0)
    return Mlp(dropout)


def _tile(mlp: Mlp, tokens: int) -> Mlp:
    mlp.forward = tiled_mlp._tiled_forward(mlp, tokens)
    return mlp


def _step(mlp: Mlp, x: torch.Tensor, *, recompute: bool = False) -> dict[str, torch.Tensor]:
    """Output and gradients of a residual block around the MLP."""
    x = x.clone().requires_grad_()

    def block(x: torch.Tensor) -> torch.Tensor:
        return x + mlp(torch.tanh(x))

    torch.manual_seed(5)
    y = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    (y**2).sum().backward()
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in mlp.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 7, 13, 14, 100])
def test_gradients_are_those_of_the_whole(tokens: int, recompute: bool) -> None:
    x = torch.randn(2, 7, D, dtype=torch.float64)
    expected = _step(_mlp(), x)
    ours = _step(_tile(_mlp(), tokens), x, recompute=recompute)
    assert ours.keys() == expected.keys()
    assert len(expected) == 5
    for name, value in expected.items():
        # fp64 sums over 14 tokens in another order.
        assert torch.allclose(ours[name], value, rtol=1e-13, atol=1e-14), name


def test_each_tile_is_computed_twice_also_under_checkpointing() -> None:
    """Once forward, once for its gradient: the layer's recomputation stops before the MLP."""
    mlp = _tile(_mlp(), 4)
    _step(mlp, torch.randn(1, 10, D, dtype=torch.float64), recompute=True)
    assert mlp.tokens == [4, 4, 2, 4, 4, 2]


def test_only_the_input_is_kept() -> None:
    mlp = _tile(_mlp(), 4)
    kept: list[torch.Size] = []
    x = torch.randn(1, 10, D, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        mlp(x)
    assert kept == [(1, 10, D)]


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_is_drawn_again_as_it_was(recompute: bool) -> None:
    """The gradient belongs to the output: expected from a plain MLP whose tiles are drawn in the same order."""
    x = torch.randn(1, 10, D, dtype=torch.float64)
    ours = _step(_tile(_mlp(0.5), 4), x, recompute=recompute)
    plain = _mlp(0.5)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(5)
    inner = torch.tanh(leaf)
    y = leaf + torch.cat([plain(tile) for tile in inner.split(4, dim=1)], dim=1)
    (y**2).sum().backward()
    assert torch.equal(ours["y"], y)
    assert torch.allclose(ours["x"], leaf.grad, rtol=1e-13, atol=1e-14)
    assert torch.allclose(ours["up_proj.weight"], plain.up_proj.weight.grad, rtol=1e-13, atol=1e-14)
    before = torch.get_rng_state()
    mlp = _tile(_mlp(0.5), 4)
    torch.set_rng_state(before)
    y = mlp(leaf)
    drawn = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), drawn)  # the backward pass draws nothing


def test_frozen_weights_and_frozen_inputs() -> None:
    mlp = _mlp()
    mlp.gate_proj.weight.requires_grad_(False)
    _tile(mlp, 3)
    x = torch.randn(1, 7, D, dtype=torch.float64)
    mlp(x).sum().backward()
    plain = _mlp()
    plain(x).sum().backward()
    assert mlp.gate_proj.weight.grad is None
    for name in ("up_proj", "down_proj"):
        ours, theirs = (getattr(m, name).weight.grad for m in (mlp, plain))
        assert torch.allclose(ours, theirs, rtol=1e-13, atol=1e-14)
    with torch.no_grad():
        assert torch.allclose(mlp(x), plain(x), rtol=1e-13, atol=1e-14)


def test_autocast_holds_in_the_backward_pass() -> None:
    mlp = _tile(_mlp().float(), 4)
    seen: list[torch.dtype] = []
    mlp.up_proj.register_forward_hook(lambda _m, _i, y: seen.append(y.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mlp(torch.randn(1, 8, D, requires_grad=True))
    y.float().sum().backward()
    assert seen == [torch.bfloat16] * 4


@pytest.mark.parametrize(
    ("kind", "tiled"),
    [("llama", 2), ("qwen2", 2), ("gemma3_text", 2), ("gpt_neox", 2), ("gpt2", 0), ("mixtral", 0), ("qwen3_moe", 0)],
)
def test_models(kind: str, tiled: int) -> None:
    """Real MLPs give the same; mixtures of experts, and Conv1D, are left alone and counted."""
    import tiny_models

    model: Any = tiny_models.BUILDERS[kind]().eval()
    if not tiled:
        assert tiled_mlp.install(model, 5) == (0, 2)
        return
    model.double()
    ids = torch.arange(24).view(2, 12)
    expected = model(input_ids=ids, use_cache=False).logits
    assert tiled_mlp.install(model, 5) == (2, 0)
    # Some families compute their norms in fp32 whatever the model is.
    assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-6, atol=1e-9)
