"""Asks the Trainer for an eval every `eval_steps` steps, and for a last line of metrics.jsonl at the end.

Trainer's own strategy wants its eval data at construction and evaluates in its own way; fastft's `evaluate` is exact.
"""

from typing import Any

from transformers import TrainerCallback


class Periodic(TrainerCallback):  # type: ignore[misc]  # transformers is untyped for mypy
    """Sets `should_evaluate` every `eval_steps` steps (None is never), and `should_log` at the last one."""

    def __init__(self, eval_steps: int | None) -> None:
        self.eval_steps = eval_steps

    def on_step_end(self, _args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """Ask, except at the last step: the end has an eval of its own."""
        if self.eval_steps and state.global_step % self.eval_steps == 0 and state.global_step < state.max_steps:
            control.should_evaluate = True
        if state.global_step >= state.max_steps:
            control.should_log = True
