"""A LLaVA put together from a language model, the vision tower of a CLIP and a projector (XTuner's way).

What comes out is transformers' own `LlavaForConditionalGeneration` and `LlavaProcessor`; nothing is copied, the parts
are moved into it. `save_parts` takes a trained one apart again, into folders that XTuner's tool writes
(spec/formats.md 7.3); `convert.llava` makes one folder of them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft import console
from fastft.config import schema
from fastft.convert import clip, llava
from fastft.convert.json_file import read_object
from fastft.errors import CheckpointError, ConfigError, PlanError
from fastft.model import tokenizer, whole

if TYPE_CHECKING:
    import torch

# A turn's parts become text, images first and each on a line of its own, as XTuner and LLaVA write them.
IMAGES_FIRST = """\
{%- set ns = namespace(turns=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string or not message['content'] -%}
{%- set ns.turns = ns.turns + [message] -%}
{%- else -%}
{%- set said = namespace(images='', text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set said.images = said.images + '<image>\\n' -%}
{%- elif part['type'] == 'text' -%}{%- set said.text = said.text + part['text'] -%}{%- endif -%}
{%- endfor -%}
{%- set content = said.images + (said.text | trim if said.images else said.text) -%}
{%- set ns.turns = ns.turns + [dict(message, content=content)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = ns.turns -%}
"""
PROJECTOR_ACTIVATION = "gelu"
# What a whole CLIP holds besides its vision tower.
_NOT_OF_THE_TOWER = (r"text_model\.", "logit_scale", r"(text|visual)_projection\.", "position_ids")


def locate_tower(config: schema.Config) -> Path:
    """Find the folder of `vision.tower`.

    Raises:
        HubError: it is neither a folder nor on the hub.
        ConfigError: it is no CLIP.
    """
    from fastft.hub import locate

    assert config.vision is not None
    assert config.vision.tower is not None
    folder = Path(locate.model(schema.Model(name=config.vision.tower, hub=config.model.hub)))
    tower_config(folder)
    return folder


def read_processor(config: schema.Config, folder: Path) -> Any:
    """Read LLaVA's processor for a run; images are filled up to a square unless the projector alone is trained.

    Args:
        config: of the run.
        folder: of the language model.

    Raises:
        CheckpointError: the tokenizer, or the tower's image processor, cannot be read.
    """
    assert config.vision is not None
    words = tokenizer.load_tokenizer(folder, config.model)
    tower = locate_tower(config)
    _check(config, read_object(folder / "config.json"), tower_config(tower))
    return processor(words, tower, to_square=config.vision.learn.llm != "frozen")


def _check(config: schema.Config, llm: Mapping[str, Any], tower: Mapping[str, Any]) -> None:
    """Refuse parts that do not fit, before gigabytes of them are read.

    Raises:
        ConfigError: saying which.
        CheckpointError, PlanError: the projector cannot be used.
    """
    assert config.vision is not None
    folder = _projector_folder(config.vision)
    if folder is None:
        settings = llava.projector_config(
            tower["hidden_size"], llm.get("hidden_size", 0), PROJECTOR_ACTIVATION, bias=True
        )
    elif not (folder / "config.json").is_file():
        first = f" with `fastft train {folder.parts[-3]}`" if folder.parts[-2:] == ("llava", "projector") else ""
        raise ConfigError(
            f"vision.projector {folder}: no projector there; train it first (the first stage){first}, or set vision.projector="
            "null to begin with a new one"
        )
    else:
        settings = dict(llava.read_projector(folder).config)
    try:
        llava.llava_config(llm, tower, settings, image_token_id=0, select_layer=config.vision.select_layer, num_rows=1)
    except PlanError as error:
        raise ConfigError(f"vision: {error}") from error


def _projector_folder(vision: schema.Vision) -> Path | None:
    """The folder of `vision.projector`, which may be that of a whole result."""
    if vision.projector is None:
        return None
    folder = Path(vision.projector).expanduser()
    return folder / llava.PROJECTOR if llava.is_result(folder) else folder


def read(config: schema.Config, llm: Any, words: Any) -> Any:
    """Read tower and projector of a run, and put them together with its language model.

    Args:
        config: of the run.
        llm: an AutoModelForCausalLM as the method wants it.
        words: the tokenizer.

    Raises:
        ConfigError, CheckpointError: what does not fit or cannot be read.
    """
    vision = config.vision
    assert vision is not None
    tower = read_tower(locate_tower(config), llm.get_input_embeddings().weight.dtype)
    projector = _projector_folder(vision)
    model = put_together(llm, tower, words, projector=projector, select_layer=vision.select_layer)
    on = llm.get_input_embeddings().weight.device
    model.model.vision_tower.to(on)
    model.model.multi_modal_projector.to(on)
    if projector is None:
        console.note("model: a LLaVA of both; its projector is new")
    else:
        console.note(f"model: a LLaVA of both; its projector is that of {projector}")
    return model


def tower_config(folder: Path) -> dict[str, Any]:
    """config.json of the vision tower in a folder of a CLIP, whole or the tower alone.

    Raises:
        ConfigError: it is no CLIP.
        FileError: there is none.
    """
    config = read_object(folder / "config.json")
    kind = config.get("model_type")
    if kind not in ("clip", clip.VISION_TYPE):
        raise ConfigError(f"vision.tower: {folder} is a {kind}; a CLIP is needed (clip, {clip.VISION_TYPE})")
    found = clip.vision_config(config)
    from transformers import CLIPVisionConfig

    # Old files leave out what is as usual.
    completed: dict[str, Any] = CLIPVisionConfig(**found).to_dict()
    return {**completed, **found}


def with_image_token(words: Any) -> int:
    """Give a tokenizer a token for images, where it has none; returns the token's id."""
    found = words.convert_tokens_to_ids(llava.IMAGE_TOKEN)
    if found is None or found == words.unk_token_id or llava.IMAGE_TOKEN not in words.get_vocab():
        words.add_special_tokens({"additional_special_tokens": [llava.IMAGE_TOKEN]}, replace_extra_special_tokens=False)
        found = words.convert_tokens_to_ids(llava.IMAGE_TOKEN)
    return int(found)


def with_images_first(template: str) -> str:
    """Let a chat template that takes texts take images, too."""
    return template if template.startswith(IMAGES_FIRST) else IMAGES_FIRST + template


def processor(words: Any, tower: Path, *, to_square: bool = True) -> Any:
    """LLaVA's processor: the language model's tokenizer and chat template, the tower's image processor.

    Args:
        words: gets `<image>`, and a template that takes images, in place.
        tower: folder of the CLIP, with preprocessor_config.json.
        to_square: fill an image up to a square with the mean colour, so that nothing is cut off; XTuner does it in the second
            stage and in chat.

    Raises:
        CheckpointError: the tower has no image processor.
    """
    from transformers import AutoImageProcessor, LlavaProcessor

    with_image_token(words)
    if words.chat_template:
        words.chat_template = with_images_first(words.chat_template)
    try:
        plain = AutoImageProcessor.from_pretrained(tower)
    except (OSError, ValueError, KeyError) as cause:
        raise CheckpointError(
            f"vision.tower {tower}: its image processor cannot be read (preprocessor_config.json): "
            f"{str(cause).strip().splitlines()[0]}"
        ) from cause
    config = tower_config(tower)
    return LlavaProcessor(
        image_processor=_padding(plain) if to_square else plain,
        tokenizer=words,
        patch_size=config["patch_size"],
        vision_feature_select_strategy="default",
        chat_template=words.chat_template,
        image_token=llava.IMAGE_TOKEN,
        num_additional_image_tokens=1,
    )


def _padding(plain: Any) -> Any:
    """The same image processor, which fills images up to a square first."""
    import importlib.util

    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    kind: Any = LlavaImageProcessorPil
    if importlib.util.find_spec("torchvision") is not None:
        from transformers import LlavaImageProcessor

        kind = LlavaImageProcessor
    settings = {
        key: value
        for key, value in plain.to_dict().items()
        if key not in ("image_processor_type", "processor_class", "feature_extractor_type")
    }
    return kind(**settings | {"do_pad": True})


def put_together(
    llm: Any,
    tower: Any,
    words: Any,
    *,
    projector: Path | None,
    select_layer: int,
) -> Any:
    """Move a language model and a tower into one LLaVA.

    Args:
        llm: an AutoModelForCausalLM, plain or in 4 bit; it is taken apart.
        tower: a CLIPVisionModel.
        words: the language model's, with `<image>`.
        projector: folder of a trained one; None: a new one is drawn.
        select_layer: the layer of the tower whose features are taken.

    Returns:
        a LlavaForConditionalGeneration; its projector is fp32.

    Raises:
        ConfigError: LLaVA cannot hold this language model.
        CheckpointError, PlanError: the projector does not fit.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    _require_plain_head(llm)
    image_token_id = with_image_token(words)
    _grow(llm, image_token_id, len(words))
    text, seeing = llm.config, tower.config
    if projector is None:
        settings = llava.projector_config(seeing.hidden_size, text.hidden_size, PROJECTOR_ACTIVATION, bias=True)
    else:
        settings = dict(llava.read_projector(projector).config)
    try:
        config = LlavaConfig(
            **_plain(
                llava.llava_config(
                    text.to_dict(),
                    seeing.to_dict(),
                    settings,
                    image_token_id=image_token_id,
                    select_layer=select_layer,
                    num_rows=llm.get_input_embeddings().weight.shape[0],
                )
            )
        )
    except PlanError as error:
        raise ConfigError(f"vision.tower: {error}") from error
    # The parts' own configs: what was chosen while they were read (attention, quantization) stays with them.
    config.text_config, config.vision_config = text, seeing
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(config)  # noqa: SLF001 - PEFT and Trainer use it too
    model.model.language_model = getattr(llm, llm.base_model_prefix)
    model.model.vision_tower = tower
    model.lm_head = llm.lm_head
    model.model.multi_modal_projector = _projector(config, projector)
    model.model.multi_modal_projector.register_forward_pre_hook(_as_float)
    model.generation_config = llm.generation_config
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer"):
        if hasattr(llm, name):
            setattr(model, name, getattr(llm, name))
    if getattr(llm.config, "quantization_config", None) is not None:
        model.config.quantization_config = llm.config.quantization_config
    return model


def read_tower(folder: Path, dtype: "torch.dtype", attention: str | None = None) -> Any:
    """Read the vision tower of a CLIP.

    Raises:
        CheckpointError: it cannot be read.
    """
    from transformers import CLIPVisionModel

    from fastft.convert import layout

    tower_config(folder)
    folder = layout.without_pickles(folder)
    said: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    return whole.read(CLIPVisionModel, folder, what="vision.tower", dropped=_NOT_OF_THE_TOWER, dtype=dtype, **said)


def projector_tensors(model: Any) -> "dict[str, torch.Tensor]":
    """The projector's weights by XTuner's names."""
    state = model.model.multi_modal_projector.state_dict()
    return {
        f"{ours}.{kind}": state[f"{theirs}.{kind}"]
        for ours, theirs in llava.PROJECTOR_LAYERS.items()
        for kind in ("weight", "bias")
        if f"{theirs}.{kind}" in state
    }


def save_projector(tensors: Mapping[str, "torch.Tensor"], folder: Path, hidden_act: str = PROJECTOR_ACTIVATION) -> None:
    """Write a projector folder: config.json and model.safetensors."""
    from safetensors.torch import save_file

    hidden, seen = tensors["model.0.weight"].shape
    config = llava.projector_config(seen, hidden, hidden_act, bias="model.0.bias" in tensors)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})


def _require_plain_head(llm: Any) -> None:
    """See that a language model is a body and a head without anything else."""
    children = {name for name, _ in llm.named_children()}
    head = getattr(llm, "lm_head", None)
    if llm.base_model_prefix != "model" or children != {"model", "lm_head"} or getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"vision.tower: transformers' LLaVA has no place for a language model of type {llm.config.model_type}; take one"
            " that is built as Llama is (InternLM2, Llama, Qwen, Mistral, Phi-3, ...)"
        )


def _grow(llm: Any, image_token_id: int, num_tokens: int) -> None:
    """Give embedding and head rows for `<image>` where they lack; new ones are the mean of the others."""
    import torch

    before = llm.get_input_embeddings().weight.shape[0]
    after = llava.rows_needed(before, image_token_id, num_tokens)
    if after == before:
        return
    console.note(f"model: {llava.new_rows_note(before, after)}")
    llm.resize_token_embeddings(after, mean_resizing=False)
    with torch.no_grad():
        for table in {
            id(module.weight): module.weight for module in (llm.get_input_embeddings(), llm.lm_head)
        }.values():
            table[before:] = table[:before].double().mean(dim=0).to(table.dtype)


def _as_float(_module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The projector is fp32 whatever the tower is; LLaVA turns what comes out into the language model's dtype."""
    return tuple(features.float() for features in inputs)


def _projector(config: Any, folder: Path | None) -> Any:
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    made = LlavaMultiModalProjector(config).float()
    if folder is None:
        return made
    from safetensors.torch import load_file

    path = folder / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"vision.projector {folder}: no model.safetensors there; write it anew with pth_to_hf")
    tensors = load_file(path)
    made.load_state_dict(
        {
            f"{llava.PROJECTOR_LAYERS[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": tensor
            for name, tensor in tensors.items()
        }
    )
    return made.float()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a LlavaConfig without what only a file says."""
    return {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
