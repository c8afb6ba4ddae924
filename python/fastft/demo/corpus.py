"""The text that the demo base reads: stories, notes and village talks, mixed.

`documents` is a pure function of its seed. `cached_text` writes the data set `demo/text` into the user's cache the first
time it is asked for: 17 MB of text need not travel in the package when a few small files make it in two seconds.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fastft import console, publish
from fastft.demo import notes, stories, village
from fastft.demo.words import Dice
from fastft.errors import BusyError

NUM_DOCUMENTS = 60_000
SEED = 1
# Room for the text: what 60,000 documents take, and a little.
_TEXT_BYTES = 20_000_000
_WAIT_S = 0.3


def plain_story(dice: Dice) -> str:
    """A story about a chosen hero."""
    return stories.story(dice, stories.hero(dice))


def story_with_heading(dice: Dice) -> str:
    """A story under a heading that names the hero."""
    about = stories.hero(dice)
    heading = dice.pick(("The story of {}", "{}", "A story about {}", "{} and the others"))
    return f"{heading.format(about.name)}\n{stories.story(dice, about)}"


def village_talk(dice: Dice) -> str:
    """A dialogue with its chat marks."""
    return village.chat_marks(village.talk(dice))


# Kinds of documents with their shares in percent.
SHARES: dict[Callable[[Dice], str], int] = {
    plain_story: 40,
    story_with_heading: 10,
    village_talk: 15,
    notes.sums: 7,
    notes.colours: 5,
    notes.opposites: 4,
    notes.letters: 3,
    notes.copies: 16,
}


def documents(count: int = NUM_DOCUMENTS, seed: int = SEED) -> Iterator[str]:
    """`count` documents of plain ASCII text; the same for the same seed in every Python version."""
    dice = Dice(seed)
    for _ in range(count):
        yield document(dice)


def document(dice: Dice) -> str:
    """One document of a kind chosen by `SHARES`."""
    left = dice.below(sum(SHARES.values()))
    for write_one, share in SHARES.items():
        if left < share:
            return write_one(dice)
        left -= share
    raise AssertionError("dice.below(total) is below the total")


def cached_text() -> Path:
    """The file with all documents as jsonl rows {"text": ...}, made now if this version of it is not in the cache.

    The folder is $XDG_CACHE_HOME/fastft, or ~/.cache/fastft. The name holds a hash of the code that makes the text, so a
    changed generator makes a new file.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastft"
    path = folder / f"demo-text-{_version()}.jsonl"
    while not path.exists():
        console.note(f"writing the demo's text into {path}")
        try:
            write(path, NUM_DOCUMENTS)
        except BusyError:  # another process of the same training makes it
            time.sleep(_WAIT_S)
    return path


def write(path: Path, count: int) -> None:
    """Write `count` documents as jsonl; the file appears whole or not at all.

    Raises:
        FileError: the disk refuses, or (BusyError) another process writes the file.
    """
    num_bytes = _TEXT_BYTES * count // NUM_DOCUMENTS
    with publish.staged_file(path, num_bytes=num_bytes) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in documents(count))


def _version() -> str:
    """A short hash of the modules that decide what the text is."""
    hashed = hashlib.sha256(f"{NUM_DOCUMENTS} {SEED}".encode())
    for name in ("corpus", "notes", "stories", "village", "words"):
        hashed.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return hashed.hexdigest()[:12]
