"""What a run measures: one JSON object per line in metrics.jsonl, and the status line on the console.

A line holds step, epoch and either loss, lr, grad_norm, tokens_per_s, memory_gib, or eval_loss; of a preference task
also accuracy and margin. It is flushed at once, so that a
killed run shows how far it came; a resumed run drops the lines that its checkpoint does not know and goes on.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastft import console, publish

Advance = Callable[..., None]
# Trainer's names of what is kept; everything else that it logs (flos, runtime) is not.
_NAMES = {
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "grad_norm",
    "eval_loss": "eval_loss",
    "accuracy": "accuracy",
    "margin": "margin",
    "eval_accuracy": "eval_accuracy",
}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl or samples.jsonl; a half last line of a killed run is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def drop_after(path: Path, step: int, last: int) -> None:
    """Remove the lines that a run resumed from `step` writes anew.

    Args:
        path: metrics.jsonl or samples.jsonl.
        step: of the checkpoint.
        last: step of the run, whose eval and answers come after its checkpoint.
    """

    def known(line: Mapping[str, Any]) -> bool:
        at = line.get("step", 0)
        return at <= step and not (at == last and ("eval_loss" in line or "answer" in line))

    if path.is_file():
        kept = [line for line in read(path) if known(line)]
        publish.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line; it is in the file when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def peak_memory_bytes() -> int:
    """The most that this process has held on its device, by torch's allocator; without one, in RAM."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True) if hasattr(torch, "accelerator") else None
    if device is not None:
        module = torch.get_device_module(device)
        if hasattr(module, "max_memory_allocated"):
            return int(module.max_memory_allocated())
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def status_text(loss: float, lr: float, tokens_per_s: float, memory_bytes: int) -> str:
    """What stands behind the bar; with it, a line fits 80 columns up to 99,999 steps."""
    return f"loss {loss:.3f}  lr {lr:.1e}  {tokens_per_s:,.0f} tok/s  {memory_bytes / 2**30:.1f} GiB"


class Metrics(TrainerCallback):  # type: ignore[misc]  # transformers is untyped for mypy
    """Writes metrics.jsonl and moves the status line.

    Args:
        path: the file, appended to.
        advance: `console.progress`'s, or None in processes that say nothing.
        status: gives (loss of the last micro-batch, tokens seen in this session).
        listeners: get each line too.
    """

    def __init__(
        self,
        path: Path,
        advance: Advance | None,
        status: Callable[[], tuple[float, int]],
        listeners: Sequence[Callable[[Mapping[str, Any]], None]] = (),
    ) -> None:
        self.path = path
        self.advance = advance
        self.status = status
        self.listeners = listeners
        self.mean_loss: float | None = None
        self.lr = 0.0
        self.tokens_at_line = 0
        self.time_at_line = time.monotonic()

    def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
        """Start the clock."""
        self.time_at_line = time.monotonic()

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Mapping[str, float], **_kwargs: Any) -> None:
        """Write a line of metrics.jsonl."""
        if not state.is_world_process_zero:
            return
        line: dict[str, Any] = {"step": state.global_step, "epoch": round(float(state.epoch or 0), 4)}
        line |= {ours: float(logs[theirs]) for theirs, ours in _NAMES.items() if theirs in logs}
        if len(line) == 2:
            return
        if "loss" in line:
            line["tokens_per_s"] = self._speed()
            line["memory_gib"] = round(peak_memory_bytes() / 2**30, 3)
            self.mean_loss, self.lr = line["loss"], line["lr"]
        append(self.path, line)
        for listener in self.listeners:
            listener(line)
        if "eval_loss" in line:
            console.note(f"step {state.global_step}: eval loss {line['eval_loss']:.4f}")

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        """Move the status line."""
        if self.advance is None:
            return
        elapsed = max(time.monotonic() - self.time_at_line, 1e-9)
        speed = (self.status()[1] - self.tokens_at_line) / elapsed
        loss = self.status()[0] if self.mean_loss is None else self.mean_loss
        self.advance(state.global_step, status_text(loss, self.lr, speed, peak_memory_bytes()))

    def _speed(self) -> float:
        """Tokens per second since the last line, pauses for eval and samples included."""
        now, tokens = time.monotonic(), self.status()[1]
        speed = (tokens - self.tokens_at_line) / max(now - self.time_at_line, 1e-9)
        self.time_at_line, self.tokens_at_line = now, tokens
        return round(speed, 1)
