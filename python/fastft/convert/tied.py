"""Models whose output head shares the input embedding's storage: the head has no tensor of its own in the files.

An adapter on one of the two means two different matrices after the merge; `merge` writes both then and sets
`tie_word_embeddings` to false (spec/formats.md 3.5; PEFT's own merge adds to the shared storage, which is wrong).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastft.convert.source import Source

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "tok_embeddings.weight", "embed_in.weight")
# Prefixes of embedding names, and where the head of such a model is.
_HEADS = {
    "model.embed_tokens.weight": "lm_head.weight",
    "transformer.wte.weight": "lm_head.weight",
    "model.tok_embeddings.weight": "output.weight",
    "model.language_model.embed_tokens.weight": "lm_head.weight",
    "language_model.model.embed_tokens.weight": "language_model.lm_head.weight",
}


@dataclass(frozen=True, slots=True)
class Tied:
    """Names of the shared embedding in the files, and of the head that is left out of them."""

    embedding: str
    head: str


def find_tied(config: Mapping[str, Any], tensors: Mapping[str, Source]) -> Tied | None:
    """Find the tied pair of a model; None where head and embedding are apart, or there is no head."""
    for embedding, head in _HEADS.items():
        if embedding not in tensors:
            continue
        stated = _stated(config)
        if stated is False or (stated is None and head in tensors):
            return None
        return Tied(embedding, head)
    return None


def _stated(config: Mapping[str, Any]) -> bool | None:
    """What config.json says of tying, at the top or for the text model; None: nothing."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return None


def is_embedding(name: str) -> bool:
    """Tell whether a tensor is an input embedding by its name."""
    return name.endswith(_EMBEDDINGS)
