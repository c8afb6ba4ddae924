"""The state dict in a .pth, .pt or .bin file: its tensors as ranges of bytes, and what the training noted beside them.

`torch_file` reads the file; no code in it is run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastft.convert import torch_file
from fastft.convert.pickle_data import Call
from fastft.convert.source import Source
from fastft.convert.torch_file import TorchFile, is_tensor, kind, mapping
from fastft.errors import CheckpointError

# Where a training framework puts the state dict.
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")


@dataclass(frozen=True)
class StateDict:
    """What a .pth file holds.

    Attributes:
        path: the file.
        tensors: name to bytes.
        meta: the training's notes beside the weights (mmengine's `meta`), as far as they are plain data.
        skipped: names beside the tensors that hold none.
        top: everything in the file, for what else is looked for there.
    """

    path: Path
    tensors: Mapping[str, Source]
    meta: Mapping[str, Any]
    skipped: tuple[str, ...]
    top: Mapping[Any, Any] = field(repr=False)


def read_state_dict(path: Path) -> StateDict:
    """Read the names and places of all tensors in a .pth, .pt or .bin file.

    Raises:
        FileError: the file is not there.
        CheckpointError: not a file that torch.save wrote, broken, or a tensor that is not stored plainly.
    """
    file = torch_file.read(path)
    top = mapping(file.value)
    if top is None:
        raise CheckpointError(f"{file.path}: holds a {kind(file.value)}; a dictionary of tensors is expected")
    found = top
    for wrapper in _WRAPPERS:
        inner = mapping(top.get(wrapper))
        if inner and any(is_tensor(item) for item in inner.values()):
            found = inner
            break
    tensors, skipped = tensors_in(found, file)
    if not tensors:
        held = ", ".join(_key(key) for key in list(top)[:8])
        raise CheckpointError(
            f"{file.path}: no tensors found; looked at the top and under {', '.join(_WRAPPERS)}. It holds: {held}"
        )
    meta = mapping(top.get("meta")) if found is not top else None
    return StateDict(file.path, tensors, meta or {}, tuple(skipped), top)


def tensors_in(found: Mapping[Any, Any], file: TorchFile) -> tuple[dict[str, Source], list[str]]:
    """Give the tensors of a state dict, and the names of what else is in it.

    Raises:
        CheckpointError: a tensor that is not stored plainly, or of a kind that is not read (sparse, quantized, sharded).
    """
    tensors: dict[str, Source] = {}
    skipped: list[str] = []
    for name, item in found.items():
        if isinstance(name, str) and is_tensor(item):
            tensors[name] = file.tensor(name, item)
            continue
        path = kind(item) if isinstance(item, Call) else ""
        if isinstance(name, str) and path.startswith("torch.") and "_rebuild" in path:
            raise CheckpointError(
                f"{file.path}: {name[:200]!r} is a tensor of a kind that is not read here ({path});"
                " save it again as a plain tensor"
            )
        skipped.append(_key(name))
    return tensors, skipped


def _key(key: Any) -> str:
    """A key for an error text, whatever the file holds."""
    return key[:200] if isinstance(key, str) else repr(key)[:50] if isinstance(key, int | float) else kind(key)
