"""A Python config file as data, without running it: what its top-level names would hold.

Comes from XTuner's and mmengine's configs (a file, or the text inside a .pth); goes to `xtuner`, which translates it.
Names are resolved inside the file, numbers and texts are computed, `dict(...)` is a mapping; whatever is imported or
called stays a symbol with its name, and nothing is imported or called.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastft.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_VALUES = 100_000  # computed on the way; XTuner's longest preset needs some 400
MAX_DEPTH = 50
MAX_LENGTH = 100_000  # of a text or list that is computed
MAX_NUMBER = 2**63
# `%1000000d`, or a width that comes as a value: `%*d`.
_WIDE_FORMAT = re.compile(r"%[^%a-zA-Z]*(\d{4}|\*)")

# A dictionary of settings is a plain dict with text keys; the rest is what Python's literals give.
Value = Any


@dataclass(frozen=True, slots=True)
class Symbol:
    """Something that is imported, defined or looked up: `torch.float16`, `xtuner.model.SupervisedFinetune`."""

    name: str

    @property
    def last(self) -> str:
        """The last part of the name: `SupervisedFinetune`."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Call:
    """A call that is not made."""

    function: Symbol
    arguments: tuple[Value, ...] = ()
    keywords: Mapping[str, Value] = field(default_factory=dict)


_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_CONVERTERS: Mapping[str, Callable[[Any], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "len": len,
    "list": list,
    "tuple": tuple,
}
_PLAIN = (bool, int, float, str, type(None), list, tuple, dict)


def read(text: str, place: str) -> dict[str, Value]:
    """Give what the top-level names of a Python config hold, in the order in which they were set.

    Args:
        text: the file's content.
        place: the file's name, for complaints.

    Raises:
        ConfigError: `PLACE:LINE: REASON` for what is not Python, or could only be known by running it.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{place}: too large for a config: {len(text)} characters; at most {MAX_BYTES}.")
    try:
        module = ast.parse(text)
        reader = _Reader(place)
        reader.block(module.body)
    except SyntaxError as error:
        raise ConfigError(f"{place}:{error.lineno or 1}: not Python: {error.msg}") from error
    except (RecursionError, MemoryError) as error:
        raise ConfigError(f"{place}: nested too deeply for a config.") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{place}: not Python: {error}") from error
    found = {name: value for name, value in reader.names.items() if name not in reader.imported}
    _check_size(found, place)
    return found


def _check_size(value: Value, place: str) -> None:
    """Refuse values that unfold without end: names may hold one another."""
    waiting: list[tuple[Value, int]] = [(value, 0)]
    num_values = 0
    while waiting:
        held, depth = waiting.pop()
        num_values += 1
        if num_values > MAX_VALUES or depth > MAX_DEPTH:
            raise ConfigError(f"{place}: unfolds to more than {MAX_VALUES} values, or {MAX_DEPTH} levels.")
        inner = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else ()
        waiting.extend((part, depth + 1) for part in inner)


class _Reader:
    """Holds the names set so far."""

    def __init__(self, place: str) -> None:
        self.names: dict[str, Value] = {}
        self.imported: set[str] = set()
        self._place = place
        self._num_values = 0

    def block(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _refuse(self, node: ast.AST, reason: str) -> ConfigError:
        return ConfigError(f"{self._place}:{getattr(node, 'lineno', 1)}: {reason}")

    def _statement(self, node: ast.stmt) -> None:
        match node:
            case ast.Import(names) | ast.ImportFrom(names=names):
                self._import(node, names)
            case ast.Assign(targets, value):
                held = self._value(value)
                for target in targets:
                    self._assign(target, held)
            case ast.AnnAssign(target, value=ast.expr() as value):
                self._assign(target, self._value(value))
            case ast.AugAssign(ast.Name(name) as target, operation, value):
                self._assign(target, self._computed(node, operation, self._name(node, name), self._value(value)))
            case ast.If(test, body, orelse):
                self.block(body if self._plain(test, "a condition") else orelse)
            case ast.FunctionDef(name) | ast.ClassDef(name):
                self._set(name, Symbol(name))
                self.imported.add(name)
            case ast.Expr(ast.Constant()) | ast.Pass() | ast.AnnAssign():
                pass  # a docstring, or nothing
            case ast.With():
                raise self._refuse(node, "builds on another config (read_base); give one whole file")
            case _:
                raise self._refuse(
                    node, f"a `{_word(node)}` statement; configs are read, not run: write the values out"
                )

    def _import(self, node: ast.Import | ast.ImportFrom, names: list[ast.alias]) -> None:
        module = f"{node.module}." if isinstance(node, ast.ImportFrom) and node.module else ""
        for alias in names:
            if alias.name == "*":
                raise self._refuse(node, "`import *` says nothing about the names it brings; import them by name")
            if isinstance(node, ast.Import) and alias.asname is None:
                name = alias.name.partition(".")[0]
                self._set(name, Symbol(name))
            else:
                name = alias.asname or alias.name
                self._set(name, Symbol(f"{module}{alias.name}"))
            self.imported.add(name)

    def _assign(self, target: ast.expr, value: Value) -> None:
        match target:
            case ast.Name(name):
                self._set(name, value)
                self.imported.discard(name)
            case ast.Tuple(targets) | ast.List(targets):
                if not isinstance(value, (tuple, list)) or len(value) != len(targets):
                    raise self._refuse(target, f"{len(targets)} names for a value that has not as many parts")
                for inner, part in zip(targets, value, strict=True):
                    self._assign(inner, part)
            case ast.Subscript(owner, index):
                held, key = self._value(owner), self._value(index)
                if not isinstance(held, (dict, list)):
                    raise self._refuse(target, "sets a part of something that is no dict or list")
                try:
                    held[key] = value
                except (TypeError, IndexError) as error:
                    raise self._refuse(target, f"cannot be set: {error}") from error
            case _:
                raise self._refuse(target, "sets an attribute; only names and parts of dicts can be set")

    def _set(self, name: str, value: Value) -> None:
        self.names.pop(name, None)
        self.names[name] = value

    def _name(self, node: ast.AST, name: str) -> Value:
        if name in self.names:
            return self.names[name]
        if name in _CONVERTERS or name in ("dict", "__file__"):
            return Symbol(name)
        raise self._refuse(node, f"the name {name} is not set before this line")

    def _plain(self, node: ast.expr, what: str) -> Value:
        """A value that is known without running anything."""
        value = self._value(node)
        if not isinstance(value, _PLAIN):
            raise self._refuse(node, f"{what} that depends on {_spoken(value)}, which is not run")
        return value

    def _value(self, node: ast.expr) -> Value:
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise self._refuse(node, f"unfolds to more than {MAX_VALUES} values; a config has some hundred")
        match node:
            case ast.Constant(value) if isinstance(value, (bool, int, float, str, type(None))):
                return value
            case ast.Name(name):
                return self._name(node, name)
            case ast.List(items):
                return self._items(items)
            case ast.Tuple(items) | ast.Set(items):
                return tuple(self._items(items))
            case ast.Dict(keys, values):
                return self._mapping(node, keys, values)
            case ast.Attribute(owner, name):
                return self._attribute(node, self._value(owner), name)
            case ast.Subscript(owner, index):
                return self._part(node, self._value(owner), index)
            case ast.Call():
                return self._call(node)
            case ast.BinOp(left, operation, right):
                return self._computed(node, operation, self._value(left), self._value(right))
            case ast.UnaryOp(operation, operand) if type(operation) in _UNARY:
                return self._applied(node, _UNARY[type(operation)], self._plain(operand, "arithmetic"))
            case ast.IfExp(test, body, orelse):
                return self._value(body if self._plain(test, "a condition") else orelse)
            case ast.BoolOp(operation, values):
                return self._joined(operation, values)
            case ast.Compare(left, operations, rights):
                return self._compared(node, left, operations, rights)
            case ast.JoinedStr(parts):
                return "".join(self._formatted(part) for part in parts)
            case _:
                raise self._refuse(node, f"a `{_word(node)}`; configs are read, not run: write the value out")

    def _items(self, nodes: list[ast.expr]) -> list[Value]:
        items: list[Value] = []
        for node in nodes:
            if isinstance(node, ast.Starred):
                items.extend(self._plain(node.value, "a list"))
            else:
                items.append(self._value(node))
        return items

    def _mapping(self, node: ast.AST, keys: list[ast.expr | None], values: list[ast.expr]) -> dict[str, Value]:
        made: dict[str, Value] = {}
        for key, value in zip(keys, values, strict=True):
            if key is None:
                made |= self._dictionary(value)
                continue
            name = self._plain(key, "a key")
            if not isinstance(name, (str, int)):
                raise self._refuse(node, "a key that is no text")
            made[str(name)] = self._value(value)
        return made

    def _dictionary(self, node: ast.expr) -> dict[str, Value]:
        value = self._value(node)
        if not isinstance(value, dict):
            raise self._refuse(node, "`**` before something that is no dict")
        return value

    def _attribute(self, node: ast.AST, owner: Value, name: str) -> Value:
        if isinstance(owner, Symbol):
            return Symbol(f"{owner.name}.{name}")
        if isinstance(owner, dict) and name in owner:
            return owner[name]
        raise self._refuse(node, f"the attribute {name} of {_spoken(owner)} is not known without running the file")

    def _part(self, node: ast.AST, owner: Value, index: ast.expr) -> Value:
        if isinstance(owner, Symbol):
            return Symbol(f"{owner.name}[{ast.unparse(index)}]")
        key = self._plain(index, "an index")
        try:
            return owner[key]
        except (KeyError, IndexError, TypeError) as error:
            raise self._refuse(node, f"there is no part {key!r}: {error}") from error

    def _call(self, node: ast.Call) -> Value:
        function = self._value(node.func)
        if not isinstance(function, Symbol):
            raise self._refuse(node, f"calls {_spoken(function)}")
        arguments = self._items(node.args)
        keywords: dict[str, Value] = {}
        for keyword in node.keywords:
            keywords |= (
                self._dictionary(keyword.value) if keyword.arg is None else {keyword.arg: self._value(keyword.value)}
            )
        if function.name == "dict":
            pairs = arguments[0] if arguments else {}
            return {**(pairs if isinstance(pairs, dict) else dict(self._pairs(node, pairs))), **keywords}
        if function.last == "join" and function.name.split(".")[0] in ("os", "osp") and not keywords:
            return "/".join(str(self._known(node, part)) for part in arguments)
        if function.last in ("deepcopy", "copy") and len(arguments) == 1:
            return arguments[0]
        if function.name in _CONVERTERS and len(arguments) == 1:
            return self._applied(node, _CONVERTERS[function.name], self._known(node, arguments[0]))
        return Call(function, tuple(arguments), keywords)

    def _pairs(self, node: ast.AST, pairs: Value) -> list[tuple[str, Value]]:
        if isinstance(pairs, (list, tuple)) and all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
        ):
            return [(str(key), value) for key, value in pairs]
        raise self._refuse(node, "dict() of something that is no list of pairs")

    def _known(self, node: ast.AST, value: Value) -> Value:
        if not isinstance(value, _PLAIN):
            raise self._refuse(node, f"depends on {_spoken(value)}, which is not run")
        return value

    def _computed(self, node: ast.AST, operation: ast.operator, left: Value, right: Value) -> Value:
        function = _BINARY.get(type(operation))
        if function is None:
            raise self._refuse(node, f"the operator of `{ast.unparse(node)}` is not read")
        left, right = self._known(node, left), self._known(node, right)
        too_large = isinstance(operation, ast.Pow) and (abs(right) > 64 or abs(left) > MAX_NUMBER)
        if isinstance(operation, ast.Mult) and any(isinstance(side, (str, list, tuple)) for side in (left, right)):
            sequence, count = (left, right) if isinstance(right, int) else (right, left)
            too_large = isinstance(count, int) and len(sequence) * max(count, 0) > MAX_LENGTH
        if isinstance(operation, ast.Mod) and isinstance(left, str):
            too_large = _WIDE_FORMAT.search(left) is not None
        if too_large:
            raise self._refuse(node, "computes a value that is too large for a setting")
        made = self._applied(node, function, left, right)
        if (isinstance(made, int) and abs(made) > MAX_NUMBER) or (
            isinstance(made, (str, list, tuple)) and len(made) > MAX_LENGTH
        ):
            raise self._refuse(node, "computes a value that is too large for a setting")
        return made

    def _applied(self, node: ast.AST, function: Callable[..., Any], *values: Value) -> Value:
        try:
            return function(*values)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise self._refuse(node, f"`{ast.unparse(node)[:80]}` cannot be computed: {error}") from error

    def _joined(self, operation: ast.boolop, nodes: list[ast.expr]) -> Value:
        value: Value = None
        for node in nodes:
            value = self._plain(node, "a condition")
            if bool(value) == isinstance(operation, ast.Or):
                return value
        return value

    def _compared(self, node: ast.AST, left: ast.expr, operations: list[ast.cmpop], rights: list[ast.expr]) -> bool:
        before = self._plain(left, "a condition")
        for operation, right in zip(operations, rights, strict=True):
            after = self._plain(right, "a condition")
            if isinstance(operation, (ast.In, ast.NotIn)):
                found = self._applied(node, lambda part, whole: part in whole, before, after)
                holds = found != isinstance(operation, ast.NotIn)
            else:
                holds = self._applied(node, _COMPARE[type(operation)], before, after)
            if not holds:
                return False
            before = after
        return True

    def _formatted(self, part: ast.expr) -> str:
        if isinstance(part, ast.FormattedValue):
            if part.format_spec is not None or part.conversion != -1:
                raise self._refuse(part, "a formatted text with a format; write the text out")
            return str(self._plain(part.value, "a text"))
        return str(self._value(part))


def _word(node: ast.AST) -> str:
    """A node as its keyword: `for`, `lambda`."""
    words = {
        "FunctionDef": "def",
        "ClassDef": "class",
        "ListComp": "list comprehension",
        "DictComp": "dict comprehension",
    }
    name = type(node).__name__
    return words.get(name, name.lower())


def _spoken(value: Value) -> str:
    if isinstance(value, Symbol):
        return value.name
    if isinstance(value, Call):
        return f"{value.function.name}(...)"
    return f"a {type(value).__name__}"
