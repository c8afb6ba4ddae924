"""The head by tiles of the vocabulary: the plain loss and gradient, with every scaling, bias and tile; NF4's own weights."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastft.model import quiet, tiled_head
from fastft.model.tiled_head import Scaling, TiledHead

N, D, V = 11, 8, 50
CPU = torch.device("cpu")


def _batch(dtype: torch.dtype = torch.float64, *, bias: bool = False, scale: float = 1.0) -> tuple[Any, Any, nn.Linear]:
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias, dtype=dtype).requires_grad_(False)
    hidden_ND = (torch.randn(N, D, dtype=dtype) * scale).requires_grad_()
    return hidden_ND, torch.randint(0, V, (N,)), head


def _plain(hidden_ND: torch.Tensor, targets_N: torch.Tensor, head: nn.Module, scaling: Scaling) -> torch.Tensor:
    """By torch's cross-entropy from all logits; the scalings written as their papers and configs have them."""
    logits = head(hidden_ND)
    if scaling.factor:
        logits = logits * scaling.factor
    if scaling.divisor:
        logits = logits / scaling.divisor
    if scaling.cap:
        logits = torch.tanh(logits / scaling.cap) * scaling.cap
    return functional.cross_entropy(logits, targets_N, reduction="sum")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "scaling", [Scaling(), Scaling(factor=0.25), Scaling(divisor=4.0), Scaling(cap=1.5), Scaling(0.5, 2.0, 1.0)]
)
@pytest.mark.parametrize("rows", [1, 7, 25, 49, 50, 51])
def test_loss_and_gradient(rows: int, scaling: Scaling, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_head, "BLOCK_BYTES", 4 * rows * 4)  # blocks of 4 tokens
    hidden, targets, head = _batch(bias=bias, scale=5.0)
    targets[:2] = torch.tensor([0, V - 1])
    expected = _plain(hidden, targets, head, scaling)
    expected.backward()
    gradient, hidden.grad = hidden.grad, None
    total = tiled_head.cross_entropy(hidden, targets, TiledHead(head, "host", CPU, rows), scaling)
    (3 * total).backward()
    # fp64 sums of at most 50 terms in another order.
    assert torch.allclose(total, expected, rtol=1e-13)
    assert torch.allclose(hidden.grad, 3 * gradient, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        assert torch.allclose(
            tiled_head.cross_entropy(hidden, targets, TiledHead(head, "host", CPU, rows), scaling), total
        )


def test_logits_of_any_size() -> None:
    """Exponentials are taken relative to the largest logit so far, which comes last here, first there."""
    for sign in (1.0, -1.0):
        hidden, targets, head = _batch()
        head.weight.copy_((torch.arange(V).double() * sign * 40).unsqueeze(1).expand(V, D) / D)
        hidden = torch.ones_like(hidden).requires_grad_()
        expected = _plain(hidden, targets, head, Scaling())
        expected.backward()
        gradient, hidden.grad = hidden.grad, None
        total = tiled_head.cross_entropy(hidden, targets, TiledHead(head, "host", CPU, 3))
        total.backward()
        assert torch.allclose(total, expected, rtol=1e-13)
        assert torch.allclose(hidden.grad, gradient, rtol=1e-11, atol=1e-11)


def test_bf16() -> None:
    """The reference is fp64 from the same bf16 numbers."""
    hidden, targets, head = _batch(torch.bfloat16)
    wide = hidden.detach().double().requires_grad_()
    _plain(wide, targets, head.double(), Scaling()).backward()
    total = tiled_head.cross_entropy(hidden, targets, TiledHead(head.bfloat16(), "host", CPU, 7))
    total.backward()
    assert total.dtype == torch.float32
    assert hidden.grad.dtype == torch.bfloat16
    # Logits, softmax weights and each of 8 tiles' products are rounded to bf16, 2^-9 of themselves.
    assert (hidden.grad.double() - wide.grad).norm() <= 4 * 2**-9 * wide.grad.norm()


@pytest.mark.parametrize("kind", ["host", "nf4"])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_for_generation(kind: str, bias: bool) -> None:
    quiet.prepare_libraries()
    hidden, _, head = _batch(torch.float32, bias=bias)
    tiled = TiledHead(head, kind, CPU, 16)
    weight = torch.cat(list(tiled.tiles))
    assert torch.allclose(tiled(hidden), functional.linear(hidden, weight, head.bias), rtol=1e-5, atol=1e-6)
    assert tiled(hidden.view(1, N, D)).shape == (1, N, V)
    assert (tiled.num_weights, list(tiled.parameters()), tiled.state_dict()) == (V * D, [], {})
    if kind == "host":
        assert torch.equal(weight, head.weight)


def test_nf4_is_bitsandbytes_nf4_of_each_tile() -> None:
    quiet.prepare_libraries()
    from bitsandbytes import functional as four_bit

    _, _, head = _batch(torch.float32)
    for rows, tile in zip(head.weight.split(16), TiledHead(head, "nf4", CPU, 16).tiles, strict=True):
        expected = four_bit.dequantize_4bit(
            *four_bit.quantize_4bit(rows, blocksize=64, compress_statistics=True, quant_type="nf4")
        )
        assert torch.equal(tile, expected)


def test_nf4_changes_the_loss_by_its_rounding() -> None:
    """Logits of N(0, 1) hidden states and a Gaussian head: their error, and that of the loss, from the error of NF4.

    NF4 with blocks of 64 is off by 9.2 % of the norm of Gaussian weights (spec training.md 1), 9.5 % with the scales in
    8 bits. So a logit of standard deviation s is off by 0.095 s, the mean loss over N tokens by 0.095 s sqrt(1 / N) from the
    targets' logits, and by (0.095 s)^2 / 2 in one direction from the log-sum-exp.
    """
    quiet.prepare_libraries()
    torch.manual_seed(0)
    width, rows, tokens = 256, 4096, 512
    head = nn.Linear(width, rows, bias=False).requires_grad_(False)
    head.weight.normal_(0, 0.02)
    hidden, targets = torch.randn(tokens, width), torch.randint(0, rows, (tokens,))
    exact = _plain(hidden, targets, head, Scaling()) / tokens
    ours = tiled_head.cross_entropy(hidden, targets, TiledHead(head, "nf4", CPU, 1024)) / tokens
    s = 0.02 * width**0.5
    off = 0.095 * s
    print(f"loss {exact:.4f}, with the head in NF4 {ours:.4f}: {ours - exact:+.4f}, {(ours - exact) / exact:+.2%}")
    assert abs(ours - exact) <= 4 * off / tokens**0.5 + off**2 / 2
    assert ours != exact
