"""The MLP of a decoder layer, computed for a tile of tokens at a time.

An MLP works on each token alone, but its inner tensors are the largest of a layer: gate, up, their product and the
gradients of all three, each 4096 x 18944 x 2 bytes = 148 MiB at 4,096 tokens of Qwen2.5-7B. Here the forward pass keeps
only the MLP's input; the backward pass computes one tile again, takes its gradients and goes on to the next.

Inside a checkpointed layer this costs no additional product: the layer's own recomputation ends where the last tensor
that it must keep is kept, and that is this input (`_Enter`), before the MLP runs. A 4-bit weight is unpacked once per
tile instead of once: a tenth more time in the MLP at 2,048 tokens a tile (estimated from memory traffic on a card of 272
GB/s). Exact: the sums over tokens in the adapters' gradients are taken tile by tile, in fp32. With dropout inside the
MLP other random numbers are drawn than without tiles.

Letters: B batch, T tokens, N tokens of all rows, D hidden size.
Source: the idea of tiling over the sequence, Snowflake's "Arctic long sequence training" (2025), section 3.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Forward = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class _Work:
    """What the two halves of the operation share.

    Attributes:
        forward: the MLP's own forward.
        tile_tokens: tokens computed at once.
        random: whether dropout is drawn inside.
    """

    forward: Forward
    tile_tokens: int
    random: bool


class _Enter(Function):
    """The identity; keeps the MLP's input, and takes the gradients of the whole MLP in its backward pass.

    What arrives there is the gradient of the MLP's output, which `_Through` hands on.
    """

    @staticmethod
    def forward(ctx: Any, x_BTD: torch.Tensor, work: _Work, *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_BTD)
        ctx.work, ctx.weights = work, weights
        ctx.surroundings = _Surroundings.now(x_BTD.device, random=work.random)
        return x_BTD.view_as(x_BTD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x_BTD,) = ctx.saved_tensors
        wanted = [weight for weight, needs in zip(ctx.weights, ctx.needs_input_grad[2:], strict=True) if needs]
        sums: list[torch.Tensor | None] = [None] * len(wanted)
        dx_BTD = x_BTD.new_empty(x_BTD.shape) if ctx.needs_input_grad[0] else None
        with ctx.surroundings.again():
            for x_tile, dy_tile, part in _tiles(x_BTD, dy_BTD, ctx.work.tile_tokens):
                with torch.enable_grad():
                    x = x_tile.detach().requires_grad_(dx_BTD is not None)
                    y = ctx.work.forward(x)
                inputs = [*([x] if dx_BTD is not None else []), *wanted]
                found = list(torch.autograd.grad(y, inputs, dy_tile, allow_unused=True))
                if dx_BTD is not None:
                    dx_BTD.view(-1, dx_BTD.shape[-1])[part] = found.pop(0)[0]
                for place, gradient in enumerate(found):
                    known = sums[place]
                    sums[place] = gradient if known is None else known if gradient is None else known.add_(gradient)
        gradients = iter(sums)
        return dx_BTD, None, *(next(gradients) if needs else None for needs in ctx.needs_input_grad[2:])


class _Through(Function):
    """The MLP's output from what `_Enter` gave; the gradient of the output goes on to `_Enter` as it is."""

    @staticmethod
    def forward(_ctx: Any, x_BTD: torch.Tensor, work: _Work) -> torch.Tensor:
        return _whole(x_BTD, work)

    @staticmethod
    def backward(_ctx: Any, dy_BTD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy_BTD, None


@dataclass(frozen=True)
class _Surroundings:
    """Autocast and random state of the forward pass, for the second computation.

    Attributes:
        device: where the MLP runs.
        autocast: its dtype; None is off.
        cpu: random state, or None where nothing is drawn.
        gpu: the same of `device`, when it is a GPU.
    """

    device: torch.device
    autocast: torch.dtype | None
    cpu: torch.Tensor | None
    gpu: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device, *, random: bool) -> "_Surroundings":
        on = torch.is_autocast_enabled(device.type)
        return cls(
            device,
            torch.get_autocast_dtype(device.type) if on else None,
            torch.get_rng_state() if random else None,
            torch.cuda.get_rng_state(device) if random and device.type == "cuda" else None,
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """As it was; afterwards the random state is what it was before."""
        devices = [] if self.gpu is None else [self.device]
        with (
            torch.random.fork_rng(devices=devices, enabled=self.cpu is not None),
            torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None),
        ):
            if self.cpu is not None:
                torch.set_rng_state(self.cpu)
            if self.gpu is not None:
                torch.cuda.set_rng_state(self.gpu, self.device)
            yield


def _whole(x_BTD: torch.Tensor, work: _Work) -> torch.Tensor:
    """The output for all tokens, tile by tile, without anything kept."""
    y_ND: torch.Tensor | None = None
    for x_tile, _, part in _tiles(x_BTD, x_BTD, work.tile_tokens):
        y_tile = work.forward(x_tile)[0]
        if y_ND is None:
            y_ND = y_tile.new_empty(x_BTD.numel() // x_BTD.shape[-1], y_tile.shape[-1])
        y_ND[part] = y_tile
    assert y_ND is not None
    return y_ND.view(*x_BTD.shape[:-1], -1)


def _tiles(
    x_BTD: torch.Tensor, other_BTD: torch.Tensor, tile_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice]]:
    """Tiles [1, tile, D] of two tensors, and where they lie among the N tokens."""
    x_ND, other_ND = x_BTD.reshape(-1, x_BTD.shape[-1]), other_BTD.reshape(-1, other_BTD.shape[-1])
    for start in range(0, x_ND.shape[0], tile_tokens):
        part = slice(start, min(start + tile_tokens, x_ND.shape[0]))
        yield x_ND[part].unsqueeze(0), other_ND[part].unsqueeze(0), part


def install(decoder: nn.Module, tile_tokens: int) -> tuple[int, int]:
    """Let every MLP of a decoder work in tiles.

    Args:
        decoder: a transformers model; its layers are looked through.
        tile_tokens: tokens computed at once, at least 1.

    Returns:
        numbers of layers whose MLP does, and of those whose MLP is something else (a mixture of experts).
    """
    tiled = left = 0
    for layer in _layers(decoder):
        mlp = getattr(layer, "mlp", None) or getattr(layer, "feed_forward", None)
        if not isinstance(mlp, nn.Module) or not _works_by_token(mlp):
            left += 1
            continue
        mlp.forward = _tiled_forward(mlp, tile_tokens)  # this instance's alone
        tiled += 1
    return tiled, left


def _tiled_forward(mlp: nn.Module, tile_tokens: int) -> Forward:
    own: Forward = mlp.forward
    weights: Sequence[nn.Parameter] = [p for p in mlp.parameters() if p.requires_grad]
    drops = [m for m in mlp.modules() if isinstance(m, nn.Dropout) and m.p > 0]

    @functools.wraps(own)
    def forward(x_BTD: torch.Tensor) -> torch.Tensor:
        if x_BTD.numel() // x_BTD.shape[-1] <= tile_tokens:
            return own(x_BTD)
        work = _Work(own, tile_tokens, any(drop.training for drop in drops))
        if not torch.is_grad_enabled():
            return _whole(x_BTD, work)
        entered: torch.Tensor = _Enter.apply(x_BTD, work, *weights)
        y_BTD: torch.Tensor = _Through.apply(entered, work)
        return y_BTD

    return forward


def _layers(decoder: nn.Module) -> Iterator[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return (module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer))


def _works_by_token(mlp: nn.Module) -> bool:
    """Whether it is made of linear layers (with or without adapters), activations and dropout only, from D to D."""
    from peft.tuners.lora import LoraLayer

    if any(True for _ in mlp.parameters(recurse=False)):
        return False
    sizes: list[int] = []
    for child in mlp.children():
        linear = child.base_layer if isinstance(child, LoraLayer) else child
        if isinstance(linear, nn.Linear):
            sizes += [linear.in_features, linear.out_features]
        elif any(True for _ in child.parameters()):
            return False
    return bool(sizes) and sizes[0] == sizes[-1]
