"""Short stories from templates: most of what the demo base reads, and the answers to `Tell me a story about NAME.`

A story is an opening, one plot of four to six sentences, and an end. In a template N is the hero, F a friend, T a thing,
A an animal, C a colour, P and Q places, D food, E a dish, and he/his/him the hero's pronouns (all in braces).
"""

from dataclasses import dataclass

from fastft.demo import words
from fastft.demo.words import Dice, article

OPENINGS = (
    "Once upon a time there was {kind} named {N}.",
    "Once upon a time there was {kind} called {N}. {N} lived near the {P}.",
    "Once upon a time {kind} named {N} lived by the {P}.",
)
ENDS = (
    "{N} smiled and went home.",
    "From that day on, {N} and {F} were best friends.",
    "That night {N} slept very well.",
    "{N} was very happy.",
    "And {N} never forgot that day.",
    "{N} laughed and thanked {F}.",
)
# Each plot is a row of sentences; each sentence is one of the alternatives.
PLOTS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (
        ("One {W} day {N} lost a {C} {T}.", "One morning {N} could not find {his} {C} {T}."),
        ("{N} looked in the {P}, but it was not there.", "{He} looked for it in the {P} and found nothing."),
        ("Then {N} met {F}.", "{F} saw that {N} was sad."),
        ('"Did you see my {T}?" asked {N}.', '"What is wrong?" asked {F}. "I lost my {T}," said {N}.'),
        ('"Yes, it is in the {Q}," said {F}.', '"Let us look in the {Q}," said {F}.'),
        ("They ran to the {Q} and found the {C} {T}.", "There, in the {Q}, lay the {C} {T}."),
    ),
    (
        ("{N} wanted to make {E} for {F}.", "It was the birthday of {F}, and {N} wanted to make {E}."),
        ("But there was no milk in the house.", "But the fire was cold and the pot was empty."),
        ("So {N} walked to the {P} with a {T}.", "So {he} took a {C} {T} and went to the {P}."),
        ("{An_A} helped {him} to carry it all.", 'On the way {he} met {an_A}. "May I help?" it asked.'),
        ("Soon the {E} was ready, and {F} came.", '{F} came and tasted the {E}. "This is so good!" said {F}.'),
    ),
    (
        ("One day {N} heard a sound in the {P}.", "One {W} night {N} heard a strange noise from the {P}."),
        ("{He} was afraid, but {he} went to look.", '"Who is there?" asked {N}.'),
        ("It was {an_A} that could not get home.", "A small {A} sat there and cried."),
        ('"Do not be sad," said {N}. "I will help you."', "{N} gave it some {D} and a warm blanket."),
        ("They walked to the {Q}, where {F} lived.", "Together they found the way to the {Q}."),
        ('"Thank you, {N}," said the {A}.', 'The {A} jumped for joy. "You are so kind, {N}!" it said.'),
    ),
    (
        ("{N} found a {C} {T} in the {P}.", "One {W} day {N} saw a {C} {T} near the {P}."),
        ('"What a nice {T}!" said {N}.', "{He} picked it up and showed it to {F}."),
        ('Then {F} said, "That is my {T}."', "But the {T} belonged to {F}, who had looked for it all day."),
        ("{N} gave it back at once.", "{N} was a little sad, but {he} gave it back."),
        ("{F} was glad and gave {N} some {D}.", '"Let us share it," said {F}, and so they did.'),
    ),
    (
        ("{N} and {F} wanted to build a boat.", "{N} had a plan: to cross the lake in a boat with {F}."),
        ("They looked for wood in the {P}.", "{He} found wood, a rope and a {C} {T}."),
        ("{An_A} came and watched them.", "It was hard work, and the day was {W}."),
        ("The boat was small, but it was strong.", "When it was ready, they painted it {C}."),
        ("They took some {D} and went to the lake.", "All day they played on the lake and ate {D}."),
    ),
    (
        ("{N} had {n} {things}.", "In a basket {N} had {n} {things}."),
        ("{F} gave {him} {m} more.", "Then {F} came with {m} more."),
        ("Now {N} had {sum} {things}.", '"Now I have {sum} {things}!" said {N}.'),
        ("{N} took them to the {P} and showed them to {an_A}.", "{He} put them into a {C} box."),
        ('"You can count so well, {N}," said {F}.', "They played with them until it was dark."),
    ),
    (
        ("The {A} was the fastest in the {P}.", 'Every day the {A} laughed: "I am fast and you are slow, {N}."'),
        ('"Let us race to the {Q}," said {N}.', "{N} wanted to win a race to the {Q}."),
        ("The {A} ran away, but soon it was tired and slept under a tree.", "{F} stood at the {Q} with a {C} flag."),
        ("{N} was slow, but {he} did not stop.", "{N} ran and ran, step by step."),
        ("In the end {N} came first.", '"{N} wins!" said {F}.'),
    ),
    (
        ("It was a {W} day, and {N} had nothing to do.", "{N} did not know what to play."),
        ("{He} looked at the {T} and had an idea.", "Then {F} came with a {C} {T}."),
        ('"Let us play in the {P}!" said {N}.', "They made a little house in the {P}."),
        ("{An_A} wanted to play too.", "They asked {an_A} to come with them."),
        ("They played until the sun went down.", "In the evening they ate {D} and told stories."),
    ),
)


@dataclass(frozen=True)
class Hero:
    """Who a story is about: the name, what kind of being (`girl`, `fox`), and the pronouns he/his/him or she/her/her."""

    name: str
    kind: str
    pronouns: tuple[str, str, str]


def hero(dice: Dice, name: str | None = None, kind: str | None = None) -> Hero:
    """The hero with this name and kind; what is not given is chosen (every third of the chosen names is made up)."""
    if name is None:
        name = dice.made_up_name() if dice.chance(0.33) else dice.pick((*words.GIRLS, *words.BOYS))
    if kind is None:
        kind = dice.pick(words.ANIMALS) if name not in (*words.GIRLS, *words.BOYS) or dice.chance(0.3) else None
    if kind is None:
        kind = "girl" if name in words.GIRLS else "boy"
    female = kind == "girl" or (kind != "boy" and (name in words.GIRLS or name[-1] in "aei"))
    return Hero(name, kind, ("she", "her", "her") if female else ("he", "his", "him"))


def story(dice: Dice, about: Hero) -> str:
    """A story of one paragraph about `about`."""
    slots = _slots(dice, about)
    plot = [dice.pick(sentences) for sentences in dice.pick(PLOTS)]
    return " ".join(sentence.format(**slots) for sentence in (dice.pick(OPENINGS), *plot, dice.pick(ENDS)))


def _slots(dice: Dice, about: Hero) -> dict[str, str]:
    """What stands for each brace of the templates."""
    he, his, him = about.pronouns
    friend = about.name
    while friend == about.name:
        friend = dice.pick((*words.GIRLS, *words.BOYS))
    place, other_place = dice.sample(words.PLACES, 2)
    animal = about.kind
    while animal == about.kind:
        animal = dice.pick(words.ANIMALS)
    thing = dice.pick(words.THINGS)
    count, more = 2 + dice.below(8), 2 + dice.below(8)
    slots = {"N": about.name, "F": friend, "A": animal, "T": thing, "P": place, "Q": other_place}
    slots["E"] = dice.pick(words.DISHES)
    slots |= {"C": dice.pick(words.COLOURS), "D": dice.pick(words.FOODS), "W": dice.pick(words.WEATHERS)}
    slots |= {"he": he, "his": his, "him": him, "He": he.capitalize(), "an_A": article(animal)}
    slots |= {"An_A": article(animal).capitalize(), "n": str(count), "m": str(more), "sum": str(count + more)}
    slots["things"] = dice.pick(words.COUNTED_THINGS)
    slots["kind"] = article(f"{dice.pick(words.ADJECTIVES)} {about.kind}")
    return slots
