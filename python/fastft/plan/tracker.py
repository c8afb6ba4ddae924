"""Bytes that tensors hold while code runs, step of the run by step, with or without real numbers in them.

A storage counts from the operation that makes it to the moment it is freed, rounded as torch's CUDA allocator rounds.
What is not to count, because it would lie in host RAM, is told by `in_ram`. Operations that take memory inside
themselves, which no tensor shows, are in `_INSIDE`.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The allocator of torch hands out multiples of it.
ROUND_BYTES = 512


def rounded(num_bytes: int) -> int:
    """What torch's allocator takes for a tensor."""
    return -(-num_bytes // ROUND_BYTES) * ROUND_BYTES


def _gemm_4bit(args: tuple[Any, ...]) -> int:
    """What bitsandbytes unpacks for its product: the whole weight, in the dtype of the input."""
    x, _packed, shape = args[:3]
    return rounded(int(shape[0]) * int(shape[1]) * x.element_size())


_INSIDE: Mapping[str, Callable[[tuple[Any, ...]], int]] = {"bitsandbytes::gemm_4bit": _gemm_4bit}


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts the bytes of all tensors made inside it.

    Attributes:
        held: bytes at this moment.
        peaks: part of the run -> the most bytes in it, in the order in which the parts came.
    """

    def __init__(self, *, inside: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = 0
        self.peaks: dict[Any, int] = {}
        self._inside = _INSIDE if inside else {}
        self._known: dict[int, Any] = {}
        self._part: Any = "start"
        self._counts = True

    def enter(self, part: Any) -> None:
        """What follows belongs to this part of the run."""
        self._part = part
        self._note(self.held)

    @contextmanager
    def in_ram(self) -> Iterator[None]:
        """Tensors made inside lie in host RAM."""
        before, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = before

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was made before, or `in_ram`."""
        self._see(tensor)
        storage = tensor.untyped_storage()
        entry = self._known[id(storage)]
        if entry[1] == 0:
            entry[1] = rounded(storage.nbytes())
            self.held += entry[1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, count what it made."""
        result = func(*_with_known_places(func, args), **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        inside = self._inside.get(func._schema.name)  # noqa: SLF001 - torch's name for an operation
        if inside is not None:
            self._note(self.held + inside(args))
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known[0]() is storage:
            return
        num_bytes = rounded(storage.nbytes()) if self._counts else 0
        entry: list[Any] = [None, num_bytes]

        def freed(_reference: Any, key: int = key, entry: list[Any] = entry) -> None:
            self.held -= entry[1]
            if self._known.get(key) is entry:
                del self._known[key]

        entry[0] = weakref.ref(storage, freed)
        self._known[key] = entry
        self.held += num_bytes
        self._note(self.held)

    def _note(self, num_bytes: int) -> None:
        self.peaks[self._part] = max(self.peaks.get(self._part, 0), num_bytes)


def _with_known_places(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A mask of yes and no as an index means yes everywhere: how many are chosen is not known without numbers."""
    if not func._schema.name.startswith("aten::") or "index" not in func._schema.name:  # noqa: SLF001
        return args
    return tuple(_all_places(arg) if isinstance(arg, list | tuple) else arg for arg in args)


def _all_places(indices: Any) -> list[Any]:
    places: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
            places += [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.dim())]
        else:
            places.append(index)
    return places
