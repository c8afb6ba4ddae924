"""The parts of a vision-language model, and which of them a run trains.

Models are read by their own classes (`AutoModelForImageTextToText`). Each has a language model, a vision tower and a
projector between them; what these are called is looked up in the model itself.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastft import console
from fastft.config import schema
from fastft.errors import ConfigError

# Names of the parts inside `model.`; of a tower that holds its projector (Qwen-VL), the projector's names inside it.
TOWERS = ("vision_tower", "visual", "vision_model")
PROJECTORS = ("multi_modal_projector", "connector", "aligner")
INNER_PROJECTORS = ("merger", "deepstack_merger_list")


@dataclass(frozen=True)
class Parts:
    """Names of modules, from the top of the model.

    Attributes:
        llm: the language model and its head.
        projector: what turns features into embeddings.
        tower: the vision tower.
    """

    llm: tuple[str, ...]
    projector: tuple[str, ...]
    tower: tuple[str, ...]

    def of(self, name: str) -> str:
        """Which part a module or weight belongs to: llm, projector or tower."""
        for part in ("projector", "tower"):  # Qwen's projector lies inside the tower
            if any(name == place or name.startswith(f"{place}.") for place in getattr(self, part)):
                return part
        return "llm"


def sees(config_json: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is a vision-language model."""
    return "vision_config" in config_json and not str(config_json.get("model_type", "")).startswith("clip")


def model_class() -> Any:
    """What transformers makes of such a checkpoint."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText


def image_token_id(model_config: Any) -> int:
    """The id that the model replaces by features.

    Raises:
        ConfigError: the config names none.
    """
    for name in ("image_token_id", "image_token_index"):
        found = getattr(model_config, name, None)
        if isinstance(found, int):
            return found
    raise ConfigError(f"vision: a model of type {model_config.model_type} does not say which token stands for images")


def require(config: schema.Config, config_json: Mapping[str, Any]) -> None:
    """Refuse a config whose `vision` does not fit its model.

    Raises:
        ConfigError: saying what to set.
    """
    kind = config_json.get("model_type", "unknown")
    vision = config.vision
    if vision is None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if sees(config_json) and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ConfigError(
                f"model {config.model.name}: {kind} is a vision-language model; set vision={{}} (rows without images are "
                "fine too)"
            )
        return
    if vision.tower is None and not sees(config_json):
        raise ConfigError(
            f"vision: model {config.model.name} ({kind}) reads text only; use a vision-language model, or set "
            "vision.tower to a CLIP to make a LLaVA of both"
        )
    if vision.tower is not None and sees(config_json):
        raise ConfigError(f"vision.tower: model {config.model.name} ({kind}) has a tower of its own; remove it")
    if config.model.trust_remote_code and config_json.get("auto_map"):
        console.note("vision: the model is read by transformers' own class, its remote code is not run")


def parts(model: Any) -> Parts:
    """The parts of a loaded model.

    Raises:
        ConfigError: they cannot be told.
    """
    inner = model.model if hasattr(model, "model") else model
    before = "model." if hasattr(model, "model") else ""
    towers = [name for name in TOWERS if hasattr(inner, name)]
    projectors = [f"{before}{name}" for name in PROJECTORS if hasattr(inner, name)]
    for tower in towers:
        projectors += [f"{before}{tower}.{name}" for name in _inner_projectors(getattr(inner, tower))]
    if not towers or not projectors or not hasattr(inner, "language_model"):
        raise ConfigError(
            f"vision: the parts of {type(model).__name__} are unknown; it cannot be trained on images yet"
        )
    head = ("lm_head",) if hasattr(model, "lm_head") else ()
    return Parts((f"{before}language_model", *head), tuple(projectors), tuple(f"{before}{name}" for name in towers))


def _inner_projectors(tower: Any) -> list[str]:
    """Names of the projectors in a tower; of a list of them each one, for a list cannot be wrapped."""
    from torch import nn

    names: list[str] = []
    for name in INNER_PROJECTORS:
        module = getattr(tower, name, None)
        if isinstance(module, nn.ModuleList):
            names += [f"{name}.{index}" for index in range(len(module))]
        elif module is not None:
            names.append(name)
    return names


def unquantized(model_config: Any) -> list[str]:
    """Modules that stay as they are in a 4-bit base: the head, tower and projector.

    They are small, they are what learns to see, and bitsandbytes' CPU code gets some widths of theirs wrong.
    """
    import copy

    import torch

    with torch.device("meta"):
        found = parts(model_class().from_config(copy.deepcopy(model_config)))
    return ["lm_head", *found.projector, *found.tower]


def lora_settings(model: Any, lora: schema.Lora, learn: schema.Learn) -> dict[str, Any]:
    """Peft's settings that say where adapters go and what is trained whole beside them.

    `all-linear` means those of the language model; the tower's come with `tower: lora`.
    """
    found = parts(model)
    patterns: list[str] = []
    if learn.llm == "method":
        patterns += _targets(model, found, "llm", lora)
    whole = list(lora.modules_to_save)
    if learn.projector == "full":
        whole += found.projector
    if learn.tower == "full":
        if _holds_projector(found) and learn.projector == "frozen":
            raise ConfigError(
                "vision.learn.tower: full: this model's tower holds its projector, and an adapter keeps both or none; set "
                "vision.learn.projector: full too, or tower: lora"
            )
        # A tower that holds its projector is saved with it.
        whole = [name for name in whole if found.of(name) != "projector"] if _holds_projector(found) else whole
        whole += found.tower
    settings: dict[str, Any] = {}
    if learn.tower_lora is not None:
        tower = _targets(model, found, "tower", learn.tower_lora)
        patterns += tower
        settings["rank_pattern"] = dict.fromkeys(tower, learn.tower_lora.r)
        settings["alpha_pattern"] = dict.fromkeys(tower, learn.tower_lora.alpha)
    # Peft wants adapters somewhere; by this name it knows that what is trained whole is all.
    settings["target_modules"] = "|".join(patterns) or "dummy-target-modules"
    settings["modules_to_save"] = whole or None
    return settings


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter, by its name."""
    return ".lora_" in name


def freeze(model: Any, learn: schema.Learn) -> None:
    """Take the gradient from the parts that method full does not train; adapters of the tower keep theirs."""
    found = parts(model)
    trained = {
        "llm": learn.llm == "method",
        "projector": learn.projector == "full",
        "tower": learn.tower == "full",
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[found.of(name)] or is_adapter(name))


def freeze_unused(model: Any) -> None:
    """Take the gradient from the layers of a tower behind the one whose features are taken: none would ever come.

    Processes that train together wait for the gradient of each weight that can have one.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    chosen = getattr(base.config, "vision_feature_layer", None)
    used = chosen if isinstance(chosen, list) else [chosen] if isinstance(chosen, int) else []
    layers = getattr(base.config.vision_config, "num_hidden_layers", None)
    if not used or not isinstance(layers, int):
        return
    # The features of layer n come out of the first n layers; counted from the end, -1 is the last one's.
    num_used = max(layer if layer >= 0 else layers + 1 + layer for layer in used)
    behind = (
        re.compile(rf"\.encoder\.layers?\.({'|'.join(map(str, range(num_used, layers)))})\.")
        if num_used < layers
        else None
    )
    for name, parameter in base.named_parameters():
        if any(f"{tower}." in name for tower in TOWERS) and (
            (behind is not None and behind.search(name)) or "post_layernorm" in name or ".head." in name
        ):
            parameter.requires_grad_(False)


def trains_vision(learn: schema.Learn) -> bool:
    """Whether weights are trained that a batch without images does not touch."""
    return learn.projector == "full" or learn.tower != "frozen"


def describe(learn: schema.Learn, method: str) -> str:
    """What is trained, for the start of a run."""
    llm = method if learn.llm == "method" else "frozen"
    return f"language model {llm}, projector {learn.projector}, tower {learn.tower}"


def _holds_projector(found: Parts) -> bool:
    return any(name.startswith(f"{tower}.") for name in found.projector for tower in found.tower)


def _targets(model: Any, found: Parts, part: str, lora: schema.Lora) -> list[str]:
    """Regular expressions of the module names of a part that get adapters."""
    from torch import nn

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    own = [name for name in linears if found.of(name) == part and name != "lm_head"]
    if lora.targets != "all-linear":
        own = [name for name in own if any(name == t or name.endswith(f".{t}") for t in lora.targets)]
        if not own:
            raise ConfigError(
                f"lora.targets: {', '.join(lora.targets)}: no linear layer of the {'vision tower' if part == 'tower' else 'language model'} "
                "is called so"
            )
    roots = found.llm if part == "llm" else found.tower
    ends = sorted({name.rsplit(".", 1)[-1] for name in own})
    patterns = []
    for root in roots:
        inside = [name for name in own if name.startswith(f"{root}.")]
        if not inside:
            continue
        middle = r"(?!(?:" + "|".join(INNER_PROJECTORS) + r")\.)" if part == "tower" else ""
        patterns.append(rf"{re.escape(root)}\.{middle}(?:.*\.)?(?:{'|'.join(map(re.escape, ends))})")
    return patterns
