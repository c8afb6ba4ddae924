"""The data section of a config becomes samples to train on and a report about them.

The order of things: `hub.locate` finds a source, `sources` reads rows, `formats` makes dialogues, `template` makes
tokens (in batches: the tokenizer runs on all cores), long ones are cut, `packing` joins the rest into rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from fastft import console
from fastft.config.schema import Data, Format, Source
from fastft.data import formats, sources
from fastft.data.dialogue import Dialogue, Text, Where
from fastft.data.formats import BadRowError, Item, Task
from fastft.data.packing import pack, pieces
from fastft.data.report import DataReport, FileReport, PartReport, SourceReport
from fastft.data.samples import Documents, Samples
from fastft.data.template import ChatTemplate, Encoded, Mask, Span
from fastft.errors import DataError

# Rows by which `auto` recognises a format.
ROWS_TO_RECOGNISE = 20
# Rows tokenised in one call: enough to keep all cores busy, few enough for the memory to stay flat.
BATCH_ROWS = 512


@dataclass(frozen=True, slots=True)
class Prepared:
    """Samples to learn from and to measure on."""

    train: Samples
    eval: Samples | None
    report: DataReport
    chat_template: str | None  # the template's text, to be saved with the model; None if no dialogue was rendered


def prepare(data: Data, task: Task, tokenizer: Any, seed: int, *, chat_template: str | None = None) -> Prepared:
    """Read, tokenise, cut and pack a data set.

    Args:
        data: the config's section.
        task: `sft` learns the assistant's turns; `pretrain` every token of texts (a dialogue is rendered by the chat
            template, and learned whole).
        tokenizer: a fast tokenizer of transformers.
        seed: chooses the rows held back by `eval_rows`, and the order of packed rows.
        chat_template: text of a template for a tokenizer without one.

    Raises:
        DataError: unreadable rows (with on_bad_row: error), an unclear format, no template, or nothing left to learn.
        FileError, HubError: a source is not there.
    """
    encoder = _Encoder(task, tokenizer, chat_template, data)
    part = PartReport()
    documents = _documents(data.train, encoder, part)
    held_back: Documents | None = None
    eval_part: PartReport | None = None
    if data.eval:
        eval_part = PartReport()
        held_back = _documents(data.eval, encoder, eval_part)
        _refuse_empty(held_back, eval_part, "eval")
    _refuse_empty(documents, part, "train")
    num_held_back = 0
    if data.eval_rows and not data.eval:
        if data.eval_rows >= len(documents):
            raise DataError(f"data: eval_rows is {data.eval_rows}, but there are only {len(documents)} samples in all")
        num_held_back = data.eval_rows
        order = np.random.default_rng(seed).permutation(len(documents))
        held_back = documents.take(sorted(order[:num_held_back].tolist()))
        documents = documents.take(sorted(order[num_held_back:].tolist()))
        eval_part = PartReport(longest=int(held_back.lengths.max()))
    train = _rows(documents, data, seed)
    evaluation = None if held_back is None else _rows(held_back, data, seed)
    _count(part, train)
    if eval_part is not None and evaluation is not None:
        _count(eval_part, evaluation)
    report = DataReport(
        max_length=data.max_length,
        packing=data.packing,
        train=part,
        eval=eval_part,
        held_back=num_held_back,
        learns_to_stop=task == "pretrain" or encoder.template is None or encoder.template.learns_to_stop,
    )
    return Prepared(train, evaluation, report, None if encoder.template is None else encoder.template.text)


def items(source: Source, task: Task, report: SourceReport, *, skip: bool) -> Iterator[Item]:
    """The dialogues and texts of a source, in order.

    Raises:
        DataError: an unreadable row, unless `skip`, or a format that is not clear.
    """
    system, left = source.system, source.max_rows
    for name, rows, size in _located(source):
        with console.progress(f"reading {name}", size, "B") as advance:
            stream = islice(rows, left)
            head = list(islice(stream, ROWS_TO_RECOGNISE))
            if not head:
                report.empty.append(name)
                continue
            chosen: Format = source.format
            if chosen == "auto":
                chosen = formats.recognise([row.value for row in head], task, name)
            read = formats.reader(chosen, source.columns, system, task)
            file = FileReport(name, chosen, chosen=source.format == "auto")
            report.files.append(file)
            for row in chain(head, stream):
                file.rows += 1
                try:
                    item = read(row.value, row.where)
                except BadRowError as error:
                    _refuse(error, row.where, report, skip=skip)
                    continue
                yield item
                advance(row.share * size)
        if left is not None:
            left -= file.rows
            if left <= 0:
                return


def _located(source: Source) -> Iterator[tuple[str, Iterator[sources.Row], int]]:
    """Name, rows and size in bytes of each file of a source."""
    from fastft.hub import locate

    place = locate.dataset(source)
    if isinstance(place, Path):
        for file in sources.files(place):
            yield str(file), sources.rows(file), max(file.stat().st_size, 1)
    else:
        yield f"{place.id}/{place.split}", sources.hub_rows(place), 1


def _refuse(error: BadRowError, where: Where, report: SourceReport, *, skip: bool) -> None:
    if not skip:
        raise DataError(
            f"data {where}: {error}; mend the row, or set on_bad_row: skip to leave such rows out"
        ) from error
    report.skip(str(error), where)


@dataclass(slots=True)
class _Flat:
    """Documents while they are collected."""

    ids: list[np.ndarray[Any, np.dtype[np.int32]]] = field(default_factory=list)
    learned: list[Mask] = field(default_factory=list)
    places: list[Where] = field(default_factory=list)

    def add(self, encoded: Encoded, where: Where) -> None:
        self.ids.append(encoded.ids)
        self.learned.append(encoded.learned)
        self.places.append(where)

    def documents(self) -> Documents:
        lengths = [len(ids) for ids in self.ids]
        return Documents(
            np.concatenate([np.zeros(0, dtype=np.int32), *self.ids]),
            np.concatenate([np.zeros(0, dtype=np.bool_), *self.learned]),
            np.cumsum([0, *lengths], dtype=np.int64),
            tuple(self.places),
        )


class _Encoder:
    """Items to tokens, by the task."""

    def __init__(self, task: Task, tokenizer: Any, chat_template: str | None, data: Data) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.max_length = data.max_length
        self.skip = data.on_bad_row == "skip"
        self.template: ChatTemplate | None = None
        self._fallback = chat_template

    def add(self, batch: Sequence[Item], flat: _Flat, part: PartReport, report: SourceReport) -> None:
        """Tokenise a batch, cut it to length, and put it into `flat`."""
        texts = [item for item in batch if isinstance(item, Text)]
        for encoded, item in zip(self._texts(texts), texts, strict=True):
            self._split(encoded, item.where, flat, part)
        dialogues = [item for item in batch if isinstance(item, Dialogue)]
        for encoded, where in self._dialogues(dialogues, report):
            if self.task == "pretrain":
                self._split(Encoded(encoded.ids, np.ones_like(encoded.learned)), where, flat, part)
            else:
                self._cut(encoded, where, flat, part)

    def _texts(self, texts: Sequence[Text]) -> list[Encoded]:
        """Tokens of documents: what the tokenizer adds by itself (bos), and eos at the end of each."""
        if not texts:
            return []
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError("data: the tokenizer has no eos token, which marks the end of a text in task pretrain")
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encodings = backend.encode_batch_fast([text.text for text in texts], add_special_tokens=True)
        encoded = []
        for encoding in encodings:
            ids = encoding.ids
            ids = np.asarray(ids if ids[-1:] == [eos] else [*ids, eos], dtype=np.int32)
            encoded.append(Encoded(ids, np.ones(len(ids), dtype=np.bool_)))
        return encoded

    def _dialogues(self, dialogues: Sequence[Dialogue], report: SourceReport) -> Iterator[tuple[Encoded, Where]]:
        if not dialogues:
            return
        if self.template is None:
            self.template = ChatTemplate(self.tokenizer, self._fallback)
        texts: list[str] = []
        spans: list[list[Span]] = []
        places: list[Where] = []
        for dialogue in dialogues:
            try:
                text, learned = self.template.learned_spans(dialogue.messages, dialogue.tools)
            except BadRowError as error:
                _refuse(error, dialogue.where, report, skip=self.skip)
                continue
            texts.append(text)
            spans.append(learned)
            places.append(dialogue.where)
        yield from zip(self.template.encode_batch(texts, spans), places, strict=True)

    def _cut(self, encoded: Encoded, where: Where, flat: _Flat, part: PartReport) -> None:
        """Keep the first max_length tokens of a dialogue."""
        length = len(encoded.ids)
        part.longest = max(part.longest, length)
        if length > self.max_length:
            part.truncated += 1
            part.truncated_tokens += length - self.max_length
            encoded = Encoded(encoded.ids[: self.max_length].copy(), encoded.learned[: self.max_length].copy())
        self._keep(encoded, where, flat, part)

    def _split(self, encoded: Encoded, where: Where, flat: _Flat, part: PartReport) -> None:
        """Cut a text into pieces of max_length tokens; each is a document of its own."""
        length = len(encoded.ids)
        part.longest = max(part.longest, length)
        part.split += length > self.max_length
        for start, end in pieces(length, self.max_length):
            self._keep(Encoded(encoded.ids[start:end], encoded.learned[start:end]), where, flat, part)

    @staticmethod
    def _keep(encoded: Encoded, where: Where, flat: _Flat, part: PartReport) -> None:
        """Keep a document, unless nothing in it is learned (its first token never is)."""
        if encoded.learned[1:].any():
            flat.add(encoded, where)
        else:
            part.not_learned += 1


def _documents(from_sources: Sequence[Source], encoder: _Encoder, part: PartReport) -> Documents:
    flat = _Flat()
    for source in from_sources:
        report = SourceReport(source.source)
        part.sources.append(report)
        stream = items(source, encoder.task, report, skip=encoder.skip)
        while batch := list(islice(stream, BATCH_ROWS)):
            encoder.add(batch, flat, part, report)
    return flat.documents()


def _refuse_empty(documents: Documents, part: PartReport, name: str) -> None:
    if len(documents):
        return
    rows = sum(source.rows for source in part.sources)
    raise DataError(
        f"data: nothing is left of the {name} data: {rows:,} rows read, {part.skipped:,} could not be read, "
        f"{part.not_learned:,} have nothing to learn (within max_length)"
    )


def _rows(documents: Documents, data: Data, seed: int) -> Samples:
    """Documents laid out in rows: packed, or one each."""
    if not data.packing:
        return Samples(documents, np.arange(len(documents) + 1, dtype=np.int64))
    rows = pack(documents.lengths.tolist(), data.max_length, seed)
    if data.shuffle:
        rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    ordered = documents.take([document for row in rows for document in row])
    return Samples(ordered, np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64))


def _count(part: PartReport, samples: Samples) -> None:
    part.documents = len(samples.documents)
    part.rows = len(samples)
    part.tokens = samples.num_tokens
    part.learned_tokens = samples.num_learned_tokens
