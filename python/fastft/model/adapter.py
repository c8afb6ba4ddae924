"""Low-rank adapters on a frozen base, by peft.

The schema's `lora` block becomes a peft LoraConfig. Adapters are always fp32: AdamW's small late steps are lost in
bf16 weights, and the 6 bytes more per adapter weight are little (spec training.md 2).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastft import spelling
from fastft.config import schema
from fastft.errors import ConfigError
from fastft.model import vision

if TYPE_CHECKING:
    from torch import nn


def lora_config(
    lora: schema.Lora, base_name: str, task: schema.Task = "sft", where: Mapping[str, Any] | None = None
) -> Any:
    """Peft's LoraConfig for a schema block; `base_name` is what adapter_config.json will say the base is.

    `where` says in peft's terms where adapters go, instead of `lora.targets` (from `vision.lora_settings`).

    Starts that are ours (`lora_start`) are plain to peft: what is saved loads and merges like any adapter.
    """
    from peft import LoraConfig

    places: dict[str, Any] = {
        "target_modules": lora.targets if lora.targets == "all-linear" else list(lora.targets),
        "modules_to_save": list(lora.modules_to_save) or None,
    }
    return LoraConfig(
        task_type="SEQ_CLS" if task == "reward" else "CAUSAL_LM",
        base_model_name_or_path=base_name,
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
        bias="none",
        **(places if where is None else where),
    )


def attach(
    model: Any,
    lora: schema.Lora,
    base_name: str,
    task: schema.Task = "sft",
    learn: schema.Learn | None = None,
) -> Any:
    """Freeze `model` and put trainable fp32 adapters on it.

    peft.prepare_model_for_kbit_training is never called: it would turn all 16-bit weights, embeddings included, into
    fp32 (up to 2 GiB on a 7B model, spec training.md trap C). Its hook for the inputs' gradients is needed for
    reentrant checkpointing only, which fastft does not use.

    Args:
        model: of transformers.
        lora: where adapters go, and how large they are.
        base_name: what adapter_config.json calls the base.
        task: of the run.
        learn: which parts of a vision-language model are trained; None for one that reads text only.

    Returns:
        the PeftModel; its adapter weights and `modules_to_save` are fp32 and the only weights with a gradient.

    Raises:
        ConfigError: a name in `targets` or `modules_to_save` is no module of this model.
    """
    from peft import get_peft_model

    _check_names(model, "lora.targets", () if lora.targets == "all-linear" else lora.targets)
    _check_names(model, "lora.modules_to_save", lora.modules_to_save)
    where = None if learn is None else vision.lora_settings(model, lora, learn)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    config = lora_config(lora, base_name, task, where)
    # peft writes the folder the model was loaded from; a base that was laid out anew must be known by its own name.
    model.name_or_path = base_name
    adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    _train_in_fp32(adapted)
    return adapted


def attach_to_tower(model: Any, base_name: str, learn: schema.Learn) -> None:
    """Put adapters into the vision tower of a LLaVA whose other parts are trained whole; which weights learn is set after.

    The model stays the class that it is, so that its checkpoints hold it whole, adapters included.

    Args:
        model: of transformers.
        base_name: what adapter_config.json calls the base.
        learn: with `tower_lora`.

    Raises:
        ConfigError: a name in its `targets` is no module of the tower.
    """
    from peft import inject_adapter_in_model

    assert learn.tower_lora is not None
    tower_alone = learn.model_copy(update={"llm": "frozen", "projector": "frozen"})
    where = vision.lora_settings(model, learn.tower_lora, tower_alone)
    inject_adapter_in_model(lora_config(learn.tower_lora, base_name, "sft", where), model)
    for name, parameter in model.named_parameters():
        if vision.is_adapter(name):
            parameter.data = parameter.data.float()


def _train_in_fp32(adapted: Any) -> None:
    """Make whole trained modules fp32 like the adapters; what goes in and comes out keeps the base's dtype."""
    import torch
    from peft.utils import ModulesToSaveWrapper
    from transformers.utils import ModelOutput

    def cast(value: Any, dtype: torch.dtype) -> Any:
        """Floating tensors in another dtype; a vision tower gives and takes tuples and mappings of them."""
        if isinstance(value, torch.Tensor):
            return value.to(dtype) if value.is_floating_point() else value
        if isinstance(value, ModelOutput):
            return type(value)(**{name: cast(part, dtype) for name, part in value.items()})
        if type(value) in {tuple, list}:
            return type(value)(cast(part, dtype) for part in value)
        return value

    def enter(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return cast(inputs, torch.float32), {name: cast(value, torch.float32) for name, value in named.items()}

    for wrapper in adapted.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        for module in wrapper.modules_to_save.values():
            dtype = next(module.parameters()).dtype
            if dtype == torch.float32:
                continue

            def leave(_module: Any, _inputs: Any, output: Any, dtype: torch.dtype = dtype) -> Any:
                return cast(output, dtype)

            module.float()
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave)


def count_weights(model: "nn.Module") -> tuple[int, int]:
    """Number of trained weights and of all weights; a 4-bit weight counts as one."""
    trained = total = 0
    for module in model.modules():
        total += int(getattr(module, "num_weights", 0))  # held outside of parameters(): memory.embedding, memory.head
    for parameter in model.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        num = parameter.numel()
        if shape is not None:
            num = 1
            for length in shape:
                num *= length
        total += num
        trained += num if parameter.requires_grad else 0
    return trained, total


def _check_names(model: "nn.Module", field: str, wanted: tuple[str, ...]) -> None:
    names = {name for name, _ in model.named_modules() if name}
    ends = {name.rsplit(".", 1)[-1] for name in names}
    for name in wanted:
        if name in ends or any(full == name or full.endswith(f".{name}") for full in names):
            continue
        near = spelling.nearest(name, sorted(ends), n=1)
        hint = f"did you mean {near[0]}?" if near else f"modules here: {', '.join(sorted(ends - _digits(ends)))}"
        raise ConfigError(f"{field}: {name} is no module of this model; {hint}")


def _digits(names: set[str]) -> set[str]:
    return {name for name in names if name.isdigit()}
