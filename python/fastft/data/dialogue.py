"""What a row of a data set means: a dialogue to answer in, a text to continue, two answers to choose between.

Made by `formats` from the rows of `sources`; consumed by `template`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
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


# Stands in a turn's text for an image; a character for private use, which no template touches or strips.
IMAGE_MARK = "\ue0f3"


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image that a row names; its pixels are read when they are needed, by `images`."""

    path: str | None  # the file, or None
    content: bytes | None = field(repr=False)  # the image file's bytes, where the row holds them
    name: str  # as the row calls it
    stored: tuple[int, int] | None = None  # where these bytes went: offset and length in a `spool`
    digest: str = ""  # of the bytes


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image and its tokens."""

    ref: ImageRef
    start: int  # its first token
    length: int  # tokens, the model's marks around the image included
    size: tuple[int, int]  # width and height of the picture, in pixels


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue."""

    role: Role
    content: str
    learn: bool = False  # whether the loss counts this turn; only the assistant's turns can be learned
    tool_calls: tuple[Mapping[str, Any], ...] = ()  # OpenAI style: {"type": "function", "function": {name, arguments}}
    tool_call_id: str | None = None  # which call a tool's answer belongs to
    images: tuple[ImageRef, ...] = ()  # one for each IMAGE_MARK in the content, in order


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns in order; the last is the assistant's."""

    messages: tuple[Message, ...]
    where: Where
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas of the tools the assistant may call

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """The images of all turns, in order."""
        return tuple(image for message in self.messages for image in message.images)


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
