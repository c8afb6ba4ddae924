"""What makes a run faster without changing what it learns, chosen by itself: attention, kernels, TF32, optimizer.

The schema's `accelerate` section and `model.attention` ask, `choose` decides from facts and says why; the loader and
the trainer do it. What a config pins and this machine cannot do is an error, never a silent fall-back.
"""

import importlib.util
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fastft import console
from fastft.config import schema
from fastft.errors import ConfigError
from fastft.model import device, layers

if TYPE_CHECKING:
    import torch

# Packages that are used when they are there.
FLASH, LIGER = "flash_attn", "liger_kernel"
# Devices for which torch has AdamW as one kernel (torch.optim, 2.6 and later).
_FUSED = frozenset(("cuda", "xpu", "mps", "cpu"))
# Tasks whose batches are laid into one row, the only form in which flash attention tells documents apart.
_FLATTENED = frozenset(("pretrain", "sft"))
# TF32 and FlashAttention-2 came with this CUDA capability.
_AMPERE = (8, 0)


@dataclass(frozen=True)
class Facts:
    """What the choice depends on.

    Attributes:
        device: torch's type of the device: cpu, cuda, npu, xpu, mps.
        capability: of a CUDA card, None elsewhere (ROCm included).
        products_16bit: whether products are in bf16 or fp16.
        attentions: what the model's class can do: sdpa, flash_attention_2, flex_attention; None: unknown.
        liger: whether liger has kernels for this kind of model; None: not asked, it is not installed.
        installed: of FLASH and LIGER, what is there.
    """

    device: str
    capability: tuple[int, int] | None
    products_16bit: bool
    attentions: frozenset[str] | None
    liger: bool | None
    installed: frozenset[str]


@dataclass(frozen=True)
class Speed:
    """What is used.

    Attributes:
        attention: for transformers; None: what it chooses.
        liger: liger's kernels for norm, rotary embedding and MLP.
        compile: torch.compile of each layer, for rows of any length.
        tf32: fp32 products of a CUDA card in TF32; None: it has none, nothing is set.
        fused_optimizer: AdamW as one kernel.
        why: the reason for each, by name.
    """

    attention: str | None
    liger: bool
    compile: bool
    tf32: bool | None
    fused_optimizer: bool
    why: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `fastft_training.json`."""
        return {name: value for name, value in asdict(self).items() if name != "why"}

    def parts(self) -> list[str]:
        """Each choice with its reason."""
        said = {
            "attention": f"attention {self.attention or 'as transformers chooses'}",
            "liger": f"liger {_switch(self.liger)}",
            "compile": f"torch.compile {_switch(self.compile)}",
            "tf32": f"TF32 {_switch(bool(self.tf32))}",
            "fused_optimizer": f"AdamW {'fused' if self.fused_optimizer else 'not fused'}",
        }
        return [f"{text} ({self.why[name]})" for name, text in said.items()]


def facts_of(model_config: Any, on: "torch.device", *, products_16bit: bool) -> Facts:
    """The facts of this machine and a model.

    Args:
        model_config: transformers' config of the model, or None for the machine alone.
        on: where the training runs.
        products_16bit: whether products are in bf16 or fp16.
    """
    import torch

    installed = frozenset(name for name in (FLASH, LIGER) if importlib.util.find_spec(name) is not None)
    is_cuda = on.type == "cuda" and torch.version.cuda is not None
    capability = torch.cuda.get_device_capability(on) if is_cuda else None
    attentions = liger = None
    if model_config is not None:
        attentions = _attentions(model_config)
        liger = _has_liger(model_config) if LIGER in installed else None
    return Facts(on.type, capability, products_16bit, attentions, liger, installed)


def choose(config: schema.Config, facts: Facts) -> Speed:
    """What a run uses.

    Raises:
        ConfigError: something is pinned that this machine or this model cannot do.
    """
    _refuse(config, facts)
    wanted = config.accelerate
    why: dict[str, str] = {}

    def of(name: str, asked: Any, rule: tuple[Any, str]) -> Any:
        if asked != "auto":
            why[name] = "as configured"
            return asked
        value, why[name] = rule
        return value

    return Speed(
        attention=of("attention", config.model.attention, _attention(config, facts)),
        liger=of("liger", wanted.liger, _liger(config, facts)),
        compile=of("compile", wanted.compile, (False, "it takes minutes at the start")),
        tf32=of("tf32", wanted.tf32, _tf32(config, facts)),
        fused_optimizer=of("fused_optimizer", wanted.fused_optimizer, _fused(config, facts)),
        why=why,
    )


def install(model: Any, speed: Speed) -> None:
    """Put liger's kernels into a model that has just been read, before it gets adapters. Our own loss stays."""
    if not speed.liger:
        return
    from liger_kernel.transformers import monkey_patch

    apply = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]
    apply(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def compile_layers(model: Any) -> None:
    """Compile a model's layers in place, after everything that changes their code; names of weights stay.

    The layers are alike, so one is compiled and the others use it; the loss, whose shapes follow the data, is not.
    """
    # torch's compiler looks at the gradient of each input, and torch 2.15 warns of it.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    for layer in layers.of(model):
        layer.compile(dynamic=True)


def _attention(config: schema.Config, facts: Facts) -> tuple[str | None, str]:
    known = facts.attentions
    if known is None:
        return None, "the model's own code decides"
    if "flash_attention_2" in known and facts.device == "cuda":
        if FLASH not in facts.installed:
            return ("sdpa" if "sdpa" in known else "eager"), f"{FLASH} is not installed"
        if facts.capability is not None and facts.capability < _AMPERE:
            return ("sdpa" if "sdpa" in known else "eager"), "the card is older than flash attention"
        if config.task not in _FLATTENED:
            return ("sdpa" if "sdpa" in known else "eager"), f"flash attention is not built for task {config.task}"
        if facts.products_16bit:
            return "flash_attention_2", f"{FLASH} is installed"
        return ("sdpa" if "sdpa" in known else "eager"), "flash attention has no fp32"
    if "sdpa" in known:
        return "sdpa", "torch's own"
    return "eager", "this kind of model has no other"


def _liger(config: schema.Config, facts: Facts) -> tuple[bool, str]:
    if facts.device not in ("cuda", "xpu"):
        return False, f"it has no kernels for {facts.device}"
    if LIGER not in facts.installed:
        return False, "not installed: pip install 'fastft[liger]'"
    if not facts.liger:
        return False, "it has no kernels for this kind of model"
    if config.memory.mlp_tile_tokens not in ("auto", "whole"):
        return False, "the MLP is tiled"
    return True, "installed"


def _tf32(config: schema.Config, facts: Facts) -> tuple[bool | None, str]:
    if facts.capability is None or facts.capability < _AMPERE:
        return None, f"{facts.device} has none" if facts.capability is None else "the card is too old"
    if config.model.dtype == "fp32":
        return False, "model.dtype: fp32 asks for exact products"
    return True, "for the few products that are not 16-bit"


def _fused(config: schema.Config, facts: Facts) -> tuple[bool, str]:
    if config.train.optimizer != "adamw":
        return False, f"{config.train.optimizer} has its own kernels"
    if facts.device in _FUSED:
        return True, "one kernel for all weights"
    return False, f"torch has no such kernel for {facts.device}"


def _refuse(config: schema.Config, facts: Facts) -> None:
    wanted, attention = config.accelerate, config.model.attention
    if attention not in ("auto", "eager") and facts.attentions is not None and attention not in facts.attentions:
        raise ConfigError(f"model.attention: {attention} is unknown to this kind of model; it has {_listed(facts)}")
    if attention == "flash_attention_2":
        if FLASH not in facts.installed:
            raise ConfigError(
                f"model.attention: flash_attention_2 needs {FLASH}, which is not installed; use auto or sdpa"
            )
        if facts.device == "cpu":
            raise ConfigError("model.attention: flash_attention_2 needs a GPU; use auto or sdpa")
        if config.task not in _FLATTENED:
            raise ConfigError(
                f"model.attention: flash_attention_2 is not built for task {config.task}; use auto or sdpa"
            )
    if attention == "flex_attention" and facts.device == "cpu":
        raise ConfigError("model.attention: flex_attention has no backward pass on a CPU; use auto or sdpa")
    if wanted.liger is True:
        if LIGER not in facts.installed:
            raise ConfigError("accelerate.liger: it is not installed: pip install 'fastft[liger]', or set auto")
        if not facts.liger:
            raise ConfigError("accelerate.liger: it has no kernels for this kind of model; set auto or false")
        if facts.device == "cpu":
            raise ConfigError("accelerate.liger: its kernels need a GPU; set auto or false")
    if wanted.tf32 is True and (facts.capability is None or facts.capability < _AMPERE):
        raise ConfigError("accelerate.tf32: this device has no TF32 (CUDA cards from 8.0 have); set auto or false")
    if wanted.compile is True and config.distributed.shares:
        raise ConfigError("accelerate.compile: not together with distributed.fsdp or deepspeed; set auto or false")
    if wanted.fused_optimizer is True:
        if config.train.optimizer != "adamw":
            raise ConfigError(
                f"accelerate.fused_optimizer: train.optimizer: {config.train.optimizer} has its own kernels; set auto"
            )
        if facts.device not in _FUSED:
            raise ConfigError(
                f"accelerate.fused_optimizer: torch has no such kernel for {facts.device}; set auto or false"
            )


def _attentions(model_config: Any) -> frozenset[str] | None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    # A class of the model's own code is not known here.
    auto = AutoModelForImageTextToText if hasattr(model_config, "vision_config") else AutoModelForCausalLM
    kind = auto._model_mapping.get(type(model_config), None)  # noqa: SLF001
    if kind is None or isinstance(kind, tuple):
        return None
    marks = {
        "sdpa": "_supports_sdpa",
        "flash_attention_2": "_supports_flash_attn",
        "flex_attention": "_supports_flex_attn",
    }
    return frozenset(name for name, mark in marks.items() if getattr(kind, mark, False))


def _has_liger(model_config: Any) -> bool:
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as problem:
        console.warn(f"liger: installed, but it cannot be imported: {problem}")
        return False
    return getattr(model_config, "model_type", None) in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN


def _listed(facts: Facts) -> str:
    return ", ".join(["eager", *sorted(facts.attentions or ())])


def _switch(value: bool) -> str:
    return "on" if value else "off"


def of_machine() -> Speed:
    """What a run in 16 bit would use here, whatever the model: for `doctor`."""
    on = device.choose()
    found = facts_of(None, on, products_16bit=on.type != "cpu")
    usual = Facts(**{**vars(found), "attentions": frozenset(("sdpa", "flash_attention_2")), "liger": True})
    config = schema.Config.model_validate(
        {"model": {"name": "demo"}, "method": {"kind": "lora"}, "data": {"train": [{"source": "demo/chat"}]}}
    )
    return choose(config, usual)
