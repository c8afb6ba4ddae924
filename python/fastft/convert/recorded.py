"""What is known of the run that made a checkpoint: from the config text inside it, and from CONFIG.

mmengine keeps the whole config of a run as Python text beside the weights (`meta["cfg"]`). It is read like an XTuner
config file, by `python_text`, which runs nothing. LoRA's alpha, dropout and scaling stand nowhere else. Where the
checkpoint's own record and CONFIG disagree, the record is right, and the difference is said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastft.config import python_text, recipes
from fastft.config.python_text import Call, Symbol, Value
from fastft.config.schema import Config, Lora, Model
from fastft.convert.json_file import read_regular_file
from fastft.errors import ConfigError, UsageError

XTUNER_COPY = "xtuner_config.py"
# XTuner's names of these settings, and PEFT's defaults where a config leaves them out.
_LORA = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "bias": "none"}


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What the tensors of an adapter do not say; `r` is checked against them.

    Attributes:
        r: rank.
        alpha: the update is scaled by alpha/r.
        dropout: on the adapter's input.
        rslora: scale by alpha/sqrt(r).
        bias: none, all or lora_only: which biases are trained.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    bias: str = "none"


@dataclass(frozen=True)
class Run:
    """A run, as far as a conversion needs it.

    Attributes:
        place: where this is said, for complaints.
        model: the language model that was trained.
        method: full, freeze, lora or qlora.
        lora: of the language model; None: it has no adapter.
        visual_encoder: folder or id of the vision tower of a LLaVA model.
        visual_lora: of the vision tower.
        visual_select_layer: which of its layers the language model sees.
        config: ours, where CONFIG is one of ours.
        text: of CONFIG, where it is a Python config of XTuner.
    """

    place: str
    model: Model
    method: str
    lora: LoraSettings | None
    visual_encoder: str | None = None
    visual_lora: LoraSettings | None = None
    visual_select_layer: int | None = None
    config: Config | None = None
    text: bytes | None = None


def of_config(config: Config) -> Run:
    """What a config of ours says."""
    vision = config.vision
    return Run(
        f"the config {config.name}",
        config.model,
        config.method.kind,
        _settings(config.method.lora),
        visual_encoder=None if vision is None else vision.tower,
        visual_lora=None if vision is None else _settings(vision.learn.tower_lora),
        visual_select_layer=None if vision is None else vision.select_layer,
        config=config,
    )


def _settings(lora: Lora | None) -> LoraSettings | None:
    return None if lora is None else LoraSettings(lora.r, lora.alpha, lora.dropout, lora.rslora)


def of_python_file(path: Path, words: Sequence[str] = ()) -> Run:
    """What a Python config of XTuner says.

    Args:
        path: the file.
        words: `model.KEY=value` each: what to change (the base's folder on this machine).

    Raises:
        ConfigError: it cannot be read without running it, or names no model.
        UsageError: a word for something else.
    """
    content = read_regular_file(path, python_text.MAX_BYTES)
    try:
        run = of_text(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    changes = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in ("model.name", "model.hub", "model.revision"):
            raise UsageError(
                f"{word!r}: of an XTuner config only model.name, model.hub and model.revision can be changed here; edit"
                f" {path.name} for the rest"
            )
        changes[key.removeprefix("model.")] = value
    model = Model.model_validate(run.model.model_dump() | changes)
    return replace(run, model=model, text=content)


def of_text(text: str, place: str) -> Run:
    """What the text of a Python config says.

    Raises:
        ConfigError: it cannot be read without running it, or names no model.
    """
    model = python_text.read(text, place).get("model")
    name = _at(model, "llm", "pretrained_model_name_or_path")
    if not isinstance(model, dict) or not isinstance(name, str):
        raise ConfigError(f"{place}: no `model = dict(llm=dict(pretrained_model_name_or_path=...))` in it")
    lora = model.get("lora") or model.get("llm_lora")
    is_quantized = _at(model, "llm", "quantization_config") is not None
    method = "full" if lora is None else "qlora" if is_quantized else "lora"
    visual = _at(model, "visual_encoder", "pretrained_model_name_or_path")
    visual_lora, layer = model.get("visual_encoder_lora"), model.get("visual_select_layer")
    return Run(
        place,
        Model.model_validate({"name": name, **recipes.model_settings(name)}),
        method,
        None if lora is None else _lora(lora, place),
        visual_encoder=visual if isinstance(visual, str) else None,
        visual_lora=None if visual_lora is None else _lora(visual_lora, place),
        visual_select_layer=layer if isinstance(layer, int) else None,
    )


def joined(given: Run, meta: Mapping[str, Any], pth: Path) -> tuple[Run, tuple[str, ...]]:
    """What CONFIG and the checkpoint say together; the checkpoint is right where both speak.

    Args:
        given: from CONFIG.
        meta: the notes inside the checkpoint.
        pth: the checkpoint.

    Returns:
        the run, and a note for each difference.
    """
    text = meta.get("cfg")
    if not isinstance(text, str):
        return given, ()
    place = f"the record in {pth.name}"
    try:
        recorded = of_text(text, place)
    except ConfigError as error:
        return given, (f"{error}; the settings of {given.place} are used",)
    notes = [
        *_differences("LoRA", recorded.lora, given.lora, recorded, given),
        *_differences("LoRA of the vision tower", recorded.visual_lora, given.visual_lora, recorded, given),
    ]
    if recorded.model.name != given.model.name:
        notes.append(
            f"{place} says the base {recorded.model.name}, {given.place} says {given.model.name}, which is used: the same"
            " model under another name?"
        )
    return (
        replace(
            given,
            place=place,
            method=recorded.method,
            lora=recorded.lora,
            visual_encoder=given.visual_encoder or recorded.visual_encoder,
            visual_lora=recorded.visual_lora,
            visual_select_layer=recorded.visual_select_layer,
        ),
        tuple(notes),
    )


def _differences(what: str, recorded: LoraSettings | None, given: LoraSettings | None, a: Run, b: Run) -> list[str]:
    if recorded == given or (given is None and what != "LoRA"):
        return []
    if recorded is None or given is None:
        said = [f"{run.place} says {'no ' if lora is None else ''}{what}" for run, lora in ((a, recorded), (b, given))]
        return [f"{said[0]}, {said[1]}; the checkpoint's own record is used"]
    different = [
        f"{field.name} {getattr(recorded, field.name)}, not {getattr(given, field.name)}"
        for field in fields(LoraSettings)
        if getattr(recorded, field.name) != getattr(given, field.name)
        and not (field.name == "bias" and b.config is not None)
    ]
    if not different:
        return []
    return [
        f"{a.place} says of its {what}: {', '.join(different)} as in {b.place}; the checkpoint's own record is used"
    ]


def _lora(value: Value, place: str) -> LoraSettings:
    settings = value.keywords if isinstance(value, Call) else value
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{place}: its LoRA is no dict(...)")
    found = {key: settings.get(key, default) for key, default in _LORA.items()}
    for key in ("r", "lora_alpha", "lora_dropout"):
        if not isinstance(found[key], int | float) or isinstance(found[key], bool):
            raise ConfigError(f"{place}: the LoRA's {key} is {found[key]!r}; a number is needed")
    if found["bias"] not in ("none", "all", "lora_only"):
        raise ConfigError(f"{place}: the LoRA's bias is {found['bias']!r}; none, all or lora_only is allowed")
    for key in ("rank_pattern", "alpha_pattern"):
        if settings.get(key):
            raise ConfigError(f"{place}: the LoRA's {key} is set, which is not read from Python configs")
    return LoraSettings(
        int(found["r"]),
        float(found["lora_alpha"]),
        float(found["lora_dropout"]),
        rslora=bool(found["use_rslora"]),
        bias=str(found["bias"]),
    )


def _at(value: Value, *path: str) -> Value:
    """The value at a path of keys; arguments of a call that is not made count."""
    for key in path:
        inner = value.keywords if isinstance(value, Call) else value
        value = inner.get(key) if isinstance(inner, Mapping) else None
    return None if isinstance(value, Symbol) else value
