"""Merges of adapters that are no LoRA, by PEFT's own layer classes, one module at a time.

A container model is built that holds one module at the path that the adapter calls it by, with the base's weight; PEFT
wraps it, gets this module's tensors (all of them, and no others) and merges. Memory is that of one module: its weight
and what PEFT computes from it, in f32. The result is rounded once to the output's dtype; with `--match-peft` the module
is in the base's dtype from the start, as in `merge_and_unload` on the whole model.

How the results come into the result folder: `materialized` computes all of them before the stream begins, each into a
small safetensors file inside the staging folder, and puts a `Copy` from there in the plan. To overwrite the stream's
output afterwards would need no room for a second copy of the changed tensors. But then a failure of PEFT would show
after the whole model was written instead of before the first byte, nothing could be done to a merged tensor on its way
(quantize it), and the bytes of a file would have two writers. The room is planned with (`scratch_bytes`); the files are
removed before the result is put in place.

Source: peft 0.21.2, `PeftModel`, `set_peft_model_state_dict` and `get_peft_model_state_dict`.
"""

import dataclasses
import json
import shutil
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft import _native, console
from fastft.convert.arithmetic import Arithmetic
from fastft.convert.folder import read_safetensors
from fastft.convert.peft_kinds import KINDS
from fastft.convert.plan import Copy, OutputTensor, PeftLayer, PeftModule, Quantize
from fastft.convert.source import Source, read_bytes
from fastft.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_SCRATCH = "peft"
_TORCH_DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
}
_PREFIX = "base_model.model."
# What PEFT raises about settings and tensors that do not fit.
_COMPLAINTS = (
    AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
# A merge holds some copies of a module: one module at a time, also where `verify` works in several threads.
_one_at_a_time = threading.Lock()


class PeftNumbers:
    """The rows of a `PeftLayer` as `verify` asks for them; computed whole, once."""

    def __init__(self, operation: PeftLayer) -> None:
        self._base = Arithmetic(Copy(operation.source), operation.source.dtype)
        self._merged: NDArray[np.float32] = merged(operation.module)[operation.part].float().numpy()

    def rows(self, start: int, count: int) -> "NDArray[np.float32]":
        """Give rows `start` to `start + count` of the result."""
        return self._merged[start : start + count]

    def base_rows(self, start: int, count: int) -> "NDArray[np.float32]":
        """Give the same rows of the base."""
        return self._base.rows(start, count)

    def error_bound(self, _start: int, _count: int) -> None:
        """Give none: what another order of PEFT's sums can change is not known for each kind."""
        return


def scratch_bytes(tensors: Iterable[OutputTensor]) -> int:
    """Count the bytes that `materialized` writes beside the result."""
    return sum(tensor.nbytes for tensor in map(_computed, tensors) if tensor is not None)


def check(tensors: Iterable[OutputTensor]) -> None:
    """Have PEFT take one module of every shape, to refuse while planning; nothing is computed.

    Raises:
        PlanError: the installed PEFT does not have the kind, or refuses its settings or its modules.
        CheckpointError: tensors are missing, left over or misshaped.
    """
    modules = dict.fromkeys(tensor.operation.module for tensor in tensors if isinstance(tensor.operation, PeftLayer))
    if not modules:
        return
    import torch

    seen = set()
    for module in modules:
        own = tuple((name.removeprefix(module.path), source.shape) for name, source in module.tensors)
        alike = (module.adapter, module.layer, module.weight.shape, module.bias is None, own)
        if alike not in seen:
            seen.add(alike)
            bias = None if module.bias is None else torch.zeros(module.bias.shape)
            with _one_at_a_time, _undisturbed():
                _release(_wrapped(module, torch.zeros(module.weight.shape), bias))


def materialized(tensors: Sequence[OutputTensor], stage: Path) -> tuple[OutputTensor, ...]:
    """Compute every `PeftLayer` of a plan; gives the plan with copies of the results in their place.

    Args:
        tensors: the plan.
        stage: an existing folder that is written into; `remove_scratch` removes it again.

    Raises:
        CheckpointError: PEFT refuses an adapter's tensors, or a result is not finite.
        PlanError: PEFT refuses its settings.
    """
    modules: dict[PeftModule, list[OutputTensor]] = {}
    for tensor in map(_computed, tensors):
        if tensor is not None:
            assert isinstance(tensor.operation, PeftLayer)
            modules.setdefault(tensor.operation.module, []).append(tensor)
    if not modules:
        return tuple(tensors)
    (stage / _SCRATCH).mkdir()
    copies: dict[str, Copy] = {}
    done = 0
    total = scratch_bytes(tensors)
    with console.progress("merging with PEFT", total, "B") as advance:
        for number, (module, parts) in enumerate(modules.items()):
            copies |= _written(module, parts, stage / _SCRATCH / f"{number}.safetensors")
            done += scratch_bytes(parts)
            advance(done)
    made = []
    for tensor in tensors:
        if tensor.name not in copies:
            made.append(tensor)
        elif isinstance(tensor.operation, Quantize):
            operation = dataclasses.replace(tensor.operation, of=copies[tensor.name])
            made.append(dataclasses.replace(tensor, operation=operation))
        else:
            made.append(dataclasses.replace(tensor, operation=copies[tensor.name]))
    return tuple(made)


def _computed(tensor: OutputTensor) -> OutputTensor | None:
    """The numbers of a tensor that PEFT makes, before they are quantized where they are; None for the rest."""
    operation = tensor.operation
    if isinstance(operation, Quantize):
        tensor = OutputTensor(tensor.name, operation.dtype, operation.shape, operation.of)
    return tensor if isinstance(tensor.operation, PeftLayer) else None


def remove_scratch(stage: Path) -> None:
    """Remove what `materialized` wrote."""
    shutil.rmtree(stage / _SCRATCH, ignore_errors=True)


def merged(module: PeftModule) -> "dict[str, torch.Tensor]":
    """Merge one module.

    Returns:
        Its new `weight` and, where it has one, `bias`, of the base's shapes: f32, or of the module's `dtype`.

    Raises:
        CheckpointError, PlanError: see `check`.
    """
    import torch
    from peft import set_peft_model_state_dict

    with _one_at_a_time, _undisturbed():
        weight = _numbers(module.weight, module.dtype)
        bias = None if module.bias is None else _numbers(module.bias, module.dtype)
        model = _wrapped(module, weight.clone(), bias)
        base_layer = model.get_submodule(f"{_PREFIX}{module.path}").get_base_layer()
        if not torch.equal(base_layer.weight.data, weight):
            raise PlanError(
                f"{module.adapter}: PEFT changes the base itself at the start of a {module.kind} training with these"
                " settings, so base + adapter is not the trained model; save the merged model from the training"
            )
        del weight
        tensors = _adapter_tensors(module)
        try:
            left_over = set_peft_model_state_dict(model, tensors).unexpected_keys
            # As PeftModel.load_adapter does: AdaLoRA makes new parameters of the base's dtype while it is loaded.
            model.base_model._cast_adapter_dtype("default", autocast_adapter_dtype=True)  # noqa: SLF001
            layer = model.eval().merge_and_unload().get_submodule(module.path)
            results = {name: parameter.data for name, parameter in layer.named_parameters()}
        except _COMPLAINTS as error:
            raise CheckpointError(_complaint(module, error)) from error
        finally:
            _release(model)
    if left_over:
        raise CheckpointError(f"{module.adapter}: PEFT has no use for {', '.join(sorted(left_over))}")
    return results


def _release(model: Any) -> None:
    """Give the memory of a model back now: PEFT's objects refer to each other, and Python would collect them later."""
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0)


def _written(module: PeftModule, tensors: Sequence[OutputTensor], file: Path) -> dict[str, Copy]:
    """Merge a module into a file; gives copies from there by the names of its output tensors."""
    import torch

    from fastft.native.array import SAFETENSORS, memory

    merges = merged(module)
    results = {}
    for tensor in tensors:
        assert isinstance(tensor.operation, PeftLayer)
        result = merges[tensor.operation.part].to(getattr(torch, _TORCH_DTYPES[tensor.dtype]))
        if not torch.isfinite(result).all():
            raise CheckpointError(
                f"tensor {tensor.name!r}: the result is not finite, or {tensor.dtype} cannot hold it; try --dtype bf16"
                " or fp32"
            )
        results[tensor.name] = result.contiguous()
    arrays = [(name, memory(result, f"tensor {name!r}")) for name, result in results.items()]
    _native.write_file(file, [(name, SAFETENSORS[found.dtype], found.shape, found.data) for name, found in arrays], {})
    found = read_safetensors(file)
    return {tensor.name: Copy(found[tensor.name]) for tensor in tensors}


def _wrapped(module: PeftModule, weight: "torch.Tensor", bias: "torch.Tensor | None") -> Any:
    """Put PEFT around a module, and hold the tensors that it wants against those that the adapter has."""
    from peft import PeftModel, get_peft_model_state_dict

    config = _config(module)
    try:
        model = PeftModel(_container(module, weight, bias), config)
        wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    except _COMPLAINTS as error:
        raise PlanError(_complaint(module, error)) from error
    given = {name: tuple(tensor.shape) for name, tensor in _adapter_tensors(module, shapes_only=True).items()}
    lacking, left_over = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if lacking or left_over:
        raise CheckpointError(
            f"{module.adapter}: PEFT {_version()} does not find in {module.path} what a {module.kind} of these settings has: "
            + ", ".join(
                [*(f"{name} is missing" for name in lacking[:5]), *(f"{name} is left over" for name in left_over[:5])]
            )
        )
    for name, tensor in wanted.items():
        if given[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"{module.adapter}: {name} is {given[name]}, but a {module.kind} of these settings on {module.path} of the"
                f" base has {tuple(tensor.shape)}; the adapter was trained on another model"
            )
    return model


def _config(module: PeftModule) -> Any:
    """Make PEFT's config of an adapter, for one module of it."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    made = PEFT_TYPE_TO_CONFIG_MAPPING.get(module.kind)
    if made is None:
        raise PlanError(f"{module.adapter}: the installed PEFT {_version()} has no {module.kind}; install a newer one")
    settings: dict[str, Any] = json.loads(module.settings)
    known = {field.name for field in dataclasses.fields(made)}
    for key, value in list(settings.items()):
        if key not in known:
            if value not in (None, False, {}, [], ""):
                raise CheckpointError(
                    f"{module.adapter}: the setting {key!r} = {value!r} is not known to PEFT {_version()} and may change"
                    " the result; install the version that trained it"
                )
            del settings[key]
    feedforward = settings.pop("feedforward_modules", None)
    if module.kind == "ADALORA":
        ranks = settings.get("rank_pattern") or {}
        settings["rank_pattern"] = {key: kept for key, kept in ranks.items() if f"{module.path}.lora_E" in key} or None
    try:
        config = made(**settings, target_modules=[module.path], inference_mode=True)
    except _COMPLAINTS as error:
        raise PlanError(_complaint(module, error)) from error
    if feedforward is not None:
        # Set late: IA3 wants all of them to be targets too, and matches them by the end of the path.
        config.feedforward_modules = feedforward if isinstance(feedforward, str) else set(feedforward)
    return config


def _container(module: PeftModule, weight: "torch.Tensor", bias: "torch.Tensor | None") -> Any:
    """Build the smallest model that has the module at its path."""
    from torch import nn

    *parents, last = module.path.split(".")
    root = place = nn.Module()
    for name in parents:
        inner = nn.Module()
        place.add_module(name, inner)
        place = inner
    place.add_module(last, _layer(module, weight, bias))
    return root


def _layer(module: PeftModule, weight: "torch.Tensor", bias: "torch.Tensor | None") -> Any:
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    rows, columns = weight.shape[0], weight.shape[1]
    layer: Any
    with torch.device("meta"):
        if module.layer == "Linear":
            layer = nn.Linear(columns, rows, bias=bias is not None)
        elif module.layer == "Conv1D":
            layer = Conv1D(columns, rows)
        elif module.layer == "Embedding":
            layer = nn.Embedding(rows, columns)
        elif module.layer in ("Conv1d", "Conv2d", "Conv3d"):
            kind: Any = getattr(nn, module.layer)
            window = tuple(weight.shape[2:])
            layer = kind(columns * module.groups, rows, window, groups=module.groups, bias=bias is not None)
        else:
            raise PlanError(
                f"{module.adapter}: {module.path} is a {module.layer}; linear layers, embeddings and convolutions can be"
                " merged"
            )
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _adapter_tensors(module: PeftModule, *, shapes_only: bool = False) -> "dict[str, torch.Tensor]":
    """Read the tensors of a module by PEFT's names, cut to what it uses of those that all modules share."""
    import torch

    kind = KINDS[module.kind]
    rows, columns = module.weight.shape[0], module.weight.shape[1]
    num_out, num_in = (columns, rows) if module.layer == "Conv1D" else (rows, columns)
    found = {}
    for name, source in module.tensors:
        dtype = getattr(torch, _TORCH_DTYPES[source.dtype])
        if shapes_only or source.numel == 0:
            tensor = torch.empty(source.shape, dtype=dtype, device="meta" if shapes_only else "cpu")
        else:
            tensor = torch.frombuffer(bytearray(read_bytes(source)), dtype=dtype).reshape(source.shape)
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise CheckpointError(
                    f"{module.adapter}: {name} holds infinite or undefined values; it cannot be merged"
                )
        shared = name in kind.shared
        found[name if shared else f"{_PREFIX}{name}"] = (
            tensor if kind.cut is None else kind.cut(name, tensor, num_out, num_in)
        )
    return found


def _numbers(source: Source, dtype: str | None) -> "torch.Tensor":
    """Read a tensor of the base in f32, or rounded to `dtype`."""
    import torch

    rows = source.shape[0]
    numbers = torch.from_numpy(Arithmetic(Copy(source), source.dtype).rows(0, rows)).reshape(source.shape)
    return numbers if dtype is None else numbers.to(getattr(torch, _TORCH_DTYPES[dtype]))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep PEFT from drawing the caller's random numbers, and its advice for trainings to itself.

    What its warnings say of missing and unexpected tensors is checked here, and refused.
    """
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _complaint(module: PeftModule, error: Exception) -> str:
    reason = " ".join(str(error).split())[:500]
    return f"{module.adapter}: PEFT {_version()} refuses the {module.kind} of {module.path}: {reason}"


def _version() -> str:
    import peft

    return str(peft.__version__)
