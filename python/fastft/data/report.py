"""What a data set turned out to be: counts by source, what was left out and why, how well the rows are filled.

Filled by `prepare`; `train` prints `lines()` at the start, `check` says more and holds it against the config's limits.
A source's part is kept with its tokens in the cache, as JSON.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from fastft.config.schema import Format
from fastft.data.dialogue import PlacedImage, Where

# Width of a terminal that nobody has widened.
LINE_WIDTH = 80


@dataclass(slots=True)
class FileReport:
    """One file, or one hub data set."""

    file: str
    format: Format
    chosen: bool  # by `auto`, not by the config
    rows: int = 0


@dataclass(slots=True)
class SourceReport:
    """One source of the config."""

    source: str
    files: list[FileReport] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)  # files without a row
    skipped: Counter[str] = field(default_factory=Counter)  # unreadable rows, by reason
    examples: dict[str, Where] = field(default_factory=dict)  # the first such row of each reason
    first_skipped: str | None = None  # reason of the first one of all
    lengths: Counter[int] = field(default_factory=Counter)  # samples by their tokens before they were cut
    truncated: int = 0  # dialogues longer than max_length, cut off
    truncated_tokens: int = 0  # tokens lost by that
    split: int = 0  # texts longer than max_length, cut into pieces
    not_learned: int = 0  # samples dropped because nothing in them is learned (within max_length)
    unanswered: int = 0  # dialogues with a user's turn that is not followed by an answer
    first: dict[str, Where] = field(default_factory=dict)  # the first one counted in a field above, by its name
    images: int = 0  # in the rows that were read
    image_tokens: int = 0
    image_sizes: Counter[str] = field(default_factory=Counter)  # images by "width x height"
    images_lost: int = 0  # that max_length would have cut through, or that lay behind it
    notes: list[str] = field(default_factory=list)  # what the chat template made necessary
    samples: int = 0  # what is left to learn from
    used: int = 0  # samples in an epoch, after weighting and holding back
    weight: float = 1.0
    from_cache: bool = False

    @property
    def rows(self) -> int:
        """Rows read, unreadable ones included."""
        return sum(file.rows for file in self.files)

    def skip(self, reason: str, where: Where) -> None:
        """Count an unreadable row."""
        self.skipped[reason] += 1
        self.examples.setdefault(reason, where)
        if self.first_skipped is None:
            self.first_skipped = reason

    def count_images(self, images: Iterable[PlacedImage]) -> None:
        """Count the images of a sample."""
        for image in images:
            self.images += 1
            self.image_tokens += image.length
            self.image_sizes["{} x {}".format(*image.size)] += 1

    def images_line(self) -> str:
        """How many images there are, how large, and how many tokens they take."""
        sizes = sorted(self.image_sizes, key=_area)
        spread = sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        mean = self.image_tokens / self.images
        each = f"{mean:,.0f} each" if len(sizes) == 1 else f"{mean:,.0f} each on average"
        return f"images: {self.images:,} ({spread} pixels), tokens: {self.image_tokens:,}, {each}"

    def as_json(self) -> dict[str, Any]:
        """All fields in types that JSON has."""
        # asdict makes a Counter of the pairs of a Counter; and JSON turns numbers that are keys into text.
        counters = {
            "skipped": dict(self.skipped),
            "lengths": sorted(self.lengths.items()),
            "image_sizes": dict(self.image_sizes),
        }
        return {**asdict(replace(self, skipped=Counter(), lengths=Counter(), image_sizes=Counter())), **counters}

    @classmethod
    def of_json(cls, plain: Mapping[str, Any]) -> Self:
        """The report that `as_json` wrote.

        Raises:
            TypeError, ValueError, KeyError: it did not.
        """
        values = dict(plain)
        values["files"] = [FileReport(**file) for file in values["files"]]
        values["skipped"] = Counter(values["skipped"])
        values["image_sizes"] = Counter(values["image_sizes"])
        values["lengths"] = Counter({int(length): int(count) for length, count in values["lengths"]})
        for name in ("examples", "first"):
            values[name] = {reason: Where(**where) for reason, where in values[name].items()}
        return cls(**values)


@dataclass(slots=True)
class PartReport:
    """The train or the eval part after tokenising."""

    sources: list[SourceReport] = field(default_factory=list)
    documents: int = 0  # dialogues, or texts and their pieces; pairs, for tasks that compare two answers
    rows: int = 0  # what the model gets: packed, or one document each
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0  # tokens of the longest document before it was cut
    distinct: int = 0  # of `documents` those that differ by their place: a weight above 1 repeats some
    duplicates: int = 0  # of these, samples whose tokens are those of an earlier one
    first_duplicate: tuple[Where, Where] | None = None  # it, and the earlier one
    in_train: int = 0  # of the eval part: samples that also stand in the train part
    stops: int = 0  # of `distinct`, samples in which a token that ends an answer is learned
    padded_tokens: int = 0  # tokens of an epoch without packing, each batch padded to its longest row
    chosen_tokens: int = 0  # learned tokens of the better answers (pairs), of the good ones (kto)
    rejected_tokens: int = 0  # of the worse ones
    good: int = 0  # answers called good (kto)

    @property
    def skipped(self) -> int:
        """Unreadable rows left out."""
        return sum(sum(source.skipped.values()) for source in self.sources)

    @property
    def rows_read(self) -> int:
        """Rows of all sources."""
        return sum(source.rows for source in self.sources)

    @property
    def truncated(self) -> int:
        """Dialogues longer than max_length, cut off."""
        return sum(source.truncated for source in self.sources)

    @property
    def truncated_tokens(self) -> int:
        """Tokens lost by that."""
        return sum(source.truncated_tokens for source in self.sources)

    @property
    def images_lost(self) -> int:
        """Images that max_length leaves out."""
        return sum(source.images_lost for source in self.sources)

    @property
    def split(self) -> int:
        """Texts longer than max_length, cut into pieces."""
        return sum(source.split for source in self.sources)

    @property
    def not_learned(self) -> int:
        """Samples dropped because nothing in them is learned."""
        return sum(source.not_learned for source in self.sources)

    @property
    def unanswered(self) -> int:
        """Dialogues with a user's turn that is not followed by an answer."""
        return sum(source.unanswered for source in self.sources)

    @property
    def samples(self) -> int:
        """Samples left, before weighting."""
        return sum(source.samples for source in self.sources)

    @property
    def lengths(self) -> Counter[int]:
        """Samples of all sources by their tokens before they were cut."""
        total: Counter[int] = Counter()
        for source in self.sources:
            total.update(source.lengths)
        return total

    def first(self, counted: str) -> Where | None:
        """The first sample that a field of `SourceReport` counts."""
        return next((source.first[counted] for source in self.sources if counted in source.first), None)


@dataclass(slots=True)
class DataReport:
    """The whole data set."""

    max_length: int
    packing: bool
    train: PartReport
    eval: PartReport | None
    held_back: int = 0  # documents of train that became the eval part
    learns_to_stop: bool = True  # whether an end-of-turn token is learned
    unit: str = "samples"  # what is counted: samples, pairs

    @property
    def efficiency(self) -> float:
        """Part of the train rows' room (rows x max_length) that holds tokens, 0 to 1."""
        return self.train.tokens / max(self.train.rows * self.max_length, 1)

    def lines(self) -> list[str]:
        """The report as text, at most 80 signs wide (longer only where a path or a word is)."""
        lines = _part_lines("train data", self.train, self)
        if self.packing:
            lines += wrapped(
                f"  packed rows: {self.train.rows:,} of {self.max_length:,} tokens, filled to {self.efficiency:.1%}"
            )
        if self.eval is not None:
            lines += _part_lines("eval data", self.eval, self)
            if self.held_back:
                lines.append(f"  held back from the train data: {self.held_back:,}")
        if not self.learns_to_stop:
            lines += wrapped("  warning: the chat template ends no turn with a mark, so the model learns no stopping")
        return lines


def _area(size: str) -> int:
    width, height = size.split(" x ")
    return int(width) * int(height)


def _part_lines(title: str, part: PartReport, report: DataReport) -> list[str]:
    lines = [f"{title}: {part.documents:,} {report.unit}"]
    for source in part.sources:
        formats = sorted({file.format + (" (recognised)" if file.chosen else "") for file in source.files})
        files = f" in {len(source.files)} files" if len(source.files) > 1 else ""
        cached = ", tokens from the cache" if source.from_cache else ""
        lines += wrapped(f"  {source.source}")
        lines += wrapped(f"    rows: {source.rows:,}{files}, format {', '.join(formats)}{cached}")
        for file in source.empty:
            lines += wrapped(f"    empty: {file}")
        for reason, count in source.skipped.most_common():
            lines += wrapped(f"    rows left out: {count:,}, {reason} (first: {source.examples[reason]})")
        if source.weight != 1.0:
            lines += wrapped(f"    weight {source.weight:g}: {source.used:,} from {source.samples:,} {report.unit}")
        if source.images:
            lines += wrapped(f"    {source.images_line()}")
        for note in source.notes:
            lines += wrapped(f"    {note}")
    share = part.learned_tokens / max(part.tokens, 1)
    lines += wrapped(
        f"  tokens: {part.tokens:,}, learned: {part.learned_tokens:,} ({share:.0%}), longest sample: {part.longest:,}"
    )
    limit = f"max_length ({report.max_length:,} tokens)"
    if part.truncated:
        lines += wrapped(f"  samples cut off at {limit}: {part.truncated:,}, tokens lost: {part.truncated_tokens:,}")
    if part.images_lost:
        lines += wrapped(
            f"  images left out with what follows them, not whole within {limit}: {part.images_lost:,} (first: "
            f"{part.first('images_lost')})"
        )
    if part.split:
        lines += wrapped(f"  texts split at {limit}: {part.split:,}")
    if part.not_learned:
        lines += wrapped(f"  samples dropped because no token in them is learned: {part.not_learned:,}")
    return lines


def wrapped(text: str) -> list[str]:
    """The text in lines of at most 80 signs, those after the first indented by two more."""
    # The indent is given apart: textwrap drops white space before a word that is too long for the line.
    indent = " " * (len(text) - len(text.lstrip()))
    return textwrap.wrap(
        text.lstrip(),
        LINE_WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
