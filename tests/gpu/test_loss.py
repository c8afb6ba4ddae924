"""The chunked loss on a GPU: the values and gradients of the plain one, in a fraction of its memory."""

from typing import Any

import pytest

from fastft.training import loss

pytestmark = pytest.mark.gpu

T, D, V = 1024, 64, 8000


def _batch(dtype: str, device: str) -> tuple[Any, Any, Any]:
    import torch

    torch.manual_seed(0)
    hidden_BTD = torch.randn(1, T, D, device=device).to(getattr(torch, dtype)).requires_grad_()
    head = torch.nn.Linear(D, V, bias=False, device=device, dtype=getattr(torch, dtype))
    labels_BT = torch.randint(0, V, (1, T), device=device)
    return hidden_BTD, labels_BT, head


def _plain(hidden_BTD: Any, labels_BT: Any, head: Any) -> Any:
    """What transformers' causal loss does: fp32 logits of all tokens."""
    import torch

    logits = head(hidden_BTD).float()[:, :-1].reshape(-1, V)
    return torch.nn.functional.cross_entropy(logits, labels_BT[:, 1:].reshape(-1), reduction="sum")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients(dtype: str, device: str) -> None:
    import torch

    hidden, labels, head = _batch(dtype, device)
    expected_loss = _plain(hidden, labels, head)
    expected_loss.backward()
    expected = hidden.grad.double(), head.weight.grad.double()
    hidden.grad = head.weight.grad = None
    total, count = loss.chunked_cross_entropy(hidden, labels, head, 100)
    total.backward()
    assert count == T - 1
    # The losses are fp32 sums of the same logits in another order. In bf16 a logit that is a sum near a border may be
    # rounded to either side, 2^-8 of itself, here 1 in some hundred; the head's gradient is summed in bf16 over 11 chunks.
    rounding = {"float32": 2**-20, "bfloat16": 2**-8}[dtype]
    assert total.item() == pytest.approx(expected_loss.item(), rel=rounding)
    for ours, theirs in zip((hidden.grad, head.weight.grad), expected, strict=True):
        assert (ours.double() - theirs).norm() <= 4 * rounding * theirs.norm()
    assert torch.isfinite(total)


@pytest.mark.usefixtures("needs_cuda")
def test_peak_memory(device: str) -> None:
    """The plain loss holds bf16 logits and fp32 copies of all tokens; ours holds those of a chunk."""
    import torch

    peaks = {}
    for name, compute in (
        ("plain", _plain),
        ("chunked", lambda *batch: loss.chunked_cross_entropy(*batch, 64)[0]),
    ):
        hidden, labels, head = _batch("bfloat16", device)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compute(hidden, labels, head).backward()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - before
        del hidden, labels, head
    logits_bytes = T * V * 4
    head_bytes = D * V * 2
    assert peaks["plain"] >= 2 * logits_bytes  # fp32 logits and their gradient
    # A chunk of 64 tokens: bf16 logits, fp32 logits, log-softmax, two gradients: at most 6 fp32 values a logit; and the
    # head's gradient, twice while it is added up.
    assert peaks["chunked"] <= 64 * V * 4 * 6 + 3 * head_bytes + 2**20
