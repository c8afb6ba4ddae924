"""fastft_training.json: how a result came to be, for whoever merges or continues it.

Written into the run folder and into adapter/ (or model/). A QLoRA merge reads `quantization`; a merge onto InternLM2
files reads `base.laid_out_from`.
"""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastft import publish
from fastft.config import schema
from fastft.model.load import Loaded

FILE_NAME = "fastft_training.json"
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def describe(config: schema.Config, loaded: Loaded, data: dict[str, int], steps: int) -> dict[str, Any]:
    """The record as plain data.

    Keys: `fastft` (version), `recipe`, `task`, `method`, `seed`, `steps` (planned), `data` (rows, tokens, processes),
    `base` (`name`: hub id or absolute folder; `folder`; `revision`; `model_type`: of the original files;
    `laid_out_from`: "internlm2" when it was read in the Llama layout, so that adapter names are Llama's),
    `llava` (of a LLaVA put together from parts: its tower and the layer that is used),
    `pad_token_id` (of the model in the training; a reward model needs it to score several texts at once),
    `quantization` (None, or how the base was held: model.quantization.Quantized), `memory` (the switches in use:
    model.memory.Switches; head "nf4" means that the adapter learned behind a 4-bit head), `speed` (what made it
    faster: model.speed.Speed), `versions`.
    """
    base = loaded.base
    return {
        "fastft": _version("fastft"),
        "recipe": config.name,
        "task": config.task,
        "method": config.method.kind,
        "seed": config.train.seed,
        "steps": steps,
        "data": data,
        "base": {
            "name": base.name,
            "folder": str(base.folder.resolve()),
            "revision": config.model.revision,
            "model_type": base.laid_out_from or base.config_json.get("model_type"),
            "laid_out_from": base.laid_out_from,
            "dtype": _dtype_of_base(loaded.model),
        },
        **_llava(config),
        "pad_token_id": getattr(loaded.model.config, "pad_token_id", None),  # vision models keep none at the top
        "quantization": None if loaded.quantized is None else loaded.quantized.to_json(),
        "memory": loaded.memory.to_json(),
        "speed": loaded.speed.to_json(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _LIBRARIES},
    }


def _llava(config: schema.Config) -> dict[str, Any]:
    if config.vision is None or config.vision.tower is None:
        return {}
    from fastft.training import llava_result

    return {"llava": llava_result.about_parts(config)}


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record into a folder, atomically."""
    publish.write_text(folder / FILE_NAME, json.dumps(record, indent=2) + "\n")


def _dtype_of_base(model: Any) -> str:
    """The dtype of the weights beside adapters and 4-bit ones; of a model that is trained in full, of its weights."""
    parameters = list(model.parameters())
    frozen = (p for p in parameters if not p.requires_grad and p.dtype.is_floating_point)
    return str(next(frozen, parameters[0]).dtype).removeprefix("torch.")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
