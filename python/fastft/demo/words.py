"""The words that all demo text is made of, and the dice that choose among them.

Chosen for a model of 1.4 million weights: short lists, plain words. Goes to `stories`, `village`, `notes` and `dialogues`.
"""

# ruff: noqa: SIM905  rows of words read better than lists of strings
import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")

GIRLS = (
    "Ada Amy Anna Bella Clara Daisy Ella Emma Fay Grace Hana Ida Ines Iris Jana June Kate Lena Lily Lucy "
    "Maya Mia Nina Nora Olga Pia Rosa Ruby Sara Tina Uma Vera Wanda Yara Zoe"
).split()
BOYS = (
    "Adam Alan Anton Ben Bruno Carl Dan David Emil Eric Felix Finn Fred Hugo Igor Ivan Jack Jonas Karl Kim "
    "Leo Luca Max Nick Noah Oscar Otto Paul Peter Quinn Sam Theo Tom Victor Xaver"
).split()
ANIMALS = (
    "bear bird cat cow deer dog donkey dragon duck fox frog goat goose hare hen horse lamb lion llama mole "
    "mouse otter owl panda pig pony rabbit robot sheep snail tiger turtle whale wolf"
).split()
# Pieces of made-up names: a base that has copied many of these can copy a name that it has never seen.
NAME_STARTS = "b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sh st t tr v w x y z".split()
NAME_MIDDLES = "a e i o u ai ea ee ia io ou ya".split()
NAME_ENDS = "b ck d f ft g k l lla ll m mi n na ndra nn p r ra rt s st t tta v x y z".split()

ADJECTIVES = (
    "brave clever cheerful curious friendly gentle happy kind little lucky patient quiet shy small young".split()
)
PLACES = "barn castle cave farm field forest garden harbour house kitchen market meadow mill park school shop stable station tower valley village woods yard".split()
THINGS = "apple ball basket bell blanket boat book bottle box bucket button candle coat cup drum flag flower flute hat jar key kite ladder lamp letter map mirror nut pear pebble pencil ring rope shell shoe spoon stick stone sweet wheel whistle".split()
FOODS = "apples bread cake carrots cheese cherries honey nuts pancakes pears pie plums porridge soup".split()
DISHES = "bread cake pancakes pie porridge soup".split()
COUNTED_THINGS = "apples balls buttons flowers nuts pears shells stones".split()
WEATHERS = "cold cloudy foggy hot rainy snowy sunny warm windy".split()
JOBS = "baker boatman carpenter cook doctor farmer fisher gardener mason miller painter postman potter sailor shepherd smith tailor teacher weaver".split()

# Names and codes of CSS colours (CSS Color Module Level 4, section 6.1).
COLOUR_CODES = {
    "red": "#ff0000",
    "green": "#008000",
    "blue": "#0000ff",
    "yellow": "#ffff00",
    "orange": "#ffa500",
    "purple": "#800080",
    "pink": "#ffc0cb",
    "brown": "#a52a2a",
    "black": "#000000",
    "white": "#ffffff",
    "grey": "#808080",
    "gold": "#ffd700",
    "silver": "#c0c0c0",
    "navy": "#000080",
    "teal": "#008080",
    "lime": "#00ff00",
}
# Colours of things in stories; each is written with `a`, never `an`.
COLOURS = "red green blue yellow purple pink brown black white grey gold silver".split()

OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("day", "night"),
    ("up", "down"),
    ("old", "new"),
    ("fast", "slow"),
    ("happy", "sad"),
    ("wet", "dry"),
    ("open", "closed"),
    ("full", "empty"),
    ("high", "low"),
    ("long", "short"),
    ("loud", "quiet"),
    ("hard", "soft"),
    ("light", "dark"),
    ("near", "far"),
    ("rich", "poor"),
    ("clean", "dirty"),
    ("early", "late"),
    ("strong", "weak"),
)


class Dice:
    """Repeatable choices.

    Only `random.Random.random` is promised to give the same numbers in every Python version, so nothing else is used.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311  no secret is made here

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        return int(self._random.random() * count)

    def chance(self, probability: float) -> bool:
        """True with this probability (0 to 1)."""
        return self._random.random() < probability

    def pick(self, items: Sequence[Item]) -> Item:
        """One of `items`, all equally likely; `items` must not be empty."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` different members of `items`, in random order; count at most len(items)."""
        left = list(items)
        return [left.pop(self.below(len(left))) for _ in range(count)]

    def made_up_name(self) -> str:
        """A name of two or three random syllables, such as `Brikoft`."""
        syllables = [self.pick(NAME_STARTS) + self.pick(NAME_MIDDLES) for _ in range(1 + self.below(2))]
        return ("".join(syllables) + self.pick(NAME_ENDS)).capitalize()


def article(noun: str) -> str:
    """`noun` with its indefinite article: an owl, a fox."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
