"""Tiny random Llamas: one with a tokenizer and a run's config, for training and chat; one of bare files, for conversions.

The second is made with numpy alone (no torch is imported), and its sizes are odd on purpose.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fastft.config.schema import Config

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTIONS = tuple(f"How many apples are in basket {n}?" for n in range(24))
TEXTS = tuple(f"Basket {n} holds {n * 7 % 13} apples and {n * 5 % 11} pears, said the farmer." for n in range(24))


def write_model(folder: Path, *, chat_template: str | None = CHATML, dtype: str = "float32", **config: Any) -> Path:
    """Write config, random weights (seed 0) and tokenizer of a Llama of 2 layers and width 32."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = write_tokenizer(folder, chat_template)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**{**settings, **config}))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, chat_template: str | None = CHATML) -> Any:
    """Write a byte-level BPE tokenizer of about 300 tokens and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*QUESTIONS, *TEXTS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast


def write_dialogues(path: Path, count: int = 12) -> Path:
    """Write question and answer rows; the answers differ in length."""
    rows = [{"instruction": QUESTIONS[n], "input": "", "output": "apple " * (n % 5 + 1)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_texts(path: Path, count: int = 12) -> Path:
    """Write rows of plain text."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:count]), encoding="utf-8")
    return path


def config(model: Path, data: Path, *, task: str = "sft", kind: str = "lora", **changes: Any) -> Config:
    """A run's config; `changes` are dotted keys with a double underscore: train__lr=1e-3."""
    method: dict[str, Any] = {"kind": kind}
    if kind != "full":
        method["lora"] = {"r": 4, "alpha": 8}
    plain: dict[str, Any] = {
        "name": "tiny",
        "task": task,
        "model": {"name": str(model)},
        "method": method,
        "data": {"train": [{"source": str(data)}], "max_length": 64, "packing": False},
        "train": {"max_steps": 6, "batch_size": 2, "grad_accumulation": 1, "lr": 0.01, "log_steps": 1},
        "output": {"save_steps": None},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = plain
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return Config.model_validate(plain)


# Bare files for conversions.

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


def config_json(**changes: object) -> dict[str, object]:
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
    (folder / "config.json").write_text(json.dumps(config_json(**changes), indent=2))
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
