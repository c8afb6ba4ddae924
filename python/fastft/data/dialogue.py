"""What a row of a data set means: a dialogue to answer in, a text to continue, two answers to choose between.

Made by `formats` from the rows of `sources`; consumed by `template`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Where:
    """The place a row came from, for error messages and previews."""

    file: str
    number: int  # counted from 1, in `unit`
    unit: Literal["line", "row"] = "row"

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.unit == "line" else f"{self.file}, row {self.number}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue."""

    role: Role
    content: str
    learn: bool = False  # whether the loss counts this turn; only the assistant's turns can be learned
    tool_calls: tuple[Mapping[str, Any], ...] = ()  # OpenAI style: {"type": "function", "function": {name, arguments}}
    tool_call_id: str | None = None  # which call a tool's answer belongs to


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns in order; the last is the assistant's."""

    messages: tuple[Message, ...]
    where: Where
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas of the tools the assistant may call


@dataclass(frozen=True, slots=True)
class Text:
    """A document to learn whole (task pretrain)."""

    text: str
    where: Where


@dataclass(frozen=True, slots=True)
class Pair:
    """Two ways to go on with one dialogue, the better and the worse (tasks dpo, orpo, reward).

    Both hold the whole dialogue; the turns up to where they part are equal and not learned.
    """

    chosen: Dialogue
    rejected: Dialogue
    where: Where


@dataclass(frozen=True, slots=True)
class Judged:
    """A dialogue whose last answer somebody called good or bad (task kto)."""

    dialogue: Dialogue
    good: bool
    where: Where
