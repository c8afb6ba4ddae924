"""What a plan is made of: the run's config and the base's config.json; no weights.

A model on a hub is asked for its small files only. InternLM, which fastft reads as Llama, is planned as Llama.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastft import stop
from fastft.config import schema
from fastft.errors import ConfigError
from fastft.model import folder_check, quantization
from fastft.model import load as model_load
from fastft.plan.accounting import Subject

_LAID_OUT_AS_LLAMA = ("internlm", "internlm2")


def read(config: schema.Config, *, on_gpu: bool = True, has_bf16: bool = True) -> Subject:
    """The subject of a config; see `of_json`.

    Raises:
        HubError: the model is not found.
        CheckpointError: its config.json cannot be read.
        ConfigError: it cannot be planned.
    """
    from fastft.hub import locate

    # `random` asks a hub for everything but the weights.
    folder = Path(locate.model(config.model.model_copy(update={"init": "random"})))
    return of_json(config, model_load.read_config(folder), on_gpu=on_gpu, has_bf16=has_bf16)


def of_json(
    config: schema.Config, config_json: Mapping[str, Any], *, on_gpu: bool = True, has_bf16: bool = True
) -> Subject:
    """The subject of a config and the content of a config.json.

    Raises:
        ConfigError: transformers has no class for the model, or it is no text model.
    """
    kind = str(config_json.get("model_type", "unknown"))
    if kind in _LAID_OUT_AS_LLAMA:
        from fastft.convert import layout

        to_llama = layout.llama_config if kind == "internlm2" else layout.llama_config_of_v1
        config_json = to_llama(config_json)
        kind = "llama"
    model_config = _read_as(config, kind, config_json)
    if model_config.get_text_config() is not model_config:
        raise ConfigError(f"plan: a model of type {kind} reads more than text; only text models are planned")
    stored = quantization.of_checkpoint(config_json, config.model.name)
    if stored is not None and not config.method.has_adapter:
        raise ConfigError(
            f"method: {config.method.kind} cannot train a 4-bit checkpoint; use method qlora, or the 16-bit checkpoint"
        )
    if config.task == "reward":
        model_config.num_labels, model_config.pad_token_id = 1, 0
    return Subject(config, model_config, _dtype(config_json), stored, on_gpu, has_bf16)


def _read_as(config: schema.Config, kind: str, config_json: Mapping[str, Any]) -> Any:
    import json

    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    if kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"plan, model {config.model.name}: transformers has no text model of type {kind}, and code that comes with a "
            "model is not run for a plan (model.trust_remote_code: true holds for train and chat)"
        )
    if config.task == "reward" and kind not in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise ConfigError(f"plan: transformers has no classifier of type {kind}, so no reward model is made of it")
    with stop.held(), tempfile.TemporaryDirectory() as folder:
        content = {key: value for key, value in config_json.items() if key != "auto_map"}
        (Path(folder) / "config.json").write_text(json.dumps(content))
        with folder_check.library_errors(f"model {config.model.name}: config.json cannot be read"):
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def _dtype(config_json: Mapping[str, Any]) -> Any:
    """The dtype that config.json names; bf16 where it names none."""
    import torch

    text_config = config_json.get("text_config") or {}
    named = config_json.get("dtype") or config_json.get("torch_dtype") or text_config.get("dtype")
    found = getattr(torch, str(named).removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16
