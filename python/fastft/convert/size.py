"""Sizes as people type them: `2GB` is 2*10^9 bytes, `2GiB` is 2*2^30, a bare `2` is GB (DESIGN section 4)."""

import re
from decimal import Decimal

from fastft.errors import UsageError

DEFAULT_MAX_SHARD_SIZE_BYTES = 2_000_000_000

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?|\.\d{1,15})\s*([kmgt]i?b)?", re.ASCII | re.IGNORECASE)
_POWERS = "kmgt"


def parse_size(text: str) -> int:
    """Give the bytes of a size such as `2GB`, `1.5gib`, `500 MB` or `2` (GB).

    A lower-case `b` is never read as bits; a fraction of a byte is cut off.

    Raises:
        UsageError: zero, negative, or anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"size {text!r} is not understood; write for example 2GB, 500MB, 1.5GiB, or 2 for 2GB")
    number, unit = match.groups()
    unit = (unit or "gb").lower()
    power = _POWERS.index(unit[0]) + 1
    factor = 1024**power if "i" in unit else 1000**power
    size_bytes = int(Decimal(number) * factor)
    if size_bytes < 1:
        raise UsageError(f"size {text!r} is zero; write for example 2GB")
    return size_bytes


def readable(size_bytes: float) -> str:
    """Write bytes the way people read them: `13.5 GB`, `812 KB`, decimal units."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size_bytes >= factor:
            number = size_bytes / factor
            return f"{number:.1f} {unit}" if number < 100 else f"{number:.0f} {unit}"
    return f"{size_bytes:.0f} bytes"
