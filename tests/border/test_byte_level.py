"""fastft._native.ByteLevel: what Python hands over is checked; needs no tokenizer. The rest: tests/unit/test_data_byte_level.py."""

import pytest

from fastft import _native

# Bytes of text, white space at the start and at the end, u16 each: 256 bytes and one added token.
SHAPES = bytes([1, 0, 0, 0, 0, 0]) * 256 + bytes([3, 0, 0, 0, 0, 0])
CLASSES = bytes(1 if chr(code).isalpha() else 3 if chr(code).isspace() else 0 for code in range(4096))


def core() -> _native.ByteLevel:
    made = _native.ByteLevel("gpt2", [("<a>", 256)], [], SHAPES)
    made.learn_block(0, CLASSES)
    return made


def test_bytes_as_tokens() -> None:
    tokenizer = core()
    scan = tokenizer.scan(["b<a>cd e", ""], [[(1, 5)], []], 1)
    assert (scan.asked, scan.blocks, scan.refused) == ([b"b", b"cd", b" e"], [], [])
    ids, learned, lengths = tokenizer.finish(scan, [list(piece) for piece in scan.asked])
    assert [int.from_bytes(ids[place : place + 4], "little") for place in range(0, len(ids), 4)] == [
        98,
        256,
        99,
        100,
        32,
        101,
    ]
    assert list(learned) == [0, 1, 1, 0, 0, 0]
    assert [int.from_bytes(lengths[place : place + 8], "little") for place in (0, 8)] == [6, 0]
    assert tokenizer.scan(["cd<a>b"], [[]], 1).asked == []


def test_unknown_characters_are_asked_for() -> None:
    assert core().scan(["a\u4f60", "\uff01"], [[], []], 1).blocks == [4, 15]


def test_mistakes_are_value_errors() -> None:
    tokenizer = core()
    with pytest.raises(ValueError, match="pattern other"):
        _native.ByteLevel("other", [], [], b"")
    with pytest.raises(ValueError, match="and 2 bytes more"):
        _native.ByteLevel("gpt2", [], [], SHAPES[:8])
    with pytest.raises(ValueError, match="1 texts with 0 lists"):
        tokenizer.scan(["a"], [], 1)
    for span in ((0, 2), (1, 0)):
        with pytest.raises(ValueError, match="span"):
            tokenizer.scan(["a"], [[span]], 1)
    scan = tokenizer.scan(["a"], [[]], 1)
    with pytest.raises(ValueError, match="0 answers to 1 pieces"):
        tokenizer.finish(scan, [])
    with pytest.raises(ValueError, match="token 257"):
        tokenizer.finish(scan, [[257]])
    with pytest.raises(ValueError, match="block 0 with 1 classes"):
        tokenizer.learn_block(0, b"a")
    with pytest.raises((ValueError, UnicodeEncodeError)):
        tokenizer.scan(["\ud800"], [[]], 1)
