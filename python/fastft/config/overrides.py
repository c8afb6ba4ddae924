"""`key=value` words of the command line, laid into a config's tree.

Comes from `train CONFIG train.lr=1e-5`; the tree then goes to the same checks as a file's, so that an override
reaches the value where it is used and a wrong one is refused like a wrong line.
"""

from collections.abc import Sequence

from fastft.config import fields
from fastft.config.mask import masked
from fastft.config.tree import Branch, Leaf, Listing, Tree, at, merge, parse
from fastft.errors import ConfigError

MARK = "override "


def apply(tree: Tree, overrides: Sequence[str]) -> tuple[Tree, list[str]]:
    """Lay each `key=value` into `tree`, later ones over earlier ones.

    Args:
        tree: the config so far.
        overrides: e.g. `train.lr=1e-5`, `data.train.0.source=my.json`, `samples.prompts=[a, b]`; the value is YAML 1.2,
            and taken as it stands where the schema wants text.

    Returns:
        The new tree, and one complaint for each override that cannot be laid in.
    """
    complaints = []
    for override in overrides:
        try:
            tree = _lay_in(tree, override)
        except ConfigError as error:
            complaints.append(str(error))
    return tree, complaints


def _lay_in(tree: Tree, override: str) -> Tree:
    key, equals, text = override.partition("=")
    key = key.strip()
    place = MARK + masked(override)
    if not equals or not key:
        raise ConfigError(f"{place}: not of the form key=value, e.g. train.lr=1e-5")
    path = tuple(key.split("."))
    known = fields.find(path)
    if known is None:
        near = fields.nearest(path)
        raise ConfigError(f"{place}: {key}: no such key; {near_or_list(near)}")
    branch = _value(text.strip(), known, place)
    deepest, taken = at(tree, path)
    if taken < len(path) and isinstance(deepest, Listing) and path[taken] != str(len(deepest.items)):
        raise ConfigError(f"{place}: {'.'.join(path[:taken])}: has {len(deepest.items)} items, counted from 0")
    return _set(tree, path, branch, place)


def near_or_list(near: str | None) -> str:
    """The end of a complaint about an unknown key."""
    return f"did you mean {near}?" if near else "`fastft config schema` lists all keys"


def _value(text: str, known: fields.Known, place: str) -> Tree:
    wants_text = fields.takes_text(known.annotation)
    if wants_text and text[:1] not in ("'", '"'):
        if fields.takes_null(known.annotation) and text in ("null", "~", ""):
            return Leaf(None, text, place)
        return Leaf(text, text, place)
    value = parse(text, lambda _line: place)
    # `name="a" b` is text that begins with a quote, not a quoted value.
    return value if isinstance(value, Leaf) or not wants_text else Leaf(text, text, place)


def _set(tree: Tree | None, path: tuple[str, ...], value: Tree, place: str) -> Tree:
    if not path:
        return value if tree is None else merge(tree, value)
    key, rest = path[0], path[1:]
    if isinstance(tree, Listing) or (key.isdecimal() and not isinstance(tree, Branch)):
        items = list(tree.items) if isinstance(tree, Listing) else []
        index = int(key)
        items[index : index + 1] = [_set(items[index] if index < len(items) else None, rest, value, place)]
        return Listing(tuple(items), tree.origin if isinstance(tree, Listing) else place)
    children = dict(tree.children) if isinstance(tree, Branch) else {}
    children[key] = _set(children.get(key), rest, value, place)
    return Branch(children, tree.origin if isinstance(tree, Branch) else place)
