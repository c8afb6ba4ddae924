"""A base held in 4 bit by bitsandbytes, made safe for training.

Settings come from the schema or from the checkpoint's own config.json; the record of what was done goes to
`fastft_training.json`, which a QLoRA merge reads.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.config import schema
from fastft.errors import ConfigError
from fastft.model import device, unpacking

if TYPE_CHECKING:
    import torch
    from torch import nn

# transformers passes no block size to bitsandbytes, whose default is 64 on CPU and CUDA (spec formats.md 4.3).
BLOCK_SIZE = 64


@dataclass(frozen=True)
class Quantized:
    """How the base was held while the adapter learned.

    Attributes:
        type: code book, nf4 or fp4.
        double_quant: whether the block scales were quantized too.
        blocksize: weights that share a scale.
        compute_dtype: dtype of the products ("bfloat16").
        weights_dtype: dtype to which a 4-bit weight is unpacked before the product: the base's.
        skip: names of the linear layers that stayed as they were.
    """

    type: str
    double_quant: bool
    blocksize: int
    compute_dtype: str
    weights_dtype: str
    skip: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `fastft_training.json`."""
        return {**asdict(self), "skip": list(self.skip)}


def settings(quantization: schema.Quantization, on: "torch.device", skip: list[str] | None = None) -> Any:
    """Transformers' BitsAndBytesConfig for a schema block; the compute dtype is always set.

    `skip` names the modules that stay as they are, the head among them; None: transformers' choice.

    (Its default, fp32, has no fused kernel on CUDA and says nothing about it: spec training.md 7.)
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=device.compute_dtype(quantization.compute_dtype, on),
        llm_int8_skip_modules=skip,
    )


def allow_parts_in_ram(settings: Any, model_config: Any) -> None:
    """Let some unquantized modules lie on the CPU beside a 4-bit base on a GPU; transformers asks for that word.

    Args:
        settings: from `settings`, or None when the checkpoint itself is 4-bit (or there is no 4-bit at all).
        model_config: transformers' config of the model; it has the block of a 4-bit checkpoint.
    """
    if settings is not None:
        settings.llm_int8_enable_fp32_cpu_offload = True
        return
    stored = getattr(model_config, "quantization_config", None)
    if isinstance(stored, dict):
        stored["llm_int8_enable_fp32_cpu_offload"] = True


def of_checkpoint(config_json: Mapping[str, Any], folder: Path | str) -> Mapping[str, Any] | None:
    """The quantization block of a checkpoint that is already bitsandbytes 4-bit, None for a plain one; `folder` is for the error.

    Raises:
        ConfigError: the checkpoint is quantized in another way (8 bit, GPTQ, AWQ, ...), which cannot be trained on.
    """
    block = config_json.get("quantization_config")
    if not block:
        return None
    is_4bit = block.get("quant_method") == "bitsandbytes" and (block.get("load_in_4bit") or block.get("_load_in_4bit"))
    if not is_4bit:
        raise ConfigError(
            f"model {folder}: the checkpoint is quantized as {block.get('quant_method', 'unknown')}"
            f"{' 8 bit' if block.get('load_in_8bit') else ''}; fastft trains on plain weights or bitsandbytes 4 bit"
        )
    assert isinstance(block, Mapping)
    return block


def make_safe(model: "nn.Module") -> None:
    """Keep bitsandbytes from two faults of its CPU code that would train or answer wrongly without a word.

    Must run after loading and before the first forward.
    """
    disable_cpu_repacking(model)
    unpacking.make_right(model)


def disable_cpu_repacking(model: "nn.Module") -> int:
    """Keep bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16.

    After one forward in eval mode the repacked layers have no gradient any more and only a warning says so
    (bitsandbytes 0.50, spec training.md trap A). Must run after loading and before the first forward.

    Returns:
        number of 4-bit layers.
    """
    import bitsandbytes

    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def describe(model: "nn.Module") -> Quantized | None:
    """Read from a loaded model how its linear layers are held; None when none is 4-bit."""
    import bitsandbytes
    from torch import nn

    packed = {name: m for name, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    if not packed:
        return None
    first = next(iter(packed.values()))
    state = first.weight.quant_state
    plain = (name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in packed)
    return Quantized(
        type=state.quant_type,
        double_quant=bool(state.nested),
        blocksize=int(state.blocksize),
        compute_dtype=device.short_name(first.compute_dtype),
        weights_dtype=device.short_name(state.dtype),
        skip=tuple(sorted(plain)),
    )
