"""A model as a run would hold it, made from config.json alone: shapes without numbers, a few layers of many.

The modules are those of a run: transformers' class, peft's adapters, bitsandbytes' 4-bit layers, and fastft's memory
switches as `model.memory` installs them. The tensors are fake ones of torch (FakeTensorMode), so nothing is read,
computed or taken from the machine. A few things that depend on a real card have stand-ins here.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.autograd import Function

from fastft.config import schema
from fastft.model import adapter, device, memory, quantization
from fastft.plan.tracker import Tracker

# The least number of weights in a tensor for which bitsandbytes' optimizers keep 8-bit states.
_LEAST_8BIT = 4096
# Weights that share a scale of the 8-bit states, and block scales that share one of double quantization.
_OPTIMIZER_BLOCK, _SCALES_BLOCK = 256, 256


@dataclass(frozen=True)
class Skeleton:
    """A model without numbers, ready for a step.

    Attributes:
        model: with its adapters.
        causal_lm: without.
        dtype: of the base's weights.
        products: dtype of autocast, None for none.
        switches: the memory switches that are in use.
        states: the optimizer's.
    """

    model: Any
    causal_lm: Any
    dtype: torch.dtype
    products: torch.dtype | None
    switches: memory.Switches
    states: list[torch.Tensor]


def period(model_config: Any) -> int:
    """After how many layers the kinds of layers repeat: 1 for most, 2 for Gemma 2, 6 for Gemma 3."""
    kinds = list(getattr(model_config.get_text_config(), "layer_types", None) or [])
    for length in range(1, len(kinds)):
        if all(kind == kinds[place % length] for place, kind in enumerate(kinds)):
            return length
    return 1


def with_layers(model_config: Any, count: int) -> Any:
    """A copy of a config with so many layers."""
    import copy

    made = copy.deepcopy(model_config)
    text = made.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:count]
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") in {"dynamic", "longrope"}:
        # These look at the numbers of the places; the angles take the same memory.
        text.rope_parameters = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)}
    made.use_cache = False
    return made


def build(
    config: schema.Config,
    model_config: Any,
    checkpoint: torch.dtype,
    stored_4bit: Mapping[str, Any] | None,
    tracker: Tracker,
    *,
    on_gpu: bool,
    has_bf16: bool,
) -> Skeleton:
    """The model of a run; inside FakeTensorMode and the tracker.

    Args:
        config: the run.
        model_config: transformers' config, with as many layers as are wanted.
        checkpoint: dtype of the files.
        stored_4bit: the quantization block of a 4-bit checkpoint.
        tracker: told what lies in RAM.
        on_gpu: whether the run is planned for a GPU, or for this CPU.
        has_bf16: whether that GPU multiplies bf16.
    """
    from fastft.model import freeze, load

    on = torch.device("cuda" if on_gpu else "cpu")
    kind = config.method.kind
    weights_kind = load.weights_kind(kind)
    with mock.patch.object(device, "has_bf16", return_value=has_bf16), _quiet():
        dtype = device.weights_dtype(config.model.dtype, checkpoint, weights_kind, on)
        products = device.products_dtype(config.model.dtype, dtype, weights_kind, on)
        settings: dict[str, Any] = {"trust_remote_code": False}
        if config.model.attention != "auto":
            # Flash attention from its own package keeps what torch's keeps.
            settings["attn_implementation"] = "eager" if config.model.attention == "eager" else "sdpa"
        with tracker.in_ram():
            model = load.model_class(config.task).from_config(model_config, dtype=dtype, **settings)
        if kind == "qlora" or stored_4bit is not None:
            block = stored_4bit or {}
            asked = config.method.quantization or schema.Quantization()
            nested = bool(block.get("bnb_4bit_use_double_quant", asked.double_quant))
            compute = device.compute_dtype(asked.compute_dtype, on)
            with tracker.in_ram():
                _pack(model, dtype, compute, nested=nested)
        if config.method.lora is not None:
            with tracker.in_ram():
                model = adapter.attach(model, config.method.lora, "plan", config.task)
        if config.method.trained_layers is not None:
            freeze.freeze(model, config.method.trained_layers)
        facts = memory.facts_of(model, on)
        switches = memory.choose(config, facts, on)
        with tracker.in_ram():
            memory.install(model, switches, torch.device("cpu"))
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    for tensor in held(model):
        tracker.hold(tensor)
    states = _optimizer_states(model, config.train.optimizer)
    return Skeleton(model, causal_lm, dtype, products, switches, states)


def held(model: nn.Module) -> Iterator[torch.Tensor]:
    """All tensors of the model on the device, those inside of 4-bit weights too."""
    for module in model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            yield tensor
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                yield from _of_state(state)
        tiles = getattr(module, "tiles", None)
        if getattr(module, "kind", None) == "nf4" and tiles is not None:
            for packed, state in tiles.tiles:
                yield packed
                yield from _of_state(state)


def _of_state(state: Any) -> Iterator[torch.Tensor]:
    nested = state.state2
    parts = (state.absmax, state.code, state.offset, *(() if nested is None else (nested.absmax, nested.code)))
    return (part for part in parts if isinstance(part, torch.Tensor))


def _pack(model: nn.Module, dtype: torch.dtype, compute: torch.dtype, *, nested: bool) -> None:
    """Turn every linear layer but the head into a 4-bit one, as transformers does while it reads."""
    from bitsandbytes.nn import Linear4bit

    head = getattr(model, "score", None) or model.get_output_embeddings()  # type: ignore[operator]
    for layer in list(model.modules()):
        if type(layer) is not nn.Linear or layer is head:
            continue
        weight = nn.Parameter(torch.empty(-(-layer.weight.numel() // 2), 1, dtype=torch.uint8), requires_grad=False)
        weight.quant_state = _state(layer.weight, dtype, nested=nested)  # type: ignore[attr-defined]
        weight.compress_statistics, weight.quant_type = nested, "nf4"  # type: ignore[attr-defined]
        weight.bnb_quantized = True  # type: ignore[attr-defined]
        layer.__class__ = Linear4bit
        layer.weight = weight
        layer.compute_dtype, layer.compute_type_is_set = compute, True  # type: ignore[assignment]
        layer.quant_state, layer.quant_storage = weight.quant_state, torch.uint8  # type: ignore[assignment,attr-defined]
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def _state(weight: torch.Tensor, dtype: torch.dtype, *, nested: bool) -> Any:
    from bitsandbytes.functional import QuantState

    scales = -(-weight.numel() // quantization.BLOCK_SIZE)
    code = torch.empty(16)
    if not nested:
        return QuantState(torch.empty(scales), weight.shape, code, quantization.BLOCK_SIZE, "nf4", dtype)
    outer = QuantState(
        torch.empty(-(-scales // _SCALES_BLOCK)), code=torch.empty(256), blocksize=_SCALES_BLOCK, dtype=torch.float32
    )
    absmax = torch.empty(scales, dtype=torch.uint8)
    return QuantState(absmax, weight.shape, code, quantization.BLOCK_SIZE, "nf4", dtype, torch.empty(()), outer)


def _optimizer_states(model: nn.Module, optimizer: str) -> list[torch.Tensor]:
    """What AdamW keeps from step to step; paged states are counted, since they come to the card when they are used."""
    made: list[torch.Tensor] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        small = optimizer == "adamw" or parameter.numel() < _LEAST_8BIT
        for _ in range(2):
            if small:
                wide = parameter.dtype if optimizer == "adamw" else torch.float32
                made.append(torch.empty_like(parameter, dtype=wide))
            else:
                made.append(torch.empty(parameter.numel(), dtype=torch.uint8))
                made.append(torch.empty(-(-parameter.numel() // _OPTIMIZER_BLOCK)))
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """What the run itself will say is not said by its plan."""
    from fastft import console

    def silent(*_args: Any, **_kwargs: Any) -> None:
        return

    with mock.patch.object(console, "note", silent), mock.patch.object(console, "warn", silent):
        yield


class _Attention(Function):
    """Attention that keeps its inputs, its output and one number per query and head, as flash kernels do."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
        sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        # A mask of yes and no is turned into numbers to be added, for all heads alike.
        added = None if mask is None else q.new_empty(mask.shape)
        ctx.save_for_backward(q, k, v, y, sums, *(() if added is None else (added,)))
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors[:3]
        sums = q.new_empty(q.shape, dtype=torch.float32)  # the queries' gradient is summed in fp32
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del sums, dy
        return dq, dk, dv, None


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, **_settings: Any
) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu"):
        to = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(to), key.to(to), value.to(to)
    y: torch.Tensor = _Attention.apply(query, key, value, attn_mask)
    return y


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:  # noqa: A002, ARG001 - torch's own names
    return torch.native_dropout(input, p, train=True)[0] if training and p > 0 else input


def _fused_drop(x_NI: torch.Tensor, dropout: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.native_dropout(x_NI, dropout, train=True) if dropout > 0 else (x_NI, None)


def _apply(module: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
    """`.to()` and `.float()` of a module whose tensors are fake: torch would swap them in place, which fake ones refuse."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in list(part._parameters.items()):  # noqa: SLF001 - as in torch's own
            if parameter is None:
                continue
            new = change(parameter.detach())
            if (new.dtype, new.device) != (parameter.dtype, parameter.device):
                part._parameters[name] = nn.Parameter(new, requires_grad=parameter.requires_grad)  # noqa: SLF001
        for name, buffer in list(part._buffers.items()):  # noqa: SLF001
            if buffer is not None:
                part._buffers[name] = change(buffer)  # noqa: SLF001
    return module


@contextmanager
def stand_ins(tracker: Tracker, *, on_gpu: bool) -> Iterator[None]:
    """In place of what needs numbers, a card or its streams."""
    from transformers import masking_utils

    from fastft.model import fused_lora, tiled_head
    from fastft.training import host_checkpoints, loss

    def buffer(_self: Any, num_bytes: int, *, pinned: bool) -> torch.Tensor:  # noqa: ARG001
        with tracker.in_ram():
            return torch.empty(num_bytes, dtype=torch.uint8)

    def host_tiles(self: Any) -> Iterator[torch.Tensor]:
        buffers = [torch.empty_like(self.tiles[0]) for _ in range(2)]
        for number, tile in enumerate(self.tiles):
            yield buffers[number % 2][: tile.shape[0]]

    def copied(self: Any, memo: dict[int, Any]) -> Any:
        made = torch.empty_like(self)
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, requires_grad=self.requires_grad)
        memo[id(self)] = made
        return made

    def nf4_tiles(self: Any, weight_VD: torch.Tensor, tile_rows: int, _device: torch.device) -> None:
        self.tiles = [
            (torch.empty(-(-tile.numel() // 2), 1, dtype=torch.uint8), _state(tile, weight_VD.dtype, nested=True))
            for tile in torch.split(weight_VD.detach(), tile_rows)
        ]

    with ExitStack() as stack:
        put = stack.enter_context
        put(mock.patch.object(host_checkpoints.HostCheckpoints, "buffer", buffer))
        put(mock.patch.object(nn.Module, "_apply", _apply))
        # peft copies what it trains beside adapters; torch would copy the mode of fake tensors with them.
        put(mock.patch.object(torch.Tensor, "__deepcopy__", copied))
        # Whether rows are packed is asked of the numbers; the plan gives a packed row its mask itself.
        put(mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None))
        put(mock.patch.object(tiled_head._Nf4Tiles, "__init__", nf4_tiles))  # noqa: SLF001
        put(mock.patch.object(loss, "_agrees", return_value=True))
        put(mock.patch.object(torch, "get_rng_state", return_value=None))
        put(mock.patch.object(torch, "set_rng_state", return_value=None))
        if on_gpu:
            put(mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", _attention))
            put(mock.patch.object(torch.nn.functional, "dropout", _dropout))
            put(mock.patch.object(fused_lora, "_drop", _fused_drop))
            put(mock.patch.object(tiled_head._HostTiles, "__iter__", host_tiles))  # noqa: SLF001
        yield
