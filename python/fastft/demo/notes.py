"""Dry notes for the demo base: sums, colour codes, opposites, and rows of letters, signs and words.

The base reads them as plain notes. `dialogues` then teaches it to answer questions about them. The rows of letters
train every printable ASCII sign in every position, so that no letter of an answer is met for the first time in the
fine-tuning, where the embeddings are frozen.
"""

from fastft.demo import words
from fastft.demo.words import Dice

PRINTABLE = tuple(chr(code) for code in range(33, 127))
LOWER = tuple("abcdefghijklmnopqrstuvwxyz")
# Largest number that is added.
LARGEST_TERM = 9


def sums(dice: Dice) -> str:
    """Five to eight sums of numbers from 1 to 9."""
    lines = []
    for _ in range(5 + dice.below(4)):
        left, right = 1 + dice.below(LARGEST_TERM), 1 + dice.below(LARGEST_TERM)
        lines.append(f"{left} + {right} = {left + right}")
    return "Sums\n" + "\n".join(lines)


def colours(dice: Dice) -> str:
    """Five to eight colours with their CSS codes."""
    names = dice.sample(tuple(words.COLOUR_CODES), 5 + dice.below(4))
    return "Colours\n" + "\n".join(f"{name}: {words.COLOUR_CODES[name]}" for name in names)


def opposites(dice: Dice) -> str:
    """Five to eight pairs of opposites, either way round."""
    pairs = dice.sample(words.OPPOSITES, 5 + dice.below(4))
    turned = [pair if dice.chance(0.5) else pair[::-1] for pair in pairs]
    return "Opposites\n" + "\n".join(f"{one} - {other}" for one, other in turned)


def letters(dice: Dice) -> str:
    """Made-up words, mostly of small letters, some of any signs, each written four times."""
    lines = []
    for _ in range(2 + dice.below(3)):
        signs = PRINTABLE if dice.chance(0.3) else LOWER
        word = "".join(dice.pick(signs) for _ in range(3 + dice.below(6)))
        lines.append(" ".join([word] * 4))
    return "Letters\n" + "\n".join(lines)


def copies(dice: Dice) -> str:
    """A row of two to six unrelated words and names, written five times: trains copying."""
    row = [_any_word(dice) for _ in range(2 + dice.below(5))]
    return "Copies\n" + "\n".join([", ".join(row)] * 5)


def _any_word(dice: Dice) -> str:
    lists = (words.GIRLS, words.BOYS, words.ANIMALS, words.THINGS, words.PLACES, words.COLOURS, words.FOODS)
    return dice.made_up_name() if dice.chance(0.15) else dice.pick(dice.pick(lists))
