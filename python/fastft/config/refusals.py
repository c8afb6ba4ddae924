"""What pydantic refuses, as lines for a person: `FILE:LINE: key: what came; what is allowed; did you mean X?`.

Comes from `load`; the lines become the text of one ConfigError.
"""

from collections.abc import Sequence

from pydantic import ValidationError

from fastft import spelling
from fastft.config import fields
from fastft.config.mask import masked
from fastft.config.overrides import near_or_list
from fastft.config.tree import Branch, Leaf, Listing, Tree, at

MAX_LINES = 10
MAX_SHOWN = 60  # characters of a value that came


def lines(error: ValidationError, tree: Tree) -> list[str]:
    """One line for each value that pydantic refused in `tree`."""
    found: dict[tuple[str, ...], str] = {}
    for detail in error.errors(include_url=False):
        path, known = _path(detail["loc"])
        kind = detail["type"]
        if kind == "missing" and path[-1].isdecimal():
            kind, path = "too_short", path[:-1]  # a pair with one item: the list is wrong
            known = fields.find(path)
        if path in found:
            continue  # the alternatives of one value are refused one by one
        deepest, taken = at(tree, path)
        key = ".".join(path) or "the config"
        place = deepest.origin
        if kind == "extra_forbidden":
            found[path] = f"{place}: {key}: no such key; {near_or_list(fields.nearest(path))}"
        elif kind == "missing":
            found[path] = f"{place}: {key}: missing; {_missing(known)}"
        elif kind == "value_error":
            found[path] = f"{place}: {key}: {detail['ctx']['error']}"
        elif known is None or taken < len(path):
            found[path] = f"{place}: {key}: {detail['msg']}"
        else:
            found[path] = f"{place}: {key}: {_came(deepest)}; allowed: {_allowed(known, deepest)}"
    # A list whose item was refused is refused as well, as one that fits no alternative: the item says why.
    return [line for path, line in found.items() if not any(_is_inside(other, path) for other in found)]


def _is_inside(path: tuple[str, ...], outer: tuple[str, ...]) -> bool:
    return len(path) > len(outer) and path[: len(outer)] == outer


def joined(complaints: Sequence[str]) -> str:
    """The complaints as one message, the first MAX_LINES of them."""
    shown = list(dict.fromkeys(complaint.replace("\n", "\\n") for complaint in complaints))
    rest = len(shown) - MAX_LINES
    if rest > 0:
        shown = [*shown[:MAX_LINES], f"... and {rest} more"]
    return "\n".join(shown)


def _path(location: tuple[int | str, ...]) -> tuple[tuple[str, ...], fields.Known | None]:
    """The part of pydantic's location that names keys (it adds the names of types), and what the schema knows of it."""
    path: tuple[str, ...] = ()
    for step in location:
        known = fields.find((*path, str(step)))
        if known is None:
            outer = fields.find(path)
            if outer is None or fields.section_of(outer.annotation) is None:
                break
            return (*path, str(step)), None  # a key that is not in its section
        path = (*path, str(step))
    return path, fields.find(path)


def _missing(known: fields.Known | None) -> str:
    if known is None or known.info is None or not known.info.description:
        return "it must be given"
    return f"it must be given: {known.info.description}"


def _came(tree: Tree) -> str:
    if isinstance(tree, Branch):
        return "a mapping came"
    if isinstance(tree, Listing):
        return f"a list of {len(tree.items)} came"
    shown = tree.text if len(tree.text) <= MAX_SHOWN else tree.text[:MAX_SHOWN] + "..."
    if isinstance(tree.value, str):
        return f"text {masked(shown)!r} came"
    return f"{shown or 'nothing'} came"


def _allowed(known: fields.Known, tree: Tree) -> str:
    words = fields.allowed(known.annotation)
    if isinstance(tree, Leaf) and tree.text:
        near = spelling.nearest(tree.text, [str(word) for word in fields.choices(known.annotation)], n=1)
        if near:
            return f"{words}; did you mean {near[0]}?"
    if words == "text":
        return "text of at least one character"
    return words
