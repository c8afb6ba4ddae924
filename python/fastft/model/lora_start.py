"""Adapters that do not start from nothing, and how they are saved so that they merge onto the original base.

`pissa` (Meng et al. 2024, section 3): A and B start as the largest singular values of W, and the base keeps the rest,
W - s B0 A0. `olora` (Bueyuekakyuez 2024, section 3): the same with the first rows and columns of a QR decomposition.
`loftq` (Li et al. 2023, algorithm 1 with one turn): A and B start as what 4 bits lost of W; the base stays.

With the first two the base that is trained on is not the base that a user has. The result is therefore written as a
plain LoRA of twice the rank, [B, -B0] [A; A0], which adds s (B A - B0 A0) to the original weights; the alpha grows
with the rank so that s stays. Checkpoints keep A and B as they are, are marked as what they are (a merge refuses them),
and hold A0 and B0 beside: a resumed run must find the same ones.

With `loftq` nothing is converted: a merge starts from what 4 bits made of the base, as for any QLoRA adapter.

In a LLaVA made of parts the adapters of the tower start like those of the language model, each with its own rank; with
`loftq` the tower can have none, since it is never held in 4 bits.

Letters: I in, O out, R rank; s is the adapter's scale.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastft import console
from fastft.config import schema
from fastft.errors import CheckpointError, ConfigError, TrainingError

FILE_NAME = "lora_start.safetensors"
_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."

Pair = tuple[torch.Tensor, torch.Tensor]


def start(adapted: Any, lora: schema.Lora, original: Path, *, in_parts: bool = False) -> None:
    """Give the fresh adapters of a peft model their start, and take it out of the base where it comes from there.

    Args:
        adapted: the PeftModel.
        lora: `init` says which start.
        original: folder of the base's safetensors, which loftq reads again.
        in_parts: the base is the language model of a LLaVA, whose names differ from those in its files.

    Raises:
        ConfigError: the start does not fit this model.
        CheckpointError: the original weights cannot be read.
    """
    if lora.init not in ("pissa", "olora", "loftq"):
        return
    config = adapted.peft_config["default"]
    if getattr(config, "target_parameters", None):
        raise ConfigError(f"lora.init: {lora.init} is for linear layers, and this model has experts; use default")
    layers = list(_layers(adapted))
    stored = _Stored(original, in_parts=in_parts) if lora.init == "loftq" else None
    begun: dict[str, torch.Tensor] = {}
    with console.progress(f"lora.init: {lora.init}", len(layers), "layers") as advance, torch.no_grad():
        for done, (name, layer) in enumerate(layers, 1):
            scale = float(layer.scaling["default"])
            A_RI, B_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            rank = int(layer.r["default"])
            if stored is None:
                weight_OI = layer.base_layer.weight
                A0_RI, B0_OR = (_pissa if lora.init == "pissa" else _olora)(weight_OI.float(), rank, scale)
                weight_OI.copy_(weight_OI.float() - scale * (B0_OR @ A0_RI))
                begun[f"{name}.lora_A.weight"] = A0_RI.cpu().contiguous()
                begun[f"{name}.lora_B.weight"] = B0_OR.cpu().contiguous()
            else:
                held_OI = _held(layer.base_layer, name)
                lost_OI = stored.read(name, held_OI.shape).to(held_OI.device) - held_OI
                A0_RI, B0_OR = _pissa(lost_OI, rank, scale)
            A_RI.copy_(A0_RI)
            B_OR.copy_(B0_OR)
            advance(done)
    if begun:
        config.init_lora_weights = lora.init  # what is saved raw says so, and a merge refuses it
        adapted.lora_start = begun


def write(folder: Path, model: Any) -> None:
    """Put A0 and B0 into a checkpoint, if the model's adapters have changed the base."""
    begun = getattr(model, "lora_start", None)
    if begun:
        from safetensors.torch import save_file

        save_file(begun, folder / FILE_NAME)


def check(folder: Path, model: Any) -> None:
    """Refuse to go on with adapters whose start is another one than that of the checkpoint.

    Raises:
        TrainingError: the decomposition gave other numbers than on the machine where the run began.
    """
    begun = getattr(model, "lora_start", None)
    if not begun:
        return
    from safetensors.torch import load_file

    path = folder / FILE_NAME
    if not path.is_file():
        raise TrainingError(f"--resume {folder}: {FILE_NAME} is missing")
    then = load_file(path)
    if then.keys() != begun.keys() or not all(torch.equal(then[name], value) for name, value in begun.items()):
        raise TrainingError(
            f"--resume {folder}: the adapters' start (lora.init) comes out otherwise on this machine than where the run "
            "began, so that the weights would not fit; go on there, or start anew with another --work-dir"
        )


def convert(folder: Path, model: Any) -> None:
    """Make the adapter that was written into `folder` a plain one of twice the rank, for the original base."""
    begun = getattr(model, "lora_start", None)
    if not begun:
        return
    from safetensors.torch import load_file, save_file

    weights = doubled(load_file(folder / _WEIGHTS), model)
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    config |= plain_settings(config)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    console.note(
        f"result: the adapter has rank {config['r']}, twice the trained one, so that it fits the original base"
    )


def doubled(tensors: Mapping[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """The tensors of an adapter for the original base, by their names in the whole model or in peft's files.

    A model whose base the start has not changed keeps them as they are.
    """
    begun = getattr(model, "lora_start", None) or {}
    return {name: _doubled(name, value.detach().cpu(), begun) for name, value in tensors.items()}


def plain_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings of an adapter become when its rank is doubled."""
    factor = math.sqrt(2) if config["use_rslora"] else 2
    return {"r": config["r"] * 2, "lora_alpha": config["lora_alpha"] * factor, "init_lora_weights": True}


def changed_base(model: Any) -> bool:
    """Whether the start took something out of the base, so that what is saved must be doubled."""
    return bool(getattr(model, "lora_start", None))


def _doubled(name: str, value: torch.Tensor, begun: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[A; A0] for an A, [B, -B0] for a B; other tensors as they are."""
    first = begun.get(name.removeprefix(_PREFIX))
    if first is None:
        return value
    return torch.cat([value, first]) if ".lora_A." in name else torch.cat([value, -first], dim=1)


def _layers(adapted: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers with an adapter, by their names in the base."""
    from peft.tuners.lora import LoraLayer

    for name, module in adapted.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if not isinstance(module.base_layer, torch.nn.Linear):
            raise ConfigError(
                f"lora.init: {name} is no linear layer; leave it out of lora.targets, or use init: default"
            )
        yield name, module


def _pissa(weight_OI: torch.Tensor, rank: int, scale: float) -> Pair:
    """A0 [R, I] and B0 [O, R] with s B0 A0 the best approximation of the weight that rank R allows."""
    rank = _rank(weight_OI, rank)
    U, S, V = torch.linalg.svd(weight_OI, full_matrices=False)
    root_R = (S[:rank] / scale).sqrt()
    return root_R[:, None] * V[:rank], U[:, :rank] * root_R


def _olora(weight_OI: torch.Tensor, rank: int, _scale: float) -> Pair:
    """The first R rows of R and columns of Q, from W = Q R."""
    rank = _rank(weight_OI, rank)
    Q, R = torch.linalg.qr(weight_OI)
    return R[:rank].contiguous(), Q[:, :rank].contiguous()


def _rank(weight_OI: torch.Tensor, rank: int) -> int:
    if rank > min(weight_OI.shape):
        raise ConfigError(
            f"lora.r: {rank} is more than a layer of {weight_OI.shape[0]} x {weight_OI.shape[1]} has; lora.init: pissa, "
            "olora and loftq need an r of at most the smaller side"
        )
    return rank


def _held(base: Any, name: str = "a layer with an adapter") -> torch.Tensor:
    """What 4 bits made of a weight, fp32 [O, I]."""
    from fastft.model import fused_lora

    if getattr(base.weight, "quant_state", None) is None:
        raise ConfigError(
            f"lora.init: loftq is for layers held in 4 bits, and {name} is not; leave it without an adapter (a vision tower:"
            " vision.learn.tower=frozen), or use init: default"
        )
    return fused_lora.weight_of(base, torch.float32)


class _Stored:
    """The weights of a checkpoint, read one at a time.

    Args:
        folder: holds the safetensors files.
        in_parts: they are those of a LLaVA's language model.
    """

    def __init__(self, folder: Path, *, in_parts: bool = False) -> None:
        from safetensors import safe_open

        self.in_parts = in_parts
        self.files: dict[str, Any] = {}  # the open file of each name
        for path in sorted(folder.glob("*.safetensors")):
            file: Any = safe_open(path, framework="pt")
            self.files |= dict.fromkeys(file.keys(), file)
        if any(".quant_state." in name for name in self.files):
            raise ConfigError("lora.init: loftq needs the 16-bit checkpoint to see what 4 bits lose; this one is 4-bit")

    def read(self, layer: str, shape: torch.Size) -> torch.Tensor:
        """The weight of a layer, fp32.

        Raises:
            CheckpointError: it does not stand in the files under this name, or has another shape.
        """
        name = f"{layer.replace('model.language_model.', 'model.', 1) if self.in_parts else layer}.weight"
        weight: torch.Tensor | None = self.files[name].get_tensor(name) if name in self.files else None
        if weight is None or weight.shape != shape:
            raise CheckpointError(
                f"lora.init: loftq finds no {layer}.weight of {tuple(shape)} in the checkpoint's files"
            )
        return weight.float()
