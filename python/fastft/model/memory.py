"""Which memory switches a run uses, why, and how they are put into the model.

The schema's `memory` section asks, `choose` decides, `install` changes the model. `choose` looks at facts only, so that
another way of choosing (by accounting, for a given card) can take the place of `_by_rule` and nothing else changes.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fastft import console
from fastft.config import schema
from fastft.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Facts:
    """What the choice depends on.

    Attributes:
        on_gpu: whether the run is on a GPU.
        tied: whether the head's weight is the embedding table.
        embedding_trained: whether the table has a gradient or an adapter.
        head_trained: the same of the head; also when there is no linear head.
        adapters: whether there are adapters.
    """

    on_gpu: bool
    tied: bool
    embedding_trained: bool
    head_trained: bool
    adapters: bool


@dataclass(frozen=True)
class Switches:
    """What is used.

    Attributes:
        checkpoints: none (nothing is recomputed), device or host.
        embedding: device or host.
        head: device, host or nf4.
        mlp_tile_tokens: tokens per tile, None for all at once.
        lora: plain or fused.
        chosen: the switches that the config left to fastft, with the reason.
    """

    checkpoints: str
    embedding: str
    head: str
    mlp_tile_tokens: int | None
    lora: str
    chosen: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `fastft_training.json`."""
        return {name: value for name, value in asdict(self).items() if name != "chosen"}

    def line(self) -> str:
        """What is used and why, for the start of a run."""
        tile = "whole" if self.mlp_tile_tokens is None else f"{self.mlp_tile_tokens} tokens at a time"
        said = {
            "checkpoints": f"checkpoints {self.checkpoints}",
            "embedding": f"embedding {self.embedding}",
            "head": f"head {self.head}" + (" (not exact)" if self.head == "nf4" else ""),
            "mlp_tile_tokens": f"MLP {tile}",
            "lora": f"adapters {self.lora}",
        }
        asked = [text for name, text in said.items() if name not in self.chosen]
        auto = [
            text + (f" ({self.chosen[name]})" if self.chosen[name] else "")
            for name, text in said.items()
            if name in self.chosen
        ]
        return "; ".join(
            f"{who}: {', '.join(texts)}" for who, texts in (("as configured", asked), ("auto", auto)) if texts
        )


def checkpoints(config: schema.Config, on: "torch.device") -> str:
    """Where the inputs of recomputed layers wait: none, device or host."""
    wanted = config.train.gradient_checkpointing
    if wanted is False:
        return "none"
    if config.memory.checkpoints == "host":
        return "host"
    return "device" if wanted is True or on.type == "cuda" else "none"


def choose(config: schema.Config, facts: Facts, on: "torch.device") -> Switches:
    """The switches of a run.

    Raises:
        ConfigError: one that the config asks for cannot be used with this model.
    """
    memory = config.memory
    _refuse(memory, facts)
    rule = _by_rule(facts)
    if config.method.lora is not None and config.method.lora.dora and facts.on_gpu:
        rule["lora"] = ("plain", "dora's norms are peft's")
    chosen: dict[str, str] = {}

    def of(name: str) -> Any:
        asked = getattr(memory, name)
        if asked != "auto":
            return asked
        value, chosen[name] = rule[name]
        return value

    if memory.checkpoints == "auto":
        chosen["checkpoints"] = ""
    tile = of("mlp_tile_tokens")
    return Switches(
        checkpoints=checkpoints(config, on),
        embedding=of("embedding"),
        head=of("head"),
        mlp_tile_tokens=None if tile == "whole" else tile,
        lora=of("lora"),
        chosen=chosen,
    )


def _by_rule(facts: Facts) -> dict[str, tuple[str, str]]:
    """What `auto` means: switches that cost time or exactness are used when they are asked for."""
    fused = facts.on_gpu and facts.adapters
    return {
        "embedding": ("device", ""),
        "head": ("device", ""),
        "mlp_tile_tokens": ("whole", ""),
        "lora": ("fused", "less memory on a GPU at no cost") if fused else ("plain", ""),
    }


def _refuse(memory: schema.Memory, facts: Facts) -> None:
    if memory.embedding == "host" and facts.embedding_trained:
        raise ConfigError("memory.embedding: host is for a frozen table, this run trains it; use device")
    if memory.head in {"host", "nf4"} and facts.head_trained:
        raise ConfigError(f"memory.head: {memory.head} is for a frozen linear head, this run has none; use device")
    if facts.tied and memory.embedding == "host" and memory.head != "host":
        raise ConfigError(
            "memory.embedding: host brings nothing while the head, which is the same table in this model, is on the "
            "device; set memory.head: host too, or memory.embedding: device"
        )
    if facts.tied and memory.head in {"host", "nf4"} and memory.embedding != "host":
        raise ConfigError(
            f"memory.head: {memory.head} brings nothing while the embedding, which is the same table in this model, is "
            "on the device; set memory.embedding: host too, or memory.head: device"
        )
    if memory.lora == "fused" and not facts.adapters:
        raise ConfigError("memory.lora: fused needs adapters; use method lora or qlora")


def facts_of(model: Any, on: "torch.device") -> Facts:
    """The facts of a loaded model, with its adapters if it has any."""
    from torch import nn

    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    return Facts(
        on_gpu=on.type == "cuda",
        tied=head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0),
        embedding_trained=not isinstance(embedding, nn.Embedding) or _is_trained(embedding),
        head_trained=type(head) is not nn.Linear or _is_trained(head),
        adapters=causal_lm is not model,
    )


def install(model: Any, switches: Switches, on: "torch.device") -> None:
    """Change a loaded model as the switches say; checkpoints are the trainer's.

    What cannot be changed stays as it was and is said aloud.
    """
    import gc

    import torch

    from fastft.model import fused_lora, host_embedding, tiled_head, tiled_mlp

    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    if switches.embedding == "host":
        host_embedding.install(causal_lm)
    if switches.head in {"host", "nf4"}:
        tiled_head.install(causal_lm, switches.head, on)
    if switches.lora == "fused":
        fused, left = fused_lora.install(model)
        if left:
            console.warn(f"memory.lora: {left} of {fused + left} adapters are not on a linear layer and stay plain")
    if switches.mlp_tile_tokens is not None:
        tiled, left = tiled_mlp.install(causal_lm, switches.mlp_tile_tokens)
        if left:
            console.warn(f"memory.mlp_tile_tokens: the MLPs of {left} of {tiled + left} layers cannot be tiled")
    if on.type == "cuda" and (switches.embedding == "host" or switches.head != "device"):
        gc.collect()
        torch.cuda.empty_cache()


def _is_trained(module: Any) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
