"""The inputs of recomputed layers wait in host RAM instead of on the device.

Checkpointing keeps one tensor per layer: 32 x 4096 x 4096 x 2 bytes = 1 GiB at 4,096 tokens of Llama-2-7B. Here each is
copied to pinned RAM while the layer computes, and comes back while the layer behind it is in its backward pass. A stream
of its own copies; the device holds at most two inputs on their way out and two on their way in. The buffers in RAM are
kept for the next step. Exact: the same bits come back; dropout's random state is torch.utils.checkpoint's affair as ever.

Costs the input of each layer twice over PCIe per step, which is hidden as long as a layer computes longer than that. On a
CPU the same code copies to other buffers of the same RAM and brings nothing.
"""

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

# Smaller tensors stay where they are: a copy costs more than they take.
LEAST_BYTES = 2**16
_HELD_ON_THE_WAY_OUT = 2


class HostCheckpoints:
    """Takes the place of torch.utils.checkpoint.checkpoint in a model.

    Called with a layer's computation and its arguments, the hidden states first. One of these serves all layers of a
    model, in the order of the forward pass.
    """

    def __init__(self) -> None:
        self.idle: list[torch.Tensor] = []  # flat uint8 buffers in RAM
        self.last: Callable[[], _Kept | None] = lambda: None  # a weak reference: a graph that is dropped takes its own
        self.leaving: deque[tuple[Any, torch.Tensor]] = deque()  # copies under way: event, tensor on the device
        self.streams: dict[torch.device, Any] = {}

    def __call__(self, function: Callable[..., Any], hidden_BTD: torch.Tensor, *rest: Any) -> Any:
        """`function(hidden_BTD, *rest)`, computed again in the backward pass; only hidden_BTD is kept, in RAM."""
        if not torch.is_grad_enabled() or hidden_BTD.nbytes < LEAST_BYTES:
            return checkpoint(function, hidden_BTD, *rest, use_reentrant=False)
        kept = _Kept(self, hidden_BTD)

        # torch holds on to the arguments; `anchor` tells it the device, whose random state it keeps for the recomputation.
        def of_kept(kept: _Kept, _anchor: torch.Tensor, *rest: Any) -> Any:
            return function(kept.take(), *rest)

        return checkpoint(of_kept, kept, hidden_BTD.new_empty(0), *rest, use_reentrant=False)

    def stream(self, device: torch.device) -> Any:
        """The stream that copies from and to a GPU."""
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self.streams[device]

    def buffer(self, num_bytes: int, *, pinned: bool) -> torch.Tensor:
        """A flat buffer of at least so many bytes; the smallest idle one that is large enough, else a new one."""
        fitting = [buffer for buffer in self.idle if buffer.nbytes >= num_bytes]
        if fitting:
            best = min(fitting, key=lambda buffer: buffer.nbytes)
            self.idle = [buffer for buffer in self.idle if buffer is not best]
            return best
        self.idle.clear()  # too small for this batch: let them go before RAM holds both
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)


class _Kept:
    """One layer's input: on the device in the forward pass, then in RAM, and on the device again when it is taken."""

    def __init__(self, owner: HostCheckpoints, hidden_BTD: torch.Tensor) -> None:
        self.owner = owner
        self.device = hidden_BTD.device
        self.shape, self.dtype = hidden_BTD.shape, hidden_BTD.dtype
        self.needs_gradient = hidden_BTD.requires_grad
        self.on_gpu = self.device.type == "cuda"
        self.in_forward: torch.Tensor | None = hidden_BTD
        self.returned: torch.Tensor | None = None
        self.returned_at: Any = None
        self.flat = owner.buffer(hidden_BTD.nbytes, pinned=self.on_gpu)
        self._send(hidden_BTD.detach())
        self.done = False
        self.before, owner.last = owner.last, weakref.ref(self)

    def take(self) -> torch.Tensor:
        """The hidden states: as they came in the forward pass, from RAM at the recomputation."""
        if self.in_forward is not None:
            hidden_BTD, self.in_forward = self.in_forward, None
            return hidden_BTD
        self._fetch()
        assert self.returned is not None, "a graph with checkpoints in host RAM goes backward once"
        hidden_BTD, self.returned = self.returned, None
        if self.on_gpu:
            torch.cuda.current_stream(self.device).wait_event(self.returned_at)
        before = self.before()
        if before is not None:
            before._fetch()  # noqa: SLF001 - its own kind
        self._release()
        return hidden_BTD.requires_grad_(self.needs_gradient)

    def _in_ram(self) -> torch.Tensor:
        num_bytes = self.shape.numel() * self.dtype.itemsize
        return self.flat[:num_bytes].view(self.dtype).view(self.shape)

    def _send(self, hidden_BTD: torch.Tensor) -> None:
        """Copy to RAM; on a GPU beside the computation."""
        if not self.on_gpu:
            self._in_ram().copy_(hidden_BTD)
            return
        main, aside = torch.cuda.current_stream(self.device), self.owner.stream(self.device)
        # The oldest copies must have left before this stream gives their memory to somebody else.
        while len(self.owner.leaving) >= _HELD_ON_THE_WAY_OUT:
            event, _ = self.owner.leaving.popleft()
            main.wait_event(event)
        aside.wait_stream(main)
        with torch.cuda.stream(aside):
            self._in_ram().copy_(hidden_BTD, non_blocking=True)
            self.owner.leaving.append((aside.record_event(), hidden_BTD))

    def _fetch(self) -> None:
        """Start the copy back to the device, once."""
        if self.returned is not None or self.done:
            return
        # Allocated by the computation's stream, which also frees it; the copy waits for what was there before.
        self.returned = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if not self.on_gpu:
            self.returned.copy_(self._in_ram())
            return
        main, aside = torch.cuda.current_stream(self.device), self.owner.stream(self.device)
        while self.owner.leaving:
            event, _ = self.owner.leaving.popleft()
            main.wait_event(event)
        aside.wait_stream(main)
        with torch.cuda.stream(aside):
            self.returned.copy_(self._in_ram(), non_blocking=True)
            self.returned_at = aside.record_event()
        self.returned.record_stream(aside)

    def _release(self) -> None:
        """Give the buffer back: copies into it come later on the same stream than the one out of it."""
        self.done = True
        self.owner.idle.append(self.flat)
        del self.flat
