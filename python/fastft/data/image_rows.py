"""Where the images of a row belong in its turns: `<image>` in texts, image parts of messages, a column beside them.

`formats` reads the turns and asks this module for images; what comes out are turns whose text holds an IMAGE_MARK for each
image. A row without images passes through untouched, so texts and images may be mixed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastft.data import images
from fastft.data.dialogue import IMAGE_MARK, Dialogue, ImageRef, Message, Where

# How texts mark the place of an image: LLaVA, sharegpt and ms-swift; XTuner 1.
TEXT_MARK = re.compile(r"<image>|<IMG_CONTEXT>")
# ms-swift's older rows name the image inside the text.
TEXT_PATH = re.compile(r"<img>(.*?)</img>", re.DOTALL)
IMAGE_COLUMNS = ("image", "images")


@dataclass(slots=True)
class RowImages:
    """The images of one row while its turns are read.

    Args:
        folder: where relative paths start.
        where: the row.
        beside: images of the row's own column, in order.
    """

    folder: images.Folder
    where: Where
    beside: list[ImageRef] = field(default_factory=list)

    def of_column(self, row: Mapping[str, Any]) -> None:
        """Take what stands in the column `image` or `images`: one, or a list."""
        for column in IMAGE_COLUMNS:
            value = row.get(column)
            if value is None or value in ("", [], {}):
                continue
            for one in value if isinstance(value, list | tuple) else [value]:
                self.beside.append(images.reference(one, self.folder, self.where))

    def part(self, value: Any) -> ImageRef:
        """An image part of a message."""
        return images.reference(value, self.folder, self.where)

    def placed(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue with every image in its place.

        Raises:
            images.BadImageError: as many marks as images are not there.
        """
        waiting = list(self.beside)
        loose = not any(TEXT_MARK.search(message.content) for message in dialogue.messages) and bool(waiting)
        turns: list[Message] = []
        marks = 0
        for message in dialogue.messages:
            placed, taken = self._turn(message, waiting)
            marks += taken
            if placed.role == "assistant" and placed.images:
                raise images.BadImageError("an image stands in a turn of the assistant; models that see do not draw")
            turns.append(placed)
        if marks > len(self.beside):
            raise images.BadImageError(f"the texts have {marks} image marks, the row has {len(self.beside)} images")
        if waiting and not loose:
            raise images.BadImageError(f"the texts have {marks} image marks, the row has {len(self.beside)} images")
        if waiting:
            # No text says where they belong: before the first question, as the field does it.
            first = next((index for index, turn in enumerate(turns) if turn.role == "user"), None)
            if first is None:
                raise images.BadImageError("the row has images and no turn of the user to show them in")
            turn = turns[first]
            turns[first] = replace(
                turn, content=IMAGE_MARK * len(waiting) + turn.content, images=(*waiting, *turn.images)
            )
        return replace(dialogue, messages=tuple(turns))

    def _turn(self, message: Message, waiting: list[ImageRef]) -> tuple[Message, int]:
        """A turn with its images, and how many marks took an image of the row's column."""
        text, found = message.content, list(message.images)
        own = text.count(IMAGE_MARK)
        if own != len(found):
            raise images.BadImageError("a text holds the private character U+E0F3, which fastft needs for itself")
        marks = len(TEXT_MARK.findall(text))
        if own and marks:
            # XTuner 1: the parts come first, and the text beside them says where each belongs.
            if own != marks:
                raise images.BadImageError(f"a turn has {own} image parts and {marks} image marks in its text")
            return replace(message, content=_marked(text.replace(IMAGE_MARK, ""))), 0
        if marks:
            found = waiting[:marks]
            del waiting[:marks]
            text = _marked(text)
        paths = TEXT_PATH.findall(text)
        if paths:
            if own or marks:
                raise images.BadImageError("a turn names images in two ways, <img> and <image> or a part")
            found = [self.part(path) for path in paths]
            text = TEXT_PATH.sub(IMAGE_MARK, text)
        return replace(message, content=text, images=tuple(found)), marks


def _marked(text: str) -> str:
    r"""A text with IMAGE_MARK for each image.

    The line break between a mark and the text belongs to the mark (LLaVA writes `<image>\n`): models have their own
    separator, in their chat template, and chat shows an image without one too.
    """
    text = re.sub(r"(?:<image>|<IMG_CONTEXT>)\n?", IMAGE_MARK, text)
    return re.sub(rf"\n(?={IMAGE_MARK}+\Z)", "", text)


def folder_of(setting: str | None, file: str) -> images.Folder:
    """Where the paths of a source start: its `images`, else the folder of the data file."""
    if setting is not None:
        return images.Folder(Path(setting).expanduser(), configured=True)
    place = Path(file)
    return images.Folder(place.parent if place.is_file() else Path(), configured=False)
