"""Sizes as people type them."""

import pytest

from fastft.convert.size import parse_size, readable
from fastft.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GB", 2_000_000_000),
        ("2gb", 2_000_000_000),
        ("2GiB", 2_147_483_648),
        ("2", 2_000_000_000),
        ("1.5", 1_500_000_000),
        ("0.5 MB", 500_000),
        (" 300KB ", 300_000),
        ("1.5kib", 1536),
        (".5GB", 500_000_000),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        ("0.1GB", 100_000_000),
    ],
)
def test_understood(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "0", "0GB", "-1GB", "+1GB", "2G", "GB", "2 G B", "1e3GB", "nan", "inf", "2GB2", "two", "2,5GB", "\u0662GB"],
)
def test_refused(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


def test_readable() -> None:
    assert [readable(n) for n in (999, 1000, 13_512_345_678, 250_000_000)] == [
        "999 bytes",
        "1.0 KB",
        "13.5 GB",
        "250 MB",
    ]
