"""What tasks dpo, orpo, kto and reward minimise: formulas on log probabilities and scores, one number per row.

Every function gives the loss of each row and its margin: how far the model is on the right side, above 0 if it is. All
arguments are fp32 [B], in nats; a log probability is the sum over the learned tokens of an answer.

The formulas are a few lines each, so they are written here rather than taken from trl: its trainers prepare their data row
by row through `datasets` with templates and masks of their own, keep adapters in 16 bits, and would be a second loop
beside ours, with other checkpoints, and without our exact resume (spec training.md 2).
"""

import torch
from torch.nn import functional

Losses = tuple[torch.Tensor, torch.Tensor]

# Largest mean log probability that is told from 0, where the odds are infinite.
_LARGEST = -(2.0**-23)


def dpo(chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float, label_smoothing: float = 0.0) -> Losses:
    """Rafailov et al. 2023, equation 7; with label smoothing, Mitchell 2023 (cDPO), equation 3.

    Args:
        chosen: log p(chosen) of the model less that of the reference.
        rejected: the same of the rejected answer.
        beta: how closely the model is held to the reference.
        label_smoothing: part of the pairs that are thought to be the wrong way round, below 0.5.
    """
    margin = beta * (chosen - rejected)
    loss = -(1 - label_smoothing) * functional.logsigmoid(margin) - label_smoothing * functional.logsigmoid(-margin)
    return loss, margin


def orpo(chosen: torch.Tensor, rejected: torch.Tensor, *, beta: float) -> Losses:
    """Hong et al. 2024, equations 6 and 7: the likelihood of the chosen answer, and the odds of both.

    Args:
        chosen: mean log probability of a token of the chosen answer.
        rejected: the same of the rejected answer.
        beta: weight of the odds ratio (the paper's lambda).
    """
    margin = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - beta * functional.logsigmoid(margin), margin


def _log_odds(mean: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) for p = exp(mean)."""
    mean = mean.clamp(max=_LARGEST)
    return mean - torch.log(-torch.expm1(mean))


def kto(
    ratio: torch.Tensor, drift: torch.Tensor, good: torch.Tensor, *, beta: float, good_weight: float, bad_weight: float
) -> Losses:
    """Ethayarajh et al. 2024, equation 8.

    Args:
        ratio: log p(answer) of the model less that of the reference.
        drift: a scalar without gradient: how far the model has moved from the reference, estimated as the mean of the same
            ratio over answers to other prompts, at least 0.
        good: bool, whether somebody called the answer good.
        beta: how soon gains and losses saturate.
        good_weight: weight of the good answers.
        bad_weight: weight of the bad ones.
    """
    margin = beta * (ratio - drift) * torch.where(good, 1.0, -1.0)
    return torch.where(good, good_weight, bad_weight) * (1 - torch.sigmoid(margin)), margin


def reward(chosen: torch.Tensor, rejected: torch.Tensor) -> Losses:
    """Bradley and Terry's model of a choice, as in Ouyang et al. 2022, equation 1: `chosen`, `rejected` are scores."""
    margin = chosen - rejected
    return -functional.logsigmoid(margin), margin
