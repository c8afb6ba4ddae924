"""Holds the words of a command line against a command's signature, before anything runs.

Python Fire calls a function before it notices left-over words, reads `12345` and `[x]` as Python values, and lets a
switch swallow the next word. So the signature is the grammar here: parameters without default are the arguments,
`*overrides` takes `key=value` words, keyword-only parameters are the options. Their annotations say how a value is read:
`bool` is a switch, `tuple[str, ...]` may be given several times, `Literal[...]` lists the choices, `BareAuto` is an option
that means "auto" when no value follows. What comes out is a list of `--name=value` words that Fire cannot misread.
"""

import inspect
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastft import spelling
from fastft.errors import UsageError

# An option that may stand alone (`--resume`) and then means "auto".
BareAuto = Annotated[str | None, "bare: auto"]

# Options that XTuner's scripts carry; they are read as the rest of the overrides.
OVERRIDE_OPTION = "cfg_options"


@dataclass(frozen=True, slots=True)
class Option:
    """One keyword-only parameter of a command function."""

    name: str
    kind: type
    choices: tuple[str, ...] = ()
    repeats: bool = False
    bare: str | None = None
    default: Any = None

    @property
    def flag(self) -> str:
        """As it is typed: `--work-dir`."""
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True, slots=True)
class Grammar:
    """What words a command takes."""

    arguments: tuple[str, ...]
    optional_arguments: tuple[str, ...]
    takes_overrides: bool
    options: Mapping[str, Option]


def grammar(function: Callable[..., Any]) -> Grammar:
    """Read the grammar off a function's signature."""
    hints = typing.get_type_hints(function, include_extras=True)
    arguments, optional, options, overrides = [], [], {}, False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            overrides = True
        elif parameter.kind is parameter.KEYWORD_ONLY:
            options[parameter.name] = _option(parameter, hints[parameter.name])
        elif parameter.default is parameter.empty:
            arguments.append(parameter.name)
        else:
            optional.append(parameter.name)
    # Fire would bind the first override to an optional argument.
    assert not (overrides and optional), function
    return Grammar(tuple(arguments), tuple(optional), overrides, options)


def _option(parameter: inspect.Parameter, hint: Any) -> Option:
    bare = None
    if typing.get_origin(hint) is Annotated:
        hint, *marks = typing.get_args(hint)
        bare = next((m.removeprefix("bare: ") for m in marks if str(m).startswith("bare: ")), None)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    name, default = parameter.name, parameter.default
    if typing.get_origin(hint) is Literal:
        return Option(name, str, choices=typing.get_args(hint), bare=bare, default=default)
    if typing.get_origin(hint) is tuple:
        return Option(name, str, repeats=True, default=default)
    return Option(name, hint, bare=bare, default=default)


def check(name: str, function: Callable[..., Any], words: Sequence[str], shorts: Mapping[str, str]) -> list[str]:
    """Check `words` and put them into the one form that Fire binds without guessing.

    Args:
        name: the command as typed, for messages.
        function: its function; the signature is the grammar.
        words: what was typed after the command.
        shorts: one-letter options.

    Returns:
        overrides first, then `--parameter=value` for everything else.

    Raises:
        UsageError: a word is unknown, missing, superfluous, or a value is not of its option's kind.
    """
    for word in words:
        if "\0" in word:
            raise UsageError(f"{name}: the word {word!r} holds a NUL character")
        if not word.isprintable() and any("\ud800" <= character <= "\udfff" for character in word):
            raise UsageError(f"{name}: the word {word!r} is not UTF-8 text")
    rules = grammar(function)
    places, overrides, values = _sort(name, rules, words, shorts)
    allowed = rules.arguments + rules.optional_arguments
    if len(places) < len(rules.arguments):
        missing = rules.arguments[len(places) :]
        raise UsageError(f"{name}: {', '.join(m.upper() for m in missing)} missing; usage: {usage(name, function)}")
    if len(places) > len(allowed):
        extra = places[len(allowed)]
        raise UsageError(f"{name}: `{extra}` is one word too many; usage: {usage(name, function)}")
    bound = [f"--{parameter}={value}" for parameter, value in zip(allowed, places, strict=False)]
    for option, given in values.items():
        text = json.dumps(given) if rules.options[option].repeats else given[-1]
        bound.append(f"--{option}={text}")
    return overrides + bound


def converters(function: Callable[..., Any]) -> dict[str, Callable[[str], Any]]:
    """How Fire shall read each parameter's text; text stays text unless the annotation says otherwise."""
    rules = grammar(function)
    reads: dict[str, Callable[[str], Any]] = dict.fromkeys(rules.arguments + rules.optional_arguments, str)
    for option in rules.options.values():
        reads[option.name] = _reader(option)
    return reads


def _reader(option: Option) -> Callable[[str], Any]:
    if option.repeats:
        return lambda text: tuple(json.loads(text))
    if option.kind is bool:
        return lambda text: text == "True"
    kind: Callable[[str], Any] = option.kind
    return kind


def _sort(
    name: str, rules: Grammar, words: Sequence[str], shorts: Mapping[str, str]
) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Split `words` into arguments, overrides and option values (each option's values in order)."""
    places: list[str] = []
    overrides: list[str] = []
    values: dict[str, list[str]] = {}
    rest = iter(list(words))
    pending: list[str] = []  # words looked at and put back

    def following() -> str | None:
        return pending.pop() if pending else next(rest, None)

    while (word := following()) is not None:
        if not word.startswith("-") or word == "-":
            if rules.takes_overrides and len(places) >= len(rules.arguments) and "=" in word:
                overrides.append(word)
            else:
                places.append(word)
            continue
        flag, has_value, text = word.partition("=")
        if _spelled(flag) == OVERRIDE_OPTION and rules.takes_overrides:
            overrides += _override_words(name, text, following, pending)
            continue
        option = _find(name, rules, flag, shorts)
        if not has_value:
            text = _value(name, option, following, pending)
        values.setdefault(option.name, []).append(_checked(name, option, text))
        if len(values[option.name]) > 1 and not option.repeats:
            raise UsageError(f"{name}: {option.flag} is given twice")
    return places, overrides, values


def _override_words(name: str, first: str, following: Callable[[], str | None], pending: list[str]) -> Iterator[str]:
    """The `key=value` words after XTuner's `--cfg-options`."""
    found = [first] if first else []
    while (word := following()) is not None:
        if word.startswith("--") or "=" not in word:
            pending.append(word)
            break
        found.append(word)
    if not found:
        raise UsageError(f"{name}: --cfg-options needs key=value words")
    return iter(found)


def _spelled(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _find(name: str, rules: Grammar, flag: str, shorts: Mapping[str, str]) -> Option:
    spelled = _spelled(flag)
    if not flag.startswith("--"):
        spelled = shorts.get(flag[1:], "")
    if spelled in rules.options:
        return rules.options[spelled]
    known = [o.flag for o in rules.options.values()]
    nearest = spelling.nearest("--" + flag.lstrip("-"), known, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]}?" if nearest else f"it takes {', '.join([*known, '--help'])}"
    if rules.takes_overrides and not nearest:
        hint = _config_hint(spelled or flag.lstrip("-"))
    raise UsageError(f"{name}: there is no option {flag}; {hint}")


def _config_hint(word: str) -> str:
    """What to type instead of an option that looks like a value of the config."""
    from fastft.config.schema import leaves

    keys = leaves()
    by_last = {key.rpartition(".")[2]: key for key in reversed(keys)}
    nearest = spelling.nearest(word, by_last, n=1, cutoff=0.6)
    key = by_last[nearest[0]] if nearest else "train.lr"
    mean = f"did you mean {key}=VALUE? " if nearest else ""
    return f"{mean}values of the config are given without dashes, e.g. {key}=..."


def _value(name: str, option: Option, following: Callable[[], str | None], pending: list[str]) -> str:
    """The value of an option that came without `=`."""
    if option.kind is bool:
        return "True"
    word = following()
    is_value = word is not None and not word.startswith("--")
    if option.bare is not None and (not is_value or "=" in str(word)):
        if word is not None:
            pending.append(word)
        return option.bare
    if word is None or not is_value:
        raise UsageError(f"{name}: {option.flag} needs a value")
    return word


def _checked(name: str, option: Option, text: str) -> str:
    if option.kind is bool:
        switch = {"true": "True", "1": "True", "false": "False", "0": "False"}.get(text.lower())
        if switch is None:
            raise UsageError(f"{name}: {option.flag} is a switch; `{text}` is neither true nor false")
        return switch
    if option.choices and text not in option.choices:
        raise UsageError(f"{name}: {option.flag} {text}: allowed are {', '.join(option.choices)}")
    if option.kind in (int, float):
        try:
            option.kind(text)
        except ValueError:
            wanted = "a whole number" if option.kind is int else "a number"
            raise UsageError(f"{name}: {option.flag} {text}: not {wanted}") from None
    return text


def usage(name: str, function: Callable[..., Any]) -> str:
    """One line: `fastft convert merge LLM ADAPTER SAVE_PATH [options]`."""
    rules = grammar(function)
    parts = [a.upper() for a in rules.arguments] + [f"[{a.upper()}]" for a in rules.optional_arguments]
    if rules.takes_overrides:
        parts.append("[key=value ...]")
    if rules.options:
        parts.append("[options]")
    return " ".join(["fastft", name, *parts])
