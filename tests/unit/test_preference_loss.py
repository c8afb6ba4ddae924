"""The losses of preference tasks against the papers' formulas, worked out with Python's own floats."""

import math

import pytest
import torch

from fastft.training import preference_loss

# What a model may say of two answers, and a reference: sums of log probabilities.
CHOSEN, REJECTED = [-12.5, -3.25, -40.0], [-11.0, -9.5, -38.0]
REFERENCE_CHOSEN, REFERENCE_REJECTED = [-13.0, -3.0, -45.0], [-10.0, -9.0, -30.0]
# fp32 values of size 1 after some ten operations: 10 * 2^-24.
CLOSE = 1e-6


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _ratios() -> tuple[torch.Tensor, torch.Tensor]:
    chosen = torch.tensor(CHOSEN) - torch.tensor(REFERENCE_CHOSEN)
    return chosen, torch.tensor(REJECTED) - torch.tensor(REFERENCE_REJECTED)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo(smoothing: float) -> None:
    loss, margin = preference_loss.dpo(*_ratios(), beta=0.1, label_smoothing=smoothing)
    places = zip(CHOSEN, REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED, strict=True)
    margins = [0.1 * ((chosen - before) - (rejected - worse)) for chosen, rejected, before, worse in places]
    expected = [-(1 - smoothing) * math.log(_sigmoid(m)) - smoothing * math.log(_sigmoid(-m)) for m in margins]
    assert margin.tolist() == pytest.approx(margins, abs=CLOSE)
    assert loss.tolist() == pytest.approx(expected, abs=CLOSE)


def test_orpo() -> None:
    """Means of log probabilities; the odds of probability p are p / (1 - p)."""
    chosen, rejected = [-0.5, -2.0, -0.01], [-1.5, -1.0, -6.0]
    loss, margin = preference_loss.orpo(torch.tensor(chosen), torch.tensor(rejected), beta=0.25)
    odds = [[math.exp(mean) / (1 - math.exp(mean)) for mean in means] for means in (chosen, rejected)]
    ratios = [math.log(one / other) for one, other in zip(*odds, strict=True)]
    expected = [-mean - 0.25 * math.log(_sigmoid(ratio)) for mean, ratio in zip(chosen, ratios, strict=True)]
    # exp(-0.01) is 0.99: the fp32 difference from 1 has lost 7 of its 24 bits in the worst case.
    assert margin.tolist() == pytest.approx(ratios, abs=2e-5)
    assert loss.tolist() == pytest.approx(expected, abs=2e-5)


def test_orpo_of_a_certain_answer_has_a_gradient() -> None:
    """A mean log probability of 0 has infinite odds."""
    chosen = torch.tensor([0.0, -1e-9], requires_grad=True)
    loss, _ = preference_loss.orpo(chosen, torch.tensor([-1.0, -1.0]), beta=0.1)
    loss.sum().backward()
    assert chosen.grad is not None
    assert bool(torch.isfinite(loss).all())
    assert bool(torch.isfinite(chosen.grad).all())


def test_kto() -> None:
    ratio, good = [2.0, -1.0, 0.5], [True, False, False]
    loss, margin = preference_loss.kto(
        torch.tensor(ratio), torch.tensor(0.75), torch.tensor(good), beta=0.1, good_weight=1.5, bad_weight=0.5
    )
    margins = [0.1 * (r - 0.75) if g else 0.1 * (0.75 - r) for r, g in zip(ratio, good, strict=True)]
    expected = [(1.5 if g else 0.5) * (1 - _sigmoid(m)) for m, g in zip(margins, good, strict=True)]
    assert margin.tolist() == pytest.approx(margins, abs=CLOSE)
    assert loss.tolist() == pytest.approx(expected, abs=CLOSE)


def test_reward() -> None:
    loss, margin = preference_loss.reward(torch.tensor([1.5, -2.0]), torch.tensor([0.5, 3.0]))
    assert margin.tolist() == [1.0, -5.0]
    assert loss.tolist() == pytest.approx([-math.log(_sigmoid(1.0)), -math.log(_sigmoid(-5.0))], abs=CLOSE)
