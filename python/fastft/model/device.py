"""Which device a run uses, and in which dtype its weights are held.

The rules of `model.dtype` and `method.quantization.compute_dtype` in the schema stand here, once.
"""

import os
from typing import TYPE_CHECKING, Any

from fastft import console
from fastft.errors import ConfigError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch

# Widest model (hidden_size) that is computed on one core.
NARROW = 512

_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def choose() -> "torch.device":
    """The device of this process: its own accelerator under torchrun, the first one alone, else the CPU.

    CUDA and ROCm cards are `cuda`, Ascend's `npu`, Intel's `xpu`, Apple's `mps`: whatever torch reports.
    """
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return torch.device("cpu")
    return torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")))


def same_random(device: "torch.device") -> "AbstractContextManager[None]":
    """Leave the random numbers of the CPU and of `device` as they were before."""
    import torch

    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device.index or 0], device_type=device.type)


def share_cores(model_config: Any, device: "torch.device") -> None:
    """Let a small model compute on one core; OMP_NUM_THREADS in the environment wins.

    Threads that wait for each other at every small product cost more than they bring, and ten times as much as soon as
    another process wants a core.

    Args:
        model_config: transformers' config; its `hidden_size` decides.
        device: only a CPU has cores to share.
    """
    import torch

    hidden = getattr(model_config.get_text_config(), "hidden_size", None)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and hidden is not None and hidden <= NARROW:
        torch.set_num_threads(1)


def by_name(name: str) -> "torch.dtype":
    """The torch dtype of a schema name: bf16, fp16 or fp32."""
    import torch

    dtype = getattr(torch, _NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def has_bf16(device: "torch.device") -> bool:
    """Whether products in bf16 are at home on `device`; a CPU computes them, if slowly."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "mps":
        return bool(torch.backends.mps.is_macos_or_newer(14, 0))
    says = None if device.type == "cpu" else getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return True if says is None else bool(says())


def weights_dtype(wanted: str, checkpoint: "torch.dtype", kind: str, device: "torch.device") -> "torch.dtype":
    """The dtype in which the base's weights are held.

    Args:
        wanted: `model.dtype` of the config.
        checkpoint: dtype of the files.
        kind: `method.kind`.
        device: where the training runs.

    Returns:
        for `auto`: fp32 for full, since AdamW's small updates are lost in 16-bit weights (the products are 16-bit on a
        GPU, see `products_dtype`). The checkpoint's own for lora and qlora, whose base is frozen; but fp32 on a CPU for
        the few weights of qlora beside the 4-bit ones (a step takes 0.32 s instead of 0.57 s: 1.3 M weights, 1,024
        tokens, one thread of an EPYC with AVX512-BF16, 2026-11-24). fp16 becomes bf16 where the device has it, and that
        is said aloud: fp16 activations overflow in training, bf16 ones do not.

    Raises:
        ConfigError: `fp16` with `method: full`, whose small updates fp16 weights lose, or `bf16` on a GPU without it.
    """
    import torch

    if wanted != "auto":
        dtype = by_name(wanted)
        if kind == "full" and dtype == torch.float16:
            raise ConfigError("model.dtype: fp16 with method full would lose small updates; use bf16, fp32 or auto")
        if dtype == torch.bfloat16 and not has_bf16(device):
            raise ConfigError("model.dtype: this GPU has no bf16; use fp16, fp32 or auto")
        if kind == "full" and dtype == torch.bfloat16:
            console.note(
                "model: weights and AdamW's moments are bf16, 8 bytes per weight less than with model.dtype: auto; "
                "small updates are lost"
            )
        return dtype
    if kind == "full" or (kind == "qlora" and device.type == "cpu"):
        return torch.float32
    if checkpoint == torch.float16 and has_bf16(device):
        console.note("model: the checkpoint is fp16; trained in bf16, which has the range that gradients need")
        return torch.bfloat16
    if checkpoint == torch.bfloat16 and not has_bf16(device):
        console.note("model: the checkpoint is bf16, which this GPU lacks; fp16 is used")
        return torch.float16
    return checkpoint


def products_dtype(wanted: str, weights: "torch.dtype", kind: str, device: "torch.device") -> "torch.dtype | None":
    """The 16-bit dtype in which fp32 weights that are trained are multiplied (autocast); None: in their own.

    Args:
        wanted: `model.dtype` of the config.
        weights: from `weights_dtype`.
        kind: `method.kind`.
        device: where the training runs.

    Returns:
        on a GPU, for full with `auto`: bf16, fp16 on a GPU without it. For lora and qlora the dtype of a 16-bit base:
        its products are in it, and those of the fp32 adapters too; in fp32 these alone, 1 % of the arithmetic, would
        take a tenth of the time and copy every input. None on a CPU, and where fp32 or a pure bf16 was asked for.
    """
    import torch

    if device.type == "cpu":
        return None
    if kind == "full":
        if wanted != "auto":
            return None
        return torch.bfloat16 if has_bf16(device) else torch.float16
    return weights if weights in {torch.bfloat16, torch.float16} else None


def compute_dtype(wanted: str, device: "torch.device") -> "torch.dtype":
    """The dtype of products with 4-bit weights: bf16 on a GPU that has it, else fp16; fp32 on a CPU."""
    import torch

    if wanted != "auto":
        return by_name(wanted)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if has_bf16(device) else torch.float16


def short_name(dtype: "torch.dtype") -> str:
    """The name without `torch.`, as config.json writes it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
