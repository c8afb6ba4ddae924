"""The fast road of `byte_level` for BPE tokenizers of SentencePiece's kind (Llama 2, Mistral, InternLM).

They write blanks as U+2581 and merge a whole text at once, however long. But hardly any of their tokens has a blank behind
another character, so no merge reaches over most blanks: cut there, each piece has the tokens that it has in the whole text.
Which characters may stand before a blank inside a token is read off the vocabulary.
"""

import re
from typing import Any

import numpy as np

from fastft import _native

BLANK = "\u2581"
# The first byte of a piece that has a blank put before it.
_PREPENDED = b"\xff"
_REPLACES = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
_PREPENDS = {"type": "Prepend", "prepend": BLANK}
# Stands between tokens where all are searched at once; it is no character, so no token has it.
_BETWEEN = "\uffff"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_LONGEST_SHAPE = 2**16 - 1


def core_of(backend: Any, normalizer: Any) -> "_native.ByteLevel | None":
    """The Rust core of such a tokenizer; None: it is of another kind, or has an option whose pieces are not its own.

    Args:
        backend: of the tokenizers library.
        normalizer: what its normalizer says of itself, None for none.
    """
    from tokenizers.models import BPE

    model = backend.model
    prepends = _prepends(normalizer)
    added = sorted(backend.get_added_tokens_decoder().items())
    if (
        not isinstance(model, BPE)
        or backend.pre_tokenizer is not None
        or prepends is None
        or model.dropout
        or model.ignore_merges  # looks a whole text up in the vocabulary first
        or model.continuing_subword_prefix
        or model.end_of_word_suffix
        or any(token.lstrip or token.rstrip or token.single_word or token.normalized for _, token in added)
    ):
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    contents = [(token.content, number) for number, token in added]
    shapes = _shapes(vocabulary, contents)
    return None if shapes is None else _native.ByteLevel.of_words(joiners(vocabulary), prepends, contents, shapes)


def spelled(piece: bytes) -> str:
    """A piece as the tokenizer's model gets it."""
    if piece.startswith(_PREPENDED):
        return BLANK + piece[1:].decode().replace(" ", BLANK)
    return piece.decode().replace(" ", BLANK)


def joiners(vocabulary: "dict[str, int]") -> str:
    """The characters that stand right before a blank inside some token."""
    found = re.findall(f"([^{BLANK}{_BETWEEN}]){BLANK}", _BETWEEN.join(vocabulary))
    return "".join(sorted(set(found)))


def _prepends(normalizer: Any) -> bool | None:
    """Whether a blank is put before each text between added tokens; None: the normalizer does something else."""
    steps = normalizer["normalizers"] if normalizer is not None and normalizer["type"] == "Sequence" else [normalizer]
    if steps == [_REPLACES]:
        return False
    return True if steps == [_PREPENDS, _REPLACES] else None


def _shapes(vocabulary: "dict[str, int]", added: "list[tuple[str, int]]") -> bytes | None:
    """Bytes of text of each token by id, as the core takes them; None if one is too long."""
    size = max([*vocabulary.values(), *(number for _, number in added)], default=-1) + 1
    shapes = np.zeros((size, 3), dtype=np.int64)
    for token, number in vocabulary.items():
        shapes[number, 0] = 1 if _BYTE.fullmatch(token) else len(token.replace(BLANK, " ").encode())
    for content, number in added:
        shapes[number, 0] = len(content.encode())
    return as_bytes(shapes)


def as_bytes(shapes: "np.typing.NDArray[np.int64]") -> bytes | None:
    """Shapes [tokens, 3] as the core takes them; None if one is too long for it."""
    return shapes.astype("<u2").tobytes() if shapes.max(initial=0) <= _LONGEST_SHAPE else None
