"""A tokenizer.model becomes the tokenizer.json that others made of it."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from fastft.convert import sentencepiece_model
from fastft.errors import CheckpointError


def message(*fields: tuple[int, object]) -> bytes:
    """Write a protobuf message: numbers as varints, floats as 4 bytes, the rest with their length."""
    content = b""
    for number, value in fields:
        if isinstance(value, float):
            content += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            content += varint(number << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            assert isinstance(data, bytes)
            content += varint(number << 3 | 2) + varint(len(data)) + data
    return content


def varint(number: int) -> bytes:
    content = b""
    while number >= 128:
        content += bytes([number & 127 | 128])
        number >>= 7
    return content + bytes([number])


def model_of(tokenizer: dict[str, Any], **normalizer: Any) -> bytes:
    """The tokenizer.model that a tokenizer.json of InternLM2 was made from: scores fall with the id."""
    pieces = []
    renamed = {entry["id"]: f"[UNUSED_TOKEN_{entry['id']}]" for entry in tokenizer["added_tokens"] if entry["id"] > 2}
    for text, number in sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1]):
        kind = {0: 2, 1: 3, 2: 3}.get(number, 6 if text.startswith("<0x") else 1)
        pieces.append((1, message((1, renamed.get(number, text)), (2, float(-number)), (3, kind))))
    trainer = (2, message((1, "corpus.txt"), (3, 2), (35, 1), (40, 0)))
    return message(*pieces, trainer, (3, message((1, "identity"), (3, int(normalizer.get("prefix", False))))))


def test_internlm2(shared_data: Path, tmp_path: Path) -> None:
    """The real vocabulary of InternLM2, from its model back to its tokenizer.json, and texts through both."""
    from tokenizers import Tokenizer

    given = json.loads((shared_data / "tokenizers/internlm2/tokenizer.json").read_text())
    (tmp_path / "tokenizer.model").write_bytes(model_of(given))
    config = {
        "added_tokens_decoder": {
            str(entry["id"]): {"content": entry["content"], "special": True}
            for entry in given["added_tokens"]
            if entry["id"] > 2
        }
    }
    content = sentencepiece_model.tokenizer_json(tmp_path / "tokenizer.model", config)
    made = json.loads(content)
    assert made["model"]["vocab"] == given["model"]["vocab"]
    assert made["added_tokens"] == given["added_tokens"]
    # By piece in the same order; pieces that are markers are never built from smaller ones.
    vocab = given["model"]["vocab"]
    pairs, their_pairs = made["model"]["merges"], [pair for pair in given["model"]["merges"] if pair != ["<s", ">"]]
    assert [vocab[left + right] for left, right in pairs] == [vocab[left + right] for left, right in their_pairs]
    assert set(map(tuple, pairs)) == set(map(tuple, their_pairs))
    assert {**made, "model": None} == {**given, "model": None}
    mine, theirs = (
        Tokenizer.from_str(content.decode()),
        Tokenizer.from_file(str(shared_data / "tokenizers/internlm2/tokenizer.json")),
    )
    rows = json.loads((shared_data / "instruction/alpaca/alpaca_zh_demo.json").read_text())[:50]
    texts = [row["output"] for row in rows] + [
        "",
        " a  b\n\tc",
        "\U0001f600 na\u00efve",
        "<|im_start|>user\nhi<|im_end|>",
    ]
    for text in texts:
        assert mine.encode(text).ids == theirs.encode(text).ids
        assert mine.decode(mine.encode(text).ids) == theirs.decode(theirs.encode(text).ids)


def test_dummy_prefix(tmp_path: Path) -> None:
    """With a dummy prefix a text gets a space in front, which decoding takes away (InternLM, Llama)."""
    from tokenizers import Tokenizer

    texts = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{byte:02X}>" for byte in range(256)],
        "\u2581",
        "h",
        "i",
        "\u2581h",
        "\u2581hi",
    ]
    tokenizer = {"model": {"vocab": {text: number for number, text in enumerate(texts)}}, "added_tokens": []}
    (tmp_path / "tokenizer.model").write_bytes(model_of(tokenizer, prefix=True))
    content = sentencepiece_model.tokenizer_json(tmp_path / "tokenizer.model", {"add_bos_token": False})
    made = Tokenizer.from_str(content.decode())
    encoded = made.encode("hi\n")
    assert encoded.tokens == ["\u2581hi", "<0x0A>"]
    assert made.decode(encoded.ids) == "hi\n"


@pytest.mark.parametrize(
    "content", [b"", b"\x0a", b"\x0a\xff\xff\xff\xff\x7fx", b"\xff" * 20, b"hello world", b"\x0a\x03\x0a\x01\xff"]
)
def test_what_is_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        sentencepiece_model.tokenizer_json(tmp_path / "tokenizer.model", {})


def test_unigram_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(message((1, message((1, "a"), (2, -1.0))), (2, message((3, 1)))))
    with pytest.raises(CheckpointError, match="byte-pair"):
        sentencepiece_model.tokenizer_json(tmp_path / "tokenizer.model", {})
