"""Hides what must never be printed or saved: the user and password inside a URL.

Used by everything that shows a config; no field of the schema holds a token, but a name or a source may be a URL.
"""

import re

# The lengths are bounded: without, a long text takes the square of its length.
_CREDENTIALS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]{0,30}://)[^/@\s]{1,1000}@")


def masked(text: str) -> str:
    """`text` with `https://user:password@host` as `https://***@host`."""
    return _CREDENTIALS.sub(r"\g<scheme>***@", text)
