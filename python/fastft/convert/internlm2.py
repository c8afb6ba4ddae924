"""InternLM2's names and its fused attention projection, against Llama's.

InternLM2 is Llama with other names: `wqkv` holds, for each key-value head, the rows of its query heads, then of its
key, then of its value: (kv_heads, queries_per_kv + 2, head_dim, hidden). Used to lay a checkpoint out as Llama, and
to put adapters of the one layout onto files of the other.
Source: modeling_internlm2.py of internlm/internlm2-7b (the rearrange "b q (h gs d) -> b q h gs d").
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastft.errors import CheckpointError

# (row of the target, row of the source, count)
RowMap = tuple[tuple[int, int, int], ...]

_PLAIN = {
    "model.tok_embeddings": "model.embed_tokens",
    "model.norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TO_INTERNLM2 = {llama: own for own, llama in (_PLAIN | _IN_LAYER).items()}
FUSED = "attention.wqkv"
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LAYER = re.compile(r"(model\.layers\.\d{1,6}\.)(.+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Heads:
    """The shape of the attention."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int

    @property
    def queries_per_group(self) -> int:
        return self.num_heads // self.num_key_value_heads

    @property
    def fused_rows(self) -> int:
        return (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim

    def rows(self, projection: str) -> int:
        """Rows of q_proj, k_proj or v_proj."""
        return (self.num_heads if projection == PROJECTIONS[0] else self.num_key_value_heads) * self.head_dim


def is_internlm2(config: Mapping[str, Any]) -> bool:
    """Tell whether config.json describes files in InternLM2's own layout."""
    return config.get("model_type") == "internlm2"


def heads_of(config: Mapping[str, Any]) -> Heads:
    """Read the shape of the attention from config.json (InternLM2's or Llama's).

    Raises:
        CheckpointError: a number is missing, or they do not fit together.
    """
    num_heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    num_key_value_heads = config.get("num_key_value_heads") or num_heads
    numbers = (num_heads, hidden, num_key_value_heads)
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        raise CheckpointError(
            "config.json: num_attention_heads, num_key_value_heads and hidden_size must be positive numbers,"
            f" they are {num_heads}, {num_key_value_heads} and {hidden}"
        )
    assert isinstance(num_heads, int)
    assert isinstance(hidden, int)
    assert isinstance(num_key_value_heads, int)
    head_dim = config.get("head_dim") or hidden // num_heads
    if not isinstance(head_dim, int) or num_heads % num_key_value_heads or (head_dim * num_heads) % num_heads:
        raise CheckpointError(
            f"config.json: {num_heads} attention heads cannot share {num_key_value_heads} key-value heads"
        )
    return Heads(num_heads, num_key_value_heads, head_dim)


def llama_name(path: str) -> str | None:
    """Give Llama's path of an InternLM2 module that is not the fused projection; None where there is none."""
    match = _LAYER.fullmatch(path)
    if match is None:
        return _PLAIN.get(path)
    inner = _IN_LAYER.get(match[2])
    return None if inner is None else match[1] + inner


def internlm2_name(path: str) -> str | None:
    """Give InternLM2's path of a Llama module that is not fused there; None where there is none."""
    match = _LAYER.fullmatch(path)
    inner = _TO_INTERNLM2.get(path if match is None else match[2])
    if inner is None or (match is None) != (inner in _PLAIN):
        return None
    return inner if match is None else match[1] + inner


def split_layer(path: str) -> tuple[str, str] | None:
    """Split `model.layers.3.attention.wqkv` into its layer prefix (with the dot) and the rest."""
    match = _LAYER.fullmatch(path)
    return None if match is None else (match[1], match[2])


def fused_row_map(heads: Heads, projection: str) -> RowMap:
    """Say where the rows of one projection lie in `wqkv`: (row of wqkv, row of the projection, count)."""
    queries, dim = heads.queries_per_group, heads.head_dim
    group_rows = (queries + 2) * dim
    first, count = {
        PROJECTIONS[0]: (0, queries * dim),
        PROJECTIONS[1]: (queries * dim, dim),
        PROJECTIONS[2]: ((queries + 1) * dim, dim),
    }[projection]
    return tuple((group * group_rows + first, group * count, count) for group in range(heads.num_key_value_heads))


def split_row_map(heads: Heads, projection: str) -> RowMap:
    """Say the same from the other side: (row of the projection, row of wqkv, count)."""
    return tuple((own, fused, count) for fused, own, count in fused_row_map(heads, projection))
