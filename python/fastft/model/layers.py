"""The repeated blocks of a model: what is sharded, compiled or recomputed one by one."""

from typing import Any

from fastft.errors import ConfigError


def of(model: Any) -> list[Any]:
    """The layers in their order: what transformers says must stay on one device.

    Args:
        model: a transformers model or a PeftModel.

    Raises:
        ConfigError: the model does not say which of its modules are layers.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(getattr(causal_lm, "_no_split_modules", None) or ())
    found = [module for module in causal_lm.modules() if type(module).__name__ in names]
    if not found:
        raise ConfigError(
            f"model: {type(causal_lm).__name__} does not say which of its modules are layers, so it cannot be sharded or "
            "compiled layer by layer; leave distributed.fsdp and accelerate.compile"
        )
    inner = {id(child) for module in found for child in module.modules() if child is not module}
    return [module for module in found if id(module) not in inner]
