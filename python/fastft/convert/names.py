"""Joins an adapter with the tensors of a base by their names.

Level 0: a module path of the adapter names a tensor of the base directly; or the two differ as InternLM2's own layout
differs from Llama's, in either direction. Level 1, where that does not find all: `names_transformers`. Every update
must find its tensor and fit its shape, else all that failed is listed.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from fastft import spelling
from fastft.convert import clip, internlm2, peft_modules
from fastft.convert.adapter import Adapter, LowRank
from fastft.convert.folder import Checkpoint
from fastft.convert.matching import NameOptions, Names, Target, with_key_map
from fastft.convert.plan import Addend, Delta, PeftLayer
from fastft.convert.source import Source, rows_of
from fastft.convert.tied import Tied, is_embedding
from fastft.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    from fastft.convert.names_transformers import ModelNames

# `model.layers.12.self_attn.q_proj`: what stands before and after the number of the layer.
_NUMBERED = re.compile(r"(.*?\b(?:layers|h|blocks|block|layer)\.)(\d{1,6})(\..+)", re.ASCII)


# A projection of one expert, which transformers 5 keeps with those of the others in one parameter.
_EXPERT = re.compile(r"\.experts\.\d{1,6}\.", re.ASCII)


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
    layers: dict[str, PeftLayer] = field(default_factory=dict)

    @property
    def changed(self) -> set[str]:
        return {*self.deltas, *self.shifts, *self.replaced, *self.token_rows, *self.layers}


class EqualNames:
    """Level 0: the names are equal, or differ as InternLM2's and Llama's do."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
        self._shapes = shapes
        self._config = config

    def targets(self, path: str) -> Sequence[Target]:
        """Find the tensors that an update of the module `path` belongs to; none: not found."""
        return _targets(path, self._shapes, self._config)

    def tensor(self, name: str) -> str | None:
        """Find the one tensor that a whole tensor of the adapter stands for."""
        return _same_tensor(name, self._shapes, self._config)

    def parameter_updates(self, adapter: Adapter) -> Iterable[tuple[LowRank, Target]]:
        """Give none: which parameter is meant only the class of the model says."""
        assert not adapter.parameters
        return ()


class BaseNames:
    """The names of a base at the first level that knows all of an adapter; transformers is imported for level 1 only."""

    def __init__(self, base: Checkpoint, tied: Tied | None, options: NameOptions | None = None) -> None:
        self.options = options or NameOptions()
        self.shapes = {name: source.shape for name, source in base.tensors.items()}
        if tied is not None:
            # The head can be a target though no file holds it.
            self.shapes.setdefault(tied.head, self.shapes[tied.embedding])
        self._base = base
        config = clip.vision_config(base.config) if self.options.is_clip else base.config
        self._equal = EqualNames(self.shapes, config)

    @cached_property
    def _by_model(self) -> "ModelNames":
        from fastft.convert.names_transformers import ModelNames, build_model

        return ModelNames(self.shapes, build_model(self._base.config, self.options.class_name))

    def layer_of(self, path: str) -> tuple[str, int] | None:
        """Give class and groups of a module, where the class of the model is known without its own code."""
        if self._base.config.get("auto_map") and self.options.class_name is None:
            return None
        try:
            return self._by_model.layer_of(path)
        except PlanError:
            # transformers does not have the class: its names were found in the files alone.
            return None

    def knowing(self, adapter: Adapter) -> Names:
        """Choose the level.

        Raises:
            PlanError: something of the adapter has no tensor at any level; the message lists what.
        """
        lost = [*_lost(adapter, self._equal), *adapter.parameters]
        if not lost:
            return self._equal
        base = self._base
        attention = [path for path in adapter.low_rank if f"{path}.in_proj_weight" in self.shapes]
        if attention:
            raise PlanError(
                f"{adapter.folder}: {attention[0]} is an nn.MultiheadAttention, where PEFT adds the update of out_proj"
                " twice, in the training and in its own merge; save the merged model from the training"
            )
        if base.config.get("auto_map") and self.options.class_name is None:
            why = "the base runs its own code (auto_map), so its names are only known from its files; --key-map renames"
            raise PlanError(_lost_text(adapter, base, lost, list(self.shapes), why))
        try:
            by_model = self._by_model
        except PlanError as error:
            raise PlanError(_lost_text(adapter, base, lost, list(self.shapes), str(error))) from error
        lost = _lost(adapter, by_model)
        if lost:
            why = "names that differ otherwise can be changed by --key-map REGEX=REPLACEMENT"
            raise PlanError(_lost_text(adapter, base, lost, list(self.shapes), why))
        return by_model


def join(
    adapter: Adapter,
    base: Checkpoint,
    tied: Tied | None,
    weight: float = 1.0,
    names: BaseNames | None = None,
    *,
    match_peft: bool = False,
) -> Joined:
    """Find the tensor of the base for everything in the adapter.

    Args:
        adapter: what to put onto the base.
        base: the folder; its config.json decides between InternLM2's layout and Llama's.
        tied: the tied pair of the base; its head can be a target though no file holds it.
        weight: multiplies the adapter's updates (several adapters at once).
        names: of the base, where they are kept for several adapters.
        match_peft: round as PEFT does.

    Raises:
        PlanError: something finds no tensor; the message lists what.
        CheckpointError: the tensor is there, but its shape does not fit.
    """
    all_names = names or BaseNames(base, tied)
    adapter = with_key_map(adapter, all_names.options.key_map)
    known = all_names.knowing(adapter)
    shapes = dict(all_names.shapes)
    _check_every_target(adapter, shapes)
    joined = Joined()
    for name, source in adapter.replaced.items():
        target = _found(known, name)
        _check_replacement(adapter, target, source, shapes[target], tied)
        joined.replaced[target] = source
        shapes[target] = source.shape
    for path, low_rank in adapter.low_rank.items():
        for goal in known.targets(path):
            if low_rank.bias is not None:
                name = goal.name.removesuffix(".weight") + ".bias"
                joined.shifts.setdefault(name, []).append(_addend(adapter, low_rank, goal, shapes.get(name), weight))
            joined.deltas.setdefault(goal.name, []).append(_delta(adapter, low_rank, goal, shapes[goal.name], weight))
    for low_rank, goal in known.parameter_updates(adapter):
        delta = replace(_delta(adapter, low_rank, goal, shapes[goal.name], weight), rounded_by_peft=True)
        joined.deltas.setdefault(goal.name, []).append(delta)
    for path, source in adapter.token_rows.items():
        target = _found(known, f"{path}.weight")
        joined.token_rows[target] = _token_rows(adapter, path, source, shapes[target])
    modules: Collection[str] = adapter.low_rank
    if adapter.peft_tensors:
        placed = peft_modules.place(adapter, known)
        modules = placed.modules
        for target, source in placed.replaced.items():
            _check_replacement(adapter, target, source, shapes[target], tied)
            joined.replaced[target] = source
        sources = dict(base.tensors)
        if tied is not None:
            sources.setdefault(tied.head, sources[tied.embedding])
        joined.layers = peft_modules.layers(adapter, placed, sources, all_names.layer_of, match_peft=match_peft)
        joined.replaced = {name: source for name, source in joined.replaced.items() if name not in joined.layers}
    _check_complete(adapter, modules, known, base.config)
    rigid = [*joined.replaced, *joined.token_rows, *joined.layers]
    if weight != 1.0 and rigid:
        raise PlanError(
            f"{adapter.folder}: a weight of {weight:g} has no meaning for what is no sum ({rigid[0]}); use weight 1"
        )
    return joined


def _lost(adapter: Adapter, names: Names) -> list[str]:
    """List what of an adapter has no tensor in the base; bare parameters are looked up later."""
    return [
        *(name for name in adapter.replaced if names.tensor(name) is None),
        *(f"{path}.weight" for path in adapter.low_rank if not names.targets(path)),
        *(f"{path}.weight" for path in adapter.token_rows if names.tensor(f"{path}.weight") is None),
        *(peft_modules.place(adapter, names).lost if adapter.peft_tensors else ()),
    ]


def _found(names: Names, name: str) -> str:
    target = names.tensor(name)
    assert target is not None
    return target


def _check_complete(adapter: Adapter, modules: Collection[str], names: Names, config: Mapping[str, Any]) -> None:
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
    patterns = {(match[1], match[3]) for match in map(_NUMBERED.fullmatch, modules) if match is not None}
    lacking = [
        path
        for prefix, suffix in sorted(patterns)
        for layer in range(num_layers)
        if (path := f"{prefix}{layer}{suffix}") not in modules and names.targets(path)
    ]
    if lacking:
        raise PlanError(
            f"{adapter.folder}: lacks the update of {len(lacking)} modules that its target_modules name, for example"
            f" {lacking[0]}; was it saved in pieces, or cut off?"
        )


def _targets(path: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> list[Target]:
    """Find the tensors that an update of the module `path` belongs to; none: not found."""
    if f"{path}.weight" in shapes:
        return [Target(f"{path}.weight")]
    if config.get("model_type") == clip.VISION_TYPE:
        # transformers 5 leaves the prefix out of the module's path, its files keep it.
        return [Target(f"{clip.PREFIX}{path}.weight")] if f"{clip.PREFIX}{path}.weight" in shapes else []
    layer = internlm2.split_layer(path)
    if internlm2.is_internlm2(config):
        if layer is not None and layer[1] in internlm2.PROJECTIONS and f"{layer[0]}{internlm2.FUSED}.weight" in shapes:
            heads = internlm2.heads_of(config)
            rows = internlm2.fused_row_map(heads, layer[1])
            return [Target(f"{layer[0]}{internlm2.FUSED}.weight", rows, heads.rows(layer[1]))]
        own = internlm2.internlm2_name(path)
        return [Target(f"{own}.weight")] if own is not None and f"{own}.weight" in shapes else []
    if layer is not None and layer[1] == internlm2.FUSED:
        heads = internlm2.heads_of(config)
        names = [f"{layer[0]}{projection}.weight" for projection in internlm2.PROJECTIONS]
        if not all(name in shapes for name in names):
            return []
        return [
            Target(name, internlm2.split_row_map(heads, projection), heads.fused_rows)
            for name, projection in zip(names, internlm2.PROJECTIONS, strict=True)
        ]
    own = internlm2.llama_name(path)
    return [Target(f"{own}.weight")] if own is not None and f"{own}.weight" in shapes else []


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


def _delta(adapter: Adapter, low_rank: LowRank, target: Target, shape: tuple[int, ...], weight: float) -> Delta:
    """Make the update of one tensor, its shape checked."""
    if len(low_rank.a.shape) > 2:
        return _conv_delta(adapter, low_rank, target, shape, weight)
    num_out, num_in = low_rank.b.shape[0], low_rank.a.shape[1]
    stated = adapter.fan_in_fan_out if target.transposed is None else target.transposed
    transposed = low_rank.embedding or stated
    given = (num_in, num_out) if transposed else (num_out, num_in)
    expected = shape if target.product_rows is None else (target.product_rows, *shape[1:])
    if target.product is not None:
        expected = target.product
    if given != expected or (transposed and target.product_rows is not None):
        raise CheckpointError(
            f"{adapter.folder}: {low_rank.path}: the update is {_by(given)}, but {target.name!r} of the base is"
            f" {_by(expected)}; the adapter was trained on another model"
        )
    _check_dora_weight(adapter, low_rank, weight)
    if low_rank.magnitude is not None and (len(shape) != len(low_rank.a.shape) or (transposed and target.rows)):
        raise PlanError(
            f"{adapter.folder}: {low_rank.path}: DoRA on a part of {target.name!r} is not built; merge it with PEFT's"
            " merge_and_unload instead"
        )
    # The columns of a transposed product are rows of B.
    b = low_rank.b if target.columns is None else rows_of(low_rank.b, *target.columns)
    return Delta(
        low_rank.a,
        b,
        low_rank.scale * weight,
        transposed,
        target.rows,
        magnitude=low_rank.magnitude,
        b_columns=low_rank.b_columns,
        rounded_by_peft=low_rank.embedding or _EXPERT.search(low_rank.path) is not None,
    )


def _conv_delta(adapter: Adapter, low_rank: LowRank, target: Target, shape: tuple[int, ...], weight: float) -> Delta:
    """Make the update of a convolution: the product of its kernels, seen as matrices (spec/formats.md 2.3)."""
    (rank, *window), num_out = low_rank.a.shape, low_rank.b.shape[0]
    if (num_out, *window) != shape or target.rows is not None or target.transposed:
        raise CheckpointError(
            f"{adapter.folder}: {low_rank.path}: the update is {_by((num_out, *window))}, but {target.name!r} of the"
            f" base is {_by(shape)}; the adapter was trained on another model"
        )
    _check_dora_weight(adapter, low_rank, weight)
    return Delta(
        replace(low_rank.a, shape=(rank, prod(window))),
        replace(low_rank.b, shape=(num_out, rank)),
        low_rank.scale * weight,
        magnitude=low_rank.magnitude,
    )


def _check_dora_weight(adapter: Adapter, low_rank: LowRank, weight: float) -> None:
    if low_rank.magnitude is not None and weight != 1.0:
        raise PlanError(f"{adapter.folder}: a weight of {weight:g} has no meaning for DoRA; use weight 1")


def _addend(
    adapter: Adapter, low_rank: LowRank, target: Target, shape: tuple[int, ...] | None, weight: float
) -> Addend:
    """Make the update of a module's bias from the bias of its lora_B."""
    assert low_rank.bias is not None
    if shape is None:
        raise PlanError(
            f"{adapter.folder}: {low_rank.path} has a lora_B.bias, but that layer of the base has no bias to add it to"
        )
    if target.product is not None:
        raise PlanError(
            f"{adapter.folder}: {low_rank.path}: lora_bias on a part of {target.name!r} is not built; merge it with"
            " PEFT's merge_and_unload instead"
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
    stated = adapter.token_indices
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


def _check_every_target(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse an adapter without any matrices for a module that it names and the base has.

    What is missing in some layers only is seen by `_check_complete`. A module that is saved whole (modules_to_save) has
    no matrices, though PEFT's `all-linear` names what is in it.
    """
    targets, settings = adapter.config.get("target_modules"), adapter.config
    if not isinstance(targets, list) or settings.get("exclude_modules") or settings.get("target_parameters"):
        return
    for end in targets if adapter.low_rank else ():
        if any(f".{module}".endswith(f".{end}") for module in adapter.low_rank):
            continue
        if any(f".{name}".endswith(f".{end}.weight") for name in adapter.replaced):
            continue
        there = [name for name, shape in shapes.items() if len(shape) == 2 and f".{name}".endswith(f".{end}.weight")]
        if there:
            raise CheckpointError(
                f"{adapter.folder}: target_modules names {end!r}, but the adapter lacks the update of {there[0]}, which is"
                " in the base; its file is incomplete, or it was trained on another model"
            )


def _lost_text(adapter: Adapter, base: Checkpoint, lost: list[str], names: list[str], why: str) -> str:
    """List what found no tensor, with the nearest names of the base and the way out."""
    named = []
    for name in sorted(lost)[:5]:
        near = spelling.nearest(name, names, n=1, cutoff=0.6)
        named.append(name + (f" (nearest in the base: {near[0]})" if near else ""))
    if len(lost) > len(named):
        named.append(f"{len(lost) - len(named)} more")
    trained_on = adapter.config.get("base_model_name_or_path")
    said = f"; the adapter says it was trained on {trained_on}" if trained_on else ""
    return f"{adapter.folder}: {len(lost)} of its modules are not in the base {base.folder}: {', '.join(named)}{said}; {why}"


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape) or "a scalar"
