"""What `check-dataset` says of a data set: everything that was counted, and where it is beyond the config's limits.

Takes the report that `prepare` filled; nothing is read here. `train` holds the same limits against the same report.
"""

from collections.abc import Iterator

from fastft.config.schema import Check, Data
from fastft.data.report import DataReport, PartReport, wrapped
from fastft.errors import DataError

# Width of the histogram's longest bar.
BAR_SIGNS = 32
# Upper ends of the histogram's classes, in tokens; the classes that hold nothing at either end are left out.
FIRST_CLASS_TOKENS = 16


def require(report: DataReport, data: Data) -> None:
    """Refuse a data set beyond the limits of `data.check`.

    Raises:
        DataError: it is; names all that is wrong, not only the first.
    """
    found = problems(report, data)
    if found:
        raise DataError(
            f"data: {'; '.join(found)}; mend the data, or the limits in data.check (`fastft check-dataset` says more)"
        )


def problems(report: DataReport, data: Data) -> list[str]:
    """What is beyond the limits, one phrase each with the number, the limit and the key."""
    part, limits = report.train, data.check
    read = part.samples + part.not_learned  # what became of readable rows; pieces of a split text count one by one
    found = [
        _least("samples to learn from", part.samples, limits.min_samples, "min_samples"),
        _share("rows cannot be read", part.skipped, part.rows_read, limits.max_bad_rows, "max_bad_rows"),
        _share("samples are cut off", part.truncated, read, limits.max_truncated, "max_truncated"),
        _share("samples have no learned token", part.not_learned, read, limits.max_not_learned, "max_not_learned"),
        _share(
            "samples repeat an earlier one", part.duplicates, part.distinct, limits.max_duplicates, "max_duplicates"
        ),
        _share("samples have a turn without answer", part.unanswered, read, limits.max_unanswered, "max_unanswered"),
        _stops(part, limits),
    ]
    if report.packing and limits.min_filled is not None and report.efficiency < limits.min_filled:
        found.append(f"packed rows are filled to {report.efficiency:.1%}; check.min_filled is {limits.min_filled:.1%}")
    if report.eval is not None:
        shared, known = report.eval.in_train, report.eval.distinct
        limit = limits.max_eval_in_train
        found.append(_share("eval samples stand in the train data too", shared, known, limit, "max_eval_in_train"))
    return [phrase for phrase in found if phrase]


def lines(report: DataReport, data: Data, batch_size: int) -> list[str]:
    """The whole report as text, at most 80 signs wide."""
    told = report.lines()
    for title, part in (("train data", report.train), ("eval data", report.eval)):
        if part is not None:
            told += [f"{title}, sample by sample:", *_counts(part, report, data)]
            if part.lengths:
                told += ["  lengths in tokens:", *_histogram(part, report.max_length)]
    told += ["an epoch:", *_epoch(report, batch_size)]
    return told


def _counts(part: PartReport, report: DataReport, data: Data) -> Iterator[str]:
    whole = max(part.documents, 1)
    counted = [
        ("rows that cannot be read", part.skipped, None),
        ("cut off at max_length", part.truncated, part.first("truncated")),
        ("all masked, dropped", part.not_learned, part.first("not_learned")),
        ("with a user's turn that nobody answers", part.unanswered, part.first("unanswered")),
    ]
    # What is held back from the train data was counted there.
    for what, count, place in (
        *(counted if part.sources else ()),
        ("repeat an earlier sample", part.duplicates, part.first_duplicate),
    ):
        first = (
            f" (first: {place[0]}, as {place[1]})"
            if isinstance(place, tuple)
            else f" (first: {place})"
            if place
            else ""
        )
        yield from wrapped(f"  {what}: {count:,}{first}")
    if part.images_lost:
        yield from wrapped(
            f"  images not whole within max_length, left out: {part.images_lost:,} (first: {part.first('images_lost')})"
        )
    if part.truncated:
        mean = part.truncated_tokens / part.truncated
        yield from wrapped(f"  tokens lost by cutting: {part.truncated_tokens:,}, {mean:,.0f} from each")
    if part is report.eval:
        yield from wrapped(f"  stand in the train data too: {part.in_train:,}")
    if report.unit == "pairs":
        yield from wrapped(
            f"  learned tokens of an answer: {part.chosen_tokens / whole:,.1f} chosen, "
            f"{part.rejected_tokens / whole:,.1f} rejected"
        )
    elif part.good or part.rejected_tokens:
        yield from wrapped(f"  answers called good: {part.good:,} of {part.documents:,}")
    yield from wrapped(f"  the end of a turn is learned in: {part.stops:,} of {part.distinct:,}")
    if part.skipped and data.on_bad_row == "error":
        yield from wrapped("  `train` stops at the first row that cannot be read (on_bad_row: error)")


def _histogram(part: PartReport, max_length: int) -> Iterator[str]:
    lengths = sorted(part.lengths.items())
    total = sum(count for _, count in lengths)
    ends = [FIRST_CLASS_TOKENS]
    while ends[-1] < lengths[-1][0]:
        ends.append(2 * ends[-1])
    if max_length < ends[-1]:
        ends = sorted({*ends, max_length})
    classes = []
    low = 1
    for end in ends:
        classes.append((low, end, sum(count for length, count in lengths if low <= length <= end)))
        low = end + 1
    while classes and not classes[0][2]:
        classes.pop(0)
    most = max(count for _, _, count in classes)
    width = len(f"{ends[-1]:,}")
    for start, end, count in classes:
        bar = "#" * round(BAR_SIGNS * count / most) if count else ""
        over = "  cut off" if start > max_length and count else ""
        yield f"    {start:>{width},} - {end:>{width},}  {count:>9,}  {bar}{over}".rstrip()
    marks = ", ".join(f"{name} {_quantile(lengths, total, share):,}" for name, share in QUANTILES)
    yield from wrapped(f"    {marks}, longest {lengths[-1][0]:,}")


QUANTILES = (("half have at most", 0.5), ("nine of ten", 0.9), ("99 of 100", 0.99))


def _quantile(lengths: list[tuple[int, int]], total: int, share: float) -> int:
    """The smallest length that at least this share of the samples does not exceed."""
    seen = 0
    for length, count in lengths:
        seen += count
        if seen >= share * total:
            return length
    return lengths[-1][0]


def _epoch(report: DataReport, batch_size: int) -> Iterator[str]:
    part = report.train
    yield from wrapped(f"  tokens: {part.tokens:,}, learned: {part.learned_tokens:,}")
    filled = part.tokens / max(part.padded_tokens, 1)
    batches = f"batches of {batch_size}, " if batch_size > 1 else ""
    rows = part.documents * (2 if report.unit == "pairs" else 1)
    yield from wrapped(
        f"  without packing: {rows:,} rows, {batches}{part.padded_tokens:,} tokens with padding, filled to {filled:.1%}"
    )
    if report.packing:
        yield from wrapped(
            f"  with packing: {part.rows:,} rows of {report.max_length:,}, {part.rows * report.max_length:,} tokens with "
            f"padding, filled to {report.efficiency:.1%}"
        )


def _least(what: str, count: int, limit: int | None, key: str) -> str:
    return f"{count:,} {what}; check.{key} is {limit:,}" if limit is not None and count < limit else ""


def _share(what: str, count: int, of: int, limit: float | None, key: str) -> str:
    if limit is None or count <= limit * of:
        return ""
    return f"{count:,} of {of:,} {what} ({count / max(of, 1):.1%}); check.{key} is {limit:.1%}"


def _stops(part: PartReport, limits: Check) -> str:
    if limits.min_stops is None or part.stops >= limits.min_stops * part.distinct:
        return ""
    return (
        f"the end of a turn is learned in {part.stops:,} of {part.distinct:,} samples; check.min_stops is "
        f"{limits.min_stops:.1%}"
    )
