"""Checkpoints in host RAM: the same gradients and random numbers, inputs that leave, buffers that are used again."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastft.training import host_checkpoints
from fastft.training.host_checkpoints import HostCheckpoints

LAYERS, D = 5, 16


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_checkpoints, "LEAST_BYTES", 1)


def _layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Dropout(0.3), nn.Tanh()) for _ in range(LAYERS))


def _step(layers: nn.ModuleList, keep: Callable[..., Any], x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(2)
    hidden = x
    for layer in layers:
        hidden = keep(layer, hidden)
    hidden.square().sum().backward()
    gradients = [x.grad, *(p.grad.clone() for p in layers.parameters())]
    layers.zero_grad()
    return [hidden.detach(), *gradients]


def test_gradients_and_dropout_are_those_of_plain_checkpoints() -> None:
    layers, ours = _layers(), HostCheckpoints()
    for shape in ((2, 3, D), (2, 3, D), (1, 9, D), (1, 2, D)):
        x = torch.randn(shape)
        expected = _step(layers, lambda *a: checkpoint(*a, use_reentrant=False), x)
        for value, theirs in zip(_step(layers, ours, x), expected, strict=True):
            assert torch.equal(value, theirs)


def test_inputs_leave_and_buffers_are_used_again() -> None:
    layers, ours = _layers(), HostCheckpoints()
    alive: list[Any] = []

    def keep(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        alive.append(weakref.ref(hidden))
        return ours(layer, hidden)

    x = torch.randn(1, 4, D, requires_grad=True)
    hidden = x
    for layer in layers:
        hidden = keep(layer, hidden)
    gc.collect()
    assert [ref() is not None for ref in alive] == [True] + [False] * (LAYERS - 1)  # x is ours, the rest is gone
    assert ours.idle == []
    hidden.sum().backward()
    places = {buffer.data_ptr() for buffer in ours.idle}
    assert len(places) == LAYERS
    _step(layers, ours, torch.randn(1, 3, D))
    assert {buffer.data_ptr() for buffer in ours.idle} == places
    _step(layers, ours, torch.randn(1, 8, D))  # larger ones take their place
    assert [buffer.nbytes for buffer in ours.idle] == [8 * D * 4] * LAYERS


def test_a_pass_that_is_given_up_disturbs_nothing() -> None:
    layers, ours = _layers(), HostCheckpoints()
    x = torch.randn(1, 4, D)
    expected = _step(layers, ours, x)
    hidden = x.clone().requires_grad_()
    for layer in layers:
        hidden = ours(layer, hidden)
    del hidden
    for value, theirs in zip(_step(layers, ours, x), expected, strict=True):
        assert torch.equal(value, theirs)


def test_what_needs_no_gradient_and_what_is_small_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, ours = _layers(), HostCheckpoints()
    with torch.no_grad():
        ours(layers[0], torch.randn(1, 4, D))
    monkeypatch.setattr(host_checkpoints, "LEAST_BYTES", 2**16)
    expected = _step(layers, lambda *a: checkpoint(*a, use_reentrant=False), torch.ones(1, 4, D))
    for value, theirs in zip(_step(layers, ours, torch.ones(1, 4, D)), expected, strict=True):
        assert torch.equal(value, theirs)
    assert ours.idle == []
