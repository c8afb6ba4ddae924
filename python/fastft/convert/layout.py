"""InternLM and InternLM2 checkpoints laid out as Llama, to be read natively, without the code that comes with them.

transformers 5 has no class for either, and the code in the models' folders was written for version 4. InternLM2's
weights are Llama's under other names, with the three attention projections in one tensor (`internlm2`): they are
streamed once, unchanged bit for bit, into a cache folder. InternLM's weights have Llama's names already: the cache
folder links to them. Adapters trained on a laid-out folder go onto the original files as well (`names`).
InternLM3 has a class of its own in transformers 5.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft import console, publish
from fastft.convert import internlm2, sentencepiece_model, split
from fastft.convert.folder import (
    INDEX,
    PICKLE_INDEX,
    PICKLE_SINGLE,
    SINGLE,
    Checkpoint,
    existing_folder,
    read_checkpoint,
)
from fastft.convert.json_file import read_object, read_regular_file
from fastft.convert.model_config import config_text
from fastft.convert.plan import OutputTensor, Part, Rows, into_shards, natural_order, taken_over
from fastft.convert.sidefiles import copy_side_files, side_files
from fastft.convert.size import readable
from fastft.convert.source import Source, check_unchanged, fingerprint
from fastft.convert.stream import write_shards
from fastft.errors import CheckpointError, FileError, PlanError

# Goes up when the layout changes, so that an older cache is not used.
_VERSION = 1
_MAX_SHARD_SIZE_BYTES = 5_000_000_000
_KEPT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "hidden_act",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "use_cache",
    "torch_dtype",
    "dtype",
    "pad_token_id",
)
_TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Layout:
    """What a laid-out folder consists of.

    Attributes:
        tensors: each tensor of the original exactly once; empty where the files are linked, or there are none.
        links: name to the file of weights that is used as it is.
        config: the new config.json.
        side_files: name to the file to copy.
        texts: name to the content of the small files that are rewritten.
    """

    tensors: tuple[OutputTensor, ...]
    links: Mapping[str, Path]
    config: Mapping[str, Any]
    side_files: Mapping[str, Path]
    texts: Mapping[str, bytes]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def without_remote_code(folder: Path) -> Path:
    """Give a folder with the same model that transformers reads by itself; made on first use, then from the cache.

    InternLM and InternLM2 come out in Llama's layout, InternLM3 with its own class and a tokenizer written anew.

    The cache is `fastft/layouts` under XDG_CACHE_HOME, else under ~/.cache. A laid-out folder belongs to the
    original's path, sizes and times: when the original changes, a new one is made.

    Args:
        folder: an InternLM, InternLM2 or InternLM3 model folder; without weights only config and tokenizer are laid out.

    Returns:
        The laid-out folder, complete.

    Raises:
        PlanError: another architecture, or a tensor that has no place in Llama.
        FileError: no room, or the cache cannot be written.
    """
    checkpoint = _checkpoint(folder)
    target = _cache_folder() / _key(checkpoint)
    if target.exists():
        return target
    layout = plan(checkpoint)
    if layout.tensors:
        console.note(
            f"InternLM2 is read in Llama's layout: {readable(layout.num_bytes)} are rewritten once, unchanged,"
            f" to {target}"
        )

    def write(stage: Path) -> None:
        write_into(stage, layout)
        check_unchanged(checkpoint.fingerprints)

    return _made_once(target, layout.num_bytes, write)


def holds_pickles(folder: Path) -> bool:
    """Whether the weights of a model folder are in pytorch_model.bin files and nowhere else."""
    has = {name for name in (SINGLE, INDEX, PICKLE_SINGLE, PICKLE_INDEX) if (folder / name).exists()}
    return bool(has) and not has & {SINGLE, INDEX}


def without_pickles(folder: Path) -> Path:
    """Give a folder with the same model in safetensors, so that no library unpickles its pytorch_model.bin.

    The pickles are read as data (`pth_reader`), the numbers are streamed once, unchanged, into the cache of
    `without_remote_code`.

    Args:
        folder: of a model.

    Returns:
        `folder` itself where it holds safetensors, or no weights.

    Raises:
        CheckpointError: a pickle is broken, or asks for what would run code; nothing in it is run.
        FileError: a shard is missing, no room, or the cache cannot be written.
    """
    if not holds_pickles(folder):
        return folder
    split_up = split.plan(folder, max_shard_size_bytes=_MAX_SHARD_SIZE_BYTES)
    target = _cache_folder() / _key(split_up.source)
    if target.exists():
        return target
    console.note(
        f"model {folder}: its weights are pickles; {readable(split_up.num_bytes)} are rewritten once as safetensors, "
        f"unchanged, to {target}"
    )
    return _made_once(target, split_up.num_bytes, lambda stage: split.write_into(stage, split_up))


def _made_once(target: Path, num_bytes: int, write: Callable[[Path], None]) -> Path:
    """Publish a folder of the cache."""
    publish.remove_leftovers(target.parent)
    try:
        with publish.staged(target, num_bytes=num_bytes) as stage:
            write(stage)
    except FileError:
        # Another process may have made the same folder meanwhile.
        if not target.exists():
            raise
    return target


def write_into(folder: Path, layout: Layout) -> None:
    """Write a laid-out model into an existing (staging) folder."""
    if layout.tensors:
        write_shards(into_shards(layout.tensors, _MAX_SHARD_SIZE_BYTES), folder, "laying out as Llama")
    for name, path in layout.links.items():
        (folder / name).symlink_to(path)
    copy_side_files(dict(layout.side_files), folder)
    for name, content in layout.texts.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(config_text(layout.config), encoding="utf-8")


def plan(checkpoint: Checkpoint) -> Layout:
    """Plan the Llama layout of an InternLM or InternLM2 checkpoint.

    Raises:
        PlanError: another architecture, or a tensor that has no place in Llama.
        CheckpointError: the fused projection does not have the shape that config.json says.
    """
    kind = checkpoint.config.get("model_type")
    if kind not in ("internlm", "internlm2", "internlm3"):
        raise PlanError(f"{checkpoint.folder}: model_type is {kind!r}; internlm and internlm2 are laid out as Llama")
    chosen = {name: path for name, path in side_files(checkpoint.folder).items() if not name.endswith(".py")}
    texts = _tokenizer_texts(chosen)
    if kind == "internlm2":
        return Layout(tuple(llama_tensors(checkpoint)), {}, llama_config(checkpoint.config), chosen, texts)
    files = [file.path for file in checkpoint.fingerprints if file.path.name != "config.json"]
    if kind == "internlm3":  # transformers has the class; only the tokenizer is written anew
        config = {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    else:
        config = llama_config_of_v1(checkpoint.config)
    return Layout((), {path.name: path for path in files}, config, chosen, texts)


def _checkpoint(folder: Path) -> Checkpoint:
    """Read a model folder; one that holds no weights (only config and tokenizer were fetched) has no tensors."""
    if any((folder / name).exists() for name in (SINGLE, INDEX, PICKLE_SINGLE, PICKLE_INDEX)):
        return read_checkpoint(folder)
    folder = existing_folder(folder, "the model")
    path = folder / "config.json"
    return Checkpoint(folder, read_object(path), {}, (fingerprint(path),))


def llama_tensors(checkpoint: Checkpoint) -> list[OutputTensor]:
    """Plan the tensors: names changed, `wqkv` split per head group, every number kept."""
    heads = internlm2.heads_of(checkpoint.config)
    tensors: list[OutputTensor] = []
    for name, source in checkpoint.tensors.items():
        path, _, kind = name.rpartition(".")
        if path.endswith(".rotary_emb"):
            continue  # inv_freq: computed from rope_theta, not trained
        layer = internlm2.split_layer(path)
        if layer is not None and layer[1] == internlm2.FUSED and kind in ("weight", "bias"):
            if source.shape[:1] != (heads.fused_rows,):
                raise CheckpointError(
                    f"{checkpoint.folder}: {name!r} has shape {source.shape}; config.json"
                    f" ({heads.num_heads} heads, {heads.num_key_value_heads} key-value heads of {heads.head_dim})"
                    f" gives {heads.fused_rows} rows"
                )
            tensors += [
                _projection(f"{layer[0]}{projection}.{kind}", source, heads, projection)
                for projection in internlm2.PROJECTIONS
            ]
            continue
        llama = internlm2.llama_name(path)
        if llama is None or kind not in ("weight", "bias"):
            raise PlanError(
                f"{checkpoint.folder}: {name!r} is no part of InternLM2ForCausalLM and has no place in Llama"
            )
        tensors.append(taken_over(f"{llama}.{kind}", source, None))
    return sorted(tensors, key=lambda tensor: natural_order(tensor.name))


def _projection(name: str, fused: Source, heads: internlm2.Heads, projection: str) -> OutputTensor:
    parts = tuple(Part(fused, row, count) for row, _, count in internlm2.fused_row_map(heads, projection))
    return OutputTensor(name, fused.dtype, (heads.rows(projection), *fused.shape[1:]), Rows(parts))


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate InternLM2's config.json into LlamaConfig's.

    Source: configuration_internlm2.py; `bias` is that of wqkv and wo, the scaling of the rotary embedding is named
    `type` there and means the same (dynamic NTK, linear).
    """
    new: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    new |= {key: config[key] for key in _KEPT if key in config}
    new["attention_bias"] = bool(config.get("bias", False))
    new["mlp_bias"] = False
    scaling = config.get("rope_scaling")
    if scaling:
        kind = scaling.get("rope_type") or scaling.get("type")
        if kind not in ("dynamic", "linear"):
            raise PlanError(f"config.json: rope_scaling {scaling!r} is not one of InternLM2's (dynamic, linear)")
        new["rope_scaling"] = {"rope_type": kind, "factor": float(scaling["factor"])}
    return new


def llama_config_of_v1(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate InternLM's config.json into LlamaConfig's.

    Source: configuration_internlm.py and modeling_internlm.py of internlm/internlm-7b: `bias` is that of the four
    attention projections, `rotary` holds base, type (origin, dynamic) and, for dynamic, the scaling factor.
    """
    new: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    new |= {key: config[key] for key in _KEPT if key in config}
    new["attention_bias"] = bool(config.get("bias", True))
    new["mlp_bias"] = False
    rotary = config.get("rotary") or {}
    kind = rotary.get("type", "origin")
    if kind not in ("origin", "dynamic"):
        raise PlanError(f"config.json: rotary {rotary!r} is not one of InternLM's (origin, dynamic)")
    if "base" in rotary:
        new["rope_theta"] = float(rotary["base"])
    if kind == "dynamic":
        new["rope_scaling"] = {"rope_type": "dynamic", "factor": float(rotary.get("scaling_factor", 1.0))}
    return new


def _tokenizer_texts(chosen: dict[str, Path]) -> dict[str, bytes]:
    """Make the tokenizer one that is read without the model's own code; what is rewritten leaves `chosen`."""
    texts = {}
    config: Mapping[str, Any] = {}
    if _TOKENIZER_CONFIG in chosen:
        config = read_object(chosen[_TOKENIZER_CONFIG])
        texts[_TOKENIZER_CONFIG] = _tokenizer_config(chosen.pop(_TOKENIZER_CONFIG))
    if "tokenizer.json" not in chosen and "tokenizer.model" in chosen:
        texts["tokenizer.json"] = sentencepiece_model.tokenizer_json(chosen["tokenizer.model"], config)
    return texts


def _tokenizer_config(path: Path) -> bytes:
    """Point tokenizer_config.json at the library's own class instead of the code that came with the model."""
    config = read_object(path)
    if "auto_map" not in config and not str(config.get("tokenizer_class", "")).startswith("InternLM"):
        return read_regular_file(path)
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def _cache_folder() -> Path:
    configured = os.environ.get("XDG_CACHE_HOME")
    root = Path(configured) if configured else Path.home() / ".cache"
    return root / "fastft" / "layouts"


def _key(checkpoint: Checkpoint) -> str:
    """Name the cache folder after the original's path and the sizes and times of its files."""
    digest = hashlib.sha256(f"{_VERSION} {checkpoint.folder}".encode())
    side = [fingerprint(path) for path in side_files(checkpoint.folder).values() if path.is_file()]
    for file in sorted({*checkpoint.fingerprints, *side}, key=lambda file: file.path):
        digest.update(f"\n{file.path.name} {file.size_bytes} {file.modified_ns}".encode())
    return f"{checkpoint.folder.name}-{digest.hexdigest()[:16]}"
