"""A LLaVA in its parts, put together in memory to talk to: `chat LLM --llava DIR --visual-encoder CLIP` as XTuner has it.

The adapters stay adapters: they are put onto their parts, and the parts into one model.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft import console
from fastft.config import schema
from fastft.convert import llava_result
from fastft.errors import CheckpointError
from fastft.model import llava, processor, tokenizer
from fastft.model import load as model_load

if TYPE_CHECKING:
    from fastft.chat.session import Talk

# XTuner's adapters of a tower name its modules as transformers 4 did.
_OLD_PREFIX, _NEW_PREFIX = "base_model.model.vision_model.", "base_model.model."


def load(
    model: str,
    result: Path,
    *,
    visual_encoder: str | None = None,
    select_layer: int | None = None,
    bits: int | None = None,
    dtype: str = "auto",
    hub: str = "huggingface",
) -> "Talk":
    """Put a LLaVA together from what its training left.

    Args:
        model: folder or hub id of the language model that it was trained on.
        result: folder with projector/ and the adapters, of fastft's training or of XTuner's tool.
        visual_encoder: folder or hub id of the tower, where the result does not say it.
        select_layer: the layer of the tower whose features are taken, where the result does not say it.
        bits: 4 holds the language model in NF4.
        dtype: of the weights.
        hub: where to look for ids.

    Raises:
        FileError, HubError: a part cannot be found.
        CheckpointError, ConfigError, PlanError: the parts do not fit.
    """
    from fastft.chat import session
    from fastft.data.vision import Seer

    base = session.locate(model, hub, None)
    found = llava_result.find(base.folder, result, visual_encoder, select_layer)
    if found.llm != base.folder:
        base = model_load.locate(schema.Model(name=str(found.llm)))
    language = session.read(base, bits, dtype)
    if found.llm_adapter is not None:
        language = session.with_adapter(language, found.llm_adapter).base_model.model
    tower = llava.read_tower(found.tower, language.get_input_embeddings().weight.dtype)
    if found.tower_adapter is not None:
        tower = _with_tower_adapter(tower, found.tower_adapter)
    if found.has_processor:
        made = processor.load(found.folder, model_type="llava")
    else:
        words = tokenizer.load_tokenizer(base.weights_folder, schema.Model(name=model, chat_template=_template(model)))
        made = llava.processor(words, found.tower)
    together = llava.put_together(
        language, tower, made.tokenizer, projector=found.projector, select_layer=found.select_layer
    )
    on = language.get_input_embeddings().weight.device
    together.model.vision_tower.to(on)
    together.model.multi_modal_projector.to(on)
    together.eval()
    console.note(f"chat: a LLaVA of {base.name}, the tower {found.tower} and the projector of {found.folder}")
    return session.Talk(together, made.tokenizer, seer=Seer(made, made.image_token_id, schema.Vision(), "llava"))


def _template(model: str) -> str | None:
    """The chat template that our part for a model names, for a tokenizer that has none."""
    from fastft.config import recipes

    named = recipes.model_settings(model).get("chat_template")
    return named if isinstance(named, str) else None


def _with_tower_adapter(tower: Any, folder: Path) -> Any:
    """Put a tower's adapter onto it, whichever names it has."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    if not (folder / "adapter_model.safetensors").is_file():  # peft would unpickle an adapter_model.bin
        raise CheckpointError(f"adapter {folder}: adapter_model.safetensors is not there")
    try:
        tensors = load_peft_weights(str(folder), device="cpu")
        config = LoraConfig.from_pretrained(folder)
        named = {name.replace(_OLD_PREFIX, _NEW_PREFIX, 1): tensor for name, tensor in tensors.items()}
        inject_adapter_in_model(config, tower)
        done = set_peft_model_state_dict(
            tower, {name.removeprefix(_NEW_PREFIX): tensor for name, tensor in named.items()}
        )
    except (OSError, RuntimeError, ValueError) as cause:
        raise CheckpointError(f"adapter {folder}: does not fit the tower: {str(cause).splitlines()[0]}") from cause
    lost = [*done.unexpected_keys, *(name for name in done.missing_keys if ".lora_" in name)]
    if lost:
        raise CheckpointError(f"adapter {folder}: does not fit the tower: {lost[0]}")
    return tower
