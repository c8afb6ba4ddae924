"""The kinds of PEFT adapters beside LoRA: which can be merged, what they touch, and why the rest cannot.

Facts only: read by `adapter` when a folder is opened and by `names` when its tensors are given to modules; the
arithmetic is PEFT's own (`peft_layers`). Checked against peft 0.21.2: each kind of `KINDS` merges one module at a time to
the very bits of `merge_and_unload` on the whole model (tests/unit/test_convert_peft_layers.py).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Settings that say where or how an adapter was trained, not what it computes.
WHERE = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode", "layers_pattern",
        "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "revision", "target_modules",
        "task_type",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """What must be known of a kind of adapter before PEFT is asked.

    Attributes:
        weight: its merge changes the weight of a module.
        bias: whether its merge changes the bias of a module, by the settings and the module's path.
        cut: gives the part of a tensor shared by all modules (or a copy of it) that a module of so many outputs and
            inputs uses: key, tensor, out, in; None: nothing is shared, or the whole of it is used.
        shared: names of the tensors that belong to all modules.
        needs_projection: refused without `save_projection`: the projection comes from torch's random numbers, drawn
            for the largest module of the whole model.
    """

    weight: bool = True
    bias: Callable[[Mapping[str, Any], str], bool] = lambda _settings, _path: False
    cut: "Callable[[str, Tensor, int, int], Tensor] | None" = None
    shared: tuple[str, ...] = ()
    needs_projection: bool = False


def _is_no_feedforward(settings: Mapping[str, Any], path: str) -> bool:
    """IA3 scales the outputs, with their bias, of all modules but the feedforward ones, whose inputs it scales."""
    stated = settings.get("feedforward_modules") or []
    if isinstance(stated, str):
        return re.fullmatch(stated, path) is None
    return not any(path.endswith(end) for end in stated)


def _always(_settings: Mapping[str, Any], _path: str) -> bool:
    return True


def _vera_part(key: str, tensor: "Tensor", num_out: int, num_in: int) -> "Tensor":
    """VeRA's layers use the first columns of A (r, largest in) and the first rows of B (largest out, r)."""
    return tensor[:, :num_in] if key.endswith("_A") else tensor[:num_out]


def _randlora_part(key: str, tensor: "Tensor", num_out: int, num_in: int) -> "Tensor":
    """RandLora's use A (r, 1, smaller side) and B (larger side, bases, r), with as many bases as give full rank."""
    smaller, larger = sorted((num_out, num_in))
    if key.endswith("randlora_A"):
        return tensor[:, :, :smaller]
    if key.endswith("randlora_B"):
        return tensor[:larger, : -(-smaller // tensor.shape[2])]
    return tensor


KINDS: dict[str, Kind] = {
    "ADALORA": Kind(),
    "BEFT": Kind(weight=False, bias=_always),
    "BOFT": Kind(),
    "C3A": Kind(),
    "DEFT": Kind(),
    "DELORA": Kind(),
    "FOURIERFT": Kind(),
    "GLORA": Kind(bias=_always),
    "GRALORA": Kind(),
    "HIRA": Kind(),
    "HRA": Kind(),
    "IA3": Kind(bias=_is_no_feedforward),
    "LOHA": Kind(),
    "LOKR": Kind(),
    "MISS": Kind(),
    "OFT": Kind(),
    "PEANUT": Kind(),
    "PVERA": Kind(cut=_vera_part, shared=("base_model.pvera_A", "base_model.pvera_B"), needs_projection=True),
    "RANDLORA": Kind(
        cut=_randlora_part, shared=("base_model.randlora_A", "base_model.randlora_B"), needs_projection=True
    ),
    "ROAD": Kind(bias=_always),
    "SHIRA": Kind(),
    "SUPERTUNING": Kind(),
    "VBLORA": Kind(shared=("base_model.vblora_vector_bank",)),
    "VERA": Kind(cut=_vera_part, shared=("base_model.vera_A", "base_model.vera_B"), needs_projection=True),
    "WAVEFT": Kind(),
}
# Kinds whose tensors stand for tensors or rows of the base, which needs no arithmetic.
REPLACING = frozenset(("LN_TUNING", "TRAINABLE_TOKENS"))

_NO_WEIGHTS = "adds inputs or activations, not weights, so there is no merged form; serve it with PEFT beside its base"
_BY_INPUT = "acts differently for each input, so there is no merged form; serve it with PEFT beside its base"
_WHOLE_MODEL = (
    "shares its parameters over the whole model, so it cannot be merged module by module; load the model with PEFT and"
    " save its merge_and_unload"
)
_SPLIT_BASE = (
    "splits the base by an SVD when it is loaded, which another machine does otherwise; save the merged model from the"
    " training"
)
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING",
            "PROMPT_TUNING",
        ),
        _NO_WEIGHTS,
    ),
    **dict.fromkeys(("LILY", "POLY", "SHADOW", "XLORA"), _BY_INPUT),
    **dict.fromkeys(("ADAMSS", "FROD", "TINYLORA", "UNILORA"), _WHOLE_MODEL),
    **dict.fromkeys(("OSF", "PSOFT"), _SPLIT_BASE),
    "BONE": "is not read by today's PEFT any more (MISS took its place); merge it with the PEFT that trained it",
}  # fmt: skip
