"""Gives the tensors of an adapter that is no LoRA to the modules of a base, for PEFT's classes to compute.

The file names them `PATH.SUFFIX`, where the suffix is the kind's own business: the longest path that is a module of the
base is meant. Used by `names`, which knows the base; what comes out is planned by `merge` and computed by `peft_layers`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastft.convert.adapter import Adapter
from fastft.convert.matching import Names, Target
from fastft.convert.peft_kinds import KINDS, WHERE
from fastft.convert.plan import PeftLayer, PeftModule
from fastft.convert.source import FLOATS, Source
from fastft.convert.tied import is_embedding
from fastft.errors import CheckpointError, PlanError


@dataclass
class Placed:
    """Where each tensor of an adapter belongs.

    Attributes:
        modules: path of a module, as the adapter calls it, to its tensors.
        targets: the same path to the base's weight.
        shared: tensors of all modules.
        replaced: name of a tensor of the base to what stands for it: trained biases, modules_to_save.
        lost: names that are nothing in the base.
    """

    modules: dict[str, dict[str, Source]] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    shared: dict[str, Source] = field(default_factory=dict)
    replaced: dict[str, Source] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


def place(adapter: Adapter, names: Names) -> Placed:
    """Find the module of every tensor.

    Raises:
        PlanError: a module that is a part of a tensor of the base, or several of them.
        CheckpointError: two tensors replace the same one.
    """
    placed = Placed()
    known: dict[str, Target | None] = {}
    for name, source in adapter.peft_tensors.items():
        if name in KINDS[adapter.kind].shared:
            placed.shared[name] = source
            continue
        own = names.tensor(_renamed(adapter, name.replace(".base_layer.", ".")))
        if own is not None:
            if own in placed.replaced:
                raise CheckpointError(f"{adapter.folder}: two of its tensors replace {own!r}")
            placed.replaced[own] = source
            continue
        path = name
        while "." in path:
            path = path.rpartition(".")[0]
            if path not in known:
                known[path] = _target(adapter, path, names)
            target = known[path]
            if target is not None:
                placed.modules.setdefault(path, {})[name] = source
                placed.targets[path] = target
                break
        else:
            placed.lost.append(name)
    return placed


def layers(
    adapter: Adapter,
    placed: Placed,
    base: Mapping[str, Source],
    layer_of: Callable[[str], tuple[str, int] | None],
    *,
    match_peft: bool,
) -> dict[str, PeftLayer]:
    """Plan the tensors of the base that the modules of an adapter change.

    Args:
        adapter: of a kind in `KINDS`.
        placed: from `place`.
        base: the tensors of the base.
        layer_of: gives class and groups of a module by its path, where the class of the model is known.
        match_peft: compute in the base's dtype, not in f32.

    Raises:
        PlanError: a module of a class, or a tensor of a dtype, that cannot be merged.
    """
    kind = KINDS[adapter.kind]
    # A trained bias, or an embedding that was saved with its adapter, is what the module starts from.
    sources = {**base, **placed.replaced}
    settings = json.dumps({key: value for key, value in adapter.config.items() if key not in WHERE})
    planned: dict[str, PeftLayer] = {}
    for path, tensors in placed.modules.items():
        name = placed.targets[path].name
        weight = sources[name]
        if weight.dtype not in FLOATS:
            raise PlanError(f"{name!r} of the base is {weight.dtype}; only {', '.join(FLOATS)} can be changed")
        bias_name = f"{name.removesuffix('.weight')}.bias"
        layer, groups = layer_of(_renamed(adapter, path)) or _guessed(adapter, name, weight.shape)
        module = PeftModule(
            adapter.folder,
            adapter.kind,
            path,
            layer,
            groups,
            weight,
            sources.get(bias_name),
            (*sorted(tensors.items()), *sorted(placed.shared.items())),
            settings,
            base[name].dtype if match_peft else None,
        )
        if kind.weight:
            planned[name] = PeftLayer(module)
        if module.bias is not None and kind.bias(adapter.config, path):
            planned[bias_name] = PeftLayer(module, "bias")
    return planned


def _target(adapter: Adapter, path: str, names: Names) -> Target | None:
    """Find the tensor of a module; None where the path is no module of the base."""
    targets = names.targets(_renamed(adapter, path))
    if not targets:
        return None
    target = targets[0]
    whole = target.rows is None and target.product is None and target.product_rows is None and target.columns is None
    if len(targets) > 1 or not whole:
        raise PlanError(
            f"{adapter.folder}: {path} is cut or fused with others in the files of the base ({target.name!r}), which"
            f" {adapter.kind} cannot follow; load the model with PEFT and save its merge_and_unload"
        )
    return target


def _renamed(adapter: Adapter, name: str) -> str:
    for pattern, replacement in adapter.renamings:
        name = pattern.sub(replacement, name)
    return name


def _guessed(adapter: Adapter, name: str, shape: tuple[int, ...]) -> tuple[str, int]:
    """Tell class and groups of a module by its weight, where the model runs its own code."""
    if len(shape) == 2:
        if is_embedding(name):
            return "Embedding", 1
        return ("Conv1D" if adapter.fan_in_fan_out else "Linear"), 1
    if 3 <= len(shape) <= 5:
        return f"Conv{len(shape) - 2}d", 1
    raise PlanError(
        f"{adapter.folder}: {name!r} of the base has {len(shape)} dimensions; {adapter.kind} changes linear layers,"
        " embeddings and convolutions"
    )
