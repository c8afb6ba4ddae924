"""A Llama folder and an adapter folder of random numbers, made with numpy alone; sizes are odd on purpose."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE, VOCAB = 24, 2, 4, 2, 40, 50
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def config(**changes: object) -> dict[str, object]:
    """config.json of the model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    } | changes


def weights(seed: int = 0, dtype: type[np.floating] = np.float32, *, tied: bool = False) -> dict[str, np.ndarray]:
    """Random weights under Llama's names."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.1).astype(dtype)

    tensors = {"model.embed_tokens.weight": draw(VOCAB, HIDDEN), "model.norm.weight": draw(HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        tensors |= {f"{at}{name}.weight": draw(*shape) for name, shape in LINEARS.items()}
        tensors |= {f"{at}{name}.weight": draw(HIDDEN) for name in ("input_layernorm", "post_attention_layernorm")}
    return tensors if tied else tensors | {"lm_head.weight": draw(VOCAB, HIDDEN)}


def write_base(
    folder: Path, tensors: Mapping[str, np.ndarray] | None = None, *, shards: int = 1, **changes: object
) -> Path:
    """Write a model folder; returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(**changes), indent=2))
    tensors = dict(weights() if tensors is None else tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def adapter_tensors(r: int = 4, seed: int = 1, scale: float = 0.1) -> dict[str, np.ndarray]:
    """A and B of every linear layer, under PEFT's names."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name, (num_out, num_in) in LINEARS.items():
            at = f"base_model.model.model.layers.{layer}.{name}.lora_"
            tensors[f"{at}A.weight"] = (rng.standard_normal((r, num_in)) * scale).astype(np.float32)
            tensors[f"{at}B.weight"] = (rng.standard_normal((num_out, r)) * scale).astype(np.float32)
    return tensors


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray] | None = None, **changes: object) -> Path:
    """Write an adapter folder with rank 4 and alpha 8; returns it."""
    folder.mkdir(parents=True)
    settings = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [name.rpartition(".")[2] for name in LINEARS],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
    } | changes
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    save_file(dict(adapter_tensors() if tensors is None else tensors), folder / "adapter_model.safetensors")
    return folder
