"""What a data set turned out to be: counts by source, what was left out and why, how well the rows are filled.

Filled by `prepare`; `train` prints it at the start, `check-dataset` and the run's report build on it.
"""

import textwrap
from collections import Counter
from dataclasses import dataclass, field

from fastft.config.schema import Format
from fastft.data.dialogue import Where

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
    skipped: Counter[str] = field(default_factory=Counter)  # rows left out by on_bad_row: skip, by reason
    examples: dict[str, Where] = field(default_factory=dict)  # the first such row of each reason

    @property
    def rows(self) -> int:
        """Rows read, unreadable ones included."""
        return sum(file.rows for file in self.files)

    def skip(self, reason: str, where: Where) -> None:
        """Count an unreadable row."""
        self.skipped[reason] += 1
        self.examples.setdefault(reason, where)


@dataclass(slots=True)
class PartReport:
    """The train or the eval part after tokenising."""

    sources: list[SourceReport] = field(default_factory=list)
    documents: int = 0  # dialogues, or texts and their pieces
    rows: int = 0  # what the model gets: packed, or one document each
    tokens: int = 0
    learned_tokens: int = 0
    longest: int = 0  # tokens of the longest document before it was cut
    truncated: int = 0  # dialogues longer than max_length, cut off
    truncated_tokens: int = 0  # tokens lost by that
    split: int = 0  # texts longer than max_length, cut into pieces
    not_learned: int = 0  # documents dropped because nothing in them is learned (within max_length)

    @property
    def skipped(self) -> int:
        """Unreadable rows left out."""
        return sum(sum(source.skipped.values()) for source in self.sources)


@dataclass(slots=True)
class DataReport:
    """The whole data set."""

    max_length: int
    packing: bool
    train: PartReport
    eval: PartReport | None
    held_back: int = 0  # documents of train that became the eval part
    learns_to_stop: bool = True  # whether an end-of-turn token is learned

    @property
    def efficiency(self) -> float:
        """Part of the train rows' room (rows x max_length) that holds tokens, 0 to 1."""
        return self.train.tokens / max(self.train.rows * self.max_length, 1)

    def lines(self) -> list[str]:
        """The report as text, at most 80 signs wide (longer only where a path or a word is)."""
        lines = _part_lines("train data", self.train, self)
        if self.packing:
            lines += _wrapped(
                f"  packed rows: {self.train.rows:,} of {self.max_length:,} tokens, filled to {self.efficiency:.1%}"
            )
        if self.eval is not None:
            lines += _part_lines("eval data", self.eval, self)
            if self.held_back:
                lines.append(f"  held back from the train data: {self.held_back:,}")
        if not self.learns_to_stop:
            lines += _wrapped("  warning: the chat template ends no turn with a mark, so the model learns no stopping")
        return lines


def _part_lines(title: str, part: PartReport, report: DataReport) -> list[str]:
    lines = [f"{title}: {part.documents:,} samples"]
    for source in part.sources:
        formats = sorted({file.format + (" (recognised)" if file.chosen else "") for file in source.files})
        files = f" in {len(source.files)} files" if len(source.files) > 1 else ""
        lines += _wrapped(f"  {source.source}")
        lines += _wrapped(f"    rows: {source.rows:,}{files}, format {', '.join(formats)}")
        for file in source.empty:
            lines += _wrapped(f"    empty: {file}")
        for reason, count in source.skipped.most_common():
            lines += _wrapped(f"    rows left out: {count:,}, {reason} (first: {source.examples[reason]})")
    share = part.learned_tokens / max(part.tokens, 1)
    lines += _wrapped(
        f"  tokens: {part.tokens:,}, learned: {part.learned_tokens:,} ({share:.0%}), longest sample: {part.longest:,}"
    )
    limit = f"max_length ({report.max_length:,} tokens)"
    if part.truncated:
        lines += _wrapped(f"  samples cut off at {limit}: {part.truncated:,}, tokens lost: {part.truncated_tokens:,}")
    if part.split:
        lines += _wrapped(f"  texts split at {limit}: {part.split:,}")
    if part.not_learned:
        lines += _wrapped(f"  samples dropped because no token in them is learned: {part.not_learned:,}")
    return lines


def _wrapped(text: str) -> list[str]:
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
