"""Learning rates that differ between weights: LoRA+, the embeddings' own rate, and decay from layer to layer.

Trainer makes the optimizer with its groups (with and without weight decay); `split` divides these before the first
step, so that checkpoints hold the finer groups and a resumed run finds them again.

Sources: Hayou et al. 2024 (LoRA+), section 4: B learns faster than A; Howard and Ruder 2018, section 3.2: lower layers
learn slower.
"""

import re
from collections import defaultdict
from typing import Any

from fastft import console
from fastft.config import schema

_LAYER = re.compile(r"\.(?:layers|layer|h|blocks)\.(\d+)\.")
_B_OF_LORA = re.compile(r"\.lora_(?:embedding_)?B\b")


def rates(model: Any, train: schema.Train) -> dict[str, float]:
    """The peak learning rate of each trained weight, by its name.

    An embedding table or head with a rate of its own (`embedding_lr`) keeps it. Without one, the embeddings decay like a
    layer below the first; the last norm and the head are not decayed.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Layers are counted over all weights: with freeze only the last are trained.
    numbers = [int(found.group(1)) for name, _ in model.named_parameters() if (found := _LAYER.search(name))]
    num_layers = max(numbers, default=-1) + 1
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    table, head = _weights(causal_lm.get_input_embeddings()), _weights(causal_lm.get_output_embeddings())
    found_rates = {}
    for name, parameter in trained.items():
        in_table, in_head = id(parameter) in table, id(parameter) in head
        if train.embedding_lr is not None and (in_table or in_head):
            found_rates[name] = train.embedding_lr
            continue
        layer = _LAYER.search(name)
        above = num_layers if in_table else num_layers - 1 - int(layer.group(1)) if layer else 0
        rate = train.lr * train.layer_lr_decay**above
        found_rates[name] = rate * train.lora_plus_ratio if _B_OF_LORA.search(name) else rate
    return found_rates


def split(optimizer: Any, model: Any, train: schema.Train) -> None:
    """Divide the groups of a fresh optimizer by learning rate, and say which there are; one rate changes nothing."""
    by_name = rates(model, train)
    if len(set(by_name.values())) <= 1 and set(by_name.values()) <= {train.lr}:
        _say_idle(train)
        return
    rate_of = {id(parameter): by_name[name] for name, parameter in model.named_parameters() if name in by_name}
    divided = []
    for group in optimizer.param_groups:
        parts: dict[float, list[Any]] = defaultdict(list)
        for parameter in group["params"]:
            parts[rate_of[id(parameter)]].append(parameter)
        divided += [{**group, "params": parameters, "lr": rate} for rate, parameters in parts.items()]
    # The first group's rate is what metrics.jsonl shows: train.lr where a group has it.
    divided.sort(key=lambda group: group["lr"] != train.lr)
    optimizer.param_groups[:] = divided
    sizes: dict[float, int] = defaultdict(int)
    for group in divided:
        sizes[group["lr"]] += sum(parameter.numel() for parameter in group["params"])
    shown = ", ".join(f"{rate:.3g} for {sizes[rate]:,} weights" for rate in sorted(sizes, reverse=True))
    console.note(f"learning rates: {shown}")


def _say_idle(train: schema.Train) -> None:
    asked = [
        name
        for name, idle in (("lora_plus_ratio", 1.0), ("embedding_lr", None), ("layer_lr_decay", 1.0))
        if getattr(train, name) != idle
    ]
    if asked:
        console.warn(f"train.{' and train.'.join(asked)}: no trained weight is concerned; all learn at {train.lr:g}")


def _weights(module: Any) -> set[int]:
    return set() if module is None else {id(parameter) for parameter in module.parameters()}
