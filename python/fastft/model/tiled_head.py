"""The head of a language model, a tile of the vocabulary at a time: its weight waits in host RAM or in NF4.

The head is as large as the embedding, 0.24 (Llama-2-7B) to 1.02 GiB (Qwen2.5-7B), and is used once per step, for the loss.

- `host`: the bf16 weight stays in pinned RAM and comes over PCIe in tiles of 32 MiB, the next one while this one is
  multiplied. Exact: the log-sum-exp over the vocabulary is put together as the tiles pass (the same logits; sums in
  another order). Costs one reading of the head over PCIe per step and per generated token.
- `nf4`: the weight is on the device in 4 bits, a quarter of its size, and a tile is unpacked at a time. Not exact: it
  is another head; tests/unit/test_model_tiled_head.py holds the change of the loss against the rounding of its weights.

The gradient by the hidden states is made in the same pass, as in attention without a score matrix: with l the logits,
W the head and y the target, dloss/dh = sum_v softmax(l)_v W_v - W_y, and the sum is scaled anew when a larger logit
comes. So the head is read once and multiplied twice, where the plain loss under checkpointing multiplies three times.

Letters: N learned tokens, D hidden size, V vocabulary, K rows of a tile.
Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

# A power of two: torch rounds pinned memory up to the next one.
TILE_BYTES = 32 * 2**20
# Largest block of logits in fp32; about four such blocks are held at once.
BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Scaling:
    """What a family does to its logits: z * factor / divisor, then cap * tanh(z / cap).

    Attributes:
        factor: Cohere's logit_scale; None leaves them.
        divisor: Granite's logits_scaling; None leaves them.
        cap: Gemma 2's final_logit_softcapping; None leaves them.
    """

    factor: float | None = None
    divisor: float | None = None
    cap: float | None = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The scaled logits."""
        if self.factor is not None:
            logits = logits * self.factor
        if self.divisor is not None:
            logits = logits / self.divisor
        return self.cap * torch.tanh(logits / self.cap) if self.cap is not None else logits

    def slope(self, scaled: torch.Tensor) -> torch.Tensor | float:
        """The derivative of `apply`, from its result."""
        linear = (1.0 if self.factor is None else self.factor) / (1.0 if self.divisor is None else self.divisor)
        return linear if self.cap is None else (1.0 - (scaled / self.cap) ** 2).mul_(linear)


class _HostTiles:
    """The weight in RAM; on a GPU a stream of its own brings the next tile while one is used."""

    def __init__(self, weight_VD: torch.Tensor, tile_rows: int, device: torch.device) -> None:
        self.device = device
        tiles = torch.split(weight_VD.detach().to("cpu"), tile_rows)
        # Each tile by itself: torch rounds pinned memory up to a power of two, which for a whole head may be twice its size.
        self.tiles = [tile.contiguous().pin_memory() for tile in tiles] if device.type == "cuda" else tiles

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.tiles) if self.device.type != "cuda" else self._streamed()

    def _streamed(self) -> Iterator[torch.Tensor]:
        main = torch.cuda.current_stream(self.device)
        aside = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        buffers = [torch.empty_like(self.tiles[0], device=self.device) for _ in range(2)]
        for buffer in buffers:
            buffer.record_stream(aside)
        aside.wait_stream(main)  # the buffers' memory may still be read by what was there before
        arrived: list[Any] = [None, None]
        used: list[Any] = [None, None]

        def bring(number: int) -> None:
            place = number % 2
            with torch.cuda.stream(aside):
                if used[place] is not None:
                    aside.wait_event(used[place])
                tile = self.tiles[number]
                buffers[place][: tile.shape[0]].copy_(tile, non_blocking=True)
                arrived[place] = aside.record_event()

        bring(0)
        for number, tile in enumerate(self.tiles):
            if number + 1 < len(self.tiles):
                bring(number + 1)
            main.wait_event(arrived[number % 2])
            yield buffers[number % 2][: tile.shape[0]]
            used[number % 2] = main.record_event()


class _Nf4Tiles:
    """The weight on the device in NF4, double-quantized, each tile by itself."""

    def __init__(self, weight_VD: torch.Tensor, tile_rows: int, device: torch.device) -> None:
        from bitsandbytes import functional as four_bit

        self.tiles = [
            four_bit.quantize_4bit(
                tile.contiguous().to(device), blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            for tile in torch.split(weight_VD.detach(), tile_rows)
        ]

    def __iter__(self) -> Iterator[torch.Tensor]:
        from bitsandbytes import functional as four_bit

        return (four_bit.dequantize_4bit(packed, state) for packed, state in self.tiles)


_TILES: dict[str, Callable[[torch.Tensor, int, torch.device], Any]] = {"host": _HostTiles, "nf4": _Nf4Tiles}


class TiledHead(nn.Module):
    """Takes the place of a frozen linear head.

    Args:
        linear: the head [V, D]; its weight is no longer needed afterwards.
        kind: "host" or "nf4".
        device: where hidden states are.
        tile_rows: rows of the head in a tile; None: what makes TILE_BYTES.
    """

    def __init__(self, linear: nn.Linear, kind: str, device: torch.device, tile_rows: int | None = None) -> None:
        super().__init__()
        self.bias: torch.Tensor | None
        weight_VD = linear.weight
        self.kind = kind
        self.out_features, self.in_features = weight_VD.shape
        self.dtype = weight_VD.dtype
        self.tile_rows = tile_rows or max(TILE_BYTES // (self.in_features * weight_VD.element_size()), 1)
        self.tiles = _TILES[kind](weight_VD, self.tile_rows, device)
        bias: Any = linear.bias
        self.register_buffer("bias", None if bias is None else bias.detach().to(device), persistent=False)

    @property
    def num_weights(self) -> int:
        """Numbers in the head; parameters() does not list them."""
        return self.out_features * self.in_features

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of hidden states [..., D]; for a few tokens, as when text is generated."""
        biases = self.tile_biases()
        parts = [
            functional.linear(hidden.to(self.dtype), tile_KD, bias)
            for tile_KD, bias in zip(self.tiles, biases, strict=True)
        ]
        return torch.cat(parts, dim=-1)

    def tile_biases(self) -> Sequence[torch.Tensor | None]:
        """The bias of each tile."""
        count = -(-self.out_features // self.tile_rows)
        return [None] * count if self.bias is None else torch.split(self.bias, self.tile_rows)


def cross_entropy(
    hidden_ND: torch.Tensor, targets_N: torch.Tensor, head: TiledHead, scaling: Scaling = Scaling()
) -> torch.Tensor:
    """Sum of the cross-entropies of N tokens, in nats: an fp32 scalar (fp64 for fp64 hidden states).

    Args:
        hidden_ND: last hidden states.
        targets_N: int64, the right tokens, 0 to V - 1.
        head: frozen.
        scaling: of the logits.
    """
    total: torch.Tensor = _TiledCrossEntropy.apply(hidden_ND, targets_N, head, scaling)
    return total


class _TiledCrossEntropy(Function):
    """The gradient is made in the forward pass and waits as one tensor [N, D]."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, targets_N: torch.Tensor, head: TiledHead, scaling: Scaling
    ) -> torch.Tensor:
        sums = _Sums(hidden_ND, targets_N, scaling, with_gradient=ctx.needs_input_grad[0])
        block_tokens = max(BLOCK_BYTES // (4 * head.tile_rows), 1)
        start = 0
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for tile_KD, bias_K in zip(head.tiles, head.tile_biases(), strict=True):
                for first in range(0, hidden_ND.shape[0], block_tokens):
                    sums.add(slice(first, first + block_tokens), start, tile_KD, bias_K)
                start += tile_KD.shape[0]
        # fp16 would lose the small entries before the loss is scaled.
        kept = torch.float32 if hidden_ND.dtype == torch.float16 else hidden_ND.dtype
        ctx.dtype = hidden_ND.dtype
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(sums.gradient().to(kept))
        return sums.loss()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * dtotal).to(ctx.dtype), None, None, None


class _Sums:
    """What the tiles have given so far, for each token: the largest logit, sums relative to it, the target's share."""

    def __init__(
        self, hidden_ND: torch.Tensor, targets_N: torch.Tensor, scaling: Scaling, *, with_gradient: bool
    ) -> None:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        num_tokens = hidden_ND.shape[0]
        self.hidden_ND, self.targets_N, self.scaling = hidden_ND, targets_N, scaling
        self.largest_N = hidden_ND.new_full((num_tokens,), -torch.inf, dtype=wide)
        self.exponentials_N = hidden_ND.new_zeros(num_tokens, dtype=wide)
        self.target_N = hidden_ND.new_zeros(num_tokens, dtype=wide)
        self.rows_ND = hidden_ND.new_zeros(hidden_ND.shape, dtype=wide) if with_gradient else None
        self.target_rows_ND = torch.zeros_like(hidden_ND, dtype=wide) if with_gradient else None

    def add(self, tokens: slice, start: int, tile_KD: torch.Tensor, bias_K: torch.Tensor | None) -> None:
        """Take in the rows `start` to `start + K` of the head for some tokens."""
        wide = self.largest_N.dtype
        product_NK = functional.linear(self.hidden_ND[tokens].to(tile_KD.dtype), tile_KD, bias_K)
        # As in the plain loss: 16-bit families scale before fp32.
        logits_NK = self.scaling.apply(product_NK).to(wide)
        before_N = self.largest_N[tokens]
        largest_N = torch.maximum(before_N, logits_NK.amax(dim=1))
        shrink_N = torch.exp(before_N - largest_N)
        self.largest_N[tokens] = largest_N
        place_N = self.targets_N[tokens] - start
        inside_N = (place_N >= 0) & (place_N < tile_KD.shape[0])
        place_N1 = place_N.clamp(0, tile_KD.shape[0] - 1).unsqueeze(1)
        target_N = logits_NK.gather(1, place_N1).squeeze(1)
        self.target_N[tokens] = torch.where(inside_N, target_N, self.target_N[tokens])
        slope = self.scaling.slope(logits_NK) if self.rows_ND is not None else 1.0
        weights_NK = logits_NK.sub_(largest_N.unsqueeze(1)).exp_()
        self.exponentials_N[tokens] = self.exponentials_N[tokens] * shrink_N + weights_NK.sum(dim=1)
        if self.rows_ND is None or self.target_rows_ND is None:
            return
        rows_ND = weights_NK.mul_(slope).to(tile_KD.dtype) @ tile_KD
        self.rows_ND[tokens] = self.rows_ND[tokens].mul_(shrink_N.unsqueeze(1)).add_(rows_ND)
        at_target_N = slope.gather(1, place_N1).squeeze(1) if isinstance(slope, torch.Tensor) else slope
        share_N = inside_N.to(wide) * at_target_N
        self.target_rows_ND[tokens] += share_N.unsqueeze(1) * tile_KD[place_N1.squeeze(1)]

    def loss(self) -> torch.Tensor:
        """Sum over the tokens of log-sum-exp minus the target's logit."""
        return (self.largest_N + self.exponentials_N.log() - self.target_N).sum()

    def gradient(self) -> torch.Tensor:
        """Its gradient by the hidden states."""
        assert self.rows_ND is not None
        assert self.target_rows_ND is not None
        return self.rows_ND.div_(self.exponentials_N.unsqueeze(1)).sub_(self.target_rows_ND)


def install(causal_lm: Any, kind: str, device: torch.device) -> TiledHead:
    """Put a tiled head into a transformers model; its parameter leaves the device."""
    tiled = TiledHead(causal_lm.get_output_embeddings(), kind, device)
    causal_lm.set_output_embeddings(tiled)
    return tiled
