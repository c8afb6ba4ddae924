"""A tokenizer.model of sentencepiece as the tokenizer.json that the `tokenizers` library reads.

InternLM's folders on the hub hold only tokenizer.model, and code of their own that reads it. This reads the protobuf
itself (neither sentencepiece nor protobuf is needed) and writes the same byte-pair merges, for `layout`.
Source: sentencepiece_model.proto of google/sentencepiece; the order of the merges is transformers' own rule
(convert_slow_tokenizer.generate_merges): by score, so that the better piece is built first.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastft.convert.json_file import read_regular_file
from fastft.errors import CheckpointError

_MAX_BYTES = 64 * 1024 * 1024
_BPE = 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"


@dataclass
class SentencePiece:
    """What a tokenizer.model says.

    Attributes:
        pieces: text, score and type (1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte) by id.
        model_type: 1 unigram, 2 byte-pair.
        byte_fallback: unknown characters become their bytes.
        add_dummy_prefix: a space is put before the text.
        has_rules: the text is normalized by a table (NFKC).
    """

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    model_type: int = 1
    byte_fallback: bool = False
    add_dummy_prefix: bool = True
    has_rules: bool = False


def tokenizer_json(path: Path, config: Mapping[str, Any]) -> bytes:
    """Convert a byte-pair tokenizer.model.

    Args:
        path: the file.
        config: tokenizer_config.json: its `added_tokens_decoder` renames unused pieces (as InternLM2-Chat does), and
            `add_bos_token`, `add_eos_token` say what stands around a text.

    Returns:
        The content of tokenizer.json.

    Raises:
        CheckpointError: broken, not byte-pair, or with a table of normalizations.
    """
    model = read(path)
    if model.model_type != _BPE or model.has_rules:
        raise CheckpointError(
            f"{path}: only byte-pair models without normalization can be converted; put the model's tokenizer.json"
            " beside it"
        )
    renamed = _added_tokens(config, path)
    pieces = [
        (renamed[number]["content"] if number in renamed else text, score, kind)
        for number, (text, score, kind) in enumerate(model.pieces)
    ]
    vocab = {text: number for number, (text, _, _) in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise CheckpointError(f"{path}: two pieces have the same text")
    special = {
        number: _added(number, text, special=kind != _USER_DEFINED)
        for number, (text, _, kind) in enumerate(pieces)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    } | {number: _added(number, **entry) for number, entry in renamed.items()}
    unknown = next((text for text, _, kind in pieces if kind == _UNKNOWN), None)
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [special[number] for number in sorted(special)],
            "normalizer": _normalizer(model),
            "pre_tokenizer": None,
            "post_processor": _post_processor(config, vocab),
            "decoder": _decoder(model),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": unknown,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": model.byte_fallback,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": _merges(pieces, vocab),
            },
        },
        ensure_ascii=False,
    ).encode()


def read(path: Path) -> SentencePiece:
    """Read the parts of a tokenizer.model that decide how a text is cut.

    Raises:
        CheckpointError: not a sentencepiece model.
    """
    model = SentencePiece()
    try:
        for number, value in _fields(read_regular_file(path, _MAX_BYTES)):
            if number == 1 and isinstance(value, bytes):
                model.pieces.append(_piece(value))
            elif number == 2 and isinstance(value, bytes):
                trainer = dict(_fields(value))
                model.model_type = int(trainer.get(3, 1))
                model.byte_fallback = bool(trainer.get(35, False))
            elif number == 3 and isinstance(value, bytes):
                normalizer = dict(_fields(value))
                model.has_rules = bool(normalizer.get(2))
                model.add_dummy_prefix = bool(normalizer.get(3, True))
    except (IndexError, struct.error, UnicodeDecodeError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a sentencepiece model: {error}") from error
    if not model.pieces:
        raise CheckpointError(f"{path}: not a sentencepiece model: it has no pieces")
    return model


def _piece(content: bytes) -> tuple[str, float, int]:
    entry = dict(_fields(content))
    text, score = entry.get(1, b""), entry.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise TypeError("a piece without text")
    return text.decode(), float(struct.unpack("<f", score)[0]), int(entry.get(3, _NORMAL))


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Give (number, value) of the fields of a protobuf message; numbers as int, the rest as bytes."""
    position = 0
    while position < len(content):
        key, position = _varint(content, position)
        kind = key & 7
        value: int | bytes
        if kind == 0:
            value, position = _varint(content, position)
        else:
            if kind == 2:
                length, position = _varint(content, position)
            else:
                length = {1: 8, 5: 4}.get(kind, -1)
            if length < 0 or position + length > len(content):
                raise ValueError(f"a field of kind {kind} at byte {position}")
            value = content[position : position + length]
            position += length
        yield key >> 3, value


def _varint(content: bytes, position: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        byte = content[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise ValueError(f"a number without end at byte {position}")


def _merges(pieces: list[tuple[str, float, int]], vocab: Mapping[str, int]) -> list[list[str]]:
    """Give every way to build a piece from two others, the better piece first."""
    found: list[tuple[float, int, int, str, str]] = []
    for text, score, kind in pieces:
        if kind not in (_NORMAL, _USER_DEFINED):
            continue
        local = [(text[:cut], text[cut:]) for cut in range(1, len(text)) if text[:cut] in vocab and text[cut:] in vocab]
        local.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(score, len(left), len(right), left, right) for left, right in local]
    found.sort(key=lambda entry: entry[:3], reverse=True)
    return [[left, right] for *_, left, right in found]


def _added_tokens(config: Mapping[str, Any], path: Path) -> dict[int, dict[str, Any]]:
    """Read `added_tokens_decoder`: id to content and switches."""
    stated = config.get("added_tokens_decoder") or {}
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    try:
        return {int(number): {key: entry[key] for key in keys if key in entry} for number, entry in stated.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path.parent}: added_tokens_decoder in tokenizer_config.json is not understood"
        ) from error


def _added(number: int, content: str, **switches: bool) -> dict[str, Any]:
    return {
        "id": number,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    } | switches


def _normalizer(model: SentencePiece) -> dict[str, Any]:
    prefix = [{"type": "Prepend", "prepend": _SPACE}] if model.add_dummy_prefix else []
    return {
        "type": "Sequence",
        "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}],
    }


def _decoder(model: SentencePiece) -> dict[str, Any]:
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.add_dummy_prefix else []
    steps = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        *strip,
    ]
    return {"type": "Sequence", "decoders": steps}


def _post_processor(config: Mapping[str, Any], vocab: Mapping[str, int]) -> dict[str, Any] | None:
    """Put the tokens for begin and end around a text, as tokenizer_config.json says (begin: yes by default)."""
    before = _special(config.get("bos_token", "<s>")) if config.get("add_bos_token", True) else None
    after = _special(config.get("eos_token", "</s>")) if config.get("add_eos_token", False) else None
    used = [token for token in (before, after) if token is not None and token in vocab]

    def around(letter: str, type_id: int) -> list[dict[str, Any]]:
        tokens: list[dict[str, Any]] = [{"Sequence": {"id": letter, "type_id": type_id}}]
        if before in used:
            tokens.insert(0, {"SpecialToken": {"id": before, "type_id": type_id}})
        if after in used:
            tokens.append({"SpecialToken": {"id": after, "type_id": type_id}})
        return tokens

    if not used:
        return None
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in used},
    }


def _special(token: object) -> str | None:
    """Read a special token: a text, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
