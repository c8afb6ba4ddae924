"""The vision tower of a CLIP model: what `convert merge --is-clip` merges an adapter into.

A full CLIP folder (openai/clip-vit-large-patch14-336) holds a text model beside it; an adapter trained on
CLIPVisionModel, as in LLaVA, belongs to the tensors under `vision_model.` alone. What is written is a folder that
CLIPVisionModel loads.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastft.convert.folder import Checkpoint
from fastft.errors import PlanError

PREFIX = "vision_model."
VISION_TYPE = "clip_vision_model"
# A buffer that older versions of transformers saved; it is counted out, not trained.
_BUFFER = "vision_model.embeddings.position_ids"


def vision_part(base: Checkpoint) -> Checkpoint:
    """Take the vision tower out of a full CLIP folder; a folder of a tower alone is given back with its buffer gone.

    Raises:
        PlanError: the folder holds no CLIP vision tower.
    """
    tensors = {name: source for name, source in base.tensors.items() if name.startswith(PREFIX) and name != _BUFFER}
    kind = base.config.get("model_type")
    if kind not in ("clip", VISION_TYPE) or not tensors:
        raise PlanError(f"{base.folder}: --is-clip needs a CLIP model or its vision tower; its model_type is {kind!r}")
    return replace(base, config=_vision_config(base.config), tensors=tensors)


def _vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Make the config of the tower the top level."""
    if config.get("model_type") == VISION_TYPE:
        return dict(config)
    vision = config.get("vision_config")
    if not isinstance(vision, dict):
        raise PlanError("config.json: no vision_config in it; give a CLIP model's folder")
    dtypes = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
    return {**vision, **dtypes, "model_type": VISION_TYPE, "architectures": ["CLIPVisionModel"]}
