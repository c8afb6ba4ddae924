"""FSDP2: each process holds its part of every weight, gradient and optimizer state (`--fsdp`).

torch's `fully_shard` is called here, on every kind of device alike. accelerate would do it on GPUs only, and on a CPU
train without a word in another way (spec training.md 6); so what the CPU tests see is what a GPU does. Checkpoints and
results are gathered by the first process: they are, name for name, the files of a run that is not sharded.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastft.config import schema
from fastft.errors import ConfigError, TrainingError
from fastft.model import layers
from fastft.training import launch

Full = dict[str, torch.Tensor]


def check(config: schema.Config, processes: int) -> None:
    """Refuse what cannot be sharded.

    Args:
        config: of a run with `distributed.fsdp`.
        processes: that train together.

    Raises:
        ConfigError: the run has one process, or 8-bit optimizer states, which bitsandbytes keeps whole.
    """
    if processes == 1:
        raise ConfigError(
            "distributed.fsdp: there is one process, so nothing can be shared out; add --nproc-per-node N, or leave --fsdp"
        )
    if config.train.optimizer != "adamw":
        raise ConfigError(
            f"distributed.fsdp: train.optimizer {config.train.optimizer} cannot be sharded; use adamw, whose states are "
            "shared out among the processes"
        )


def shard(model: Any, on: torch.device) -> None:
    """Share out the weights of `model` among all processes, layer by layer; they move to `on` as they are.

    Args:
        model: a transformers model or a PeftModel with the same weights in every process. Its `generate` gathers too.
        on: this process's device; the process group exists.
    """
    from torch.distributed import fsdp

    mesh = torch.distributed.device_mesh.init_device_mesh(on.type, (torch.distributed.get_world_size(),))
    for layer in layers.of(model):
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    # Its hooks sit on calls of the module; `generate` calls modules inside it only.
    fsdp.register_fsdp_forward_method(model, "generate")


def is_sharded(model: Any) -> bool:
    """Whether `shard` has been here."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def gathered_weights(model: Any) -> Full | None:
    """The weights of a sharded model on the CPU, in the first process; None in the others. All take part.

    Of a PeftModel only what is trained: its frozen base is in no checkpoint.
    """
    full: Full = {}
    for name, value in _weights(model).items():
        gathered = whole(value)
        if launch.rank() == 0:
            full[name] = gathered.cpu()
        del gathered
    return full if launch.rank() == 0 else None


def load_weights(
    model: Any, folder: Path, names: Callable[[Full], Mapping[str, torch.Tensor]]
) -> tuple[list[str], list[str]]:
    """Put the weights of a checkpoint into a sharded model; each process reads the files and takes its part.

    Args:
        model: sharded.
        folder: holds safetensors files.
        names: gives for a state dict the same tensors under the names they have in files.

    Returns:
        names that the files lack, and names that the model lacks.

    Raises:
        TrainingError: a tensor has another shape.
    """
    from safetensors import safe_open

    places = names(_weights(model))
    seen, unexpected = set(), []
    for path in sorted({*folder.glob("*model*.safetensors")}):  # beside them lie the reference and the adapter's start
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no dict
                if name in places:
                    seen.add(name)
                    _fill(name, places[name], file.get_tensor(name))
                else:
                    unexpected.append(name)
    return sorted(places.keys() - seen), unexpected


def gathered_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """The optimizer's state dict as a run that is not sharded has it, in the first process; None in the others."""
    state = optimizer.state_dict()
    full: dict[Any, dict[str, Any]] = {}
    for key, values in state["state"].items():
        wholes = {name: whole(v).cpu() if isinstance(v, torch.Tensor) else v for name, v in values.items()}
        if launch.rank() == 0:
            full[key] = wholes
    return {**state, "state": full} if launch.rank() == 0 else None


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give each process its part of a state dict made by `gathered_optimizer`."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    weights = list(_numbered(optimizer))
    parts: dict[Any, dict[str, Any]] = {}
    for key, values in state["state"].items():
        weight = weights[key]
        assert isinstance(weight, DTensor)
        parts[key] = {
            # The count of steps is a scalar; everything of the weight's shape is sharded like the weight.
            name: distribute_tensor(v.to(weight.device), weight.device_mesh, weight.placements)
            if isinstance(v, torch.Tensor) and v.shape == weight.shape and v.dim()
            else v
            for name, v in values.items()
        }
    optimizer.load_state_dict({**state, "state": parts})


def clip(model: Any, max_norm: float) -> torch.Tensor:
    """Clip the gradients to `max_norm` and return their norm before, over all processes."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return whole(torch.nn.utils.clip_grad_norm_(weights, max_norm))


def require_in_force(config: schema.Config, model: Any, distributed_type: str) -> None:
    """See that the processes really train together in the way that was asked for.

    Args:
        config: the run's config.
        model: as the trainer calls it, wrapped.
        distributed_type: accelerate's word for it.

    Raises:
        TrainingError: they do not; what is in force instead is said.
    """
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    wanted, processes = config.distributed, launch.num_processes()
    model = getattr(model, "_orig_mod", model)  # inside torch.compile's
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() != processes:
        raise TrainingError(
            f"processes: {processes} were started, {torch.distributed.get_world_size()} found each other"
        )
    if processes > 1 and not torch.distributed.is_initialized():
        raise TrainingError(f"processes: {processes} were started, but they have not found each other")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if wanted.deepspeed is not None:
        in_force = distributed_type == "DEEPSPEED"
    elif wanted.fsdp:
        in_force = not isinstance(model, DistributedDataParallel) and all(isinstance(w, DTensor) for w in trained)
    elif processes > 1:
        in_force = isinstance(model, DistributedDataParallel) and distributed_type.startswith("MULTI_")
    else:
        in_force = distributed_type == "NO" and not any(isinstance(w, DTensor) for w in trained)
    if not in_force:
        asked = "DeepSpeed" if wanted.deepspeed else "FSDP" if wanted.fsdp else f"{processes} processes"
        raise TrainingError(
            f"{asked}: not in force; the model is a {type(model).__name__} and accelerate says {distributed_type}. "
            "Does an ACCELERATE_... variable or a config of accelerate stand in the way?"
        )


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor put together from all processes' parts; one that is not sharded as it is."""
    from torch.distributed.tensor import DTensor

    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor; all of one that is not sharded."""
    from torch.distributed.tensor import DTensor

    return value.to_local() if isinstance(value, DTensor) else value


def _weights(model: Any) -> Full:
    """The state dict, of a PeftModel the trained part; what an evaluation or an answer gathered is let go before."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    if hasattr(model, "get_base_model"):
        return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    state: Full = model.state_dict()
    return state


def _fill(name: str, place: torch.Tensor, value: torch.Tensor) -> None:
    """Overwrite `place` with `value`, of which a sharded place takes its part."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if place.shape != value.shape:
        raise TrainingError(
            f"--resume: the checkpoint's weights do not fit the model: {name} is {tuple(value.shape)} there and "
            f"{tuple(place.shape)} here"
        )
    if isinstance(place, DTensor):
        part = distribute_tensor(value.to(place.device, place.dtype), place.device_mesh, place.placements)
        place.to_local().copy_(part.to_local())
    else:
        place.copy_(value)


def _numbered(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """The weights in the order in which a state dict numbers them."""
    for group in optimizer.param_groups:
        yield from group["params"]
