"""A DeepSpeed ZeRO checkpoint: which tensors it has and where their bytes are, without DeepSpeed.

Up to stage 2 the 16-bit weights lie whole in the file of the first process (`module`), and the fp32 masters are flat
groups that the processes share out: a master is a range of their concatenation. In stage 3 each weight is shared out by
itself, and only as fp32. Frozen weights lie beside them. Goes to `trained`.
Source: deepspeed/utils/zero_to_fp32.py and deepspeed/checkpoint/constants.py, version 0.19.8; spec/formats.md 7.4.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fastft.convert import torch_file
from fastft.convert.json_file import read_regular_file
from fastft.convert.pickle_data import Call
from fastft.convert.pth_reader import tensors_in
from fastft.convert.source import FLOATS, Source, joined, stretch
from fastft.convert.torch_file import TorchFile, is_tensor, mapping, sizes
from fastft.errors import CheckpointError, FileError, PlanError

_WHOLE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_PART = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_STATES = "*model_states.pt"
_AUTO_EXPERTS = ("autoep_layers", "ds_autoep_layers")
_WAY_OUT = "put it together with DeepSpeed's own tools and give the file that they write"
# A world of more processes than this has never been seen in one folder.
_MAX_PROCESSES = 65536


@dataclass(frozen=True)
class ZeroFolder:
    """The weights of a ZeRO checkpoint.

    Attributes:
        tensors: name to bytes.
        trained: names of the weights that the optimizer has; None where the folder does not say.
        files: what was read.
        top: everything in the first file of weights, for the training's notes.
        notes: what the user should know.
    """

    tensors: Mapping[str, Source]
    trained: frozenset[str] | None
    files: tuple[Path, ...]
    top: Mapping[Any, Any]
    notes: tuple[str, ...]


def find(folder: Path) -> Path | None:
    """Give the folder of the ZeRO files: `folder` itself, or the one that its `latest` names; None: there are none.

    Raises:
        FileError: `latest` names a folder that is not there.
        CheckpointError: `latest` holds no plain name.
        PlanError: there are several and no `latest`.
    """
    if any(folder.glob(_STATES)):
        return folder
    latest = folder / "latest"
    if latest.is_file():
        tag = read_regular_file(latest, 4096).decode("utf-8", "replace").strip()
        if not tag or Path(tag).name != tag or tag in (".", ".."):
            raise CheckpointError(f"{latest}: holds {tag[:80]!r}; the name of a folder beside it is expected")
        if not (folder / tag).is_dir():
            raise FileError(f"{folder}: `latest` names {tag}, which is not there")
        if any((folder / tag).glob(_STATES)):
            return folder / tag
        raise FileError(f"{folder / tag}: no *_model_states.pt there, though `latest` names it")
    tags = sorted(path.parent for path in folder.glob(f"global_step*/{_STATES}"))
    if len(set(tags)) > 1:
        raise PlanError(f"{folder}: several checkpoints and no `latest`: {_names(set(tags))}; give one of them")
    return tags[0] if tags else None


def read(folder: Path, *, masters: bool) -> ZeroFolder:
    """Find every weight of a ZeRO checkpoint.

    Args:
        folder: from `find`.
        masters: up to stage 2, take the optimizer's fp32 masters and not the 16-bit weights, where they are there.

    Raises:
        FileError: the file of a process is missing.
        CheckpointError: broken, or the parts do not make the whole.
        PlanError: a layout that is not read: tensor parallel, pipeline, experts, universal.
    """
    folder = folder.resolve()
    names = sorted(path.name for path in folder.iterdir())
    _refuse_other_layouts(folder, names)
    optimizers = _by_rank(folder, names, _OPTIMIZER)
    whole = [name for name in names if _WHOLE.fullmatch(name)]
    parts = _by_rank(folder, names, _PART)
    if whole and parts:
        raise CheckpointError(f"{folder}: holds files of ZeRO-3 and of another stage, two different saves")
    if whole:
        return _read_whole(folder / whole[0], optimizers, masters=masters)
    if not optimizers:
        raise FileError(
            f"{folder}: a ZeRO-3 checkpoint without its *_optim_states.pt, which hold the weights; copy them beside the"
            " *_model_states.pt"
        )
    return _read_parts(parts, optimizers)


def _refuse_other_layouts(folder: Path, names: Sequence[str]) -> None:
    """Refuse what would be read only in part."""
    for pattern, what in (
        (r"layer_\d+-model_\d+-model_states\.pt|layer_\d+-model_states\.pt", "pipeline parallel"),
        (r"layer_\d+_expert_\d+_.*|expp?_rank_.*|expert_\d+_.*model_states\.pt", "with experts in files of their own"),
        (r"(zero_pp_rank_\d+_)?mp_rank_0*[1-9]\d*_model_states\.pt", "tensor parallel"),
        (r"zero", "universal"),
    ):
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            raise PlanError(f"{folder}: a DeepSpeed checkpoint that is {what} ({found[0]}) is not read; {_WAY_OUT}")
    strange = [n for n in names if n.endswith("model_states.pt") and not (_WHOLE.fullmatch(n) or _PART.fullmatch(n))]
    if strange:
        raise PlanError(f"{folder}: {strange[0]} is no file of ZeRO that is known here; {_WAY_OUT}")


def _by_rank(folder: Path, names: Sequence[str], pattern: re.Pattern[str]) -> list[Path]:
    """Give the files of all processes in their order; a gap is refused here, a missing end by the count inside."""
    found = {int(match[1]): folder / name for name in names if (match := pattern.fullmatch(name)) is not None}
    missing = sorted(set(range(max(found, default=-1) + 1)) - found.keys()) if len(found) < _MAX_PROCESSES else [0]
    if missing:
        raise FileError(
            f"{folder}: the file of process {missing[0]} is missing beside {next(iter(found.values())).name}; copy it too"
        )
    return [found[rank] for rank in sorted(found)]


def _top(file: TorchFile) -> dict[Any, Any]:
    top = mapping(file.value)
    if top is None:
        raise CheckpointError(f"{file.path}: no checkpoint of DeepSpeed: it holds no dictionary")
    for key in _AUTO_EXPERTS:
        if top.get(key):
            raise PlanError(f"{file.path}: its experts are shared out (AutoEP), which is not read; {_WAY_OUT}")
    return top


def _read_whole(path: Path, optimizers: Sequence[Path], *, masters: bool) -> ZeroFolder:
    """Read ZeRO up to stage 2, or DeepSpeed without ZeRO."""
    file = torch_file.read(path)
    top = _top(file)
    module = mapping(top.get("module"))
    if not module:
        raise CheckpointError(f"{path}: no `module` in it; is it the checkpoint of a DeepSpeed engine?")
    tensors, _ = tensors_in(module, file)
    trained = _trained(top, path)
    notes: list[str] = []
    files = [path]
    if masters and not optimizers:
        notes.append(f"no *_optim_states.pt beside {path.name}, so its weights are taken and not the fp32 masters")
    elif masters and trained is None:
        notes.append(f"{path.name} does not say where the fp32 masters are (param_shapes), so its weights are taken")
    elif masters:
        found = _whole_masters(path, top, optimizers)
        tensors = {**tensors, **found, **_shared(top, {**tensors, **found}, path)}
        files += optimizers
        notes.append(f"{len(found)} weights are the optimizer's fp32 masters, not the 16-bit copies in {path.name}")
    if not tensors:
        raise CheckpointError(f"{path}: no tensors in its `module`")
    return ZeroFolder(tensors, trained, tuple(files), top, tuple(notes))


def _trained(top: Mapping[Any, Any], path: Path) -> frozenset[str] | None:
    groups = top.get("param_shapes")
    if groups is None:
        return None
    return frozenset(name for group in _shapes(groups, path) for name in group)


def _shapes(groups: Any, path: Path) -> list[dict[str, tuple[int, ...]]]:
    """Read `param_shapes`: for each group of the optimizer the shape of each weight, in order."""
    found = []
    for group in groups if isinstance(groups, list) else [groups]:
        items = mapping(group)
        shapes = {name: sizes(shape) for name, shape in (items or {}).items()}
        if items is None or any(not isinstance(name, str) or shape is None for name, shape in shapes.items()):
            raise CheckpointError(f"{path}: its param_shapes are not understood")
        found.append({name: shape for name, shape in shapes.items() if shape is not None})
    return found


def _optimizer_states(files: Sequence[Path]) -> tuple[int, list[tuple[TorchFile, dict[Any, Any]]]]:
    """Read the optimizer's file of each process; the stage, and the states.

    Raises:
        FileError: the file of a process is missing.
    """
    states = []
    for path in files:
        file = torch_file.read(path)
        state = mapping(_top(file).get("optimizer_state_dict"))
        if state is None:
            raise CheckpointError(f"{path}: no optimizer_state_dict in it")
        states.append((file, state))
    stages, worlds = set(), set()
    for file, state in states:
        stages.add(_stage(state, file.path))
        worlds.add(_world(state, file.path))
    if len(stages) > 1 or len(worlds) > 1:
        raise CheckpointError(f"{files[0].parent}: the files of its processes are of different saves")
    world = worlds.pop()
    if world != len(files):
        raise FileError(
            f"{files[0].parent}: saved by {world} processes, but {len(files)} *_optim_states.pt are there; copy the"
            " missing ones too, or remove those of an older save"
        )
    return stages.pop(), states


def _stage(state: Mapping[Any, Any], path: Path) -> int:
    stage = state.get("zero_stage")
    if isinstance(stage, Call) and isinstance(stage.arguments, tuple) and len(stage.arguments) == 1:
        stage = stage.arguments[0]  # ZeroStageEnum(2)
    if stage is None and "single_partition_of_fp32_groups" in state:
        return 1  # the bf16 optimizer, which does not say
    if type(stage) is not int or not 0 <= stage <= 3:
        raise CheckpointError(f"{path}: its zero_stage is not understood")
    return stage


def _world(state: Mapping[Any, Any], path: Path) -> int:
    """The number of processes that shared out the masters; experts may have fewer."""
    count = state.get("partition_count")
    counts = count if isinstance(count, list | tuple) and count else [count]
    if not all(type(number) is int and 0 < number <= _MAX_PROCESSES for number in counts):
        raise CheckpointError(f"{path}: its partition_count is not understood")
    if len(set(counts)) > 1:
        raise PlanError(f"{path}: its groups are shared out over different numbers of processes (experts); {_WAY_OUT}")
    return int(max(counts))


def _flat(item: Any, file: TorchFile, what: str) -> Source:
    """A flat tensor of masters."""
    if not is_tensor(item):
        raise CheckpointError(f"{file.path}: {what} holds no tensor where one is needed")
    source = file.tensor(what, item)
    if len(source.shape) != 1 or source.dtype not in FLOATS:
        raise CheckpointError(
            f"{file.path}: {what} is {source.dtype} {source.shape}; flat floating numbers are expected"
        )
    return source


def _groups(file: TorchFile, state: Mapping[Any, Any], key: str) -> list[Source]:
    groups = state.get(key)
    if not isinstance(groups, list | tuple) or not groups:
        raise CheckpointError(f"{file.path}: no {key} in its optimizer_state_dict, so the masters are not there")
    return [_flat(group, file, f"{key}[{number}]") for number, group in enumerate(groups)]


def _whole_masters(path: Path, top: Mapping[Any, Any], optimizers: Sequence[Path]) -> dict[str, Source]:
    """The fp32 masters up to stage 2: ranges of what the processes hold together, group by group."""
    stage, states = _optimizer_states(optimizers)
    if stage > 2:
        raise CheckpointError(f"{optimizers[0]}: of stage {stage}, but {path.name} is of an earlier one")
    key = "single_partition_of_fp32_groups"
    ranks = [_groups(file, state, key) for file, state in states]
    groups = _shapes(top.get("param_shapes"), path)
    if any(len(rank) != len(groups) for rank in ranks):
        raise CheckpointError(
            f"{path.parent}: {len(groups)} groups in {path.name}, another number of groups of masters"
        )
    paddings = _paddings(states[0][1], groups, states[0][0].path)
    masters: dict[str, Source] = {}
    for number, shapes in enumerate(groups):
        parts = [rank[number] for rank in ranks]
        available, at = sum(part.numel for part in parts), 0
        for (name, shape), padding in zip(shapes.items(), paddings[number], strict=True):
            if name in masters:
                raise CheckpointError(f"{path}: {name!r} is in two groups of the optimizer")
            masters[name] = _range_of(parts, at, shape, path)
            at += prod(shape) + padding
        align = 2 * len(ranks)
        if -(-at // align) != -(-available // align):
            raise CheckpointError(
                f"{path.parent}: group {number} has {available} masters, but its weights need {at}; a file is of another"
                " save"
            )
    return masters


def _paddings(state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]], path: Path) -> list[list[int]]:
    """The gaps behind the weights of each group (`param_alignment_paddings`, from DeepSpeed 0.19)."""
    found = state.get("param_alignment_paddings")
    if found is None:
        return [[0] * len(group) for group in groups]
    if (
        not isinstance(found, list | tuple)
        or [len(group) if isinstance(group, list | tuple) else -1 for group in found] != [len(g) for g in groups]
        or not all(type(gap) is int and 0 <= gap < 2**32 for group in found for gap in group)
    ):
        raise CheckpointError(f"{path}: its param_alignment_paddings are not understood")
    return [list(group) for group in found]


def _range_of(parts: Sequence[Source], start: int, shape: tuple[int, ...], path: Path) -> Source:
    """Numbers from `start` on, for a tensor of `shape`, of flat tensors that stand one behind another."""
    end, at = start + prod(shape), 0
    found: list[Source] = []
    for part in parts:
        first, last = max(start, at), min(end, at + part.numel)
        if first < last:
            found.append(stretch(part, first - at, last - first))
        at += part.numel
    if end > at:
        raise CheckpointError(
            f"{path.parent}: the masters end at {at} where {end} are needed; a file is of another save"
        )
    return joined(found or [stretch(parts[0], 0, 0)], shape)


def _shared(top: Mapping[Any, Any], tensors: Mapping[str, Source], path: Path) -> dict[str, Source]:
    """The weights that are another one under a second name (`shared_params`)."""
    pairs = top.get("shared_params")
    items = mapping(pairs) if pairs is not None else {}
    if isinstance(pairs, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        items = {pair[0]: pair[1] for pair in pairs if isinstance(pair[0], str)}
    if items is None or not all(isinstance(name, str) for pair in items.items() for name in pair):
        raise CheckpointError(f"{path}: its shared_params are not understood")
    return {name: tensors[source] for name, source in items.items() if source in tensors}


def _read_parts(parts: Sequence[Path], optimizers: Sequence[Path]) -> ZeroFolder:
    """Read ZeRO-3: each weight is shared out by itself; the last process's part may end in padding."""
    stage, states = _optimizer_states(optimizers)
    if stage != 3:
        raise CheckpointError(f"{optimizers[0]}: of stage {stage}, but {parts[0].name} is of stage 3")
    if len(parts) != len(states):
        raise FileError(
            f"{parts[0].parent}: saved by {len(states)} processes, but {len(parts)} *_model_states.pt are there; copy the"
            " missing ones too"
        )
    files = [torch_file.read(path) for path in parts]
    tops = [_top(file) for file in files]
    first = parts[0]
    groups = _shapes(tops[0].get("param_shapes"), first)
    shapes = {name: shape for group in groups for name, shape in group.items()}
    if len(shapes) != sum(map(len, groups)):
        raise CheckpointError(f"{first}: a weight is in two groups of the optimizer")
    ranks = [_groups(file, state, "fp32_flat_groups") for file, state in states]
    tensors, at = {}, 0
    for name, shape in shapes.items():
        length = -(-prod(shape) // len(ranks))
        tensors[name] = _shared_out([_range_of(rank, at, (length,), first) for rank in ranks], shape)
        at += length
    if any(sum(group.numel for group in rank) != at for rank in ranks):
        raise CheckpointError(f"{first.parent}: its masters are not those of its weights; a file is of another save")
    frozen = _frozen(files, tops)
    buffers = _buffers(files[0], tops[0])
    tensors |= frozen | buffers
    tensors |= _shared(tops[0], tensors, first)
    notes = ("ZeRO-3 keeps its weights as fp32 masters only, so they are what is converted",)
    return ZeroFolder(tensors, frozenset(shapes), (*parts, *optimizers), tops[0], notes)


def _shared_out(parts: Sequence[Source], shape: tuple[int, ...]) -> Source:
    """One weight of the equal parts that the processes hold, without the padding at the end."""
    left = prod(shape)
    found: list[Source] = []
    for part in parts:
        for piece in part.lens.parts if part.lens is not None else (part,):  # type: ignore[union-attr]
            count = min(left, piece.numel)
            found.append(stretch(piece, 0, count))
            left -= count
    return joined(found, shape)


def _frozen(files: Sequence[TorchFile], tops: Sequence[Mapping[Any, Any]]) -> dict[str, Source]:
    """The weights that were not trained: a part in each process's file."""
    given = tops[0].get("frozen_param_shapes")
    if not given:
        return {}
    path = files[0].path
    fragments = [mapping(top.get("frozen_param_fragments")) for top in tops]
    found: dict[str, Source] = {}
    for name, shape in _shapes(given, path)[0].items():
        parts = []
        for file, held in zip(files, fragments, strict=True):
            item = (held or {}).get(name)
            if not is_tensor(item):
                raise CheckpointError(f"{file.path}: the frozen weight {name!r} is not in it")
            parts.append(file.tensor(name, item))
        if sum(part.numel for part in parts) < prod(shape) or len({part.dtype for part in parts}) != 1:
            raise CheckpointError(f"{path}: the parts of the frozen weight {name!r} do not make {shape}")
        found[name] = _shared_out(parts, shape)
    return found


def _buffers(file: TorchFile, top: Mapping[Any, Any]) -> dict[str, Source]:
    names = top.get("buffer_names")
    module = mapping(top.get("module")) or {}
    wanted = set(names) if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) else set()
    found, _ = tensors_in({name: item for name, item in module.items() if name in wanted}, file)
    return found


def _names(folders: set[Path]) -> str:
    return ", ".join(sorted(folder.name for folder in folders))
