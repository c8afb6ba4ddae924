"""The weights of a training's checkpoint, whatever trainer wrote it: found by what is there, not by its name.

Reads mmengine's and XTuner's .pth, plain state dicts, DeepSpeed's folders, those of torch.distributed.checkpoint (FSDP),
the checkpoint-N of transformers' Trainer and of fastft, and fastft's run folders. Goes to `pth`, which plans with it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastft.convert import deepspeed_folder, distributed_checkpoint
from fastft.convert.adapter import CONFIG as ADAPTER_CONFIG
from fastft.convert.adapter import PICKLE_WEIGHTS as ADAPTER_PICKLE
from fastft.convert.adapter import WEIGHTS as ADAPTER_WEIGHTS
from fastft.convert.adapter import canonical_key
from fastft.convert.folder import INDEX, PICKLE_INDEX, PICKLE_SINGLE, SINGLE, read_safetensors, read_weights
from fastft.convert.pth_reader import read_state_dict
from fastft.convert.source import Source
from fastft.convert.torch_file import mapping
from fastft.errors import CheckpointError, FileError, PlanError

CONFIG_JSON = "config.json"
LORA = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")
_WEIGHTS = (SINGLE, INDEX, PICKLE_SINGLE, PICKLE_INDEX)
_FSDP_WHOLE = "pytorch_model_fsdp.bin"
# Where fastft's run folders keep their result.
_RESULTS = ("adapter", "model")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What wraps the whole model in a sharded checkpoint.
_OUTER = ("model.", "module.", "state_dict.", "app.model.", "app.")
_OPTIMIZER = re.compile(r"(optimizer|optim|lr_scheduler|scheduler|train_state|dataloader|app\.optim\w*)(\..*|_\d+.*)?")
# How the tensors of a model's outermost modules begin, by any trainer.
_INNER = ("base_model.", "model.", "transformer.", "llm.", "language_model.", "lm_head.", "gpt_neox.", "visual")


@dataclass(frozen=True)
class Trained:
    """The weights of a checkpoint.

    Attributes:
        tensors: by the names that the trainer gave them.
        files: what was read.
        folder: whose config.json, tokenizer and adapter_config.json belong to the weights; None: there is none.
        trained: names that the optimizer has, where that is known.
        meta: the training's notes beside the weights.
        notes: what the user should know.
    """

    tensors: Mapping[str, Source]
    files: tuple[Path, ...]
    folder: Path | None = None
    trained: frozenset[str] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read(pth: Path, *, masters: bool) -> Trained:
    """Find the weights of a checkpoint.

    Args:
        pth: a file or a folder.
        masters: take the optimizer's fp32 masters where DeepSpeed kept some.

    Raises:
        FileError, CheckpointError, PlanError: what is missing, broken, or not read here.
    """
    try:
        if not pth.exists():
            raise FileError(f"{pth}: not there; give a .pth file or a checkpoint folder")
        if pth.is_dir():
            _refuse_llava(pth)
            return _read_folder(pth.resolve(), masters=masters)
    except PermissionError as error:
        raise FileError(f"{pth}: cannot be read: {error.strerror}") from error
    if pth.suffix == ".safetensors":
        return Trained(read_safetensors(pth), (pth,))
    return _read_file(pth)


def _read_file(path: Path) -> Trained:
    state = read_state_dict(path)
    notes = (f"{len(state.skipped)} entries of {path.name} hold no tensor and are left out",) if state.skipped else ()
    return Trained(state.tensors, (state.path,), meta=state.meta, notes=notes)


def _read_folder(folder: Path, *, masters: bool) -> Trained:
    own = (folder / ADAPTER_CONFIG).exists() or has_weights(folder)
    zero = deepspeed_folder.find(folder)
    if zero is not None and (zero == folder or masters or not own):
        return _read_zero(folder, zero, masters=masters)
    if not own or (folder / distributed_checkpoint.METADATA).exists():
        sharded = distributed_checkpoint.find(folder)
        if sharded is not None:
            return _read_sharded(folder, sharded)
    if (folder / ADAPTER_CONFIG).exists():
        return _read_adapter(folder)
    if own:
        tensors, files = read_weights(folder)
        config = folder / CONFIG_JSON
        if config.exists():
            return Trained(tensors, (config, *files), folder)
        return Trained(tensors, tuple(files))
    if (folder / _FSDP_WHOLE).exists():
        return replace(_read_file(folder / _FSDP_WHOLE), folder=_described(folder))
    return _read_run(folder, masters=masters)


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds a model's weights as transformers names them."""
    return any((folder / name).exists() for name in _WEIGHTS)


def _described(folder: Path) -> Path | None:
    """The folder, if it describes its weights."""
    return folder if any((folder / name).exists() for name in (CONFIG_JSON, ADAPTER_CONFIG)) else None


def _read_adapter(folder: Path) -> Trained:
    weights = folder / ADAPTER_WEIGHTS
    if weights.exists():
        return Trained(read_safetensors(weights), (folder / ADAPTER_CONFIG, weights), folder)
    weights = folder / ADAPTER_PICKLE
    if weights.exists():
        return Trained(read_state_dict(weights).tensors, (folder / ADAPTER_CONFIG, weights), folder)
    raise FileError(f"{folder}: {ADAPTER_CONFIG} is there, but no {ADAPTER_WEIGHTS} and no {ADAPTER_PICKLE}")


def _read_zero(folder: Path, zero: Path, *, masters: bool) -> Trained:
    found = deepspeed_folder.read(zero, masters=masters)
    meta = mapping(found.top.get("meta")) or {}
    return Trained(found.tensors, found.files, _described(folder), found.trained, meta, found.notes)


def _read_sharded(folder: Path, sharded: Path) -> Trained:
    found = distributed_checkpoint.read(sharded)
    tensors = {name: source for name, source in found.tensors.items() if _OPTIMIZER.fullmatch(name) is None}
    if not tensors:
        raise CheckpointError(f"{sharded}: holds the states of an optimizer and no weights; give the model's folder")
    notes = []
    if len(tensors) != len(found.tensors):
        notes.append(f"{len(found.tensors) - len(tensors)} tensors of the optimizer in {sharded.name} are left out")
    return Trained(_without_wrapper(tensors), found.files, _described(folder), notes=tuple(notes))


def _refuse_llava(folder: Path) -> None:
    """Refuse what the training of a LLaVA left: its parts are there already, in folders of their own.

    Raises:
        PlanError: naming the command for it.
    """
    for place in (folder, folder / "llava"):
        if (place / "projector" / CONFIG_JSON).is_file():
            raise PlanError(
                f"{folder}: the parts of a LLaVA, converted already; `fastft convert merge LLM {place} SAVE_PATH` makes one"
                " folder of them"
            )


def _without_wrapper(tensors: Mapping[str, Source]) -> dict[str, Source]:
    """Strip what wraps every name, as long as what is left still begins as the names of models do."""
    names = dict(tensors)
    for _ in range(3):
        outer = next((outer for outer in _OUTER if all(name.startswith(outer) for name in names)), None)
        inner = {} if outer is None else {name.removeprefix(outer): source for name, source in names.items()}
        if not inner or not all(canonical_key(name).startswith(_INNER) or LORA.search(name) for name in inner):
            break
        names = inner
    return names


def _read_run(folder: Path, *, masters: bool) -> Trained:
    """Read a fastft run: its result, else its newest checkpoint."""
    for name in _RESULTS:
        result = folder / name
        if (result / ADAPTER_CONFIG).exists() or has_weights(result):
            found = _read_folder(result, masters=masters)
            return replace(found, notes=(*found.notes, f"{folder.name} is a run; its result in {name} is converted"))
    steps = sorted((int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name)))
    if steps:
        raise FileError(f"{folder}: no checkpoint there, but a run without a result; did you mean {steps[-1][1]}?")
    saved = sorted(folder.glob("iter_*.pth"), key=lambda path: (len(path.name), path.name))
    hint = f"; did you mean {saved[-1]}?" if saved else ""
    if (folder / "optimizer.bin").exists() or any(folder.glob("rng_state*")):
        raise PlanError(f"{folder}: holds the states of a training and no weights that are read here{hint}")
    raise FileError(
        f"{folder}: no checkpoint there: no {ADAPTER_CONFIG}, no {CONFIG_JSON} with weights, no *_model_states.pt and no"
        f" {distributed_checkpoint.METADATA}{hint}"
    )
