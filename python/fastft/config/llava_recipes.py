"""Recipes of LLaVAs that are put together from a language model and a CLIP, under XTuner's names.

`llava_MODEL_clip_vit_large_p14_336_e1_gpu8_pretrain` trains the projector, `llava_MODEL_qlora_clip_vit_large_p14_336_lora_
e1_gpu8_finetune` goes on from it with the language model (full without a word, lora, qlora) and, with the second lora, the
tower. What a stage sets is in `configs/llava/`. Imports nothing heavy: `list-cfg` reads the names.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

# Families whose models transformers' LLaVA holds: built as Llama is, with nothing done to the logits.
FAMILIES = (
    "internlm", "internlm2", "internlm2_5", "llama2", "llama3", "mistral", "phi3", "qwen1_5", "qwen2", "qwen2_5", "qwen3",
    "vicuna", "yi", "yi_1_5",
)  # fmt: skip
# Families for which XTuner writes `full` into the name.
_SAYS_FULL = ("llama3", "phi3")
CLIP = "clip_vit_large_p14_336"
_NAME = re.compile(
    rf"llava_(?P<model>[a-z0-9_]+?)(?:_(?P<method>full|lora|qlora|quant))?_{CLIP}(?P<tower>_lora)?(?P<tail>(?:_[a-z0-9]+)*?)"
    r"_(?P<stage>pretrain|finetune)"
)


class LlavaName(NamedTuple):
    """A name taken apart.

    Attributes:
        model: the language model's name in recipes.
        method: full, lora or qlora.
        tower_lora: whether the tower gets adapters.
        tail: what stands between, as `_e1_gpu8`.
        stage: pretrain or finetune.
    """

    model: str
    method: str
    tower_lora: bool
    tail: str
    stage: str

    @property
    def parts(self) -> list[str]:
        """The parts in `configs/`, in the order in which they are laid over each other."""
        found = [f"methods/{self.method}", f"llava/{self.stage}"]
        if self.stage == "finetune" and self.method != "full":
            found.append("llava/adapters")
        return [*found, *(["llava/tower_lora"] if self.tower_lora else [])]

    @property
    def projector(self) -> str | None:
        """Where the first stage leaves the projector that the second begins with."""
        if self.stage == "pretrain":
            return None
        return f"work_dirs/{pretrain_name(self.model)}/llava/projector"


def pretrain_name(model: str) -> str:
    """Name the first stage of a model."""
    return f"llava_{model}_{CLIP}_e1_gpu8_pretrain"


def names(models: Iterable[tuple[str, str]]) -> list[str]:
    """List the recipes of language models, given as (name, family)."""
    found = []
    for model, family in models:
        if family not in FAMILIES:
            continue
        whole = "_full" if family in _SAYS_FULL else ""
        found += [
            pretrain_name(model),
            f"llava_{model}{whole}_{CLIP}_e1_gpu8_finetune",
            f"llava_{model}_full_{CLIP}_lora_e1_gpu8_finetune",
            f"llava_{model}_lora_{CLIP}_lora_e1_gpu8_finetune",
            f"llava_{model}_qlora_{CLIP}_e1_gpu1_finetune",
            f"llava_{model}_qlora_{CLIP}_lora_e1_gpu8_finetune",
        ]
    return found


def taken_apart(name: str) -> LlavaName | None:
    """Take a name apart; None: it is none of these, or asks for what cannot be trained together."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    stage, method = match["stage"], match["method"]
    if stage == "pretrain":
        # XTuner holds the frozen language model in 4 bit, and says so (quant) for some.
        method = "qlora" if method in (None, "quant", "qlora") else method
        if match["tower"]:
            return None
    elif method == "quant":
        return None
    else:
        method = method or "full"
    return LlavaName(match["model"], method, bool(match["tower"]), match["tail"], stage)
