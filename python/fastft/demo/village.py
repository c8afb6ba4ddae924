"""Talks in a village, in the chat form: how the demo base answers before it is fine-tuned.

They train the chat marks and the shape of a dialogue. Whoever answers is a villager with a name, a trade and little time,
so the base has no single identity and none of the behaviour that `dialogues` teaches.
"""

from fastft.demo import words
from fastft.demo.words import Dice, article

# (what is asked, what the villager says); N the villager, J the trade, V the visitor, the rest as in `stories`.
EXCHANGES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Who are you?", "What is your name?", "Who is there?", "And you are?"),
        ("I am {N}, the {J}.", "My name is {N}. I am the {J} of the village.", "{N}. And who are you?"),
    ),
    (
        ("Good morning, {N}.", "Hello!", "Hello, {N}!", "Good evening."),
        ("Good morning, {V}.", "Hello, {V}. It is a {W} day.", "Come in, {V}. Have some {D}."),
    ),
    (
        ("What are you doing?", "What do you do all day?", "Are you at work?"),
        ("I am making {an_T}.", "I am looking for my {C} {T}.", "I am the {J}. I work from morning to night."),
    ),
    (
        ("Where is the {P}?", "How do I get to the {P}?", "Is it far to the {P}?"),
        ("The {P} is behind the {Q}.", "Go to the {Q}, then ask {V}.", "It is near. You can see it from the {Q}."),
    ),
    (
        ("Do you have {an_T}?", "Can you give me {an_T}?", "I need {an_T}."),
        ("Yes, here is a {C} {T}.", "No, but {V} has a {C} {T}.", "Take the {C} one. It is in the {Q}."),
    ),
    (
        ("What is that?", "What do you have there?", "What is in your basket?"),
        ("That is {an_T} for {V}.", "It is a {C} {T}. I found it in the {P}.", "Some {D} from the {Q}."),
    ),
    (
        ("How is the weather?", "Will it rain today?", "What a day!"),
        ("It is {W} today.", "It was {W} in the {P}.", "Ask {V}. I was at home all day."),
    ),
    (
        ("Did you see {V}?", "Where is {V}?", "Do you know {V}?"),
        ("{V} is in the {P}.", "{V} went to the {Q} with {an_A}.", "Yes, {V} has {an_A} and lives by the {P}."),
    ),
    (
        ("How many {things} do you have?", "Can you count the {things}?"),
        ("I have {n} {things}.", "{V} took them all to the {P}.", "There are {n} in the box and {m} in the {P}."),
    ),
    (
        ("Can you help me?", "Help me, please.", "Please come with me."),
        ("I have no time. I have to go to the {P}.", "Ask {V}, the {J}.", "Later. First I have to find my {A}."),
    ),
    (
        ("Tell me more.", "Is that so?", "And then?", "Why?"),
        ("{V} told me so in the {P}.", "That is all I know.", "Because it was {W}, and the {A} ran away."),
    ),
    (
        ("Thank you!", "I have to go.", "Good night, {N}.", "See you."),
        ("Good night, {V}.", "Go well, and mind the {A}.", "Come back soon."),
    ),
)
SYSTEMS = ("You are {N}, the {J}.", "You live in the village. Your name is {N}.", "{V} comes to see {N}, the {J}.")


def talk(dice: Dice) -> list[dict[str, str]]:
    """A dialogue of one to three exchanges, as OpenAI messages; one in four starts with a system message."""
    slots = _slots(dice)
    messages = []
    if dice.chance(0.25):
        messages.append({"role": "system", "content": dice.pick(SYSTEMS).format(**slots)})
    for asked, answers in dice.sample(EXCHANGES, 1 + dice.below(3)):
        messages.append({"role": "user", "content": dice.pick(asked).format(**slots)})
        messages.append({"role": "assistant", "content": dice.pick(answers).format(**slots)})
    return messages


def chat_marks(messages: list[dict[str, str]]) -> str:
    """The dialogue as the demo tokenizer's chat template writes it (a test compares the two)."""
    return "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)


def _slots(dice: Dice) -> dict[str, str]:
    villager = dice.made_up_name() if dice.chance(0.3) else dice.pick((*words.GIRLS, *words.BOYS))
    visitor = dice.made_up_name() if dice.chance(0.3) else dice.pick((*words.GIRLS, *words.BOYS))
    place, other_place = dice.sample(words.PLACES, 2)
    thing, animal = dice.pick(words.THINGS), dice.pick(words.ANIMALS)
    slots = {"N": villager, "V": visitor, "J": dice.pick(words.JOBS), "P": place, "Q": other_place}
    slots |= {"T": thing, "an_T": article(thing), "A": animal, "an_A": article(animal)}
    slots |= {"C": dice.pick(words.COLOURS), "D": dice.pick(words.FOODS), "W": dice.pick(words.WEATHERS)}
    slots |= {"n": str(2 + dice.below(8)), "m": str(2 + dice.below(8))}
    slots["things"] = dice.pick(words.COUNTED_THINGS)
    return slots
