"""Ctrl-C and SIGTERM in a training: finish the step, write a checkpoint, stop.

A second signal stops at once. Under torchrun all processes agree on the step, or they would wait for each other
for ever in the checkpoint's barrier.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from fastft import console


class Interrupt(TrainerCallback):  # type: ignore[misc]  # transformers is untyped for mypy
    """Remembers a signal and ends the training after the step, with a checkpoint."""

    def __init__(self) -> None:
        self.received: int | None = None

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM: 128 + number of the signal."""
        assert self.received is not None
        return 128 + self.received

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM for the time of the training."""
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, _state: Any, control: Any, **_kwargs: Any) -> None:
        """End the training if a signal came in any process."""
        if args.world_size > 1:
            number = torch.tensor([self.received or 0], device=args.device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            self.received = int(number.item()) or None
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    def _receive(self, number: int, _frame: object) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.received = number
        console.note("\nstopping after this step, with a checkpoint (once more: stop at once)")
