"""YAML text as a tree in which every value knows its text and where it was written.

Comes from config files, recipe parts and the values of overrides; goes to `load`, which merges trees, checks them
against the schema and needs the line of every value for its complaints. Only plain YAML 1.2 is read: `1e-5` is a
number, `on` is text, and tags, duplicate keys and documents that unfold beyond reason are refused.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fastft.errors import ConfigError

if TYPE_CHECKING:
    from ruamel.yaml.events import Event

Scalar = str | int | float | bool | None

MAX_BYTES = 1_000_000
MAX_NODES = 10_000  # after aliases are unfolded; the largest config of ours has some 200
MAX_DEPTH = 32
MAX_NUMBER_LENGTH = 40  # a longer one is no setting but a mistake; it stays text and the schema refuses it

# The core schema of YAML 1.2.2, section 10.3.2.
_NULL = re.compile(r"null|Null|NULL|~|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")


class Origin(Protocol):
    """Names the place of a value from its line, counted from 1."""

    def __call__(self, line: int) -> str: ...


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value: what it means in YAML, its characters as written, and its place."""

    value: Scalar
    text: str
    origin: str


@dataclass(frozen=True, slots=True)
class Listing:
    """A sequence."""

    items: tuple["Tree", ...]
    origin: str


@dataclass(frozen=True, slots=True)
class Branch:
    """A mapping with text keys, in the order written."""

    children: dict[str, "Tree"]
    origin: str


Tree = Leaf | Listing | Branch


def parse(text: str, origin: Origin) -> Tree:
    """Read one YAML document.

    Args:
        text: the document; an empty one is a Leaf of None.
        origin: makes the place that complaints and `config show` print, e.g. `my.yaml:7`.

    Raises:
        ConfigError: `PLACE: REASON` for anything that is not one plain, bounded YAML 1.2 document.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if len(text) > MAX_BYTES:
        raise ConfigError(f"{origin(1)}: too large for a config: {len(text)} characters; at most {MAX_BYTES}.")
    try:
        return _Builder(iter(YAML(typ="safe", pure=True).parse(text)), origin).document()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{origin(mark.line + 1 if mark else 1)}: not YAML: {what}") from error
    except YAMLError as error:
        raise ConfigError(f"{origin(1)}: not YAML: {' '.join(str(error).split())}") from error


def scalar(text: str) -> Scalar:
    """What a plain (unquoted) scalar means in the core schema of YAML 1.2."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if len(text) > MAX_NUMBER_LENGTH:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text):
        return int(text, 0)
    if _HEX.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float("-inf" if text.startswith("-") else "inf")
    if _NAN.fullmatch(text):
        return float("nan")
    return text


def merge(low: Tree, high: Tree) -> Tree:
    """`high` laid over `low`: mappings are joined key by key, everything else is replaced whole."""
    if not (isinstance(low, Branch) and isinstance(high, Branch)):
        return high
    children = dict(low.children)
    for key, child in high.children.items():
        children[key] = merge(children[key], child) if key in children else child
    return Branch(children, high.origin)


def plain(tree: Tree) -> Any:
    """The tree as dict, list and scalars."""
    if isinstance(tree, Leaf):
        return tree.value
    if isinstance(tree, Listing):
        return [plain(item) for item in tree.items]
    return {key: plain(child) for key, child in tree.children.items()}


def grown(value: Any, origin: str) -> Tree:
    """The tree of plain values that all come from one place; the way back from `plain`."""
    if isinstance(value, dict):
        return Branch({key: grown(inner, origin) for key, inner in value.items()}, origin)
    if isinstance(value, (list, tuple)):
        return Listing(tuple(grown(inner, origin) for inner in value), origin)
    return Leaf(value, "" if value is None else str(value), origin)


def leaves(tree: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tree]]:
    """Every value with its path; an empty mapping or list counts as a value."""
    if isinstance(tree, Branch) and tree.children:
        for key, child in tree.children.items():
            yield from leaves(child, (*path, key))
    elif isinstance(tree, Listing) and tree.items:
        for index, item in enumerate(tree.items):
            yield from leaves(item, (*path, str(index)))
    else:
        yield path, tree


def at(tree: Tree, path: tuple[str, ...]) -> tuple[Tree, int]:
    """The deepest existing tree on the way along `path`, and how many steps of the path it took."""
    for taken, key in enumerate(path):
        if isinstance(tree, Branch) and key in tree.children:
            tree = tree.children[key]
        elif isinstance(tree, Listing) and key.isdecimal() and int(key) < len(tree.items):
            tree = tree.items[int(key)]
        else:
            return tree, taken
    return tree, len(path)


class _Builder:
    """Turns the parser's events into a tree; holds what is counted and named on the way."""

    def __init__(self, events: "Iterator[Event]", origin: Origin) -> None:
        self._events = events
        self._origin = origin
        self._anchors: dict[str, tuple[Tree, int]] = {}
        self._nodes = 0

    def document(self) -> Tree:
        from ruamel.yaml.events import DocumentStartEvent, StreamEndEvent

        next(self._events)  # start of the stream
        start = next(self._events)
        if isinstance(start, StreamEndEvent):
            return Leaf(None, "", self._origin(1))
        if isinstance(start, DocumentStartEvent) and (start.version or start.tags):
            raise ConfigError(f"{self._place(start)}: directives are not allowed; fastft reads plain YAML 1.2.")
        tree = self._node(next(self._events), 0)
        next(self._events)  # end of the document
        after = next(self._events)
        if not isinstance(after, StreamEndEvent):
            raise ConfigError(f"{self._place(after)}: a second YAML document; a config is one document.")
        return tree

    def _node(self, event: "Event", depth: int, place: str | None = None) -> Tree:
        """The tree that starts with `event`; `place` is its key's, when it has one."""
        from ruamel.yaml.events import AliasEvent, MappingStartEvent, ScalarEvent

        place = place or self._place(event)
        before = self._count(1, place)
        if depth > MAX_DEPTH:
            raise ConfigError(f"{place}: nested deeper than {MAX_DEPTH} levels.")
        if isinstance(event, AliasEvent):
            if event.anchor not in self._anchors:
                raise ConfigError(f"{place}: `*{event.anchor}` stands for nothing that is complete here.")
            known, size = self._anchors[event.anchor]
            self._count(size, place)
            return known
        if event.ctag is not None:  # type: ignore[attr-defined]  # scalars, sequences and mappings have it
            raise ConfigError(f"{place}: the tag {event.ctag} is not allowed; write plain values.")  # type: ignore[attr-defined]
        tree: Tree
        if isinstance(event, ScalarEvent):
            value = scalar(event.value) if event.implicit[0] else event.value
            tree = Leaf(value, event.value, place)
        elif isinstance(event, MappingStartEvent):
            tree = Branch(self._children(depth), place)
        else:
            tree = Listing(tuple(self._items(depth)), place)
        if event.anchor is not None:  # type: ignore[attr-defined]
            self._anchors[event.anchor] = (tree, self._nodes - before)  # type: ignore[attr-defined]
        return tree

    def _children(self, depth: int) -> dict[str, Tree]:
        from ruamel.yaml.events import MappingEndEvent, ScalarEvent

        children: dict[str, Tree] = {}
        while not isinstance(event := next(self._events), MappingEndEvent):
            place = self._place(event)
            if not isinstance(event, ScalarEvent) or event.ctag is not None or event.anchor is not None:
                raise ConfigError(f"{place}: a key must be a plain word.")
            key = event.value
            if key in children:
                raise ConfigError(f"{place}: {key}: a second time; the first is at {children[key].origin}.")
            children[key] = self._node(next(self._events), depth + 1, place)
        return children

    def _items(self, depth: int) -> Iterator[Tree]:
        from ruamel.yaml.events import SequenceEndEvent

        while not isinstance(event := next(self._events), SequenceEndEvent):
            yield self._node(event, depth + 1)

    def _count(self, nodes: int, place: str) -> int:
        before = self._nodes
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise ConfigError(f"{place}: unfolds to more than {MAX_NODES} values; a config has some hundred.")
        return before

    def _place(self, event: "Event") -> str:
        return self._origin(event.start_mark.line + 1)
