"""Names beyond equality (level 1): both sides go through transformers' own conversion mapping.

Hub files keep the names of transformers 4 and are converted while they are loaded: modules are renamed, the experts of
a layer become one parameter, fused projections are cut. Adapters carry the names of the version that trained them.
Here the class that config.json names is built without weights (meta device, no remote code); the keys of the files and
of the adapter are renamed as transformers renames checkpoints, and meet in the parameters of that class. Where a file
tensor is a slice of a parameter (or several are), the slice says which rows of an update it gets: nothing is loaded.

Source: core_model_loading.py and conversion_mapping.py of transformers 5.23; ParamWrapper of peft 0.21.2
(spec/formats.md 2.5 and 3).
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from fastft.convert.adapter import CONFIG, Adapter, LowRank, ParameterPair, checked_scale
from fastft.convert.matching import Target
from fastft.convert.source import rows_of
from fastft.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Key:
    """What a name means: a parameter, or the part of it that a pattern of the mapping and its numbers stand for."""

    parameter: str
    pattern: str | None = None
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """The part of a parameter that a tensor holds. Rows and columns are those of the parameter's last two dimensions.

    Attributes:
        parameter: its name in the model.
        rows: (first, count) in the parameter.
        columns: (first, count) in the parameter.
        own: (rows, columns) of the whole tensor, in the parameter's orientation.
        own_row: row of the tensor that the part begins with (a tensor that several parameters are cut from).
        expert: index in the parameter's first dimension; None: all of them, or none.
        flipped: the tensor holds the transposed.
    """

    parameter: str
    rows: Span
    columns: Span
    own: Span
    own_row: int = 0
    expert: int | None = None
    flipped: bool = False


class ModelNames:
    """The names of one base, by way of the class of its model."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], model: "PreTrainedModel") -> None:
        """Map every tensor of the files.

        Args:
            shapes: the tensors of the files.
            model: built on the meta device.

        Raises:
            CheckpointError: two tensors of the files are the same part of a parameter.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {
            pattern: converter for converter in self._converters for pattern in converter.source_patterns
        }
        self._model = model
        self._meta = model.state_dict()
        self.parameters = {name: tuple(tensor.shape) for name, tensor in self._meta.items()}
        self._shapes = shapes
        self._places: dict[str, list[tuple[str, Place]]] = {}
        self._same: dict[Key, str] = {}
        self._refused: dict[str, str] = {}
        ordered = sorted(shapes, key=dot_natural_key)
        self._add_files([(name, key) for name in ordered if (key := self._key_of_file(name)) is not None])

    def targets(self, path: str) -> list[Target]:
        """Find the tensors that an update of the module `path` belongs to; none: not found.

        Raises:
            PlanError: they are there, but laid out in a way that an update cannot follow.
        """
        key = self._key_of_adapter(f"{path}.weight")
        if key is None:
            return []
        self._refuse_unknown(key.parameter)
        same = self._same.get(key)
        if same is not None:
            return [Target(same, transposed=self._is_transposed(key))]
        return [
            target for place in self._places_of_adapter(key) for target in self._joined(place, transposed=place.flipped)
        ]

    def tensor(self, name: str) -> str | None:
        """Find the one tensor that a whole tensor of the adapter stands for.

        Raises:
            PlanError: it is spread over several tensors of the files, or a part of one.
        """
        key = self._key_of_adapter(name)
        if key is None:
            return None
        same = self._same.get(key)
        if same is None and key.parameter in self._places:
            raise PlanError(
                f"the adapter replaces {name!r} whole, but the base keeps it in other pieces"
                f" ({self._places[key.parameter][0][0]}); save the merged model from the training"
            )
        return same

    def layer_of(self, path: str) -> tuple[str, int] | None:
        """Give the class (Linear, Conv1D, Embedding, Conv2d, ...) and the groups of a module; None: not in the model."""
        key = self._key_of_adapter(f"{path}.weight")
        if key is None or key.pattern is not None:
            return None
        from torch import nn

        module = self._model.get_submodule(key.parameter.rpartition(".")[0])
        known = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        names = [kind.__name__ for kind in known if isinstance(module, kind)] or [type(module).__name__]
        return names[0], int(getattr(module, "groups", 1))

    def kept_modules(self) -> list[str]:
        """Give the modules that transformers leaves out when it quantizes: the head, what is tied, what stays in fp32.

        Source: transformers 5.23, quantizers/base.py.
        """
        from transformers.quantizers.base import HfQuantizer

        model: Any = self._model
        kept: list[str] = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)  # noqa: SLF001 - as the quantizer asks it
        return sorted(kept)

    def linear_modules(self) -> list[str]:
        """List the linear layers by their paths."""
        return [path for path, _ in self._linear()]

    def linear_tensors(self, kept: Sequence[str] | None) -> dict[str, bool]:
        """Find the tensors of the files that transformers holds in 4 bit.

        Args:
            kept: modules that stay as they are; None: `kept_modules`.

        Returns:
            The names, and whether the layer is a Conv1D, whose transpose is quantized.

        Raises:
            PlanError: a linear layer lies in the files in pieces, or fused with others.
            CheckpointError: it is not in the files at all.
        """
        from transformers.quantizers.quantizers_utils import should_convert_module

        model: Any = self._model
        patterns = self.kept_modules() if kept is None else [*kept, *(model._keep_in_fp32_modules or ())]  # noqa: SLF001
        found: dict[str, bool] = {}
        for path, is_conv1d in self._linear():
            if not should_convert_module(path, patterns):
                continue
            name = self._same.get(Key(f"{path}.weight"))
            if name is not None:
                found[name] = is_conv1d
                continue
            parameter = f"{path}.weight"
            if parameter in self._places or parameter in self._refused:
                raise PlanError(
                    f"the linear layer {path} lies in the files in other pieces, where transformers could not read its"
                    f" 4-bit form back; keep it as it is with --skip {path.rpartition('.')[2]}, or save the model in 4 bit"
                    " with transformers"
                )
            raise CheckpointError(f"the files of the base have no tensor for {parameter}")
        return found

    def linear_files(self, skipped: Collection[str]) -> set[str]:
        """Find the tensors of the files that were held in 4 bit by a training that left the modules `skipped` as they were.

        Raises:
            PlanError: a linear layer lies in the files in pieces, or fused with others.
        """
        found: set[str] = set()
        for path, _ in self._linear():
            if path in skipped:
                continue
            name = self._same.get(Key(f"{path}.weight"))
            if name is None:
                raise PlanError(
                    f"the linear layer {path} lies in the files in other pieces, so what the training saw of it in 4 bit"
                    " cannot be made; say --dequantized-base none to merge onto the weights as they are"
                )
            found.add(name)
        return found

    def _linear(self) -> Iterator[tuple[str, bool]]:
        """Give the path of each layer that bitsandbytes can hold in 4 bit, and whether it is a Conv1D."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        for path, module in self._model.named_modules():
            if isinstance(module, Conv1D) or type(module) is nn.Linear:
                yield path, isinstance(module, Conv1D)

    def parameter_updates(self, adapter: Adapter) -> Iterator[tuple[LowRank, Target]]:
        """Give the updates of bare parameters (experts, routers), one per expert and tensor of the files.

        Raises:
            PlanError: the parameter is not in the model, or the layout of a square one is not known.
            CheckpointError: shapes do not fit, or a parameter that was trained is missing.
        """
        modules: dict[str, dict[int, ParameterPair]] = {}
        for path, pair in adapter.parameters.items():
            modules.setdefault(path.replace(".base_layer", ""), {})[path.count(".base_layer")] = pair
        updated: set[str] = set()
        for path, pairs in modules.items():
            module = self._module_of(path, adapter.target_parameters)
            if module is None:
                raise PlanError(
                    f"{adapter.folder}: {path} has no parameter named in target_parameters"
                    f" ({', '.join(adapter.target_parameters)}) in {type(self._model).__name__}"
                )
            names = self._targeted(path, module, adapter.target_parameters)
            if sorted(pairs) != list(range(len(names))):
                raise CheckpointError(
                    f"{adapter.folder}: {path} has {len(pairs)} updates for its {len(names)} targeted parameters"
                    f" ({', '.join(names)}); was the adapter saved in pieces, or cut off?"
                )
            # The parameter registered first is wrapped first, so it lies innermost.
            for hops, pair in pairs.items():
                name = names[len(names) - 1 - hops]
                updated.add(f"{module}.{name}")
                yield from self._parameter_update(adapter, pair, f"{module}.{name}", name)
        lacking = [
            name for name in self.parameters if name not in updated and _is_targeted(name, adapter.target_parameters)
        ]
        if lacking:
            raise CheckpointError(
                f"{adapter.folder}: lacks the update of {len(lacking)} parameters that its target_parameters name, for"
                f" example {lacking[0]}; was it saved in pieces, or cut off?"
            )

    def _parameter_update(
        self, adapter: Adapter, pair: ParameterPair, parameter: str, name: str
    ) -> Iterator[tuple[LowRank, Target]]:
        """Cut the update of one parameter into its experts (spec/formats.md 2.5)."""
        self._refuse_unknown(parameter)
        shape = self.parameters[parameter]
        num_experts = shape[0] if len(shape) == 3 else 1
        rank, rest = divmod(pair.a.shape[0], num_experts)
        if len(shape) not in (2, 3) or rest or rank == 0 or pair.b.shape[1] != pair.a.shape[0]:
            raise CheckpointError(
                f"{adapter.folder}: {pair.path}: A {pair.a.shape} and B {pair.b.shape} do not fit {parameter} {shape}"
            )
        scale = checked_scale(adapter.config, f"{pair.path.replace('.base_layer', '')}.{name}", rank, adapter.folder)
        transposed = self._product_is_transposed(adapter, pair, parameter)
        num_rows, num_columns = shape[-2:]
        for expert in range(num_experts):
            place = Place(
                parameter,
                (0, num_rows),
                (0, num_columns),
                (num_rows, num_columns),
                expert=expert if len(shape) == 3 else None,
            )
            low_rank = LowRank(
                path=f"{pair.path}[{expert}]" if len(shape) == 3 else pair.path,
                a=rows_of(pair.a, expert * rank, rank),
                b=pair.b,
                scale=scale,
                b_columns=(expert, num_experts) if num_experts > 1 else None,
            )
            for target in self._joined(place, transposed=transposed):
                yield low_rank, target

    def _product_is_transposed(self, adapter: Adapter, pair: ParameterPair, parameter: str) -> bool:
        """Decide whether B A or its transposed is added: by the shapes, for square parameters by PEFT's version."""
        shape = self.parameters[parameter]
        given, own = (pair.b.shape[0], pair.a.shape[1]), shape[-2:]
        if given not in (own, own[::-1]) or (len(shape) == 2 and given != own):
            raise CheckpointError(
                f"{adapter.folder}: {pair.path}: the update of each expert is {given[0]} x {given[1]}, but {parameter}"
                f" is {' x '.join(map(str, shape))}; the adapter was trained on another model"
            )
        if len(shape) == 2 or own[0] != own[1]:
            return given != own
        module = self._model.get_submodule(parameter.rpartition(".")[0])
        is_transposed = getattr(module, "is_transposed", False) is True
        stated = adapter.config.get("peft_version")
        version = re.match(r"(\d+)\.(\d+)\.(\d+)(.*)", str(stated)) if stated is not None else None
        numbers = tuple(int(number) for number in version.groups()[:3]) if version is not None else (0, 17, 0)
        between = version is not None and numbers in ((0, 19, 0), (0, 19, 1)) and bool(version[4])
        if between or (stated is not None and version is None):
            raise PlanError(
                f"{adapter.folder}: {CONFIG} says peft_version {stated!r}; PEFT changed the layout of square expert"
                f" weights ({parameter}) in 0.19.0 and 0.19.1, so it cannot be known; save the adapter again with a"
                " released version"
            )
        if numbers >= (0, 19, 1):
            return is_transposed
        return not is_transposed if numbers == (0, 19, 0) else True

    def _module_of(self, path: str, targets: Sequence[str]) -> str | None:
        """Find the module of the model that an adapter calls `path`."""
        for target in targets:
            name = target.rpartition(".")[2]
            if not _is_targeted(f"{path}.{name}", targets):
                continue
            key = self._key_of_adapter(f"{path}.{name}")
            if key is not None and key.pattern is None and key.parameter.endswith(f".{name}"):
                return key.parameter.removesuffix(f".{name}")
        return None

    def _targeted(self, path: str, module: str, targets: Sequence[str]) -> list[str]:
        """List the targeted parameters of a module in the order of their registration."""
        own = self._model.get_submodule(module).named_parameters(recurse=False)
        return [name for name, _ in own if _is_targeted(f"{path}.{name}", targets)]

    def _is_transposed(self, key: Key) -> bool | None:
        """Tell whether the module stores its weight as (in, out); None: an embedding, the adapter knows."""
        if key.pattern is not None:
            return False
        kind = type(self._model.get_submodule(key.parameter.rpartition(".")[0])).__name__
        return None if "Embedding" in kind else kind == "Conv1D"

    def _refuse_unknown(self, parameter: str) -> None:
        if parameter in self._refused:
            raise PlanError(
                f"{parameter} is made from the files by {self._refused[parameter]}, which an update cannot follow"
                " without loading the model; merge it with PEFT's merge_and_unload instead"
            )

    # Keys

    def _key_of_file(self, name: str) -> Key | None:
        """Rename a key of the files as transformers' loader does; None: it is loaded into nothing."""
        renamed, pattern = self._renamed(name)
        if renamed not in self._meta and name in self._meta:
            renamed, pattern = self._with_prefix(name), None
        if renamed not in self._meta:
            return None
        return Key(renamed, pattern, self._numbers(name, pattern))

    def _key_of_adapter(self, name: str) -> Key | None:
        """Rename a name of an adapter; one that the model has itself is meant as it stands."""
        own = self._with_prefix(name)
        return Key(own) if own in self._meta else self._key_of_file(name)

    def _renamed(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        renamed: tuple[str, str | None] = rename_source_key(
            name, self._renamings, self._converters, self._model.base_model_prefix, self._meta
        )
        return renamed

    def _with_prefix(self, name: str) -> str:
        from transformers.core_model_loading import rename_source_key

        renamed: str = rename_source_key(name, [], [], self._model.base_model_prefix, self._meta)[0]
        return renamed

    def _numbers(self, name: str, pattern: str | None) -> tuple[int, ...]:
        """Read what stands for the `*` of a pattern: the number of the expert."""
        if pattern is None or "*" not in pattern:
            return ()
        from transformers.core_model_loading import apply_renamings

        found = re.search(pattern.replace("*.", r"(\d+)\."), apply_renamings(name, self._renamings))
        return () if found is None else tuple(int(number) for number in found.groups())

    # Places

    def _add_files(self, keys: Sequence[tuple[str, Key]]) -> None:
        """Find the place of each tensor of the files, in the order in which the loader collects them."""
        groups: dict[tuple[str, int], list[tuple[str, Key]]] = {}
        for name, key in keys:
            if key in self._same:
                raise CheckpointError(f"the tensors {self._same[key]!r} and {name!r} of the base are one and the same")
            self._same[key] = name
            if key.pattern is None:
                self._add_whole(name, key.parameter)
            else:
                groups.setdefault((key.parameter, id(self._by_pattern[key.pattern])), []).append((name, key))
        for (parameter, _), members in groups.items():
            self._add_group(parameter, members)

    def _add_whole(self, name: str, parameter: str) -> None:
        shape = self.parameters[parameter]
        own = (shape[-2], shape[-1]) if len(shape) > 1 else (prod(shape), 1)
        place = Place(parameter, (0, own[0]), (0, own[1]), own)
        self._places.setdefault(parameter, []).append((name, place))

    def _add_group(self, parameter: str, members: Sequence[tuple[str, Key]]) -> None:
        """Add the tensors that one converter makes a parameter from (or several, by cutting)."""
        pattern = members[0][1].pattern
        assert pattern is not None
        converter = self._by_pattern[pattern]
        chain = _chain(converter)
        try:
            placed = [
                (name, place)
                for name, key in members
                for place in self._places_of(converter, chain, key, self._shapes[name], members)
            ]
        except _UnknownLayoutError:
            for target in self._cut_names(parameter, converter):
                self._refused[target] = chain
            return
        for name, place in placed:
            self._places.setdefault(place.parameter, []).append((name, place))

    def _places_of(
        self,
        converter: Any,
        chain: str,
        key: Key,
        shape: tuple[int, ...],
        members: Sequence[tuple[str, Key]],
    ) -> list[Place]:
        """Say which part of its parameter a tensor is, by the chain of operations that it goes through."""
        whole = self.parameters[key.parameter]
        match chain:
            case "MergeModulelist(0)" if len(shape) == 2 and len(key.numbers) == 1:
                self._check_number(key, members)
                return [Place(key.parameter, (0, shape[0]), (0, shape[1]), shape, expert=key.numbers[0])]
            case "MergeModulelist(0)+Concatenate(1)" | "MergeModulelist(0)+Concatenate(2)" if (
                len(shape) == 2 and len(key.numbers) == 1
            ):
                self._check_number(key, members)
                axis = 0 if chain.endswith("(1)") else 1
                return [_sliced(key, shape, axis, self._offset(converter, key, members, axis), key.numbers[0])]
            case "Concatenate(0)" | "Concatenate(1)" if len(shape) == 2:
                axis = 0 if chain.endswith("(0)") else 1
                return [_sliced(key, shape, axis, self._offset(converter, key, members, axis), None)]
            case "Chunk(0)" if len(shape) == 2:
                names = self._cut_names(key.parameter, converter)
                num_rows, rest = divmod(shape[0], len(names))
                if rest or any(self.parameters.get(name) != (num_rows, shape[1]) for name in names):
                    raise _UnknownLayoutError
                return [
                    Place(name, (0, num_rows), (0, shape[1]), shape, own_row=number * num_rows)
                    for number, name in enumerate(names)
                ]
            case "Transpose(1, 2)" | "Transpose(0, 1)" if len(shape) == len(whole) == (3 if "2" in chain else 2):
                flipped = not converter.operations[0].check_dims or shape != whole
                return [Place(key.parameter, (0, whole[-2]), (0, whole[-1]), (whole[-2], whole[-1]), flipped=flipped)]
        raise _UnknownLayoutError

    def _check_number(self, key: Key, members: Sequence[tuple[str, Key]]) -> None:
        """The loader takes experts in the order of their names; their numbers must say the same."""
        numbers = [other.numbers for _, other in members if other.pattern == key.pattern]
        if numbers != [(number,) for number in range(self.parameters[key.parameter][0])]:
            raise _UnknownLayoutError

    def _offset(self, converter: Any, key: Key, members: Sequence[tuple[str, Key]], axis: int) -> int:
        """Sum what is concatenated before a tensor."""
        before = converter.source_patterns[: converter.source_patterns.index(key.pattern)]
        offset = 0
        for pattern in before:
            found = [name for name, other in members if (other.pattern, other.numbers) == (pattern, key.numbers)]
            if len(found) != 1:
                raise _UnknownLayoutError
            offset += self._shapes[found[0]][axis]
        return offset

    def _cut_names(self, parameter: str, converter: Any) -> list[str]:
        """Name the parameters that a converter makes; the first one is `parameter`."""
        first = converter.target_patterns[0]
        head, found, tail = parameter.rpartition(first)
        if not found or len(converter.target_patterns) == 1:
            return [parameter]
        return [f"{head}{target}{tail}" for target in converter.target_patterns]

    def _places_of_adapter(self, key: Key) -> list[Place]:
        """Say which part of the model an adapter's module is, when no tensor of the files is that very part."""
        shape = self.parameters[key.parameter]
        if key.pattern is None:
            if len(shape) != 2:
                return []
            return [Place(key.parameter, (0, shape[0]), (0, shape[1]), (shape[0], shape[1]))]
        converter = self._by_pattern[key.pattern]
        chain = _chain(converter)
        patterns = converter.source_patterns
        if chain.startswith("MergeModulelist(0)") and len(shape) == 3 and len(key.numbers) == 1:
            # The files hold the parameter whole; its parts are of one size, as gate and up are.
            axis = 1 if chain.endswith("Concatenate(2)") else 0
            size, rest = divmod(shape[1 + axis], len(patterns))
            if rest == 0 and key.numbers[0] < shape[0]:
                own = (size, shape[2]) if axis == 0 else (shape[1], size)
                return [_sliced(key, own, axis, patterns.index(key.pattern) * size, key.numbers[0])]
        if chain == "Chunk(0)" and len(shape) == 2:
            names = self._cut_names(key.parameter, converter)
            if all(self.parameters.get(name) == shape for name in names):
                own = (shape[0] * len(names), shape[1])
                return [
                    Place(name, (0, shape[0]), (0, shape[1]), own, own_row=number * shape[0])
                    for number, name in enumerate(names)
                ]
        self._refused.setdefault(key.parameter, chain)
        self._refuse_unknown(key.parameter)
        return []

    def _joined(self, part: Place, *, transposed: bool) -> list[Target]:
        """Find the tensors of the files that overlap with a part of the model."""
        targets = [
            _target(name, self._shapes[name], part, place, transposed=transposed != place.flipped)
            for name, place in self._places.get(part.parameter, [])
            if (place.expert is None or place.expert == part.expert)
            and _overlap(part.rows, place.rows) is not None
            and _overlap(part.columns, place.columns) is not None
        ]
        covered = sum(prod(size) for _, size in targets)
        if targets and covered != part.rows[1] * part.columns[1]:
            raise CheckpointError(f"{part.parameter}: the files of the base do not hold all of it")
        return [target for target, _ in targets]


class _UnknownLayoutError(Exception):
    """A chain of operations, or a set of tensors, whose slices are not known."""


def build_model(config: Mapping[str, Any], model_class: str | None) -> "PreTrainedModel":
    """Build the class that a config.json names on the meta device: names and shapes, no weights, no remote code.

    Args:
        config: config.json.
        model_class: a class of transformers to take instead.

    Raises:
        PlanError: transformers has no such class, or it cannot be built.
    """
    import json

    return _built(json.dumps(config, sort_keys=True), model_class)


@lru_cache(maxsize=2)
def _built(config_json: str, model_class: str | None) -> "PreTrainedModel":
    import json

    import torch
    import transformers

    settings: dict[str, Any] = json.loads(config_json)
    settings.pop("quantization_config", None)
    name = model_class or _first(settings.get("architectures"))
    found: Any = getattr(transformers, name, None) if name is not None else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        what = f"--model-class {name}" if model_class else f"its config.json names the class {name}"
        raise PlanError(f"{what}, which transformers {transformers.__version__} does not have")
    kind = settings.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise PlanError(f"its config.json says model_type {kind!r}, which transformers does not know")
    made: Any = found
    try:
        config = _fitting(transformers.CONFIG_MAPPING[kind].from_dict(settings), found)
        with torch.device("meta"):
            model = made._from_config(config, attn_implementation="eager")  # noqa: SLF001 - PEFT and Trainer use it too
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise PlanError(f"its class {name} cannot be built from its config.json: {error}") from error
    assert isinstance(model, transformers.PreTrainedModel)
    return model


def _fitting(config: Any, model_class: Any) -> Any:
    """Take the part of a config that a class is made from: the vision part for a vision tower."""
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [part for part in vars(config).values() if isinstance(part, wanted)]
    if len(parts) != 1:
        raise ValueError(f"{model_class.__name__} needs a {wanted.__name__}, this is a {type(config).__name__}")
    return parts[0]


def _first(names: object) -> str | None:
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _is_targeted(name: str, targets: Sequence[str]) -> bool:
    """Tell whether target_parameters names a parameter (PEFT's rule: the whole name, or its end)."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _chain(converter: Any) -> str:
    """Write the operations of a converter as text: `MergeModulelist(0)+Concatenate(1)`."""
    parts = []
    for operation in converter.operations:
        dimensions = [getattr(operation, name) for name in ("dim", "dim0", "dim1") if hasattr(operation, name)]
        counted = getattr(operation, "num_shards_attribute", None)
        inner = ", ".join(str(value) for value in (*dimensions, *([counted] if counted else [])))
        parts.append(f"{type(operation).__name__}({inner})")
    return "+".join(parts)


def _sliced(key: Key, shape: tuple[int, ...], axis: int, offset: int, expert: int | None) -> Place:
    spans = [(0, shape[0]), (0, shape[1])]
    spans[axis] = (offset, shape[axis])
    return Place(key.parameter, spans[0], spans[1], (shape[0], shape[1]), expert=expert)


def _overlap(one: Span, other: Span) -> Span | None:
    start, end = max(one[0], other[0]), min(one[0] + one[1], other[0] + other[1])
    return (start, end - start) if start < end else None


def _target(
    name: str, shape: tuple[int, ...], part: Place, place: Place, *, transposed: bool
) -> tuple[Target, tuple[int, int]]:
    """Say what a tensor at `place` gets from an update of `part`, and how large that is.

    Everything is turned into the orientation of the file first: `transposed` is how the product is added there.
    """
    rows, columns = _overlap(part.rows, place.rows), _overlap(part.columns, place.columns)
    assert rows is not None
    assert columns is not None
    own_rows = (rows[0] - place.rows[0] + place.own_row, rows[0] - part.rows[0] + part.own_row, rows[1])
    own_columns = (columns[0] - place.columns[0], columns[0] - part.columns[0], columns[1])
    size, product = (rows[1], columns[1]), part.own
    if place.flipped:
        own_rows, own_columns, product = own_columns, own_rows, (product[1], product[0])
    num_rows, num_columns = shape[-2:]
    cut = own_columns[1:] != (0, product[1])
    if own_columns[0] != 0 or own_columns[2] != num_columns or (cut and not transposed):
        raise PlanError(
            f"{name} holds some columns of {part.parameter} only, where an update cannot be cut; merge it with PEFT's"
            " merge_and_unload instead"
        )
    first = (part.expert or 0) * num_rows if len(shape) == 3 else 0
    whole = len(shape) == 2 and own_rows == (0, 0, num_rows) and product[0] == num_rows
    target = Target(
        name,
        rows=None if whole else ((own_rows[0] + first, own_rows[1], own_rows[2]),),
        product=product,
        columns=own_columns[1:] if cut else None,
        transposed=transposed,
    )
    return target, size
