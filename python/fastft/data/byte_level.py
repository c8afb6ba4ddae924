"""Tokens of whole batches for byte-level BPE tokenizers (GPT-2, Llama 3, Qwen, GLM-4), many times as fast.

The tokenizers library cuts a text into pieces and merges each piece by itself; the tokens of a piece never change. The
Rust core cuts (`rust/tokens`) and remembers the pieces; the tokens of a new piece come from the library's own model, and so
do the classes of characters. What the core does not know (another pattern, another normalizer, added tokens that take
white space along) goes the library's road, and of every batch some rows go both roads and are compared.

Tokenizers of SentencePiece's kind have the same road with another cut (`sentence_pieces`).

`template` and `prepare` ask `of` for it; None means the library's road for all.
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from fastft import _native
from fastft.data import sentence_pieces
from fastft.data.samples import Ids, Mask
from fastft.errors import DataError

# What the tokenizers' regular expressions are called in the Rust core.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {QWEN2: "qwen2", QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama3"}
BLOCK = 4096  # code points whose classes are learned together
CLASSES = ((1, r"\p{L}"), (2, r"\p{N}"), (3, r"\s"))
# Rows of each batch that go both roads.
COMPARED_ROWS = 4

Span = tuple[int, int]


class ByteLevel:
    """A tokenizer's fast road.

    Args:
        backend: of the tokenizers library.
        core: the Rust side.
        spelled: writes a piece as the tokenizer's model takes it.
        has_nfc: whether texts are normalized first; those that would change go the library's road.
    """

    def __init__(
        self, backend: Any, core: "_native.ByteLevel", spelled: Callable[[bytes], str], *, has_nfc: bool
    ) -> None:
        self._backend = backend
        self._spelled = spelled
        self._model = backend.model
        self._core = core
        self._has_nfc = has_nfc

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> tuple[list[tuple[Ids, Mask]], list[int]]:
        """Ids (int32 [T]) and mask (bool [T]) of each text, and the numbers of the texts that this road does not know.

        Args:
            texts: without anything added at the ends.
            spans: per text the learned stretches in characters, sorted and disjoint.
        """
        scan = self._core.scan(texts, spans, num_threads())
        while scan.blocks:
            for block in scan.blocks:
                self._core.learn_block(block, classes_of(block))
            scan = self._core.scan(texts, spans, num_threads())
        answers = [[token.id for token in self._model.tokenize(self._spelled(piece))] for piece in scan.asked]
        raw_ids, raw_learned, raw_lengths = self._core.finish(scan, answers)
        ids = np.frombuffer(raw_ids, dtype=np.int32)
        learned = np.frombuffer(raw_learned, dtype=np.bool_)
        ends = np.cumsum(np.frombuffer(raw_lengths, dtype=np.int64)).tolist()
        starts = [0, *ends[:-1]]
        found = [(ids[start:end], learned[start:end]) for start, end in zip(starts, ends, strict=True)]
        refused = set(scan.refused)
        if self._has_nfc:
            import unicodedata

            refused.update(
                index
                for index, text in enumerate(texts)
                if not (text.isascii() or unicodedata.is_normalized("NFC", text))
            )
        self._compare(texts, found, refused)
        return found, sorted(refused)

    def _compare(self, texts: Sequence[str], found: Sequence[tuple[Ids, Mask]], refused: set[int]) -> None:
        step = max(len(texts) // COMPARED_ROWS, 1)
        chosen = [index for index in range(0, len(texts), step) if index not in refused]
        encodings = self._backend.encode_batch_fast([texts[index] for index in chosen], add_special_tokens=False)
        for index, encoding in zip(chosen, encodings, strict=True):
            if found[index][0].tolist() != encoding.ids:
                raise DataError(
                    "data: fastft's fast tokenizer gives other tokens than the tokenizers library; this is a bug of ours, "
                    f"please report it with this text: {texts[index][:200]!r}. FASTFT_BYTE_LEVEL=off takes the library's road"
                )


def of(tokenizer: Any) -> ByteLevel | None:
    """The fast road of a tokenizer, or None if it has none (or FASTFT_BYTE_LEVEL is off)."""
    if os.environ.get("FASTFT_BYTE_LEVEL", "").strip().lower() == "off":
        return None
    backend = tokenizer.backend_tokenizer
    normalizer = _described(backend.normalizer)
    words = sentence_pieces.core_of(backend, normalizer)
    if words is not None:
        return ByteLevel(backend, words, sentence_pieces.spelled, has_nfc=False)
    pattern = _pattern(_described(backend.pre_tokenizer))
    trims = _trims(_described(backend.post_processor))
    added = sorted(backend.get_added_tokens_decoder().items())
    if (
        pattern is None
        or trims is None
        or not (normalizer is None or normalizer == {"type": "NFC"})
        or not _merges_bytes(backend.model)
        or any(token.lstrip or token.rstrip or token.single_word for _, token in added)
    ):
        return None
    first = [(token.content, number) for number, token in added if not token.normalized]
    then = [(token.content, number) for number, token in added if token.normalized]
    shapes = _shapes(backend.get_vocab(with_added_tokens=False), first + then, trims=trims)
    if shapes is None:
        return None
    core = _native.ByteLevel(pattern, first, then, shapes)
    return ByteLevel(backend, core, _as_signs, has_nfc=normalizer is not None)


def _described(component: Any) -> Any:
    """What a part of a tokenizer says of itself; the whole tokenizer.json would take ten times as long."""
    return None if component is None else json.loads(component.__getstate__())


def _merges_bytes(model: Any) -> bool:
    """Whether a model merges the bytes of a piece and nothing else."""
    from tokenizers.models import BPE

    others = ("continuing_subword_prefix", "end_of_word_suffix")
    return isinstance(model, BPE) and not model.dropout and not any(getattr(model, name) for name in others)


def num_threads() -> int:
    """Threads of the tokenizer, as the tokenizers library chooses them."""
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "0", "off", "no", "n", "f"):
        return 1
    asked = os.environ.get("RAYON_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0))


@cache
def classes_of(block: int) -> bytes:
    """For each code point of a block 1 (letter), 2 (number), 3 (white space) or 0, by the library's own engine."""
    from tokenizers import Regex, pre_tokenizers

    # Surrogates are no characters.
    codes = [code for code in range(block * BLOCK, (block + 1) * BLOCK) if not 0xD800 <= code < 0xE000]
    text = "".join(map(chr, codes))
    found = bytearray(BLOCK)
    for number, pattern in CLASSES:
        members = set(text)
        # What is left when all members of the class are taken away.
        for piece, _ in pre_tokenizers.Split(Regex(pattern), "removed").pre_tokenize_str(text):
            members.difference_update(piece)
        for member in members:
            found[ord(member) - block * BLOCK] = number
    return bytes(found)


def _pattern(described: Any) -> str | None:
    """The core's name for what a pre-tokenizer does."""
    if described is None:
        return None
    if described["type"] == "ByteLevel":
        return "gpt2" if described.get("use_regex", True) and not described["add_prefix_space"] else None
    if described["type"] != "Sequence" or len(described["pretokenizers"]) != 2:
        return None
    split, bytes_of = described["pretokenizers"]
    if (
        split["type"] != "Split"
        or split["behavior"] != "Isolated"
        or split["invert"]
        or bytes_of["type"] != "ByteLevel"
        or bytes_of["add_prefix_space"]
        or bytes_of.get("use_regex", True)
    ):
        return None
    return PATTERNS.get(split["pattern"].get("Regex", ""))


def _trims(described: Any) -> bool | None:
    """Whether offsets leave out white space at the ends of a token; None if the post-processor is not known."""
    if described is None or described["type"] == "TemplateProcessing":
        return False
    if described["type"] == "ByteLevel":
        # With add_prefix_space the first token is trimmed in another way.
        return bool(described["trim_offsets"]) if not described["add_prefix_space"] else None
    if described["type"] == "Sequence":
        parts = [_trims(part) for part in described["processors"]]
        return None if None in parts else any(parts)
    return None


def _shapes(vocabulary: dict[str, int], added: Sequence[tuple[str, int]], *, trims: bool) -> bytes | None:
    """Bytes, white space at the start and white space at the end of each token by id, u16 [tokens, 3]; None if too long."""
    tokens = list(vocabulary)
    numbers = np.fromiter(vocabulary.values(), dtype=np.int64, count=len(tokens))
    size = max([int(numbers.max(initial=-1)), *(number for _, number in added)]) + 1
    shapes = np.zeros((size, 3), dtype=np.int64)
    # Each sign of a token in the vocabulary stands for a byte.
    shapes[numbers, 0] = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
    if trims:
        blank = _signs()[ord(" ")]
        for token, number in vocabulary.items():
            if token[0] == blank or token[-1] == blank:
                shapes[number, 1:] = len(token) - len(token.lstrip(blank)), len(token) - len(token.rstrip(blank))
    for content, number in added:
        num_bytes = len(content.encode())
        lead, trail = num_bytes - len(content.lstrip().encode()), num_bytes - len(content.rstrip().encode())
        shapes[number] = (num_bytes, lead, trail) if trims else (num_bytes, 0, 0)
    return sentence_pieces.as_bytes(shapes)


@cache
def _signs() -> list[str]:
    """The printable sign by which byte-level tokenizers write each byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    signs, others = {byte: chr(byte) for byte in printable}, 0
    for byte in range(256):
        if byte not in signs:
            signs[byte] = chr(256 + others)
            others += 1
    return [signs[byte] for byte in range(256)]


def _as_signs(piece: bytes) -> str:
    return piece.decode("latin-1").translate(_table())


@cache
def _table() -> dict[int, str]:
    return dict(enumerate(_signs()))
