"""A folder as the hub serves InternLM2: its own tensor names, fused wqkv, remote-code config, the real tokenizer."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCAB = 32, 2, 4, 2, 8, 64, 92544


def write(folder: Path, tokenizer: Path, seed: int = 0) -> Path:
    """Write config, two shards of random f32 weights with their index, and the tokenizer; returns the folder."""
    folder.mkdir(parents=True)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    (folder / "config.json").write_text(json.dumps(config(), indent=2))
    tensors = weights(np.random.default_rng(seed))
    cut = len(tensors) // 2
    shards = (dict(list(tensors.items())[:cut]), dict(list(tensors.items())[cut:]))
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    total = sum(t.nbytes for t in tensors.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {k: n for n, s in zip(names, shards, strict=True) for k in s},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def config() -> dict[str, object]:
    """config.json as InternLM2-Chat ships it, with tiny sizes."""
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "attn_implementation": "eager",
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 32768,
        "model_type": "internlm2",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": VOCAB,
    }


def weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random weights under InternLM2's names; wqkv is (kv_heads * (queries per head + 2) * head_dim, hidden)."""

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.05).astype(np.float32)

    tensors = {"model.tok_embeddings.weight": draw(VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "attention.wqkv.weight": draw((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
            at + "attention.wo.weight": draw(HIDDEN, HEADS * HEAD_DIM),
            at + "feed_forward.w1.weight": draw(INTERMEDIATE, HIDDEN),
            at + "feed_forward.w3.weight": draw(INTERMEDIATE, HIDDEN),
            at + "feed_forward.w2.weight": draw(HIDDEN, INTERMEDIATE),
            at + "attention_norm.weight": np.ones(HIDDEN, np.float32),
            at + "ffn_norm.weight": np.ones(HIDDEN, np.float32),
        }
    return tensors | {"model.norm.weight": np.ones(HIDDEN, np.float32), "output.weight": draw(VOCAB, HIDDEN)}
