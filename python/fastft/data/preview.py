"""Samples as a person reads them: the text with its learned tokens in place, the ids, the labels.

Used by `log-dataset` and at the start of a run. Colour where there is a terminal, `[[ ]]` around what is learned
elsewhere, so that it can be read in a file.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from fastft import console
from fastft.config.schema import Task
from fastft.data.dialogue import PlacedImage
from fastft.data.formats import PAIR_TASKS
from fastft.data.samples import GOOD, NOT_LEARNED, Sample, Samples

if TYPE_CHECKING:
    from rich.text import Text

Show = Literal["text", "masked_text", "input_ids", "labels", "all"]
LEARNED_STYLE = "bold green"
OTHER_STYLE = "dim"
OPEN_MARK, CLOSE_MARK = "[[", "]]"
# What is shown of the first sample at the start of a run.
OPENING_CHARACTERS = 800
# Between two documents of a packed row.
DOCUMENT_BORDER = "\n--- next document of this row ---\n"


def view(samples: Samples, index: int, tokenizer: Any, what: Show, *, colour: bool) -> "Text":
    """One sample with a line that says where it came from.

    Args:
        samples: the train or eval part.
        index: 0 to len(samples) - 1.
        tokenizer: decodes the ids.
        what: what to print; `all` is everything one after the other.
        colour: mark learned tokens by colour instead of by `[[ ]]`.
    """
    from rich.text import Text

    sample = samples[index]
    views = {
        "text": Text(plain(sample, tokenizer, "text")),
        "masked_text": masked_text(sample, tokenizer, colour=colour),
        "input_ids": Text(plain(sample, tokenizer, "input_ids")),
        "labels": Text(plain(sample, tokenizer, "labels")),
    }
    parts = [Text(header(samples, index), style="bold" if colour else "")]
    if what == "all":
        for name, shown in views.items():
            parts += [Text(f"{name}:"), shown]
    else:
        parts.append(views[what])
    return Text("\n").join(parts)


def view_of(task: Task, samples: Samples, index: int, tokenizer: Any, what: Show, *, colour: bool) -> "Text":
    """One sample as `view` shows it; of a preference task both answers of a pair, or the answer and its label."""
    from rich.text import Text

    style = "bold" if colour else ""
    if task in PAIR_TASKS:
        parts = []
        for name, place in (("chosen", 2 * index), ("rejected", 2 * index + 1)):
            parts += [Text(f"pair {index}, {name}:", style), view(samples, place, tokenizer, what, colour=colour)]
        return Text("\n").join(parts)
    shown = view(samples, index, tokenizer, what, colour=colour)
    if task != "kto":
        return shown
    good = samples.collection.kinds[samples.numbers(index)[0]] == GOOD
    return Text("\n").join([Text("called good:" if good else "called bad:", style), shown])


def header(samples: Samples, index: int) -> str:
    """Number, origin, tokens and learned tokens of a sample, in one line."""
    places = samples.places(index)
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    sample = samples[index]
    labels, images = sample["labels"], sample.get("images", [])
    learned = sum(label != NOT_LEARNED for label in labels)
    shown = f", {sum(i.length for i in images)} of {count_images(len(images))}" if images else ""
    return f"sample {index}, from {places[0]}{more}: {len(labels)} tokens, {learned} learned{shown}"


def count_images(count: int) -> str:
    """`1 image`, `3 images`."""
    return f"{count:,} image{'' if count == 1 else 's'}"


def plain(sample: Sample, tokenizer: Any, what: Literal["text", "input_ids", "labels"]) -> str:
    """The whole text, the ids, or the labels (-100 is not learned) of a sample."""
    if what == "text":
        return "".join(text for text, _ in pieces(sample, tokenizer))
    return str(sample["input_ids"] if what == "input_ids" else sample["labels"])


def masked_text(sample: Sample, tokenizer: Any, *, colour: bool = True) -> "Text":
    """The text of a sample with what is learned in colour, or between `[[` and `]]`."""
    from rich.text import Text

    shown = Text()
    for text, learned in pieces(sample, tokenizer):
        if colour:
            shown.append(text, LEARNED_STYLE if learned else OTHER_STYLE)
        else:
            shown.append(f"{OPEN_MARK}{text}{CLOSE_MARK}" if learned else text)
    return shown


def opening(sample: Sample, tokenizer: Any, *, colour: bool = True) -> "Text":
    """The start of `masked_text`: the first document of a packed row, cut off after `OPENING_CHARACTERS`."""
    positions = sample["position_ids"]
    end = next((place for place in range(1, len(positions)) if positions[place] == 0), len(positions))
    first: Sample = {
        "input_ids": sample["input_ids"][:end],
        "labels": sample["labels"][:end],
        "position_ids": positions[:end],
        "images": [image for image in sample.get("images", ()) if image.start < end],
    }
    shown = masked_text(first, tokenizer, colour=colour)
    if len(shown) <= OPENING_CHARACTERS:
        return shown
    return shown[:OPENING_CHARACTERS].append(" ...")


def pieces(sample: Sample, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Stretches of a sample's text, and whether they are learned; joined they are the text.

    The tokens of an image are one stretch: `<image x576: cat.png 640x480>`. Control characters are shown as escapes: a data set may hold codes for the terminal.
    """
    ids, labels, positions = sample["input_ids"], sample["labels"], sample["position_ids"]
    images = {image.start: image for image in sample.get("images", ())}
    borders = images.keys() | {image.start + image.length for image in images.values()}
    document = start = 0
    for place in range(1, len(ids) + 1):
        ends_document = place == len(ids) or positions[place] == 0
        same = not ends_document and (labels[place] == NOT_LEARNED) == (labels[start] == NOT_LEARNED)
        if same and place not in borders:
            continue
        # Decoded from the start of the document: tokenizers treat the first token of what they decode differently.
        before, text = _decode(tokenizer, ids[document:start]), _decode(tokenizer, ids[document:place])
        shown = text[len(before) :] if start not in images else image_label(images[start])
        yield console.printable(shown), labels[start] != NOT_LEARNED
        start = place
        if ends_document and place < len(ids):
            yield DOCUMENT_BORDER, False
            document = place


def image_label(image: PlacedImage) -> str:
    """What is shown in place of an image's tokens."""
    width, height = image.size
    return f"<image x{image.length}: {image.ref.name} {width}x{height}>"


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""
