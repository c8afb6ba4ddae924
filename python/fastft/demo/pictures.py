"""The pictures of `fastft train demo_vision`; `python -m fastft.demo.pictures FOLDER` draws them anywhere.

Four colours and three shapes make a dozen pictures; rows.jsonl asks two things about each. What belongs to a picture
(where the shape lies, how large it is) is drawn by its own dice, so the files are the same each time.
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fastft.demo.words import Dice

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 64  # pixels
COLOURS = {"red": (214, 40, 40), "green": (42, 157, 70), "blue": (38, 84, 204), "black": (30, 30, 34)}
SHAPES = ("circle", "square", "triangle")
QUESTIONS = ("What is in the picture?", "What do you see?")
ROWS = "vision.jsonl"
FOLDER = "pictures"
SEED = 4


def names() -> list[tuple[str, str]]:
    """Colour and shape of each picture."""
    return [(colour, shape) for colour in COLOURS for shape in SHAPES]


def answer(colour: str, shape: str) -> str:
    """What is to be said of a picture."""
    return f"A {colour} {shape}."


def draw(colour: str, shape: str) -> "Image":
    """Draw one picture, 64 x 64 pixels in RGB, before a pale ground."""
    from PIL import Image, ImageDraw

    dice = Dice(SEED + names().index((colour, shape)))
    picture = Image.new("RGB", (SIDE, SIDE), (244, 241, 234))
    size = 30 + dice.below(13)
    left, top = 4 + dice.below(SIDE - size - 8), 4 + dice.below(SIDE - size - 8)
    right, bottom = left + size, top + size
    pen, fill = ImageDraw.Draw(picture), COLOURS[colour]
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=fill)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill=fill)
    else:
        pen.polygon(((left + size // 2, top), (right, bottom), (left, bottom)), fill=fill)
    return picture


def rows() -> list[dict[str, object]]:
    """Make the rows in LLaVA's form: an image, and a dialogue about it."""
    return [
        {
            "image": f"{FOLDER}/{colour}_{shape}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer(colour, shape)},
            ],
        }
        for colour, shape in names()
        for question in QUESTIONS
    ]


def write(folder: Path) -> None:
    """Write the pictures and the rows into `folder`."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for colour, shape in names():
        draw(colour, shape).save(folder / FOLDER / f"{colour}_{shape}.png", optimize=True)
    lines = [json.dumps(row) + "\n" for row in rows()]
    (folder / ROWS).write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(prog="python -m fastft.demo.pictures", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the pictures go; made if it is not there")
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
