"""What a resumed run needs beside the weights, as safetensors and JSON: no pickle is written and none is executed.

`state/` in a checkpoint holds the states of the optimizer, the schedule and the loss scaler, and for each process its
random numbers. `state.json` is the nested data as torch gives it, with tuples, numbers as keys and infinities marked;
tensors stand there by name and lie in `tensors.safetensors`, one that is used twice only once. It is a folder of its
own because programs that load a model take every safetensors file beside its config.

Checkpoints of earlier versions have .pt and .pth files instead; they are read as data, by `convert.torch_file`.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.convert.folder import read_safetensors
from fastft.convert.json_file import read_object
from fastft.convert.source import Source
from fastft.errors import CheckpointError, FileError

if TYPE_CHECKING:
    import torch

FOLDER = "state"
TREE = f"{FOLDER}/state.json"
TENSORS = f"{FOLDER}/tensors.safetensors"
# The files of earlier versions and what they hold; each process had one of its own.
OLD_FILES = {"optimizer": "optimizer.pt", "scheduler": "scheduler.pt", "scaler": "scaler.pt"}
_OLD_PROCESSES = "rng_state*.pth"
_VERSION = 1
_MARKS = ("$tensor", "$tuple", "$map", "$float")
_PARTS = ("optimizer", "scheduler", "scaler", "processes")
# torch's names of what safetensors' names mean.
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def write(folder: Path, parts: Mapping[str, Any]) -> None:
    """Write the states into a checkpoint that is being filled.

    Args:
        folder: exists; gets `state/`.
        parts: `optimizer`, `scheduler`, `scaler` (state dicts; those that the run has) and `processes` (one value each).
            Nested dict, list, tuple, str, int, float, bool, None and dense tensors on any device.

    Raises:
        TypeError: something else is in them.
        OSError: the disk refuses; see `checkpoint.disk_errors`.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    names: dict[Any, str] = {}
    tree = {name: _encoded(value, name, tensors, names) for name, value in parts.items()}
    (folder / FOLDER).mkdir()
    save_file(tensors, folder / TENSORS)
    text = json.dumps({"version": _VERSION, **tree}, allow_nan=False)
    (folder / TREE).write_text(text, encoding="utf-8")


def is_old(folder: Path) -> bool:
    """Whether a checkpoint has the .pt and .pth files of earlier versions."""
    return not (folder / TREE).exists() and any(folder.glob(_OLD_PROCESSES))


def read(folder: Path, part: str) -> Any:
    """Read one of the parts, with the types that were written; tensors on the CPU.

    Args:
        folder: the checkpoint.
        part: `optimizer`, `scheduler`, `scaler` or `processes`.

    Returns:
        None where the run had no such part.

    Raises:
        CheckpointError: a file is broken, cut off or holds something else; it is named.
        FileError: a file is missing or cannot be read.
    """
    if is_old(folder):
        return _read_old(folder, part)
    found, sources = _tree(folder)
    if part not in found:
        return None
    return _decoded(found[part], sources, str(folder / TREE), _Tensors())


def check(folder: Path, step: int, processes: int | None = None) -> None:
    """See that the states of a checkpoint can be read and are states; no tensor is read, and torch is not imported.

    Args:
        folder: the checkpoint.
        step: optimizer steps that were done.
        processes: that trained, as the manifest says.

    Raises:
        CheckpointError, FileError: as for `read`.
    """
    where = str(folder) if is_old(folder) else str(folder / TREE)
    if is_old(folder):
        found = {part: [value for _, value in _old_tree(folder, part)] for part in _PARTS}
        parts = {part: values if part == "processes" else next(iter(values), None) for part, values in found.items()}
    else:
        tree, sources = _tree(folder)
        parts = {part: _decoded(tree.get(part), sources, where, lambda source: source) for part in _PARTS}
    if processes is not None and len(parts["processes"]) != processes:
        raise CheckpointError(f"{where}: holds the states of {len(parts['processes'])} processes, not of {processes}")
    for number, own in enumerate(parts["processes"]):
        _check_process(own, f"{where}: the random numbers of process {number}")
    if parts["optimizer"] is None and parts["scheduler"] is None and any(folder.glob("global_step*")):
        return  # DeepSpeed keeps both
    if not isinstance(parts["scheduler"], dict) or type(parts["scheduler"].get("last_epoch")) is not int:
        raise CheckpointError(f"{where}: the schedule has no last_epoch")
    # Fewer than the steps where a loss scaler left some out.
    if not 0 <= parts["scheduler"]["last_epoch"] <= step:
        raise CheckpointError(
            f"{where}: the schedule's last_epoch is {parts['scheduler']['last_epoch']}; the checkpoint is of step {step}"
        )
    groups = parts["optimizer"].get("param_groups") if isinstance(parts["optimizer"], dict) else None
    if not isinstance(groups, list) or not groups:
        raise CheckpointError(f"{where}: the optimizer has no groups of weights")
    for group in groups:
        rate = group.get("lr") if isinstance(group, dict) else None
        if type(rate) not in (int, float) or not math.isfinite(rate):
            raise CheckpointError(f"{where}: an lr of the optimizer is {_short(rate)}; a number is expected")


def _check_process(own: Any, where: str) -> None:
    """See that a process's random numbers can be set."""
    import random

    import numpy as np

    try:
        random.Random().setstate(own["python"])  # noqa: S311 - nothing secret is drawn
        np.random.RandomState().set_state(own["numpy"])
        words = [own[name] for name in ("cpu", "device") if name == "cpu" or name in own]
        if not all(isinstance(word, Source) and word.dtype == "U8" and len(word.shape) == 1 for word in words):
            raise CheckpointError(f"{where}: torch's are no bytes")
        if not math.isfinite(own["loss_sum"]) or type(own["logged"]) is not int:
            raise CheckpointError(f"{where}: the sum of the losses beside them is {_short(own['loss_sum'])}")
    except (LookupError, TypeError, ValueError, OverflowError) as cause:
        if isinstance(cause, CheckpointError):
            raise
        raise CheckpointError(f"{where} cannot be set: {type(cause).__name__}: {cause}") from cause


def _tree(folder: Path) -> tuple[dict[str, Any], dict[str, Source]]:
    """The content of state.json, and where each tensor lies."""
    path = folder / TREE
    found = read_object(path)
    if found.pop("version", None) != _VERSION:
        raise CheckpointError(f"{path}: is not of version {_VERSION}; it was written by another fastft")
    if unknown := sorted(found.keys() - set(_PARTS)):
        raise CheckpointError(f"{path}: {unknown[0][:100]!r} is no state of a training")
    if not isinstance(found.get("processes"), list):
        raise CheckpointError(f"{path}: holds no state of the processes")
    if not (folder / TENSORS).exists():
        raise FileError(f"{folder / TENSORS}: is missing")
    return found, read_safetensors(folder / TENSORS)


def _encoded(value: Any, where: str, tensors: dict[str, "torch.Tensor"], names: dict[Any, str]) -> Any:
    """A value as JSON; its tensors go into `tensors`, under the name that `names` has for their memory."""
    import torch

    if isinstance(value, torch.Tensor):
        memory = (value.data_ptr() or id(value), value.dtype, value.shape, value.stride(), value.device)
        if memory not in names:
            names[memory] = where
            tensors[where] = _in_order(value.detach())[0]
        order = _in_order(value)[1]
        return {"$tensor": names[memory], **({"order": order} if order else {})}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encoded(item, f"{where}.{key}", tensors, names) for key, item in value.items()}
        pairs = [[key, _encoded(item, f"{where}.{key}", tensors, names)] for key, item in value.items()]
        if not all(type(key) in (str, int) for key, _ in pairs):
            raise TypeError(f"{where}: keys must be texts or whole numbers")
        return {"$map": pairs}
    if isinstance(value, list | tuple):
        items = [_encoded(item, f"{where}.{index}", tensors, names) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(float(value))}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{where}: {type(value).__name__} is no plain data")


def _in_order(value: "torch.Tensor") -> tuple["torch.Tensor", list[int] | None]:
    """A tensor with its numbers in a row, and how its dimensions were exchanged for that; None: they were not.

    A fused optimizer walks over weights and states by address, so a state must come back with the strides it had.
    """
    if value.is_contiguous():
        return value, None
    order = sorted(range(value.dim()), key=lambda dim: -value.stride(dim))
    turned = value.permute(order)
    return (turned, order) if turned.is_contiguous() else (value.contiguous(), None)


def _decoded(value: Any, sources: Mapping[str, Source], where: str, tensor: Callable[[Source], Any]) -> Any:
    """The value that `_encoded` wrote; `tensor` makes of each place what is wanted."""
    if isinstance(value, list):
        return [_decoded(item, sources, where, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    mark = next(iter(value), "")
    if mark not in _MARKS:
        return {key: _decoded(item, sources, where, tensor) for key, item in value.items()}
    content = value[mark]
    if mark == "$tensor" and isinstance(content, str):
        if content not in sources:
            raise CheckpointError(f"{where}: the tensor {content[:100]!r} is not in {TENSORS}")
        source = sources[content]
        if source.dtype not in _DTYPES:
            raise CheckpointError(f"{source.file}: the tensor {content[:100]!r} is {source.dtype}, which no state has")
        return _turned(tensor(source), source, value.get("order"), where)
    if mark == "$tuple" and isinstance(content, list):
        return tuple(_decoded(item, sources, where, tensor) for item in content)
    if mark == "$map" and isinstance(content, list) and all(_is_pair(item) for item in content):
        return {key: _decoded(item, sources, where, tensor) for key, item in content}
    if mark == "$float" and content in ("inf", "-inf", "nan"):
        return float(content)
    raise CheckpointError(f"{where}: {mark} stands there with something that it does not go with")


def _is_pair(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int)


def _turned(found: Any, source: Source, order: Any, where: str) -> Any:
    """Undo `_in_order`."""
    if order is None:
        return found
    if not isinstance(order, list) or sorted(order, key=repr) != sorted(range(len(source.shape)), key=repr):
        raise CheckpointError(f"{where}: {str(order)[:100]} is no order of {len(source.shape)} dimensions")
    back = [order.index(dim) for dim in range(len(order))]
    return found if isinstance(found, Source) else found.permute(back)


class _Tensors:
    """Reads tensors, each place only once, so that what was one tensor is one again."""

    def __init__(self) -> None:
        self._seen: dict[Source, torch.Tensor] = {}

    def __call__(self, source: Source) -> "torch.Tensor":
        if source not in self._seen:
            self._seen[source] = _tensor(source)
        return self._seen[source]


def _tensor(source: Source) -> "torch.Tensor":
    """Read a tensor into memory of its own; a map of the file would kill the process if it shrank."""
    import torch

    found = torch.empty(source.shape, dtype=getattr(torch, _DTYPES[source.dtype]))
    if found.numel() == 0:
        return found
    memory = memoryview(found.reshape(-1).view(torch.uint8).numpy())
    try:
        with source.file.open("rb", buffering=0) as file:
            file.seek(source.offset)
            done = 0
            while done < len(memory):
                if not (count := file.readinto(memory[done:])):
                    raise CheckpointError(f"{source.file}: ends within a tensor; was it cut while it was read?")
                done += count
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{source.file}: cannot be read: {error.strerror}") from error
    return found


def _old_tree(folder: Path, part: str) -> list[tuple[Any, Any]]:
    """Files of earlier versions as inert data: pairs of a file of torch.save and its value, none where there is none."""
    from fastft.convert import torch_file

    paths = sorted(folder.glob(_OLD_PROCESSES), key=lambda path: (len(path.name), path.name))
    if part != "processes":
        paths = [path for path in (folder / OLD_FILES[part],) if path.exists()]
    files = [torch_file.read(path) for path in paths]
    return [(file, _plain(file.value, file, lambda source: source)) for file in files]


def _read_old(folder: Path, part: str) -> Any:
    tensors = _Tensors()
    found = [_plain(file.value, file, tensors) for file, _ in _old_tree(folder, part)]
    return found if part == "processes" else found[0] if found else None


def _plain(value: Any, file: Any, tensor: Callable[[Source], Any], depth: int = 0) -> Any:
    """The value of a pickle that was read without running it, with real tensors."""
    from fastft.convert import torch_file

    if depth > 20:
        raise CheckpointError(f"{file.path}: is nested too deep for a state")
    if torch_file.is_tensor(value):
        source = file.tensor("state", value)
        if source.dtype not in _DTYPES:
            raise CheckpointError(f"{file.path}: holds a tensor of {source.dtype}, which no state has")
        return tensor(source)
    if (items := torch_file.mapping(value)) is not None:
        return {key: _plain(item, file, tensor, depth + 1) for key, item in items.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item, file, tensor, depth + 1) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"{file.path}: holds {torch_file.kind(value)}, which no state has")


def check_like(found: Any, pattern: Any, where: str) -> None:
    """See that data from a file is of the kind that the running object has: same keys, lengths and types.

    A number may be a whole one or not; where one of both is None the other may be anything plain.

    Raises:
        CheckpointError: it is not; `where` is named.
    """
    if isinstance(pattern, dict):
        if not isinstance(found, dict):
            raise CheckpointError(f"{where}: is {_short(found)}; an object is expected")
        if found.keys() != pattern.keys():
            others = sorted(map(str, found.keys() ^ pattern.keys()))
            raise CheckpointError(f"{where}: {_short(others[0])} is there and not here, or the other way round")
        for key, value in pattern.items():
            check_like(found[key], value, f"{where}, {key}")
        return
    if isinstance(pattern, list | tuple):
        if type(found) is not type(pattern) or len(found) != len(pattern):
            raise CheckpointError(f"{where}: holds {_short(found)} instead of {_short(pattern)}")
        for index, value in enumerate(pattern):
            check_like(found[index], value, f"{where}, {index}")
        return
    both = (found, pattern)
    numbers = all(type(one) in (int, float) for one in both)
    plain = None in both and all(one is None or type(one) in (bool, int, float, str) for one in both)
    if not (numbers or plain or type(found) is type(pattern)):
        raise CheckpointError(f"{where}: is {_short(found)}; a {type(pattern).__name__} is expected")
    if isinstance(found, float) and math.isfinite(float(pattern or 0)) and not math.isfinite(found):
        raise CheckpointError(f"{where}: is {found}")


def fitting(found: Any, pattern: Mapping[str, Any], needed: Sequence[str], where: str) -> dict[str, Any]:
    """Give a state dict from a file what the running object has beyond it; see that the rest is of its kind.

    Args:
        found: from `read`.
        pattern: the state dict of the running object, maybe of a newer torch with more in it.
        needed: keys that must be in the file.
        where: for the error texts.

    Raises:
        CheckpointError: a key is missing, or is one more, or a value is of another kind.
    """
    if not isinstance(found, dict) or not all(key in found for key in needed):
        raise CheckpointError(f"{where}: has no {', '.join(needed)} in its file")
    filled = {**pattern, **found}
    check_like(filled, dict(pattern), where)
    return filled


def fitting_optimizer(found: Any, optimizer: "torch.optim.Optimizer", where: str) -> dict[str, Any]:
    """The same for an optimizer: its settings by `fitting`, its tensors held against the weights that they are for.

    Raises:
        CheckpointError: of other weights, of another optimizer, a shape is wrong or a number is not finite.
    """
    where = f"{where}: the optimizer"
    groups = optimizer.state_dict()["param_groups"]
    if not isinstance(found, dict) or found.keys() != {"state", "param_groups"} or not isinstance(found["state"], dict):
        raise CheckpointError(f"{where}'s state is none")
    if not isinstance(found["param_groups"], list) or len(found["param_groups"]) != len(groups):
        raise CheckpointError(f"{where} has {len(groups)} groups of weights; the file has others")
    filled = [
        fitting(group, wanted, ("lr", "params"), f"{where}'s group {number}")
        for number, (group, wanted) in enumerate(zip(found["param_groups"], groups, strict=True))
    ]
    if [group["params"] for group in filled] != [group["params"] for group in groups]:
        raise CheckpointError(f"{where} numbers its weights in another way")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for key, values in found["state"].items():
        if type(key) is not int or not 0 <= key < len(weights) or not isinstance(values, dict):
            raise CheckpointError(f"{where} has no weight {str(key)[:50]!r}")
        for name, value in _flat(values):
            _check_state(name, value, weights[key], f"{where}'s {str(name)[:50]} of weight {key}")
    return {"state": found["state"], "param_groups": filled}


def _flat(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a weight's state; bitsandbytes keeps some of it one level deeper."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield name, value


def _check_state(name: str, value: Any, weight: "torch.Tensor", where: str) -> None:
    """Refuse what the optimizer would trip over, or take for something else."""
    import torch

    if name == "step":
        if not (type(value) in (int, float) or (isinstance(value, torch.Tensor) and value.numel() == 1)):
            raise CheckpointError(f"{where}: is {_short(value)}, no count")
        value = torch.as_tensor(value)
        if not (bool(torch.isfinite(value).all()) and float(value) >= 0):
            raise CheckpointError(f"{where}: is {float(value)}, no count")
        return
    shapes: dict[str, Sequence[int]] = {
        **dict.fromkeys(("exp_avg", "exp_avg_sq", "state1", "state2"), tuple(weight.shape)),
        **dict.fromkeys(("qmap1", "qmap2"), (256,)),
        **dict.fromkeys(("absmax1", "absmax2"), (math.ceil(weight.numel() / 256),)),  # bitsandbytes' blocks
    }
    if name not in shapes or not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{where}: this optimizer has none")
    if tuple(value.shape) != tuple(shapes[name]):
        raise CheckpointError(f"{where}: has shape {tuple(value.shape)} instead of {tuple(shapes[name])}")
    if name.startswith("state") and value.dtype not in (torch.uint8, torch.float32):
        raise CheckpointError(f"{where}: is {value.dtype}; uint8 or float32 is expected")
    if not name.startswith("state") and not value.is_floating_point():
        raise CheckpointError(f"{where}: is {value.dtype}; floating point is expected")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise CheckpointError(f"{where}: holds a number that is not finite")


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = sorted(map(str, value))
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
