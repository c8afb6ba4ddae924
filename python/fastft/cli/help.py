"""`fastft help [COMMAND]`: what there is, made from the command functions' own docstrings and signatures."""

import inspect
import re
import textwrap

from fastft import console
from fastft.cli import table, words
from fastft.cli.job import Job
from fastft.cli.table import Command

WIDTH = 80


def help_(command: str | None = None, subcommand: str | None = None) -> Job:
    """List all commands, or explain one.

    Args:
        command: the command to explain, e.g. train
        subcommand: its second word, e.g. merge
    """
    if command is None:
        text = overview()
    elif subcommand is None and any(c.words[0] == command and len(c.words) > 1 for c in table.COMMANDS):
        text = "\n".join(_line(c) for c in table.COMMANDS if c.words[0] == command)
    else:
        asked = [word for word in (command, subcommand) if word is not None]
        text = explain(table.find(asked)[0])
    return Job(lambda: console.result(text))


def overview() -> str:
    """The page that `fastft` alone prints."""
    lines = [
        "fastft: fine-tune language and vision models; convert, merge, quantize weights.",
        "",
        "usage: fastft COMMAND [arguments] [--options]      (or: python -m fastft ...)",
        "",
        *[_line(command) for command in table.COMMANDS],
        "",
        "First steps:  fastft train demo         trains a tiny model on this machine",
        "              fastft train demo_vision  a tiny model that sees, five minutes",
        "              fastft list-cfg -p qlora  recipes with `qlora` in their name",
        "              fastft help train         arguments and options of a command",
    ]
    return "\n".join(lines)


def explain(command: Command) -> str:
    """Usage, arguments and options of one command."""
    function = command.function()
    rules = words.grammar(function)
    summary, notes, about = _docstring(function)
    lines = [f"usage: {words.usage(command.name, function)}", "", *textwrap.wrap(summary, WIDTH)]
    for paragraph in notes:
        lines += ["", *textwrap.wrap(paragraph, WIDTH)]
    places = [(a.upper(), about.get(a, "")) for a in rules.arguments + rules.optional_arguments]
    if rules.takes_overrides:
        places.append(("key=value", about.get("overrides", "")))
    short_of = {full: short for short, full in command.shorts.items()}
    options = [
        (_flag(o, short_of.get(o.name)), _with_default(about.get(o.name, ""), o)) for o in rules.options.values()
    ]
    for title, rows in (("arguments", places), ("options", options)):
        if rows:
            lines += ["", f"{title}:"]
            for left, right in rows:
                lines += _columns(left, right)
    return "\n".join(lines)


def _line(command: Command) -> str:
    summary = _docstring(command.function())[0]
    return f"  {command.name:<20} {summary[:1].lower()}{summary[1:].rstrip('.')}"


def _flag(option: words.Option, short: str | None) -> str:
    if option.kind is bool:
        value = ""
    elif option.choices:
        value = " " + "|".join(option.choices)
    else:
        value = {int: " N", float: " X"}.get(option.kind, " TEXT")
    return (f"-{short}, " if short else "") + option.flag + (f" [{value.strip()}]" if option.bare else value)


def _with_default(text: str, option: words.Option) -> str:
    silent = option.default is None or option.default is False or option.default == ()
    return text if silent else f"{text} (default: {option.default})"


def _columns(left: str, right: str) -> list[str]:
    indent = 26
    wrapped = textwrap.wrap(right, WIDTH - indent) or [""]
    if len(left) + 3 > indent:
        return [f"  {left}", *[" " * indent + line for line in wrapped]]
    return [f"  {left:<{indent - 2}}{wrapped[0]}", *[" " * indent + line for line in wrapped[1:]]]


def _docstring(function: object) -> tuple[str, list[str], dict[str, str]]:
    """Summary line, further paragraphs, and what the `Args:` section says of each parameter."""
    text = inspect.getdoc(function) or ""
    head, _, arguments = text.partition("\nArgs:\n")
    summary, *notes = [" ".join(p.split()) for p in head.split("\n\n")]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, flags=re.MULTILINE)
    return summary, [n for n in notes if n], {name: " ".join(what.split()) for name, what in entries}
