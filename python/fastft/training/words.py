"""What turns the rows of a run into tokens: the tokenizer of the base and, for a model that sees, its processor."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastft import console
from fastft.config import schema
from fastft.model import llava, processor, tokenizer, vision
from fastft.model import load as model_load

if TYPE_CHECKING:
    from fastft.data.vision import Seer


@dataclass(frozen=True)
class Words:
    """Ready to read data.

    Attributes:
        tokenizer: with its chat template.
        processor: of a vision run, else None.
        seer: the processor as `data.prepare` takes it, else None.
    """

    tokenizer: Any
    processor: Any = None
    seer: "Seer | None" = None


def read(config: schema.Config, base: model_load.Base) -> Words:
    """Read tokenizer and processor of a run's base.

    Raises:
        ConfigError: `vision` does not fit the model, or a dialogue has no form.
        CheckpointError: tokenizer or processor cannot be read.
    """
    vision.require(config, base.config_json)
    if config.vision is None:
        words = Words(tokenizer.load_tokenizer(base.weights_folder, config.model))
    else:
        words = _seeing(config, base, config.vision)
    if config.task != "pretrain" or words.seer is not None:
        tokenizer.require_chat_template(words.tokenizer, config.model)
    return words


def _seeing(config: schema.Config, base: model_load.Base, settings: schema.Vision) -> Words:
    from fastft.data import cache
    from fastft.data.vision import Seer

    if settings.tower is not None:
        kind = "llava"
        made = llava.read_processor(config, base.weights_folder)
        token = int(made.image_token_id)
    else:
        kind = str(base.config_json.get("model_type"))
        made = processor.load(base.weights_folder, settings, model_type=kind)
        token = vision.image_token_id(model_load.read_model_config(base))
    if not getattr(made.tokenizer, "chat_template", None):
        made.tokenizer = tokenizer.with_template(made.tokenizer, config.model)
    folder = None if config.data.cache is None else cache.folder(config.data.cache)
    seer = Seer(made, token, settings, kind, folder=folder)
    if config.data.packing and not seer.packs:
        console.note(f"packing: off, a model of type {kind} takes one sample a row")
    return Words(made.tokenizer, made, seer)
