"""Answers to the config's prompts before, during and after the training, to see what is learned.

Each round is printed and kept in samples.jsonl. Greedy, and no random number of the training is used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastft import console
from fastft.chat import session
from fastft.config import schema
from fastft.model import device
from fastft.training import metrics


class SampleAnswers(TrainerCallback):  # type: ignore[misc]  # transformers is untyped for mypy
    """Answers the prompts at the start, every `every` steps and at the end.

    Args:
        path: samples.jsonl, appended to.
        talk: the model under training, ready to answer.
        samples: prompts, system message, longest answer.
        every: steps between two rounds, None for start and end only.
        speaks: False in processes that write nothing.
        together: the processes share the weights, so that all must answer; else silent ones skip the rounds.
    """

    def __init__(
        self,
        path: Path,
        talk: session.Talk,
        samples: schema.Samples,
        every: int | None,
        *,
        speaks: bool,
        together: bool = False,
    ) -> None:
        self.path = path
        self.talk = talk
        self.samples = samples
        self.every = every
        self.speaks = speaks
        self.answers = (speaks or together) and bool(samples.prompts)
        self.last_step = -1

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        """The first round, also of a resumed run."""
        if state.global_step == 0:
            self._round(state.global_step, "before the training")

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        """A round every `every` steps; the last one is the end's."""
        step = state.global_step
        if self.every is not None and step % self.every == 0 and step < state.max_steps:
            self._round(step, f"after {step} steps")

    def on_train_end(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
        """The last round, also of a run that was stopped."""
        if state.global_step != self.last_step:
            self._round(state.global_step, f"after the training ({state.global_step} steps)")

    def _round(self, step: int, when: str) -> None:
        self.last_step = step
        if not self.answers:
            return
        answers = answer_all(self.talk, self.samples)
        if not self.speaks:
            return
        console.note(f"\nanswers {when}:")
        for prompt, answer in zip(self.samples.prompts, answers, strict=True):
            console.note(f"  > {prompt}\n    {answer.strip()}")
            metrics.append(self.path, {"step": step, "prompt": prompt, "answer": answer})
        console.note("")


def answer_all(talk: session.Talk, samples: schema.Samples) -> Sequence[str]:
    """One greedy answer per prompt; the model's mode and all random states are as before afterwards."""
    images = [session.image(path) for path in samples.images]
    training = talk.model.training
    talk.model.eval()
    sampling = session.Sampling(max_new_tokens=samples.max_new_tokens, temperature=0.0)
    try:
        with device.same_random(talk.model.device):
            return [
                session.answer(talk, session.question(prompt, samples.system, images), sampling)
                for prompt in samples.prompts
            ]
    finally:
        talk.model.train(training)
