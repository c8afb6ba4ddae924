"""`--is-clip`: an adapter of a CLIP vision tower onto a whole CLIP or onto a tower; the result is the tower alone.

XTuner trains the visual encoder of its LLaVA models as a CLIPVisionModel and merges it so. What is left of a whole
CLIP is `vision_model.*`, its vision part of config.json (spec/formats.md 6.4) and the image processor.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastft.convert.folder import Checkpoint
from fastft.convert.matching import CLIP_CLASS
from fastft.errors import PlanError

VISION_TYPE = "clip_vision_model"
_KINDS = ("clip", VISION_TYPE)
PREFIX = "vision_model."
# Saved by transformers before 4.31: the numbers from 0 on, which are no weights.
_COUNTERS = ("embeddings.position_ids",)
_DTYPE_KEYS = ("dtype", "torch_dtype")


def vision_tower(base: Checkpoint) -> Checkpoint:
    """Keep the tensors of the vision tower.

    Raises:
        PlanError: the folder is no CLIP.
    """
    kind = base.config.get("model_type")
    if kind not in _KINDS:
        raise PlanError(
            f"{base.folder}: --is-clip is for {' and '.join(_KINDS)}, this is {kind!r}; use --model-class for other towers"
        )
    whole = kind == _KINDS[0]
    tensors = {
        name: source
        for name, source in base.tensors.items()
        if (not whole or name.startswith(PREFIX)) and not name.endswith(_COUNTERS)
    }
    if not tensors:
        raise PlanError(f"{base.folder}: no tensor of it starts with {PREFIX!r}; it holds no vision tower")
    return replace(base, tensors=tensors)


def vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Make the config.json of the tower from that of the whole; a tower's own stays as it is."""
    if config.get("model_type") != _KINDS[0]:
        return dict(config)
    # Old files have both; transformers lets the second win.
    parts = [config.get(key) for key in ("vision_config", "vision_config_dict")]
    vision = {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}
    for key in (*_DTYPE_KEYS, "transformers_version"):
        if vision.get(key) is None:
            vision.pop(key, None)
            if config.get(key) is not None:
                vision[key] = config[key]
    return {**vision, "architectures": [CLIP_CLASS], "model_type": VISION_TYPE}
