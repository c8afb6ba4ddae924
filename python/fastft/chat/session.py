"""A model to talk to, and its answers.

The template is the one that lies with the model, so training and chat cannot differ. `load` takes a model folder, an
adapter folder (its base is found by what adapter_config.json says) or a hub id; `answer` streams one answer.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft import console
from fastft.config import schema
from fastft.convert.json_file import read_object
from fastft.data.dialogue import IMAGE_MARK, ImageRef, Message
from fastft.data.template import ChatTemplate
from fastft.errors import CheckpointError, ConfigError, HubError
from fastft.model import device, folder_check, processor, quantization, quiet, tokenizer, vision, whole
from fastft.model import load as model_load

if TYPE_CHECKING:
    import torch

    from fastft.data.vision import Seer

_MAX_RANK = 65536

OnText = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: longest answer.
        temperature: 0 always takes the likeliest token; below 1 prefers likely ones.
        top_k: sample from so many likeliest tokens; 0 is all.
        top_p: sample from the likeliest tokens of this total probability, 0 to 1.
        repetition_penalty: above 1 makes tokens that were there less likely.
        seed: of the sampling; the same seed gives the same answer.
    """

    max_new_tokens: int = 2048
    temperature: float = 0.1
    top_k: int = 40
    top_p: float = 0.75
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, f"max_new_tokens: {self.max_new_tokens} is not allowed; 1 or more"),
            (self.temperature >= 0, f"temperature: {self.temperature} is not allowed; 0 or more"),
            (self.top_k >= 0, f"top_k: {self.top_k} is not allowed; 0 (all) or more"),
            (0 < self.top_p <= 1, f"top_p: {self.top_p} is not allowed; above 0, at most 1"),
            (self.repetition_penalty > 0, f"repetition_penalty: {self.repetition_penalty} is not allowed; above 0"),
        )
        for holds, complaint in checks:
            if not holds:
                raise ConfigError(complaint)


class Talk:
    """A model with its tokenizer, ready to answer.

    Args:
        model: any causal language model of transformers or peft.
        tokenizer: its tokenizer.
        continues: treat every question as text to continue, even if there is a chat template.
        seer: what makes tokens and pixels of images; None for a model that reads text only.
    """

    def __init__(self, model: Any, tokenizer: Any, *, continues: bool = False, seer: "Seer | None" = None) -> None:
        self.model = model
        self.seer = seer
        self.tokenizer = tokenizer
        without = continues or not tokenizer.chat_template
        self.template = None if without else ChatTemplate(tokenizer, of_processor=seer is not None)
        self.stops = stop_ids(model, tokenizer, self.template)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids after which the answer comes; without a template the last message, to be continued."""
        if self.template is not None:
            return self.template.prompt(messages)
        return [int(i) for i in self.tokenizer(messages[-1].content)["input_ids"]]

    def inputs(self, messages: Sequence[Message]) -> "dict[str, torch.Tensor]":
        """What the model gets: input_ids and attention_mask, int64 [1, T]; with images what it needs to see them.

        Raises:
            ConfigError: there are images, and the model cannot see.
            BadImageError: an image cannot be used.
        """
        import torch

        refs = [image for message in messages for image in message.images]
        self.require_sight(refs)
        if self.seer is None or self.template is None:
            ids, more = self.prompt_ids(messages), {}
        else:
            text, _, _ = self.seer.expanded(self.template.opened(messages), [], refs)
            ids = self.template.ids(text)
            more = self.seer.pixels(refs)
            if self.seer.type_key is not None:
                more[self.seer.type_key] = torch.tensor([self.seer.types(ids)])
        ids_1T = torch.tensor([ids])
        found = {"input_ids": ids_1T, "attention_mask": torch.ones_like(ids_1T), **more}
        return {name: value.to(self.model.device) for name, value in found.items()}

    def require_sight(self, refs: Sequence[ImageRef]) -> None:
        """Refuse images that the model cannot be shown.

        Raises:
            ConfigError: it reads text only, or has no chat template to show them in.
        """
        if refs and self.seer is None:
            raise ConfigError("chat: this model reads text only; --image is for vision-language models")
        if refs and self.template is None:
            raise ConfigError("chat: this model has no chat template, so there is no place for an image")


def question(text: str, system: str | None = None, images: Sequence[ImageRef] = ()) -> list[Message]:
    """The messages of a single question; images stand before its text."""
    first = [Message("system", system)] if system else []
    return [*first, Message("user", IMAGE_MARK * len(images) + text, images=tuple(images))]


def image(path: str) -> ImageRef:
    """An image file to be shown; it is read when the question is asked."""
    return ImageRef(str(Path(path).expanduser()), None, path)


def look(ref: ImageRef) -> None:
    """See that an image can be shown.

    Raises:
        BadImageError: it cannot be read.
    """
    from fastft.data import images

    images.examine(ref, schema.Vision().max_image_pixels)


def load(
    model: str, *, adapter: str | None = None, bits: int | None = None, dtype: str = "auto", hub: str = "huggingface"
) -> Talk:
    """Read a model to talk to.

    Args:
        model: folder or hub id of a model, or the folder of an adapter, whose base is then looked for.
        adapter: folder of an adapter to put on the model.
        bits: 4 holds the weights in NF4, None as they are.
        dtype: bf16, fp16, fp32, or auto (the checkpoint's own; fp32 for fp16 on a CPU).
        hub: where to look for an id.

    Raises:
        CheckpointError: a folder is no model or no adapter.
        HubError: the model, or the base of an adapter, cannot be found.
    """
    quiet.prepare_libraries()
    wanted = Path(model).expanduser()
    if (wanted / "adapter_config.json").is_file():
        if adapter is not None:
            raise ConfigError(f"chat {model}: this is an adapter already; give its base model with --adapter {adapter}")
        adapter, model = str(wanted), _base_of(wanted)
        console.note(f"chat: {adapter} is an adapter; its base is {model}")
        base = locate(model, hub, f"the base of adapter {adapter}")
    else:
        base = locate(model, hub, None)
    words, seer = _words(base, None if adapter is None else Path(adapter))
    loaded = read(base, bits, dtype)
    if adapter is not None:
        loaded = with_adapter(loaded, Path(adapter))
    loaded.eval()
    talk = Talk(loaded, words, seer=seer)
    if talk.template is None:
        console.note("chat: this model has no chat template; it continues your text instead of answering it")
    return talk


def answer(talk: Talk, messages: Sequence[Message] | str, sampling: Sampling, on_text: OnText | None = None) -> str:
    """Answer a dialogue.

    Args:
        talk: the model.
        messages: the turns so far, the user's last; or the text of a single question.
        sampling: how tokens are chosen; torch's global random state is as before afterwards.
        on_text: called with each new piece of the answer as it comes.

    Returns:
        the answer without special tokens.
    """
    import torch

    if isinstance(messages, str):
        messages = question(messages)
    inputs = talk.inputs(messages)
    streamer = _Stream(talk.tokenizer, on_text)
    with device.same_random(talk.model.device), torch.no_grad():
        torch.manual_seed(sampling.seed)
        with folder_check.library_errors("chat: the model cannot answer (do its weights hold undefined numbers?)"):
            talk.model.generate(
                **inputs,
                generation_config=_generation(talk, sampling),
                streamer=streamer,
            )
    return streamer.text


def stop_ids(model: Any, tokenizer: Any, template: ChatTemplate | None) -> list[int]:
    """Ids that end an answer: those of generation_config, the tokenizer's eos, and what ends a turn in the template."""
    found: list[int] = []
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None)
    found += eos if isinstance(eos, list) else [eos] if eos is not None else []
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    if template is not None:
        # A mark of several tokens ("</s>" unknown to the tokenizer, "\n\n") cannot be seen in one id.
        found += template.stop_token_ids
    return sorted({int(i) for i in found})


class _Stream:
    """Collects generated ids and hands on whole characters; transformers calls `put` and `end`."""

    def __init__(self, tokenizer: Any, on_text: OnText | None) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.ids: list[int] = []
        self.text = ""
        self.is_prompt = True

    def put(self, value: Any) -> None:
        if self.is_prompt:
            self.is_prompt = False
            return
        self.ids += value.flatten().tolist()
        if self.on_text is not None:
            self._show(final=False)

    def end(self) -> None:
        self._show(final=True)

    def _show(self, *, final: bool) -> None:
        decoded = str(self.tokenizer.decode(self.ids, skip_special_tokens=True))
        # The bytes of one character may lie in several tokens; the replacement sign says that some are missing.
        if not final:
            decoded = decoded.rstrip("\N{REPLACEMENT CHARACTER}")
        new, self.text = decoded[len(self.text) :], decoded if len(decoded) >= len(self.text) else self.text
        if new and self.on_text is not None:
            self.on_text(new)


def _generation(talk: Talk, sampling: Sampling) -> Any:
    from transformers import GenerationConfig

    greedy = sampling.temperature == 0
    chosen = {} if greedy else {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=not greedy,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=talk.stops or None,
        pad_token_id=tokenizer.pad_id(talk.tokenizer),
        bos_token_id=talk.tokenizer.bos_token_id,
        use_cache=True,
        **chosen,
    )


def locate(model: str, hub: str, role: str | None) -> model_load.Base:
    """Find a model by its folder or id; `role` says what it is for, where it is not the one that was asked for.

    Raises:
        HubError: it cannot be found.
    """
    try:
        return model_load.locate(schema.Model.model_validate({"name": model, "hub": hub}))
    except HubError as cause:
        if role is None:
            raise
        raise HubError(f"{role} cannot be found: {cause}; give it by hand: fastft chat BASE --adapter DIR") from cause


def _base_of(adapter: Path) -> str:
    name = read_object(adapter / "adapter_config.json").get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"adapter {adapter}: base_model_name_or_path must be a text, it is {name!r}")
    if not name:
        raise CheckpointError(
            f"adapter {adapter}: it does not name its base; use: fastft chat BASE --adapter {adapter}"
        )
    return name


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def _words(base: model_load.Base, adapter: Path | None) -> "tuple[Any, Seer | None]":
    """The tokenizer, and what makes tokens and pixels of images if the model sees; an adapter's own files win."""
    if not vision.sees(base.config_json):
        return tokenizer.read(adapter if adapter and _has_tokenizer(adapter) else base.weights_folder), None
    from fastft.data.vision import Seer

    has_processor = adapter is not None and any((adapter / name).is_file() for name in processor.FILES[:2])
    folder = adapter if adapter is not None and has_processor else base.weights_folder
    kind = str(base.config_json.get("model_type"))
    made = processor.load(folder, model_type=kind)
    if adapter is not None and not has_processor and _has_tokenizer(adapter):
        made.tokenizer = tokenizer.read(adapter)
    token = vision.image_token_id(model_load.read_model_config(base))
    return made.tokenizer, Seer(made, token, schema.Vision(), kind)


def read(base: model_load.Base, bits: int | None, dtype: str) -> Any:
    """Read the weights of a model to talk to; `bits` and `dtype` as in `load`.

    Raises:
        CheckpointError: they cannot be read, or the model does not talk.
    """
    import torch
    from transformers import AutoModelForCausalLM

    sees = vision.sees(base.config_json)
    model_class = vision.model_class() if sees else AutoModelForCausalLM
    if any(str(name).endswith("ForSequenceClassification") for name in base.config_json.get("architectures") or ()):
        raise CheckpointError(f"model {base.folder}: a reward model gives an answer a number; it does not talk")
    base = model_load.without_pickles(base)
    quiet.hide_loading_bars()
    on = device.choose()
    stored_4bit = quantization.of_checkpoint(base.config_json, base.folder)
    held = model_load.checkpoint_dtype(base) if dtype == "auto" else device.by_name(dtype)
    if dtype == "auto" and held == torch.float16 and on.type == "cpu":
        held = torch.float32
    place: dict[str, Any] = {"device_map": {"": str(on)}} if on.type != "cpu" or bits or stored_4bit else {}
    model_config = model_load.read_model_config(base)
    if bits and stored_4bit is None:
        skip = vision.unquantized(model_config) if sees else None
        place["quantization_config"] = quantization.settings(schema.Quantization(), on, skip)
    device.share_cores(model_config, on)
    model = whole.read(model_class, base.weights_folder, config=model_config, dtype=held, **place)
    if bits or stored_4bit is not None:
        quantization.make_safe(model)
    return model


def with_adapter(model: Any, adapter: Path) -> Any:
    """Put an adapter onto a model; gives peft's model.

    Raises:
        CheckpointError: it is none, does not fit, or does not talk.
    """
    from peft import PeftModel, get_peft_model_state_dict

    from fastft.convert.folder import read_safetensors

    if not (adapter / "adapter_config.json").exists():
        raise CheckpointError(f"adapter {adapter}: there is no adapter_config.json; is this an adapter folder?")
    settings = read_object(adapter / "adapter_config.json")
    if settings.get("task_type") == "SEQ_CLS":
        raise CheckpointError(f"adapter {adapter}: a reward model gives an answer a number; it does not talk")
    _check_kind(settings, adapter)
    weights = adapter / "adapter_model.safetensors"
    if not weights.exists():
        pickle = adapter / "adapter_model.bin"
        hint = f"; {pickle.name} is a pickle, which chat does not read: `convert merge` does" if pickle.exists() else ""
        raise CheckpointError(f"adapter {adapter}: there is no {weights.name}{hint}")
    there = set(read_safetensors(weights))
    with folder_check.library_errors(f"adapter {adapter}: does not fit the model"), warnings.catch_warnings():
        # peft only warns of weights that the file lacks, and leaves them as they were drawn.
        warnings.filterwarnings("error", message=r"(?s).*missing adapter keys", category=UserWarning)
        adapted = PeftModel.from_pretrained(model, adapter)
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if there - wanted:
        raise CheckpointError(
            f"adapter {adapter}: {min(there - wanted)} of {weights.name} has no place in the model; it is of another model"
        )
    return adapted


def _check_kind(settings: Mapping[str, Any], adapter: Path) -> None:
    """Refuse settings with which peft would import modules by name, or make matrices of any size."""
    from peft import PeftType

    kind, rank = settings.get("peft_type"), settings.get("r")
    if not isinstance(kind, str) or kind not in set(PeftType):
        raise CheckpointError(f"adapter {adapter}: peft_type {kind!r} in adapter_config.json is not known")
    if kind == "LORA" and (type(rank) is not int or not 1 <= rank <= _MAX_RANK):
        raise CheckpointError(f"adapter {adapter}: r in adapter_config.json must be 1 to {_MAX_RANK}, it is {rank!r}")
