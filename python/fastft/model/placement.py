"""Where each weight goes while a checkpoint is read, so that what shall wait in RAM never comes to the device.

transformers reads and quantizes tensor by tensor, so a base that is quantized on the way never takes more than its own
size and one tensor in 16 bit. Given several devices it would go on to hook the modules on the CPU, to copy their weights
at each forward; fastft puts modules of its own there instead, so those hooks are left out. Left out too is the allocation
of the whole model in advance as one block, of which a small card keeps the gaps.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastft.config import schema


def device_map(memory: schema.Memory, model_config: Any, device: str, model_class: Any = None) -> dict[str, str]:
    """Module names and devices for transformers' `device_map`.

    Args:
        memory: the switches asked for.
        model_config: transformers' config of the model.
        device: where everything else goes: "cpu", "cuda:0".
        model_class: what reads the model; None: AutoModelForCausalLM.
    """
    places = {"": device}
    wanted = {
        "get_input_embeddings": memory.embedding == "host",
        "get_output_embeddings": memory.head in {"host", "nf4"},
    }
    if device == "cpu" or not any(wanted.values()):
        return places
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = (model_class or AutoModelForCausalLM).from_config(copy.deepcopy(model_config))
    modules = [getattr(skeleton, getter)() for getter, is_wanted in wanted.items() if is_wanted]
    names = [name for name, module in skeleton.named_modules() if any(module is found for found in modules)]
    return {**places, **dict.fromkeys(names, "cpu")}


@contextmanager
def without_offload_hooks() -> Iterator[None]:
    """Let transformers leave modules where the device map puts them, without hooks and without a block in advance."""
    from transformers import modeling_utils

    names = ("accelerate_dispatch", "caching_allocator_warmup")
    own = {name: getattr(modeling_utils, name) for name in names}
    try:
        for name in names:
            setattr(modeling_utils, name, lambda *_args, **_kwargs: None)
        yield
    finally:
        for name, function in own.items():
            setattr(modeling_utils, name, function)
