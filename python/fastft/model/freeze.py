"""Train only the last decoder layers of a model; everything before and after them stays as it is.

The result is a whole model. Gradients, and AdamW's two moments, are kept for the trained weights alone.
"""

from typing import Any

from fastft import console
from fastft.errors import ConfigError


def freeze(model: Any, trained_layers: int) -> None:
    """Take the gradient from all weights but those of the last layers (and of a reward model's new head).

    Args:
        model: a transformers model.
        trained_layers: how many of its decoder layers are trained, counted from the last.

    Raises:
        ConfigError: the model has fewer layers, or none that can be told.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(f"method: freeze cannot tell the layers of {type(model).__name__}; use method lora or full")
    if trained_layers > len(layers):
        raise ConfigError(f"method.trained_layers: {trained_layers} is more than the model's {len(layers)} layers")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = layers[-trained_layers:]
    if getattr(model, "score", None) is not None:
        trained.append(model.score)
    for module in trained:
        for parameter in module.parameters():
            parameter.requires_grad_(True)
    head = ", and the new head" if len(trained) > trained_layers else ""
    console.note(f"freeze: the last {trained_layers} of {len(layers)} layers are trained{head}; the rest stays")
