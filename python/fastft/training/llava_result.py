"""The result of training a LLaVA that was put together from parts: its parts again, each where XTuner's tool writes it.

    llava/
      llm_adapter/              what the language model learned, a PEFT adapter for it alone; or its whole weights in llava/
      visual_encoder_adapter/   what the tower learned, a PEFT adapter for a CLIPVisionModel; or visual_encoder/, all of it
      projector/                config.json (model_type projector), model.safetensors
      tokenizer, processor, chat template, fastft_training.json

(spec/formats.md 7.3). A folder lacks what was not trained. `convert merge LLM llava OUT` makes one folder of them and the
parts that they were trained on; `chat LLM --llava llava` puts them together in memory.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastft.config import schema
from fastft.convert import llava as parts
from fastft.model import llava, lora_start
from fastft.model.load import Loaded
from fastft.training import record

NAME = "llava"
_LLM = "model.language_model."
_TOWER = "model.vision_tower."
_PROJECTOR = "model.multi_modal_projector."
_PREFIX = "base_model.model."
_WHOLE = ".modules_to_save."


def write(
    config: schema.Config,
    loaded: Loaded,
    folder: Path,
    about: Mapping[str, Any],
    weights: Mapping[str, Any] | None = None,
) -> None:
    """Write the trained parts.

    Args:
        config: of the run.
        loaded: the trained model.
        folder: exists and is empty.
        about: the run's record; the language model's adapter gets it too, for its merge.
        weights: the state dict, where the model holds only a part of each weight.
    """
    assert config.vision is not None
    learn = config.vision.learn
    state = _trained_state(loaded.model, weights)
    state = lora_start.doubled(state, loaded.model) if lora_start.changed_base(loaded.model) else state
    projector = {
        f"{ours}.{kind}": state[f"{_PROJECTOR}{theirs}.{kind}"]
        for ours, theirs in parts.PROJECTOR_LAYERS.items()
        for kind in ("weight", "bias")
        if f"{_PROJECTOR}{theirs}.{kind}" in state
    }
    if not projector:
        projector = llava.projector_tensors(_plain(loaded.model))
    llava.save_projector(projector, folder / parts.PROJECTOR)
    if learn.llm == "method" and config.method.has_adapter:
        place = folder / parts.LLM_ADAPTER
        named = {f"model.{name.removeprefix(_LLM)}": tensor for name, tensor in state.items() if name.startswith(_LLM)}
        named |= {name: tensor for name, tensor in state.items() if name.startswith("lm_head.")}
        assert config.method.lora is not None
        _write_adapter(place, named, loaded, config.method.lora, loaded.base.name, task_type="CAUSAL_LM")
        record.write(place, about)
    elif learn.llm == "method":
        _write_language_model(loaded, folder, state)
    if learn.tower_lora is not None and not config.method.has_adapter:
        state = _adapters_of(loaded.model, state)
    tower = {name.removeprefix(_TOWER): tensor for name, tensor in state.items() if name.startswith(_TOWER)}
    if learn.tower_lora is not None:
        assert config.vision.tower is not None
        name = str(_known_name(config.vision.tower))
        _write_adapter(folder / parts.TOWER_ADAPTER, tower, loaded, learn.tower_lora, name, task_type=None)
    elif learn.tower == "full":
        _write_tower(config, loaded, folder / parts.TOWER, tower)


def about_parts(config: schema.Config) -> dict[str, Any]:
    """What the record says of the parts, so that a chat or a merge finds the tower."""
    assert config.vision is not None
    assert config.vision.tower is not None
    return {"visual_encoder": str(_known_name(config.vision.tower)), "select_layer": config.vision.select_layer}


def _known_name(tower: str) -> str | Path:
    """The absolute folder of a tower that lies here, or its id on the hub."""
    folder = Path(tower).expanduser()
    return folder.resolve() if folder.is_dir() else tower


def _plain(model: Any) -> Any:
    """The model without its adapters' wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _trained_state(model: Any, weights: Mapping[str, Any] | None) -> dict[str, Any]:
    """What was trained by the names of the whole model: adapters as peft saves them, weights as they are called."""
    if hasattr(model, "get_base_model"):
        from peft import get_peft_model_state_dict

        given = {} if weights is None else {"state_dict": dict(weights)}
        saved = get_peft_model_state_dict(model, save_embedding_layers=False, **given)
        return {name.removeprefix(_PREFIX): tensor for name, tensor in saved.items()}
    return dict(model.state_dict() if weights is None else weights)


def _adapters_of(model: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """The adapters in a model that is trained whole beside them, by the names that peft saves."""
    from peft import get_peft_model_state_dict

    named: dict[str, Any] = get_peft_model_state_dict(model, state_dict=dict(state), save_embedding_layers=False)
    return named


def _write_adapter(
    place: Path,
    tensors: Mapping[str, Any],
    loaded: Loaded,
    lora: schema.Lora,
    base_name: str,
    *,
    task_type: str | None,
) -> None:
    """Write an adapter for one part alone."""
    from safetensors.torch import save_file

    place.mkdir()
    named = {f"{_PREFIX}{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(named, place / "adapter_model.safetensors", metadata={"format": "pt"})
    config: Any = loaded.model.peft_config["default"]
    marks = (".lora_A.", ".lora_B.", ".lora_magnitude_vector", ".lora_embedding_A", ".lora_embedding_B")
    targets = {name[: name.index(mark)].rpartition(".")[2] for name in tensors for mark in marks if mark in name}
    whole = {name.rpartition(".")[0].rpartition(".")[2] for name in tensors if not any(mark in name for mark in marks)}
    settings = {
        **config.to_dict(),
        "alpha_pattern": {},
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "modules_to_save": sorted(whole) or None,
        "r": lora.r,
        "rank_pattern": {},
        "target_modules": sorted(targets),
        "task_type": task_type,
    }
    if lora_start.changed_base(loaded.model):
        settings |= lora_start.plain_settings(settings)
    text = json.dumps({key: _as_json(value) for key, value in settings.items()}, indent=2, sort_keys=True)
    (place / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


def _as_json(value: Any) -> Any:
    """A setting as JSON holds it: words of peft's enumerations as text, sets in order."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)


def _write_language_model(loaded: Loaded, folder: Path, state: Mapping[str, Any]) -> None:
    """Write the language model, trained whole, as a folder of its own class."""
    import torch
    from transformers import AutoModelForCausalLM

    model = _plain(loaded.model)
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(model.config.text_config)
    setattr(language, language.base_model_prefix, model.model.language_model)
    language.lm_head = model.lm_head
    language.generation_config = model.generation_config
    named = {f"model.{name.removeprefix(_LLM)}": tensor for name, tensor in state.items() if name.startswith(_LLM)}
    named |= {name: tensor for name, tensor in state.items() if name.startswith("lm_head.")}
    language.config.use_cache = True
    language.save_pretrained(folder, state_dict=named)


def _write_tower(config: schema.Config, loaded: Loaded, place: Path, tower: Mapping[str, Any]) -> None:
    """Write the vision tower, trained whole, with its own image processor."""
    from transformers import AutoImageProcessor

    model = _plain(loaded.model).model.vision_tower
    model = getattr(model, "original_module", model)
    model.save_pretrained(place, state_dict=dict(tower))
    AutoImageProcessor.from_pretrained(llava.locate_tower(config)).save_pretrained(place)
