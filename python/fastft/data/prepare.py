"""The data section of a config becomes samples to train on and a report about them.

The order of things: `hub.locate` finds a source, `sources` reads rows, `formats` makes dialogues, `template` makes
tokens (in batches: the tokenizer runs on all cores), long ones are cut, `store` collects them (`cache` keeps them for
the next run), `mixing` and `packing` say which documents stand in which row.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np

from fastft import console
from fastft.config.schema import Data, Format, Source, Task
from fastft.data import byte_level, cache, formats, image_rows, sources
from fastft.data.dialogue import Dialogue, Judged, Pair, Text, Where
from fastft.data.formats import BadRowError, Item
from fastft.data.images import BadImageError
from fastft.data.mixing import repeated
from fastft.data.packing import pack, pieces
from fastft.data.report import DataReport, FileReport, PartReport, SourceReport
from fastft.data.samples import (
    BAD,
    CHOSEN,
    GOOD,
    PLAIN,
    REJECTED,
    Collection,
    Documents,
    Mask,
    Numbers,
    Pairs,
    Samples,
)
from fastft.data.store import Store, digest
from fastft.data.template import ChatTemplate, Encoded, ShownImage, Span
from fastft.data.vision import Seer
from fastft.errors import DataError

# Rows by which `auto` recognises a format, and which are tried before anything else is read.
ROWS_TO_RECOGNISE = 20
# Rows tokenised in one call: enough to keep all cores busy, few enough for the memory to stay flat.
BATCH_ROWS = 512
# Fewer rows where these are long.
BATCH_CHARACTERS = 2_000_000
# Rows of a batch from which on the tokenizer's fast road is worth being made.
FEWEST_FAST_ROWS = 256
# Files of a source whose first rows are tried before anything else is read.
FILES_TO_TRY = 100
# An odd number whose multiples spread over 64 bits (2**64 divided by the golden ratio), to join two digests.
MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Samples to learn from and to measure on."""

    train: Samples
    eval: Samples | None
    report: DataReport
    chat_template: str | None  # the template's text, to be saved with the model; None if no dialogue was rendered

    def pairs(self) -> Pairs:
        """The train part of a task that compares two answers."""
        return Pairs(self.train)


def prepare(
    data: Data,
    task: Task,
    tokenizer: Any,
    seed: int,
    *,
    chat_template: str | None = None,
    batch_size: int = 1,
    keep_going: bool = False,
    seer: Seer | None = None,
) -> Prepared:
    """Read, tokenise, cut and pack a data set.

    Args:
        data: the config's section.
        task: `sft` learns the assistant's turns; `pretrain` every token of texts (a dialogue is rendered by the chat
            template, and learned whole); dpo, orpo, reward and kto the answers that are compared.
        tokenizer: a fast tokenizer of transformers.
        seed: chooses the rows held back by `eval_rows`, what a weight takes, and the order of packed rows.
        chat_template: text of a template for a tokenizer without one.
        batch_size: rows of a step, only to tell how much padding there would be without packing.
        keep_going: leave out unreadable rows even with on_bad_row: error, and let a part be empty (`check-dataset`).
        seer: what a vision-language model makes of images; None: rows with images are refused.

    Raises:
        DataError: unreadable rows (with on_bad_row: error), an unclear format, no template, or nothing left to learn.
        FileError, HubError: a source is not there.
    """
    encoder = Encoder(task, tokenizer, chat_template, data, skip=keep_going or data.on_bad_row == "skip", seer=seer)
    encoder.skip_images = encoder.skip_images or keep_going
    located = {source: _locate(source) for source in (*data.train, *data.eval)}
    for source, place in located.items():
        _try(source, place, encoder)
    part = PartReport()
    documents = _collected(data.train, located, encoder, part)
    held_back: Collection | None = None
    eval_part: PartReport | None = None
    if data.eval:
        eval_part = PartReport()
        held_back = _collected(data.eval, located, encoder, eval_part)
        if not keep_going:
            _refuse_empty(held_back, eval_part, "eval")
    if not keep_going:
        _refuse_empty(documents, part, "train")
    per_unit = 2 if task in formats.PAIR_TASKS else 1
    units = np.arange(len(documents) // per_unit, dtype=np.int64)
    num_held_back = 0
    if data.eval_rows and not data.eval:
        if data.eval_rows >= len(units) and not keep_going:
            raise DataError(f"data: eval_rows is {data.eval_rows}, but there are only {len(units)} samples in all")
        num_held_back = min(data.eval_rows, len(units))
        order = np.random.default_rng(seed).permutation(len(units))
        eval_units, units = np.sort(order[:num_held_back]), np.sort(order[num_held_back:])
    mixed = _weighted(units, documents, data.train, part, per_unit=per_unit, seed=seed)
    packing = data.packing and task in ("pretrain", "sft") and (seer is None or seer.packs)
    train = _rows(documents, mixed, data, per_unit=per_unit, seed=seed, packing=packing)
    evaluation = None
    if held_back is not None:
        every = np.arange(len(held_back) // per_unit, dtype=np.int64)
        evaluation = _rows(held_back, every, data, per_unit=per_unit, seed=seed, packing=packing)
    elif num_held_back:
        evaluation = _rows(documents, eval_units, data, per_unit=per_unit, seed=seed, packing=packing)
        eval_part = PartReport(longest=int(documents.lengths[evaluation.order].max()))
    stops = encoder.stop_token_ids()
    _count(part, train, stops, per_unit=per_unit, batch_size=batch_size, seed=seed)
    if eval_part is not None and evaluation is not None:
        _count(eval_part, evaluation, stops, per_unit=per_unit, batch_size=batch_size, seed=seed)
        measured, learned = (_unit_digests(side, per_unit)[1] for side in (evaluation, train))
        eval_part.in_train = int(np.isin(measured, learned).sum())
    report = DataReport(
        max_length=data.max_length,
        packing=packing,
        train=part,
        eval=eval_part,
        held_back=num_held_back,
        learns_to_stop=task == "pretrain" or encoder.template is None or encoder.template.learns_to_stop,
        unit="pairs" if per_unit == 2 else "samples",
    )
    return Prepared(train, evaluation, report, None if encoder.template is None else encoder.template.text)


@dataclass(frozen=True, slots=True)
class Located:
    """Where the rows of a source are."""

    files: tuple[Path, ...]  # what they are made of; for a hub data set the files that `datasets` keeps
    table: Any = None  # of `datasets`
    name: str = ""  # of a hub data set

    def rows(self) -> Iterator[tuple[str, Iterator[sources.Row], int]]:
        """Name, rows and size in bytes of each file."""
        if self.table is not None:
            yield self.name, sources.table_rows(self.table, self.name), len(self.table)
            return
        for file in self.files:
            yield str(file), sources.rows(file), max(file.stat().st_size, 1)


def _locate(source: Source) -> Located:
    from fastft.hub import locate

    place = locate.dataset(source)
    if isinstance(place, Path):
        return Located(tuple(sources.files(place)))
    table = sources.hub_table(place)
    files = tuple(Path(str(file["filename"])) for file in table.cache_files)
    return Located(files, table, sources.hub_name(place))


def _try(source: Source, place: Located, encoder: "Encoder") -> None:
    """Recognise the format of every file and encode its first rows: what fails there should not fail after an hour.

    Raises:
        DataError: the format is not clear, or a row among the first is unreadable, unless such rows are left out.
    """
    left = source.max_rows
    for name, rows, _ in islice(place.rows(), FILES_TO_TRY):
        head = list(islice(rows, ROWS_TO_RECOGNISE if left is None else min(left, ROWS_TO_RECOGNISE)))
        if not head:
            continue
        # max_rows may end before the last file is reached; nothing is asked of files that are not read.
        if left is not None:
            left -= len(head)
        report = SourceReport(source.source)
        read = _reader(_format(source, head, encoder.task, name), source, name, encoder)
        batch = list(_read(head, read, report, encoder))
        encoder.add(batch, Store(), report)
        if left is not None and left <= 0:
            return


def _reader(chosen: Format, source: Source, file: str, encoder: "Encoder") -> formats.Reader:
    folder = None if encoder.seer is None else image_rows.folder_of(source.images, file)
    return formats.reader(chosen, source.columns, source.system, encoder.task, folder)


def items(source: Source, place: Located, encoder: "Encoder", report: SourceReport) -> Iterator[Item]:
    """The dialogues and texts of a source, in order.

    Raises:
        DataError: an unreadable row, unless such rows are left out, or a format that is not clear.
    """
    left = source.max_rows
    for name, rows, size in place.rows():
        with console.progress(f"reading {name}", size, "B" if place.table is None else "rows") as advance:
            stream = islice(rows, left)
            head = list(islice(stream, ROWS_TO_RECOGNISE))
            if not head:
                report.empty.append(name)
                continue
            chosen = _format(source, head, encoder.task, name)
            read = _reader(chosen, source, name, encoder)
            file = FileReport(name, chosen, chosen=source.format == "auto")
            report.files.append(file)

            def counted(stream: Iterator[sources.Row], file: FileReport = file) -> Iterator[sources.Row]:
                for row in stream:
                    file.rows += 1
                    yield row
                    advance(row.share * size)  # noqa: B023  used up within this turn of the loop

            yield from _read(counted(chain(head, stream)), read, report, encoder)
        if left is not None:
            left -= file.rows
            if left <= 0:
                return


def _format(source: Source, head: Sequence[sources.Row], task: Task, name: str) -> Format:
    if source.format != "auto":
        return source.format
    return formats.recognise([row.value for row in head], task, name)


def _read(
    rows: Iterator[sources.Row] | Sequence[sources.Row], read: formats.Reader, report: SourceReport, encoder: "Encoder"
) -> Iterator[Item]:
    for row in rows:
        try:
            item = read(row.value, row.where)
        except (BadRowError, BadImageError) as error:
            encoder.refuse(error, row.where, report)
            continue
        yield item


def _refuse(reason: str, where: Where, report: SourceReport, *, skip: bool, image: bool = False) -> None:
    if not skip:
        switch = "vision.on_bad_image: skip" if image else "on_bad_row: skip"
        raise DataError(f"data {where}: {reason}; mend the row, or set {switch} to leave such rows out")
    report.skip(reason, where)


class Encoder:
    """Items to tokens, by the task."""

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        chat_template: str | None,
        data: Data,
        *,
        skip: bool,
        seer: Seer | None = None,
    ) -> None:
        self.seer = seer
        self.skip_images = seer is not None and seer.skips_bad_images
        self.task = task
        self.tokenizer = tokenizer
        self.max_length = data.max_length
        self.skip = skip
        self.cache = data.cache
        self.template: ChatTemplate | None = None
        self._fallback = chat_template
        self._fast: byte_level.ByteLevel | None = None
        self._asked_for_fast = False
        self._identity: dict[str, Any] | None = None

    def identity(self) -> Mapping[str, Any]:
        """What decides the tokens of a row besides the row; JSON."""
        if self._identity is None:
            backend = self.tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            template = self.tokenizer.chat_template or self._fallback
            self._identity = {
                "task": self.task,
                "max_length": self.max_length,
                "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
                "special_tokens": {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()},
                "template": template,
                # Llama's templates write the date into each dialogue.
                "date": time.strftime("%Y-%m-%d") if "strftime_now" in str(template) else None,
            }
        return self._identity

    def refuse(self, error: BadRowError | BadImageError, where: Where, report: SourceReport) -> None:
        """Count a row that cannot be used, or raise what says so."""
        image = isinstance(error, BadImageError)
        _refuse(str(error), where, report, skip=self.skip_images if image else self.skip, image=image)

    def stop_token_ids(self) -> list[int]:
        """Tokens that end an answer or a text."""
        if self.template is not None:
            return self.template.stop_token_ids
        eos = self.tokenizer.eos_token_id
        return [] if eos is None else [int(eos)]

    def add(self, batch: Sequence[Item], collected: Store, report: SourceReport) -> None:
        """Tokenise a batch, cut it to length, and put it into `collected`."""
        texts = [item for item in batch if isinstance(item, Text)]
        for encoded_text, text in zip(self._texts(texts), texts, strict=True):
            self._split(encoded_text, text.where, collected, report)
        spoken = [item for item in batch if not isinstance(item, Text)]
        kinds, dialogues, last = [], [], []  # last: whether the dialogue is the last one of its item
        for item in spoken:
            found = _dialogues(item, self.task)
            for index, (dialogue, kind) in enumerate(found):
                dialogues.append(dialogue)
                kinds.append(kind)
                last.append(self.task not in formats.PAIR_TASKS or index == len(found) - 1)
        waiting: list[tuple[Encoded, int]] = []
        refused: BadRowError | BadImageError | None = None
        for encoded, dialogue, kind, complete in zip(self._encode(dialogues), dialogues, kinds, last, strict=True):
            if isinstance(encoded, BadRowError | BadImageError):
                refused = refused or encoded
            else:
                waiting.append((encoded, kind))
            if not complete:
                continue
            if refused is not None:
                self.refuse(refused, dialogue.where, report)
            elif self.task == "pretrain":
                self._learn_whole(waiting[0][0], dialogue.where, collected, report)
            else:
                _count_unanswered(dialogue, report)
                self._cut(waiting, dialogue.where, collected, report)
            waiting, refused = [], None

    def _learn_whole(self, encoded: Encoded, where: Where, collected: Store, report: SourceReport) -> None:
        """A dialogue in task pretrain: everything is learned but images, which also keep it in one piece."""
        learned = np.ones_like(encoded.learned)
        for image in encoded.images:
            learned[image.start : image.start + image.length] = False
        whole = Encoded(encoded.ids, learned, encoded.images)
        if encoded.images:
            self._cut([(whole, PLAIN)], where, collected, report)
        else:
            self._split(whole, where, collected, report)

    def _fast_road(self, num_texts: int) -> byte_level.ByteLevel | None:
        """The tokenizer's fast road; it takes 0.2 s to be made, so a small data set does without."""
        if not self._asked_for_fast and num_texts >= FEWEST_FAST_ROWS:
            self._fast, self._asked_for_fast = byte_level.of(self.tokenizer), True
        return self._fast

    def _texts(self, texts: Sequence[Text]) -> list[Encoded]:
        """Tokens of documents: what the tokenizer adds by itself (bos), and eos at the end of each."""
        if not texts:
            return []
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError("data: the tokenizer has no eos token, which marks the end of a text in task pretrain")
        encoded = []
        for ids in self._ids_of([text.text for text in texts]):
            whole = np.asarray(ids if ids[-1:] == [eos] else [*ids, eos], dtype=np.int32)
            encoded.append(Encoded(whole, np.ones(len(whole), dtype=np.bool_)))
        return encoded

    def _ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts with what the tokenizer adds to each by itself."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        fast = self._fast_road(len(texts))
        if fast is None:
            return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=True)]
        found, others = fast.encode(texts, [()] * len(texts))
        plain, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
        start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        before, after = whole[:start], whole[start + len(plain) :]
        ids = [[*before, *part.tolist(), *after] for part, _ in found]
        for index in others:
            ids[index] = backend.encode(texts[index], add_special_tokens=True).ids
        return ids

    def _encode(self, dialogues: Sequence[Dialogue]) -> Iterator[Encoded | BadRowError | BadImageError]:
        """Tokens of each dialogue, or why there are none."""
        if not dialogues:
            return
        if self.template is None:
            self.template = ChatTemplate(self.tokenizer, self._fallback, of_processor=self.seer is not None)
        rendered: list[tuple[str, list[Span]] | BadRowError | BadImageError] = []
        # Where each image stands in the text of those that could be rendered.
        shown: list[list[ShownImage]] = []
        texts = self.template.render_all(dialogues)
        if self.seer is not None:
            self.seer.look_at(image for dialogue in dialogues for image in dialogue.images)
        for dialogue, text in zip(dialogues, texts, strict=True):
            try:
                written, spans = self.template.learned_spans(dialogue.messages, dialogue.tools, text)
                if self.seer is not None:
                    written, spans, images = self.seer.expanded(written, spans, dialogue.images)
                    shown.append(images)
                rendered.append((written, spans))
            except (BadRowError, BadImageError) as error:
                rendered.append(error)
        good = [found for found in rendered if isinstance(found, tuple)]
        if self.seer is not None:
            encoded = iter(self.template.encode_shown(good, shown))
        else:
            fast = self._fast_road(len(good))
            encoded = iter(self.template.encode_batch([text for text, _ in good], [spans for _, spans in good], fast))
        for each in rendered:
            yield next(encoded) if isinstance(each, tuple) else each

    def _cut(self, parts: Sequence[tuple[Encoded, int]], where: Where, collected: Store, report: SourceReport) -> None:
        """Keep the first max_length tokens of a dialogue, or of both of a pair."""
        length = max(len(encoded.ids) for encoded, _ in parts)
        report.lengths[length] += 1
        report.count_images([image for encoded, _ in parts for image in encoded.images])
        parts = [(self._before_image(encoded, where, report), kind) for encoded, kind in parts]
        if length > self.max_length:
            report.truncated += 1
            report.truncated_tokens += sum(max(len(encoded.ids) - self.max_length, 0) for encoded, _ in parts)
            report.first.setdefault("truncated", where)
        # The first token of a document is never learned.
        if not all(encoded.learned[1 : self.max_length].any() for encoded, _ in parts):
            report.not_learned += 1
            report.first.setdefault("not_learned", where)
            return
        for encoded, kind in parts:
            ids, learned = encoded.ids[: self.max_length], encoded.learned[: self.max_length]
            collected.add(ids, learned, where, _digest(encoded), kind=kind, images=encoded.images)

    def _before_image(self, encoded: Encoded, where: Where, report: SourceReport) -> Encoded:
        """The dialogue, ended before an image that max_length would cut through, or that lies behind it."""
        whole = tuple(image for image in encoded.images if image.start + image.length <= self.max_length)
        if len(whole) == len(encoded.images):
            return encoded
        report.images_lost += len(encoded.images) - len(whole)
        report.first.setdefault("images_lost", where)
        end = min(encoded.images[len(whole)].start, self.max_length)
        return Encoded(encoded.ids[:end], encoded.learned[:end], whole)

    def _split(self, encoded: Encoded, where: Where, collected: Store, report: SourceReport) -> None:
        """Cut a text into pieces of max_length tokens; each is a document of its own."""
        length = len(encoded.ids)
        report.lengths[length] += 1
        report.split += length > self.max_length
        for start, end in pieces(length, self.max_length):
            ids = encoded.ids[start:end]
            if encoded.learned[start + 1 : end].any():
                collected.add(ids, encoded.learned[start:end], where, digest(ids))
            else:
                report.not_learned += 1
                report.first.setdefault("not_learned", where)


def _digest(encoded: Encoded) -> int:
    """Equal for dialogues that say and show the same."""
    if not encoded.images:
        return digest(encoded.ids)
    joined = hashlib.blake2b(encoded.ids.tobytes(), digest_size=8)
    for image in encoded.images:
        joined.update((image.ref.digest or str(image.ref.path)).encode())
    return int.from_bytes(joined.digest(), "little")


def _dialogues(item: Item, task: Task) -> list[tuple[Dialogue, int]]:
    """The dialogues that are encoded for an item, and what each is."""
    if isinstance(item, Pair):
        kinds = (GOOD, BAD) if task == "kto" else (CHOSEN, REJECTED)
        return list(zip((item.chosen, item.rejected), kinds, strict=True))
    if isinstance(item, Judged):
        return [(item.dialogue, GOOD if item.good else BAD)]
    return [(cast("Dialogue", item), PLAIN)]


def _count_unanswered(dialogue: Dialogue, report: SourceReport) -> None:
    roles = [message.role for message in dialogue.messages]
    if any(role == "user" and after != "assistant" for role, after in pairwise(roles)):
        report.unanswered += 1
        report.first.setdefault("unanswered", dialogue.where)


def _collected(
    from_sources: Sequence[Source],
    located: Mapping[Source, Located],
    encoder: Encoder,
    part: PartReport,
) -> Collection:
    """The documents of all sources; their reports go into `part`."""
    parts = []
    for source in from_sources:
        documents, report = _documents(source, located[source], encoder)
        report.weight = source.weight
        per_unit = 2 if encoder.task in formats.PAIR_TASKS else 1
        report.samples = report.used = len(documents) // per_unit
        part.sources.append(report)
        parts.append(documents)
    part.longest = max(part.lengths, default=0)
    return Collection(parts)


def _documents(source: Source, place: Located, encoder: Encoder) -> tuple[Documents, SourceReport]:
    """The documents of one source, from the cache or made now."""

    def make(collected: Store) -> SourceReport:
        report = SourceReport(source.source)
        if encoder.template is not None:
            encoder.template.notes.clear()
        stream = items(source, place, encoder, report)
        for batch in _batches(stream):
            encoder.add(batch, collected, report)
        report.notes = [] if encoder.template is None else list(encoder.template.notes)
        return report

    # Images may change or go without a word in the rows, so what they are is looked at in every run.
    setting = None if encoder.seer is not None else encoder.cache
    entry = cache.entry(setting, source, place.files, encoder.identity)
    if entry is None:
        inputs = {file: cache.fingerprint(file) for file in place.files}
        with Store() as collected:
            report = make(collected)
            cache.require_unchanged(inputs)
            return collected.documents(), report
    documents, report = entry.get(make)
    if report.skipped and not encoder.skip:
        reason = cast("str", report.first_skipped)
        _refuse(reason, report.examples[reason], report, skip=False)
    return documents, report


def _batches(stream: Iterator[Item]) -> Iterator[list[Item]]:
    """Items in the portions in which they are tokenised."""
    batch: list[Item] = []
    characters = 0
    for item in stream:
        batch.append(item)
        characters += _num_characters(item)
        if len(batch) == BATCH_ROWS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _num_characters(item: Item) -> int:
    if isinstance(item, Text):
        return len(item.text)
    if isinstance(item, Pair):
        return _num_characters(item.chosen) + _num_characters(item.rejected)
    dialogue = item.dialogue if isinstance(item, Judged) else item
    return sum(len(message.content) for message in dialogue.messages)


def _refuse_empty(documents: Collection, part: PartReport, name: str) -> None:
    if len(documents):
        return
    raise DataError(
        f"data: nothing is left of the {name} data: {part.rows_read:,} rows read, {part.skipped:,} could not be read, "
        f"{part.not_learned:,} have nothing to learn (within max_length)"
    )


def _weighted(
    units: Numbers, documents: Collection, from_sources: Sequence[Source], part: PartReport, *, per_unit: int, seed: int
) -> Numbers:
    """The units of an epoch, each as often as the weight of its source says."""
    mixed = []
    for index, source in enumerate(from_sources):
        first, end = documents.firsts[index] // per_unit, documents.firsts[index + 1] // per_unit
        own = units[(units >= first) & (units < end)]
        chosen = repeated(own, source.weight, seed + index)
        part.sources[index].used = len(chosen)
        mixed.append(chosen)
    return np.concatenate([np.zeros(0, dtype=np.int64), *mixed])


def _rows(documents: Collection, units: Numbers, data: Data, *, per_unit: int, seed: int, packing: bool) -> Samples:
    """Units laid out in rows: packed, or one document each."""
    if not packing:
        order = (units[:, None] * per_unit + np.arange(per_unit)).ravel()
        return Samples(documents, np.arange(len(order) + 1, dtype=np.int64), order)
    rows = pack(documents.lengths[units].tolist(), data.max_length, seed)
    if data.shuffle:
        rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    order = units[np.asarray([place for row in rows for place in row], dtype=np.int64)]
    return Samples(documents, np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64), order)


def _count(
    part: PartReport, samples: Samples, stops: Sequence[int], *, per_unit: int, batch_size: int, seed: int
) -> None:
    part.documents = samples.num_documents // per_unit
    part.rows = len(samples) // per_unit
    part.tokens = samples.num_tokens
    collection, order = samples.collection, samples.order
    learned = collection.learned_counts()
    part.learned_tokens = int(learned[order].sum())
    kinds = collection.kinds[order]
    better, worse = np.isin(kinds, (CHOSEN, GOOD)), np.isin(kinds, (REJECTED, BAD))
    part.chosen_tokens = int(learned[order][better].sum())
    part.rejected_tokens = int(learned[order][worse].sum())
    part.good = int((kinds == GOOD).sum())
    numbers = np.unique(order)
    _count_duplicates(part, samples, per_unit)
    part.stops = int(_learn_to_stop(collection, stops)[numbers].reshape(-1, per_unit).all(axis=1).sum())
    lengths = np.random.default_rng(seed).permutation(collection.lengths[order])
    short = -len(lengths) % batch_size
    batches = np.concatenate([lengths, np.zeros(short, dtype=np.int64)]).reshape(-1, batch_size)
    part.padded_tokens = int(batches.max(axis=1, initial=0).sum() * batch_size)


def _learn_to_stop(collection: Collection, stops: Sequence[int]) -> Mask:
    """Whether each document teaches a token that ends an answer; bool [documents]."""
    found = [np.zeros(0, dtype=np.bool_)]
    for part in collection.parts:

        def teaches(tokens: slice, part: Documents = part) -> Mask:
            return np.asarray(np.isin(part.ids[tokens], stops) & part.learned[tokens])

        found.append(part.count(teaches) > 0)
    return np.concatenate(found)


def _unit_digests(samples: Samples, per_unit: int) -> "tuple[Numbers, np.ndarray[Any, np.dtype[np.uint64]]]":
    """Number of the first document of each sample (or pair) that stands in a row, once each, and its digest."""
    numbers = np.unique(samples.order)
    digests = samples.collection.digests()[numbers].reshape(-1, per_unit)
    joined = digests[:, 0]
    for other in range(1, per_unit):
        joined = joined * MIX ^ digests[:, other]
    return numbers[::per_unit], joined


def _count_duplicates(part: PartReport, samples: Samples, per_unit: int) -> None:
    """Samples that repeat an earlier one; a pair does if both of its answers do."""
    numbers, digests = _unit_digests(samples, per_unit)
    part.distinct = len(numbers)
    _, firsts, groups = np.unique(digests, return_index=True, return_inverse=True)
    part.duplicates = len(digests) - len(firsts)
    if part.duplicates:
        again = int(np.flatnonzero(firsts[groups] != np.arange(len(digests)))[0])
        earlier = int(firsts[groups[again]])
        part.first_duplicate = (
            samples.collection.place(int(numbers[again])),
            samples.collection.place(int(numbers[earlier])),
        )
