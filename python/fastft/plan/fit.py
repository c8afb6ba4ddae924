"""Whether a run fits on a card, the longest rows that do, and what to change when it does not.

The switches are tried in the order of what they cost; each cost is the one that docs/memory.md tells.
"""

from dataclasses import dataclass, replace
from typing import Any

from fastft.config import schema
from fastft.plan.accounting import Account, Subject, account

GIB = 2**30
# torch's allocator takes more than it hands out: 7.00 GiB for 6.60 at the longest row that still fits
# (benches/results/2026-11-26_nvidia-h200.md, Llama-3.1-8B within 7 GiB).
GAPS = 1.06
# Of one process on a card: the CUDA context with the kernels that are loaded.
CONTEXT_BYTES = int(0.4 * GIB)
# What the card's driver keeps of the size that is printed on the box, on a machine without a desktop.
DRIVER_BYTES = int(0.6 * GIB)
# Rows are planned in steps of it.
STEP_TOKENS = 256
# Switches that save less than this part of the peak are not advised.
_LEAST_SAVING = 0.005

_counted: dict[tuple[Any, ...], Account] = {}


@dataclass(frozen=True)
class Card:
    """A card's memory.

    Attributes:
        total: bytes, as on the box or as the driver tells.
        free: of them, for torch and its context.
    """

    total: int
    free: int

    @classmethod
    def of_size(cls, total: int) -> "Card":
        """A card of that size with nothing else on it."""
        return cls(total, total - DRIVER_BYTES)

    @property
    def budget(self) -> int:
        """The highest peak of torch's allocator that fits."""
        return max(int((self.free - CONTEXT_BYTES) / GAPS), 0)


@dataclass(frozen=True)
class Change:
    """One setting.

    Attributes:
        key: in the config, dotted.
        value: what it should be.
        cost: what it costs, in words.
    """

    key: str
    value: Any
    cost: str

    def text(self) -> str:
        """As it is typed: `memory.head=host`."""
        value = "true" if self.value is True else self.value
        return f"{self.key}={value}"


@dataclass(frozen=True)
class Advice:
    """Settings that let a run fit.

    Attributes:
        changes: in the order of their cost.
        account: with them.
        fits: whether they suffice.
    """

    changes: tuple[Change, ...]
    account: Account
    fits: bool


def changed(config: schema.Config, changes: tuple[Change, ...]) -> schema.Config:
    """The config with some settings changed."""
    content = config.model_dump()
    for change in changes:
        section, name = change.key.split(".")
        content[section][name] = change.value
    return schema.Config.model_validate(content)


def possible(subject: Subject) -> tuple[Change, ...]:
    """The changes that this run allows, the cheapest first."""
    config, text = subject.config, subject.model_config.get_text_config()
    memory, train = config.memory, config.train
    frozen = config.method.has_adapter
    saved = config.method.lora.modules_to_save if config.method.lora is not None else ()
    tables = frozen and not saved
    tied = bool(getattr(text, "tie_word_embeddings", False))
    found: list[Change] = []

    def offer(key: str, value: Any, cost: str, *, when: bool) -> None:
        if when:
            found.append(Change(key, value, cost))

    offer("memory.lora", "fused", "nothing", when=frozen and memory.lora == "plain")
    offer("train.optimizer", "adamw_8bit", "states in 8 bits", when=train.optimizer == "adamw")
    if train.batch_size > 1:
        found.append(Change("train.batch_size", 1, "more, smaller products"))
        found.append(
            Change("train.grad_accumulation", train.grad_accumulation * train.batch_size, "the same rows in a step")
        )
    offer("train.gradient_checkpointing", True, "a third more time", when=train.gradient_checkpointing is False)
    offer("memory.embedding", "host", "one wait per step", when=tables and not tied and memory.embedding != "host")
    offer("memory.checkpoints", "host", "pinned RAM, copies beside the work", when=memory.checkpoints != "host")
    tile = memory.mlp_tile_tokens
    whole = tile in {"auto", "whole"}
    offer("memory.mlp_tile_tokens", 2048, "a tenth of an MLP's time", when=whole)
    head_free = tables and memory.head not in {"host", "nf4"}
    offer("memory.head", "host", "the head read over PCIe once a step", when=head_free and not tied)
    if tied and head_free:
        found.append(Change("memory.embedding", "host", "one wait per step"))
        found.append(Change("memory.head", "host", "the head read over PCIe once a step"))
    offer("memory.mlp_tile_tokens", 512, "4-bit weights unpacked for every tile", when=whole or int(tile) > 512)
    return tuple(found)


def count(subject: Subject, tokens: int) -> Account:
    """`account`, remembered for the time of the process."""
    about = (subject.config.model_dump_json(), subject.model_config.to_json_string(), subject.on_gpu, subject.has_bf16)
    key = (*about, tokens)
    if key not in _counted:
        _counted[key] = account(subject, tokens)
    return _counted[key]


def automatic(subject: Subject) -> tuple[Change, ...]:
    """Those of `possible` that a run may make by itself: memory switches that the config leaves to it. All are exact."""
    memory = subject.config.memory

    def is_left(key: str) -> bool:
        section, name = key.split(".")
        return section == "memory" and getattr(memory, name) == "auto"

    return tuple(change for change in possible(subject) if is_left(change.key))


def advise(subject: Subject, tokens: int, budget: int, offered: tuple[Change, ...] | None = None) -> Advice:
    """The least costly changes with which rows of `tokens` tokens fit; all of them where they do not suffice.

    Args:
        subject: what is planned.
        tokens: of a row.
        budget: the highest peak of torch's allocator that fits.
        offered: what may be changed; None: `possible`.
    """
    if offered is None:
        offered = possible(subject)

    def with_first(number: int) -> Account:
        return count(replace(subject, config=changed(subject.config, offered[:number])), tokens)

    if with_first(len(offered)).peak > budget:
        return Advice(_useful(subject, tokens, offered, 2**63), with_first(len(offered)), fits=False)
    low, high = 0, len(offered)  # low does not fit, high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if with_first(middle).peak <= budget else (middle, high)
    kept = _useful(subject, tokens, offered[:high], budget)
    return Advice(kept, count(replace(subject, config=changed(subject.config, kept)), tokens), fits=True)


def _useful(subject: Subject, tokens: int, changes: tuple[Change, ...], budget: int) -> tuple[Change, ...]:
    """Without the changes that save next to nothing and are not needed for the budget, and without those that a later one overrides."""
    kept: list[Change] = []
    least = count(replace(subject, config=changed(subject.config, changes)), tokens).peak
    last = {change.key: change for change in changes}
    changes = tuple(change for change in changes if last[change.key] is change)
    for place, change in enumerate(changes):
        without = (*kept, *changes[place + 1 :])
        try:
            peak = count(replace(subject, config=changed(subject.config, without)), tokens).peak
        except ValueError:  # settings that only go together
            peak = least * 2
        if peak > min(least * (1 + _LEAST_SAVING), budget) or change.key == "train.grad_accumulation":
            kept.append(change)
    return tuple(kept)


def longest(subject: Subject, budget: int) -> int:
    """The longest rows that fit, a multiple of 256 tokens; 0 when none do, at most what the model knows places for."""
    most = int(getattr(subject.model_config.get_text_config(), "max_position_embeddings", 0) or 131072)
    low, high = 0, max(most // STEP_TOKENS, 1)

    def peak(steps: int) -> int:
        return count(subject, steps * STEP_TOKENS).peak

    low, at_low = 1, peak(1)
    if at_low > budget:
        return 0
    guess = min(max(high // 8, 2), 16, high)
    while low < high:
        at_guess = peak(guess)
        if at_guess <= budget:
            low, at_low, slope_from = guess, at_guess, (low, at_low)
        else:
            high, slope_from = guess - 1, (guess, at_guess)
        if low >= high:
            break
        # The peak grows almost evenly with the tokens: the next try is where the line meets the budget.
        other, at_other = slope_from
        slope = abs(at_other - at_low) / max(abs(other - low), 1)
        guess = low + int((budget - at_low) / slope) if slope else high
        guess = min(max(guess, low + 1), high, 4 * low + 4)
    return low * STEP_TOKENS
