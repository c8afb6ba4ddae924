"""Minimal edits of a model's config.json: only what the new weights make untrue (spec/formats.md 6.4)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.convert.json_file import parse_object, read_regular_file
from fastft.convert.source import CONFIG_DTYPES

_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(frozen=True, slots=True)
class ConfigEdits:
    """What changes.

    Attributes:
        dtype: the dtype of all floating weights, as safetensors names it; None: as before.
        untied: head and embedding are two tensors now.
        vocab_size: rows of the embedding, where that changed.
        vision_only: the weights are the vision tower of a CLIP now.
        quantization: the quantization block, for weights that are 4-bit now.
    """

    dtype: str | None = None
    untied: bool = False
    vocab_size: int | None = None
    vision_only: bool = False
    quantization: Mapping[str, Any] | None = None


def edited_text(path: Path, config: Mapping[str, Any], edits: ConfigEdits) -> bytes:
    """Give the bytes of the new config.json: those of the file at `path` where it says the same already."""
    new = edited(config, edits)
    content = read_regular_file(path)
    return content if parse_object(content, str(path)) == new else config_text(new).encode()


def config_text(config: Mapping[str, Any]) -> str:
    """Write a config.json; the order of the keys is kept."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def edited(config: Mapping[str, Any], edits: ConfigEdits) -> dict[str, Any]:
    """Apply the edits at the top and in the part that describes the text model."""
    if edits.vision_only:
        from fastft.convert.clip import vision_config

        config = vision_config(config)
    changed = {
        key: _edited_part(value, edits, top=False, text=key in ("text_config", "llm_config"))
        if isinstance(value, dict)
        else value
        for key, value in config.items()
    }
    return _edited_part(changed, edits, top=True, text=True)


def _edited_part(part: Mapping[str, Any], edits: ConfigEdits, *, top: bool, text: bool) -> dict[str, Any]:
    new = dict(part)
    if edits.dtype is not None:
        present = [key for key in _DTYPE_KEYS if key in part]
        for key in present or (["dtype"] if top else []):
            new[key] = CONFIG_DTYPES[edits.dtype]
    if edits.untied and (top or (text and "tie_word_embeddings" in part)):
        new["tie_word_embeddings"] = False
    if edits.vocab_size is not None and text and "vocab_size" in part:
        new["vocab_size"] = edits.vocab_size
    if edits.quantization is not None and top:
        new["quantization_config"] = dict(edits.quantization)
    return new
