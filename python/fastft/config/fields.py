"""What the schema says about a dotted key: its type in words, its description, the nearest known key.

Comes from `schema.Config`; goes to the complaints of `load` and to everything `show` prints.
"""

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from fastft import spelling
from fastft.config.schema import Config, Section

# What other tools call a field of ours; only used to suggest the right key.
OTHER_WORDS = {
    "accumulative_counts": "train.grad_accumulation",
    "adapter_rank": "method.lora.r",
    "cutoff_len": "data.max_length",
    "evaluation_freq": "train.sample_steps",
    "evaluation_inputs": "samples.prompts",
    "gradient_accumulation_steps": "train.grad_accumulation",
    "learning_rate": "train.lr",
    "lora_alpha": "method.lora.alpha",
    "lora_dropout": "method.lora.dropout",
    "lora_r": "method.lora.r",
    "lora_rank": "method.lora.r",
    "lr_scheduler_type": "train.schedule",
    "max_epochs": "train.epochs",
    "max_norm": "train.max_grad_norm",
    "max_seq_length": "data.max_length",
    "num_train_epochs": "train.epochs",
    "pack_to_max_length": "data.packing",
    "per_device_train_batch_size": "train.batch_size",
    "pretrained_model_name_or_path": "model.name",
    "prompt_template": "model.chat_template",
    "rank": "method.lora.r",
    "save_total_limit": "output.keep",
    "target_modules": "method.lora.targets",
    "torch_dtype": "model.dtype",
    "work_dir": "output.dir",
}


@dataclass(frozen=True)
class Known:
    """A key that may stand in a config. `annotation` is the field's type with its bounds."""

    annotation: Any
    info: FieldInfo | None  # None for an item of a list


def find(path: Sequence[str]) -> Known | None:
    """The schema's word on `path` (list items by index), or None if no such key may stand in a config."""
    known = Known(Config, None)
    for key in path:
        section = section_of(known.annotation)
        item = item_of(known.annotation)
        inner = of(section, key) if section is not None else None
        if inner is not None:
            known = inner
        elif item is not None and key.isdecimal():
            known = Known(item, None)
        else:
            return None
    return known


def of(section: type[Section], key: str) -> Known | None:
    """The field `key` of a section."""
    if key not in section.model_fields:
        return None
    return Known(_annotations(section)[key], section.model_fields[key])


def section_of(annotation: Any) -> type[Section] | None:
    """The group of fields that a value of this type holds, if it holds one."""
    for member, _ in members(annotation):
        if isinstance(member, type) and issubclass(member, Section):
            return member
    return None


def item_of(annotation: Any) -> Any | None:
    """The type of the items, if a value of this type can be a list."""
    for member, _ in members(annotation):
        if get_origin(member) is tuple:
            return get_args(member)[0]
    return None


def takes_text(annotation: Any) -> bool:
    """Whether any text is allowed (so that `12345` stays text)."""
    return any(member is str for member, _ in members(annotation))


def takes_null(annotation: Any) -> bool:
    """Whether null is allowed."""
    return any(member is types.NoneType for member, _ in members(annotation))


def choices(annotation: Any) -> list[str]:
    """The words of a closed list, if the type has one."""
    return [word for member, _ in members(annotation) if get_origin(member) is Literal for word in get_args(member)]


def members(annotation: Any, bounds: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The alternatives of a type, each with its bounds."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        yield from members(inner, (*bounds, *extra))
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from members(member, bounds)
    else:
        yield annotation, bounds


def allowed(annotation: Any) -> str:
    """What may stand there, in words: `a whole number of at least 1, or null`."""
    return _any_of([words for member, bounds in members(annotation) for words in _words(member, bounds)])


def nearest(path: Sequence[str]) -> str | None:
    """The known dotted key that an unknown one most likely means, or None."""
    asked = list(path)
    # A wrong word inside a known section first: `train.epoch` means train.epochs, whatever else looks alike.
    for depth in range(len(asked) - 1, -1, -1):
        known = find(asked[:depth])
        section = section_of(known.annotation) if known else None
        if section is not None:
            close = spelling.nearest(asked[depth], section.model_fields, n=1, cutoff=0.7)
            if close:
                candidate = [*asked[:depth], close[0], *asked[depth + 1 :]]
                return ".".join(candidate if find(candidate) else candidate[: depth + 1])
            break
    # Then the same word elsewhere: `lr` means train.lr.
    last = asked[-1]
    elsewhere = [key for key in dotted_keys() if key.rpartition(".")[2] == last]
    if elsewhere:
        return min(elsewhere, key=lambda key: key.count("."))  # the first of the least deep
    if last in OTHER_WORDS:
        return OTHER_WORDS[last]
    close = spelling.nearest(".".join(asked), dotted_keys(), n=1, cutoff=0.7)
    if not close:
        by_word = {key.rpartition(".")[2]: key for key in reversed(dotted_keys())}
        close = [by_word[word] for word in spelling.nearest(last, by_word, n=1, cutoff=0.75)]
    return close[0] if close else None


@cache
def dotted_keys() -> tuple[str, ...]:
    """Every dotted key of the schema in its order; an item of a list is written as 0."""
    return tuple(_keys(Config, ""))


def bounds_of(info_bounds: Sequence[Any]) -> dict[str, Any]:
    """The limits of a number: ge, gt, le, lt, and the least length of text."""
    found: dict[str, Any] = {}
    for bound in info_bounds:
        inner = bound.metadata if isinstance(bound, FieldInfo) else [bound]
        for limit in inner:
            for kind in (Ge, Gt, Le, Lt):
                if isinstance(limit, kind):
                    name = kind.__name__.lower()
                    found[name] = getattr(limit, name)
    return found


def _keys(section: type[Section], prefix: str) -> Iterator[str]:
    for name, annotation in _annotations(section).items():
        if name not in section.model_fields:
            continue
        yield prefix + name
        inner = section_of(annotation)
        item = item_of(annotation)
        if inner is None and item is not None and section_of(item) is not None:
            yield from _keys(section_of(item) or Section, f"{prefix}{name}.0.")
        elif inner is not None:
            yield from _keys(inner, f"{prefix}{name}.")


@cache
def _annotations(section: type[Section]) -> dict[str, Any]:
    return get_type_hints(section, include_extras=True)


def _words(member: Any, bounds: tuple[Any, ...]) -> list[str]:
    if member is types.NoneType:
        return ["null"]
    if member is str:
        return ["text"]
    if member is bool:
        return ["true", "false"]
    if member in (int, float):
        return [_number("a whole number" if member is int else "a number", bounds_of(bounds))]
    if get_origin(member) is Literal:
        return [str(word) for word in get_args(member)]
    if get_origin(member) is tuple:
        items = get_args(member)
        if items[-1] is Ellipsis:
            return [f"a list ([a, b]) of {allowed(items[0])}" if section_of(items[0]) is None else "a list of mappings"]
        return [f"a list of {len(items)}, each {allowed(items[0])}"]
    section = section_of(member)
    if section is not None:
        return [f"a mapping with the keys {', '.join(section.model_fields)}"]
    raise AssertionError(f"the schema uses {member}, for which there are no words yet")


def _number(noun: str, limits: dict[str, Any]) -> str:
    low = f" of at least {limits['ge']:g}" if "ge" in limits else f" above {limits['gt']:g}" if "gt" in limits else ""
    high = f" at most {limits['le']:g}" if "le" in limits else f" below {limits['lt']}" if "lt" in limits else ""
    return f"{noun}{low}{' and' if low and high else ''}{high}"


def _any_of(words: list[str]) -> str:
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
