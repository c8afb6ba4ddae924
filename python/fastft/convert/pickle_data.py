"""Reads the data in a pickle without being able to run anything.

A pickle is a program for a stack machine that may import and call any function. This interpreter knows the opcodes,
but no callable exists in it: an imported name is the inert `Global`, a call of it the inert `Call`, and what a call
would have done to an object is not done. So there is nothing that a hostile file could reach; one that names functions
which only a hostile file needs is refused, so that its owner hears of it. `torch_file` finds the tensors in what comes out.
"""

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastft.errors import CheckpointError

# A checkpoint with 10,000 tensors has a pickle of 2 MB; mmengine's logs may add some 10 MB.
MAX_BYTES = 256 * 1024 * 1024
# A tensor takes some 35 of them; 100,000 tensors (a model of many experts) still fit.
MAX_OPCODES = 4_000_000
_MAX_NAME = 1000
_MARK = object()
_KEY_TYPES = (str, int, float, bool, bytes, type(None))


# Modules that weights, logs and settings have no use for, and that run, fetch or overwrite something.
_HOSTILE_MODULES = frozenset(
    {
        "_pickle", "_posixsubprocess", "_thread", "asyncio", "bdb", "cProfile", "cloudpickle", "code", "codeop", "commands",
        "ctypes", "dill", "doctest", "ftplib", "gc", "http", "imp", "importlib", "inspect", "io", "marshal", "nt", "os",
        "pdb", "pickle", "pip", "pkgutil", "posix", "profile", "pty", "pydoc", "requests", "runpy", "shutil", "signal",
        "smtplib", "socket", "subprocess", "sys", "tempfile", "threading", "timeit", "trace", "urllib", "webbrowser",
        "zipimport",
    }
)  # fmt: skip
_HOSTILE_BUILTINS = frozenset(
    {
        "__import__", "breakpoint", "compile", "delattr", "eval", "exec", "execfile", "exit", "globals", "help", "input",
        "locals", "open", "quit", "setattr", "vars",
    }
)  # fmt: skip


class HostilePickleError(CheckpointError):
    """A pickle asks for what only code needs."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle would import: `torch._utils._rebuild_tensor_v2`. Nothing is imported."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Call:
    """A call that the pickle would make. Nothing is called; state given to its result is kept as data.

    Attributes:
        function: a `Global`, or any other value that the file put there.
        arguments: a tuple in a well-formed file.
        items: what the file set by key, for an ordered dictionary.
        state: what the file gave to `__setstate__`.
    """

    function: Any
    arguments: Any
    items: dict[Any, Any]
    state: Any = None


@dataclass(eq=False, slots=True)
class Persistent:
    """A reference to something outside the pickle; torch names its storages so."""

    identity: Any


def read(content: bytes, where: str) -> Any:
    """Read the value of a pickle.

    Args:
        content: the whole pickle, protocol 0 to 5.
        where: file name for the error texts.

    Returns:
        dict, list, tuple, set, str, bytes, int, float, bool, None, `Global`, `Call` and `Persistent`, nested.

    Raises:
        CheckpointError: not a pickle, cut off, an opcode that data does not need, or a name that only code needs.
    """
    if len(content) > MAX_BYTES:
        raise CheckpointError(f"{where}: its pickle has {len(content)} bytes; at most {MAX_BYTES} are read")
    return read_next(io.BytesIO(content), where)


def read_next(content: io.BytesIO, where: str) -> Any:
    """Read the value of the pickle that begins at the position of `content`, and leave it behind the end.

    The rest is as for `read`.
    """
    machine = _Machine(where)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if opcode.name == "STOP":
                return machine.pop()
            if number > MAX_OPCODES:
                raise CheckpointError(
                    f"{where}: its pickle has more than {MAX_OPCODES} steps; no checkpoint needs them"
                )
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{where}: not a pickle that can be read: {error}") from error
    raise CheckpointError(f"{where}: its pickle ends before its STOP")


def unwrapped_key(key: Any) -> Any:
    """Give a dictionary's key as it stood in the file: what cannot be one here is wrapped (see `_Machine.set_pairs`)."""
    return key.arguments[0] if isinstance(key, Call) and key.function is None else key


class _Machine:
    """The stack, the memo and what each opcode does to them."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise CheckpointError(f"{self._where}: its pickle takes more from the stack than is there")
        return self._stack.pop()

    def step(self, name: str, argument: Any) -> None:
        """Do one opcode."""
        if name in _LITERALS:
            self._stack.append(argument)
        elif name in _MAKERS:
            self._stack.append(_MAKERS[name]())
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise CheckpointError(f"{self._where}: its pickle uses {name}, which plain data does not need")

    def pop_mark(self) -> list[Any]:
        items: list[Any] = []
        while self._stack:
            item = self._stack.pop()
            if item is _MARK:
                items.reverse()
                return items
            items.append(item)
        raise CheckpointError(f"{self._where}: its pickle has no mark where one is needed")

    def mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def drop(self, _: Any) -> None:
        if not self._stack:
            raise CheckpointError(f"{self._where}: its pickle takes more from the stack than is there")
        self._stack.pop()

    def drop_mark(self, _: Any) -> None:
        self.pop_mark()

    def duplicate(self, _: Any) -> None:
        value = self.pop()
        self._stack += [value, value]

    def put(self, index: Any) -> None:
        value = self.pop()
        self._stack.append(value)
        self._memo[int(index)] = value

    def memoize(self, _: Any) -> None:
        self.put(len(self._memo))

    def get(self, index: Any) -> None:
        self._stack.append(self._memo[int(index)])

    def make_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self.pop_mark()))

    def tuple_of(self, count: int) -> None:
        self._stack.append(tuple(reversed([self.pop() for _ in range(count)])))

    def make_list(self, _: Any) -> None:
        self._stack.append(self.pop_mark())

    def make_dict(self, _: Any) -> None:
        self._stack.append({})
        items = self._stack.pop()
        self.set_pairs(items, self.pop_mark())
        self._stack.append(items)

    def append(self, _: Any) -> None:
        value = self.pop()
        self.extend([value])

    def appends(self, _: Any) -> None:
        self.extend(self.pop_mark())

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Call):
            raise CheckpointError(f"{self._where}: its pickle appends to a {type(target).__name__}")

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_pairs(self.top(), [key, value])

    def set_items(self, _: Any) -> None:
        pairs = self.pop_mark()
        self.set_pairs(self.top(), pairs)

    def set_pairs(self, target: Any, pairs: list[Any]) -> None:
        items = target.items if isinstance(target, Call) else target
        if not isinstance(items, dict) or len(pairs) % 2:
            raise CheckpointError(f"{self._where}: its pickle sets items of a {type(target).__name__}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Hashing nested tuples can take for ever; no checkpoint needs such a key.
            items[key if isinstance(key, _KEY_TYPES) else Call(None, (key,), {})] = value

    def add_items(self, _: Any) -> None:
        self.pop_mark()
        if not isinstance(self.top(), Call):
            raise CheckpointError(f"{self._where}: its pickle adds to a {type(self.top()).__name__}")

    def empty_set(self, _: Any) -> None:
        self._stack.append(Call(Global("builtins", "set"), (), {}))

    def frozen_set(self, _: Any) -> None:
        self._stack.append(Call(Global("builtins", "frozenset"), (tuple(self.pop_mark()),), {}))

    def top(self) -> Any:
        value = self.pop()
        self._stack.append(value)
        return value

    def import_name(self, argument: Any) -> None:
        module, _, name = str(argument).partition(" ")
        self._stack.append(self.named(module, name))

    def stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise CheckpointError(f"{self._where}: its pickle imports something that has no name")
        self._stack.append(self.named(module, name))

    def named(self, module: str, name: str) -> Global:
        """Give the inert stand-in of an import.

        Raises:
            HostilePickleError: weights never need it; a file that asks for it wants something to happen.
        """
        if not (module + name).isprintable():
            raise CheckpointError(f"{self._where}: its pickle imports a name with control characters")
        hostile = module.partition(".")[0] in _HOSTILE_MODULES
        in_builtins = module in ("builtins", "__builtin__", "__builtins__")
        if hostile or (in_builtins and name.partition(".")[0] in _HOSTILE_BUILTINS):
            raise HostilePickleError(
                f"{self._where}: its pickle asks for {module[:100]}.{name[:100]}, which would run code and which no"
                " checkpoint needs; nothing of it was run. Do not load this file with other tools"
            )
        return Global(module[:_MAX_NAME], name[:_MAX_NAME])

    def reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self._stack.append(Call(function, arguments, {}))

    def new_object_ex(self, _: Any) -> None:
        _keywords, arguments, function = self.pop(), self.pop(), self.pop()
        self._stack.append(Call(function, arguments, {}))

    def make_object(self, _: Any) -> None:
        function, *arguments = self.pop_mark()
        self._stack.append(Call(function, tuple(arguments), {}))

    def instance(self, argument: Any) -> None:
        module, _, name = str(argument).partition(" ")
        self._stack.append(Call(self.named(module, name), tuple(self.pop_mark()), {}))

    def build(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Call):
            target.state = state

    def persistent(self, _: Any) -> None:
        self._stack.append(Persistent(self.pop()))

    def persistent_text(self, argument: Any) -> None:
        self._stack.append(Persistent(argument))

    def ignore(self, _: Any) -> None:
        """PROTO and FRAME: nothing to do."""


_LITERALS = frozenset(
    {
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
        "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE",
        "SHORT_BINUNICODE", "BINUNICODE8",
    }
)  # fmt: skip
_MAKERS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.ignore,
    "FRAME": _Machine.ignore,
    "MARK": _Machine.mark,
    "POP": _Machine.drop,
    "POP_MARK": _Machine.drop_mark,
    "DUP": _Machine.duplicate,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.make_tuple,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": _Machine.make_list,
    "DICT": _Machine.make_dict,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add_items,
    "EMPTY_SET": _Machine.empty_set,
    "FROZENSET": _Machine.frozen_set,
    "GLOBAL": _Machine.import_name,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_object_ex,
    "OBJ": _Machine.make_object,
    "INST": _Machine.instance,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
    "PERSID": _Machine.persistent_text,
}
