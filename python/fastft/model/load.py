"""A base model read from its folder: found, laid out if need be, in the right dtype, with its adapter.

`locate` finds the folder, `load_tokenizer` reads its tokenizer, `load_weights` the rest; `load` does all three.
The order matters to a run, which checks its data (tokenizer needed) before it reads gigabytes of weights.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastft import console
from fastft.config import schema
from fastft.errors import CheckpointError, ConfigError
from fastft.model import (
    adapter,
    device,
    folder_check,
    freeze,
    llava,
    lora_start,
    memory,
    placement,
    quantization,
    quiet,
    speed,
    vision,
    whole,
)
from fastft.model.quantization import Quantized
from fastft.model.tokenizer import load_tokenizer, pad_id

__all__ = ["Base", "Loaded", "load", "load_tokenizer", "load_weights", "locate"]

# transformers has no classes for these (spec training.md 5); both are Llama under other names.
_LAID_OUT_AS_LLAMA = ("internlm", "internlm2")
# A class of transformers' own, but published with a tokenizer that only its remote code reads.
_TOKENIZER_REWRITTEN = "internlm3"


@dataclass(frozen=True)
class Base:
    """Where a base model lies.

    Attributes:
        name: what a merge or a chat should call it later: the hub id, or the absolute folder.
        folder: the checkpoint as it was found.
        weights_folder: the folder that is read; another one when the checkpoint was laid out as Llama.
        config_json: config.json of `weights_folder`.
        laid_out_from: the original model type ("internlm2") in that case, else None.
    """

    name: str
    folder: Path
    weights_folder: Path
    config_json: Mapping[str, Any]
    laid_out_from: str | None


@dataclass(frozen=True)
class Loaded:
    """A model ready to train.

    Attributes:
        model: transformers' model; a PeftModel for lora and qlora.
        tokenizer: its tokenizer.
        folder: the checkpoint as it was found.
        base: where it lies.
        quantized: how a 4-bit base is held, None for a plain one.
        products: torch dtype to which fp32 weights are rounded in products; None: they are multiplied as they are.
        memory: the memory switches that are in use.
        speed: what is used to be faster.
    """

    model: Any
    tokenizer: Any
    folder: Path
    base: Base
    quantized: Quantized | None
    products: Any
    memory: memory.Switches
    speed: speed.Speed


def locate(model: schema.Model) -> Base:
    """Find the base's folder, lay an InternLM checkpoint out as Llama.

    Raises:
        HubError: it is neither a folder nor on the hub.
        CheckpointError: the folder has no readable config.json.
    """
    from fastft.hub import locate as hub

    folder = Path(hub.model(model))
    config_json = read_config(folder)
    folder_check.check_small_files(folder)
    is_local = model.name == "demo" or Path(model.name).expanduser().exists()
    name = str(folder.resolve()) if is_local else model.name
    kind = str(config_json.get("model_type", ""))
    needs_tokenizer = kind == _TOKENIZER_REWRITTEN and not (folder / "tokenizer.json").is_file()
    if kind not in _LAID_OUT_AS_LLAMA and not needs_tokenizer:
        return Base(name, folder, folder, config_json, None)
    from fastft.convert import layout

    laid_out = layout.without_remote_code(folder)
    if needs_tokenizer:
        console.note(f"model: {kind}'s tokenizer.model is read natively (no remote code)")
        return Base(name, folder, laid_out, read_config(laid_out), None)
    console.note(f"model: {kind} is read as Llama, natively (no remote code); adapters merge onto the original files")
    return Base(name, folder, laid_out, read_config(laid_out), kind)


def without_pickles(base: Base) -> Base:
    """The same base with its weights in safetensors; see `layout.without_pickles`."""
    from fastft.convert import layout

    return replace(base, weights_folder=layout.without_pickles(base.weights_folder))


def read_model_config(base: Base, **settings: Any) -> Any:
    """The transformers config of a base.

    Raises:
        CheckpointError: transformers does not know this kind of model, or it needs `trust_remote_code`.
    """
    from transformers import AutoConfig

    kind = base.config_json.get("model_type", "unknown")
    own_code = base.config_json.get("auto_map") and not settings.get("trust_remote_code")
    hint = " (it comes with code of its own, which model.trust_remote_code: true would run)" if own_code else ""
    # With the answer False a library does not ask on the terminal whether it may run code.
    settings = {"trust_remote_code": False, **settings}
    with folder_check.library_errors(f"model {base.folder}: model type {kind} cannot be read{hint}"):
        return AutoConfig.from_pretrained(base.weights_folder, **settings)


def load(config: schema.Config) -> Loaded:
    """Find, read and prepare the model of a config; see `locate`, `load_tokenizer` and `load_weights`."""
    base = locate(config.model)
    return load_weights(config, base, load_tokenizer(base.weights_folder, config.model))


def load_weights(config: schema.Config, base: Base, tokenizer: Any) -> Loaded:
    """Read the weights of `base` as the config wants them and attach the adapter.

    Raises:
        ConfigError: the method does not fit the checkpoint.
        CheckpointError: weights or config cannot be read, or the tokenizer knows more tokens than the model.
        FileError: the folder changed while it was read.
    """
    from fastft.convert.source import check_unchanged, looked_at

    if config.model.init != "random":
        base = without_pickles(base)
    quiet.prepare_libraries()
    quiet.hide_loading_bars()
    seen = looked_at(base.weights_folder)
    on = device.choose()
    kind = weights_kind(config.method.kind)
    stored_4bit = quantization.of_checkpoint(base.config_json, base.folder)
    if stored_4bit is not None and kind == "full":
        raise ConfigError(
            f"method: {config.method.kind} cannot train a 4-bit checkpoint; use method qlora, or the 16-bit checkpoint"
        )
    if config.model.init == "random" and (kind == "qlora" or stored_4bit is not None):
        raise ConfigError("model.init: random makes new weights, which a 4-bit method would freeze; use method full")
    settings: dict[str, Any] = {"trust_remote_code": config.model.trust_remote_code}
    model_config = read_model_config(base, **settings)
    if config.task == "reward":
        model_config.num_labels, model_config.pad_token_id = 1, pad_id(tokenizer)
    in_parts = config.vision is not None and config.vision.tower is not None
    sees = config.vision is not None and not in_parts
    as_class = vision.model_class() if sees else model_class(config.task)
    device.share_cores(model_config, on)
    dtype = device.weights_dtype(config.model.dtype, checkpoint_dtype(base), kind, on)
    products = device.products_dtype(config.model.dtype, dtype, kind, on)
    is_16bit = dtype.itemsize == 2 or products is not None
    fast = speed.choose(config, speed.facts_of(model_config, on, products_16bit=is_16bit))
    if fast.attention is not None:
        settings["attn_implementation"] = fast.attention
    if config.model.init == "random":
        model = _draw(as_class, model_config, dtype, settings, config.train.seed)
    else:
        if kind == "qlora" and stored_4bit is None:
            assert config.method.quantization is not None
            skip = vision.unquantized(model_config) if sees else None
            settings["quantization_config"] = quantization.settings(config.method.quantization, on, skip)
        elif stored_4bit is not None:
            console.note("model: the checkpoint is already 4-bit; it is used as it is")
        # A model that is shared out afterwards need not fit on the device; a 4-bit one is packed there.
        waits = config.distributed.shares and "quantization_config" not in settings and stored_4bit is None
        places = placement.device_map(config.memory, model_config, "cpu" if waits else str(on), as_class)
        model = _read(as_class, base, model_config, dtype, settings=settings, places=places)
    check_unchanged(tuple(found for path, found in seen.items() if path.suffix in (".safetensors", ".bin", ".json")))
    quantized = None
    if kind == "qlora" or stored_4bit is not None:
        quantization.make_safe(model)
        quantized = quantization.describe(model)
    if in_parts:
        model = llava.read(config, model, tokenizer)
    _check_vocabulary(model, tokenizer, base)
    speed.install(model, fast)
    if config.method.lora is not None:
        learn = None if config.vision is None else config.vision.learn
        model = adapter.attach(model, config.method.lora, base.name, config.task, learn)
        lora_start.start(model, config.method.lora, base.weights_folder, in_parts=in_parts)
    elif config.vision is not None:
        if config.vision.learn.tower_lora is not None:
            adapter.attach_to_tower(model, base.name, config.vision.learn)
        vision.freeze(model, config.vision.learn)
    if config.vision is not None:
        vision.freeze_unused(model)
    if config.method.trained_layers is not None:
        freeze.freeze(model, config.method.trained_layers)
    switches = memory.choose(config, memory.facts_of(model, on), on)
    memory.install(model, switches, on)
    return Loaded(model, tokenizer, base.folder, base, quantized, products, switches, fast)


def read_config(folder: Path) -> Mapping[str, Any]:
    """config.json of a model folder.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    from fastft.convert.config_file import config_of

    return config_of(folder)


def checkpoint_dtype(base: Base) -> Any:
    """The torch dtype of the checkpoint: what config.json says, else what its first floating tensor is, else fp32."""
    import torch

    text_config = base.config_json.get("text_config") or {}
    named = base.config_json.get("dtype") or base.config_json.get("torch_dtype") or text_config.get("dtype")
    if isinstance(named, str) and hasattr(torch, named.removeprefix("torch.")):
        return getattr(torch, named.removeprefix("torch."))
    from safetensors import safe_open

    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    for path in sorted(base.weights_folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no dict
                stored = file.get_slice(key).get_dtype()
                if stored in kinds:
                    return kinds[stored]
    return torch.float32


def weights_kind(kind: Literal["full", "freeze", "lora", "qlora"]) -> Literal["full", "lora", "qlora"]:
    """The method whose rules of dtypes hold: what is true with full is true with freeze."""
    return "full" if kind == "freeze" else kind


def model_class(task: schema.Task) -> Any:
    """What transformers makes of a base: a model with a head for words, or for one number (task reward)."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if task == "reward" else AutoModelForCausalLM


def _draw(as_class: Any, model_config: Any, dtype: Any, settings: Mapping[str, Any], seed: int) -> Any:
    from transformers import set_seed

    set_seed(seed)
    return as_class.from_config(model_config, dtype=dtype, **settings)


def _read(
    as_class: Any,
    base: Base,
    model_config: Any,
    dtype: Any,
    *,
    settings: Mapping[str, Any],
    places: Mapping[str, str],
) -> Any:
    place: dict[str, Any] = (
        {"device_map": dict(places)} if "quantization_config" in settings or places[""] != "cpu" else {}
    )
    several = len(places) > 1
    if several:
        quantization.allow_parts_in_ram(settings.get("quantization_config"), model_config)
    is_classifier = "SequenceClassification" in as_class.__name__
    with placement.without_offload_hooks() if several else nullcontext():
        return whole.read(
            as_class,
            base.weights_folder,
            drawn=("score.weight",) if is_classifier else (),
            dropped=(r"^lm_head\.weight$",) if is_classifier else (),
            config=model_config,
            dtype=dtype,
            **place,
            **settings,
        )


def _check_vocabulary(model: Any, tokenizer: Any, base: Base) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= rows:
        raise CheckpointError(
            f"model {base.folder}: the tokenizer has ids up to {largest}, the model has embeddings for 0 to {rows - 1}; "
            "the tokenizer belongs to another model"
        )
