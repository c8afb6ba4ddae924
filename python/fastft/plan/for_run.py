"""The plan at the start of a run: what it will take of the card here, and the memory switches that it needs.

Switches that the config leaves to fastft (`auto`) are used when the run would not fit without them, the least costly
first; all are exact. What the config asks for is never changed.
"""

from dataclasses import dataclass, replace
from typing import Any

from fastft import console
from fastft.config import schema
from fastft.errors import ConfigError
from fastft.model import load as model_load
from fastft.plan import fit, subject
from fastft.plan.fit import GIB, Card


@dataclass(frozen=True)
class Choice:
    """What a run uses.

    Attributes:
        config: the run's config with the switches that were chosen.
        reasons: name of a memory switch -> why it was chosen.
    """

    config: schema.Config
    reasons: dict[str, str]

    def told(self, loaded: model_load.Loaded) -> model_load.Loaded:
        """The loaded model, whose switches know which were chosen here."""
        return replace(loaded, memory=replace(loaded.memory, chosen={**loaded.memory.chosen, **self.reasons}))


def choose(config: schema.Config, base: model_load.Base, card: Card | None, processes: int, **about: Any) -> Choice:
    """Plan a run for a card, say what it takes, and choose the switches that it needs.

    A run that cannot be planned, or that will not fit, is begun all the same; both are said aloud.

    Args:
        config: the run.
        base: where its base model lies.
        card: the card here; None: there is none, and nothing is planned.
        processes: how many take part; several keep a second copy of the gradients.
        about: `has_bf16` of the card.
    """
    unchanged = Choice(config, {})
    if card is None:
        return unchanged
    other = _not_counted(config)
    if other is not None:
        console.note(f"no plan: {other} is not counted yet")
        return unchanged
    tokens = config.data.max_length
    try:
        planned = subject.of_json(config, base.config_json, **about)
        counted = fit.count(planned, tokens)
        budget = card.budget - (counted.gradients if processes > 1 else 0)
        advice = None if counted.peak <= budget else fit.advise(planned, tokens, budget, fit.automatic(planned))
    except ConfigError as problem:
        console.note(f"no plan: {problem}")
        return unchanged
    except Exception as problem:  # noqa: BLE001 - a count of a model's code on shapes alone; no run may fail for it
        reason = (str(problem).splitlines() or [""])[0]
        console.warn(f"no plan: the count failed ({type(problem).__name__}: {reason}); the run begins without one")
        return unchanged
    console.note(
        f"plan: peak {_gib(counted.peak)} of {_gib(budget)} GiB that torch can have here, rows of {tokens:,} tokens"
    )
    if advice is None:
        return unchanged
    names = {change.key.split(".")[1]: f"else the peak is {_gib(counted.peak)} GiB" for change in advice.changes}
    if advice.changes:
        listed = ", ".join(change.text() for change in advice.changes)
        console.note(f"plan: {listed}: chosen to fit; the peak is {_gib(advice.account.peak)} GiB")
    if not advice.fits:
        console.warn(
            f"the plan says that this run will not fit: {_gib(advice.account.peak)} GiB are needed, torch can have "
            f"{_gib(budget)} GiB here; `fastft plan` tells what would"
        )
    return Choice(fit.changed(config, advice.changes), names)


def _not_counted(config: schema.Config) -> str | None:
    """What of a run the count would leave out; None: nothing."""
    if config.distributed.fsdp or config.distributed.deepspeed is not None:
        return "a run that is shared out"
    return None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"
