"""The nearest known word to one that is not known, for "did you mean"."""

from collections.abc import Iterable
from difflib import get_close_matches

# A longer word is no misspelling; the search takes the square of its length.
_LONGEST = 200


def nearest(word: str, known: Iterable[str], n: int = 1, cutoff: float = 0.6) -> list[str]:
    """Give at most `n` of the `known` words, best first, whose likeness to `word` (0 to 1) is `cutoff` or more."""
    return get_close_matches(word, list(known), n=n, cutoff=cutoff) if len(word) <= _LONGEST else []
