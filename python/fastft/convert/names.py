"""Joins an adapter with the tensors of a base by their names; transformers is asked only where they do not match.

A module path of the adapter names a tensor of the base directly; or the two differ as InternLM2's own layout differs
from Llama's, in either direction. Every update must find its tensor and fit its shape, else all that failed is listed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from fastft.convert import clip, internlm2, names_transformers
from fastft.convert.adapter import Adapter, LowRank
from fastft.convert.folder import Checkpoint
from fastft.convert.plan import Addend, Delta
from fastft.convert.source import Source
from fastft.convert.tied import Tied, is_embedding
from fastft.errors import CheckpointError, PlanError

# `model.layers.12.self_attn.q_proj`: what stands before and after the number of the layer.
_NUMBERED = re.compile(r"(.*?\b(?:layers|h|blocks|block|layer)\.)(\d{1,6})(\..+)", re.ASCII)


@dataclass(frozen=True)
class TokenRows:
    """New rows of an embedding: row i of `source` becomes row `indices[i]`."""

    source: Source
    indices: tuple[int, ...]


@dataclass
class Joined:
    """What one adapter does to each tensor of the base, by the base's names."""

    deltas: dict[str, list[Delta]] = field(default_factory=dict)
    shifts: dict[str, list[Addend]] = field(default_factory=dict)
    replaced: dict[str, Source] = field(default_factory=dict)
    token_rows: dict[str, TokenRows] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Target:
    """A tensor that (a part of) an update goes to."""

    name: str
    # Which rows of the product go where; None: all.
    rows: internlm2.RowMap | None = None
    # Rows that the product B A must have then; None: the tensor's own.
    product_rows: int | None = None


def join(adapter: Adapter, base: Checkpoint, tied: Tied | None, weight: float = 1.0) -> Joined:
    """Find the tensor of the base for everything in the adapter.

    Args:
        adapter: what to put onto the base.
        base: the folder; its config.json decides between InternLM2's layout and Llama's.
        tied: the tied pair of the base; its head can be a target though no file holds it.
        weight: multiplies the adapter's updates (several adapters at once).

    Raises:
        PlanError: something finds no tensor; the message lists what.
        CheckpointError: the tensor is there, but its shape does not fit.
    """
    shapes = {name: source.shape for name, source in base.tensors.items()}
    if tied is not None:
        shapes.setdefault(tied.head, shapes[tied.embedding])
    adapter = _in_file_names(adapter, base, shapes)
    joined = Joined()
    lost: list[str] = []
    for name, source in adapter.replaced.items():
        target = _same_tensor(name, shapes, base.config)
        if target is None:
            lost.append(name)
        else:
            _check_replacement(adapter, target, source, shapes[target], tied)
            joined.replaced[target] = source
            shapes[target] = source.shape
    for path, low_rank in adapter.low_rank.items():
        targets = _targets(path, shapes, base.config)
        if not targets:
            lost.append(f"{path}.weight")
        for goal in targets:
            if low_rank.bias is not None:
                name = goal.name.removesuffix(".weight") + ".bias"
                joined.shifts.setdefault(name, []).append(_addend(adapter, low_rank, goal, shapes.get(name), weight))
            joined.deltas.setdefault(goal.name, []).append(_delta(adapter, low_rank, goal, shapes[goal.name], weight))
    for path, source in adapter.token_rows.items():
        target = _same_tensor(f"{path}.weight", shapes, base.config)
        if target is None:
            lost.append(f"{path}.weight")
        else:
            joined.token_rows[target] = _token_rows(adapter, path, source, shapes[target])
    _check_complete(adapter, shapes, base.config)
    if lost:
        raise PlanError(_lost_text(adapter, base, lost, list(shapes)))
    if weight != 1.0 and (joined.replaced or joined.token_rows):
        raise PlanError(
            f"{adapter.folder}: a weight of {weight:g} has no meaning for the tensors that it replaces whole"
            f" ({next(iter([*joined.replaced, *joined.token_rows]))}); use weight 1"
        )
    return joined


def _in_file_names(adapter: Adapter, base: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Give the adapter with the names of the base's files, where they differ as transformers renames them.

    All names are led through the same table, or none: half of them matching by chance would be a wrong merge.
    """
    wanted = [
        *(f"{path}.weight" for path in [*adapter.low_rank, *adapter.token_rows]),
        *adapter.replaced,
    ]
    paths_found = all(_targets(path, shapes, base.config) for path in adapter.low_rank)
    names_found = all(
        _same_tensor(name, shapes, base.config)
        for name in wanted
        if name.removesuffix(".weight") not in adapter.low_rank
    )
    if paths_found and names_found:
        return adapter
    found = names_transformers.file_names(base, wanted)
    if len(set(found.values())) != len(wanted):
        return adapter

    def path_of(path: str) -> str:
        return found[f"{path}.weight"].removesuffix(".weight")

    return replace(
        adapter,
        low_rank={path_of(path): replace(low_rank, path=path_of(path)) for path, low_rank in adapter.low_rank.items()},
        replaced={found[name]: source for name, source in adapter.replaced.items()},
        token_rows={path_of(path): source for path, source in adapter.token_rows.items()},
    )


def _check_complete(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
    """Refuse an adapter that lacks layers which its training must have had.

    PEFT puts the modules named in `target_modules` into every layer, unless layers are chosen or excluded; a module
    that some layers of the file have and others, that are in the base, have not was lost on the way.
    """
    settings = adapter.config
    chosen = settings.get("layers_to_transform") is not None or settings.get("exclude_modules")
    if not isinstance(settings.get("target_modules"), list) or chosen:
        return
    text = config.get("text_config")
    num_layers = config.get("num_hidden_layers") or (text.get("num_hidden_layers") if isinstance(text, dict) else None)
    if not isinstance(num_layers, int):
        return
    patterns = {(match[1], match[3]) for match in map(_NUMBERED.fullmatch, adapter.low_rank) if match is not None}
    lacking = [
        path
        for prefix, suffix in sorted(patterns)
        for layer in range(num_layers)
        if (path := f"{prefix}{layer}{suffix}") not in adapter.low_rank and _targets(path, shapes, config)
    ]
    if lacking:
        raise PlanError(
            f"{adapter.folder}: lacks the update of {len(lacking)} modules that its target_modules name, for example"
            f" {lacking[0]}; was it saved in pieces, or cut off?"
        )


def _targets(path: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> list[_Target]:
    """Find the tensors that an update of the module `path` belongs to; none: not found."""
    if f"{path}.weight" in shapes:
        return [_Target(f"{path}.weight")]
    if config.get("model_type") == clip.VISION_TYPE:
        # transformers 5 leaves the prefix out of the module's path, its files keep it.
        return [_Target(f"{clip.PREFIX}{path}.weight")] if f"{clip.PREFIX}{path}.weight" in shapes else []
    layer = internlm2.split_layer(path)
    if internlm2.is_internlm2(config):
        if layer is not None and layer[1] in internlm2.PROJECTIONS and f"{layer[0]}{internlm2.FUSED}.weight" in shapes:
            heads = internlm2.heads_of(config)
            rows = internlm2.fused_row_map(heads, layer[1])
            return [_Target(f"{layer[0]}{internlm2.FUSED}.weight", rows, heads.rows(layer[1]))]
        own = internlm2.internlm2_name(path)
        return [_Target(f"{own}.weight")] if own is not None and f"{own}.weight" in shapes else []
    if layer is not None and layer[1] == internlm2.FUSED:
        heads = internlm2.heads_of(config)
        names = [f"{layer[0]}{projection}.weight" for projection in internlm2.PROJECTIONS]
        if not all(name in shapes for name in names):
            return []
        return [
            _Target(name, internlm2.split_row_map(heads, projection), heads.fused_rows)
            for name, projection in zip(names, internlm2.PROJECTIONS, strict=True)
        ]
    own = internlm2.llama_name(path)
    return [_Target(f"{own}.weight")] if own is not None and f"{own}.weight" in shapes else []


def _same_tensor(name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> str | None:
    """Find the one tensor of the base that a whole tensor of the adapter stands for."""
    if name in shapes:
        return name
    if config.get("model_type") == clip.VISION_TYPE:
        return f"{clip.PREFIX}{name}" if f"{clip.PREFIX}{name}" in shapes else None
    path, _, kind = name.rpartition(".")
    rename = internlm2.internlm2_name if internlm2.is_internlm2(config) else internlm2.llama_name
    own = rename(path)
    return f"{own}.{kind}" if own is not None and f"{own}.{kind}" in shapes else None


def _delta(adapter: Adapter, low_rank: LowRank, target: _Target, shape: tuple[int, ...], weight: float) -> Delta:
    """Make the update of one tensor, its shape checked."""
    num_out, num_in = low_rank.b.shape[0], low_rank.a.shape[1]
    transposed = low_rank.embedding or adapter.fan_in_fan_out
    given = (num_in, num_out) if transposed else (num_out, num_in)
    expected = shape if target.product_rows is None else (target.product_rows, *shape[1:])
    if given != expected or (transposed and target.rows is not None):
        raise CheckpointError(
            f"{adapter.folder}: {low_rank.path}: the update is {_by(given)}, but {target.name!r} of the base is"
            f" {_by(expected)}; the adapter was trained on another model"
        )
    if low_rank.magnitude is not None and weight != 1.0:
        raise PlanError(f"{adapter.folder}: a weight of {weight:g} has no meaning for DoRA; use weight 1")
    return Delta(low_rank.a, low_rank.b, low_rank.scale * weight, transposed, target.rows, low_rank.magnitude)


def _addend(
    adapter: Adapter, low_rank: LowRank, target: _Target, shape: tuple[int, ...] | None, weight: float
) -> Addend:
    """Make the update of a module's bias from the bias of its lora_B."""
    assert low_rank.bias is not None
    if shape is None:
        raise PlanError(
            f"{adapter.folder}: {low_rank.path} has a lora_B.bias, but that layer of the base has no bias to add it to"
        )
    rows = target.product_rows if target.rows is not None else shape[0]
    if low_rank.bias.numel != rows:
        raise CheckpointError(
            f"{adapter.folder}: {low_rank.path}: its lora_B.bias has {low_rank.bias.numel} numbers, the base {rows}"
        )
    return Addend(low_rank.bias, low_rank.scale * weight, target.rows)


def _check_replacement(adapter: Adapter, name: str, source: Source, shape: tuple[int, ...], tied: Tied | None) -> None:
    """Check the shape of a replacing tensor; embedding and head may have another number of rows."""
    resizable = (
        is_embedding(name)
        or name.endswith(("lm_head.weight", "output.weight"))
        or (tied is not None and name == tied.head)
    )
    fits = source.shape[1:] == shape[1:] and len(source.shape) == len(shape) if resizable else source.shape == shape
    if not fits:
        raise CheckpointError(
            f"{adapter.folder}: its tensor for {name!r} is {_by(source.shape)}, that of the base is {_by(shape)};"
            " the adapter was trained on another model"
        )


def _token_rows(adapter: Adapter, path: str, source: Source, shape: tuple[int, ...]) -> TokenRows:
    """Read which rows of an embedding are replaced."""
    stated = adapter.config.get("trainable_token_indices")
    if isinstance(stated, dict):
        found = [value for key, value in stated.items() if path == key or path.endswith(f".{key}")]
        stated = found[0] if found else None
    if not isinstance(stated, list) or not all(isinstance(index, int) and 0 <= index < shape[0] for index in stated):
        raise CheckpointError(
            f"{adapter.folder}: trainable_token_indices must list row numbers of {path} (0 to {shape[0] - 1})"
        )
    if len(set(stated)) != len(stated) or source.shape != (len(stated), *shape[1:]):
        raise CheckpointError(
            f"{adapter.folder}: {len(stated)} trainable_token_indices, but the new rows of {path} are"
            f" {_by(source.shape)} for a table of {_by(shape)}"
        )
    return TokenRows(source, tuple(stated))


def _lost_text(adapter: Adapter, base: Checkpoint, lost: list[str], names: list[str]) -> str:
    """List what found no tensor, with the nearest names of the base."""
    lines = [f"{adapter.folder}: {len(lost)} of its modules are not in the base {base.folder}:"]
    for name in sorted(lost)[:5]:
        near = get_close_matches(name, names, n=1, cutoff=0.6)
        lines.append(f"  {name}" + (f" (nearest in the base: {near[0]})" if near else ""))
    if len(lost) > 5:
        lines.append(f"  and {len(lost) - 5} more")
    trained_on = adapter.config.get("base_model_name_or_path")
    if trained_on:
        lines.append(f"  the adapter says it was trained on {trained_on}")
    if base.config.get("auto_map"):
        lines.append("  the base runs its own code (auto_map), so its names are only known from its files")
    return "\n".join(lines)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape) or "a scalar"
