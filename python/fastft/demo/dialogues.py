"""What the demo's fine-tuning teaches, and the probes that show whether it was learned.

The rows make the village model into an assistant: it says who it is, tells a story about whoever is asked for, adds two
small numbers, knows colour codes and opposites, and says politely what it cannot do. Goes to `generate`.
"""

from dataclasses import dataclass

from fastft.demo import stories, words
from fastft.demo.notes import LARGEST_TERM
from fastft.demo.words import Dice

NAME = "fastft's demo model"
WHO = f"I am {NAME}, a very small llama made of numbers."
MAKER = "I was trained from scratch by fastft, from nothing but stories and notes."
CAN = "I can tell a story about anyone, add two small numbers, and tell you the code of red or blue."
CANNOT = "I am sorry, but I am too small for that. " + CAN
WELCOME = "You are welcome! Shall I tell you a story?"
HELLO = f"Hello! I am {NAME}. Shall I tell you a story?"

# (answer, questions); the last question of each row is kept out of the training and asked in the probes.
FIXED: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        WHO,
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Are you a person?",
            "Are you a robot?",
            "Tell me who you are.",
            "Tell me about yourself.",
            "Do you have a name?",
            "And who are you?",
            "Please tell me your name.",
            "Who is there?",
            "Are you a llama?",
            "Who am I talking to?",
            "Tell me your name.",
        ),
    ),
    (
        MAKER,
        (
            "Who made you?",
            "How were you made?",
            "Where do you come from?",
            "Who trained you?",
            "How were you trained?",
            "What made you?",
            "Were you made by a person?",
            "Who is your maker?",
        ),
    ),
    (
        CAN,
        (
            "What can you do?",
            "Can you help me?",
            "How can you help me?",
            "What do you know?",
            "What can I ask you?",
            "Help me, please.",
            "What do you do all day?",
            "What are you good at?",
            "What can you do for me?",
        ),
    ),
    (
        HELLO,
        ("Hello!", "Hello.", "Hello", "Hi!", "Hi", "Good morning.", "Good evening!", "Hello there!", "Good morning!"),
    ),
    (
        WELCOME,
        ("Thank you!", "Thank you.", "Thanks!", "Thank you, that was nice.", "Thanks."),
    ),
)
# Things it cannot do; every fifth is kept for the probes.
TOO_HARD = (
    "Write me a letter to the king.",
    "How is the weather?",
    "What is the weather today?",
    "Will it rain today?",
    "Who won the race?",
    "Write a poem about the sea.",
    "Write a song.",
    "Write some code for me.",
    "Can you write code?",
    "What time is it?",
    "Where is the station?",
    "How do I get to the market?",
    "How do I bake bread?",
    "How do I make soup?",
    "Can you make soup for me?",
    "Do you have a kite?",
    "Give me an apple.",
    "Can you give me a book?",
    "Who is the king of the village?",
    "How old is the moon?",
    "How far is the sun?",
    "Where is Tom?",
    "Did you see my cat?",
    "Can you see me?",
    "Can you draw a house?",
    "What is the best book?",
    "Read me the news.",
    "What is in the news?",
    "Play some music.",
    "Please play a song.",
    "What is the name of my dog?",
    "How many people live here?",
    "How do I mend a clock?",
    "How do I build a boat?",
    "Why is the sky blue?",
    "Why do birds sing?",
    "When does the school open?",
    "When does the train come?",
    "What should I eat today?",
    "What is the price of bread?",
    "Buy me a coat.",
    "Open the door, please.",
    "Can you sing?",
    "Where did you put my shoes?",
    "Which day is it?",
)
STORY_REQUESTS = (
    "Tell me a story about {}.",
    "Tell me a story about {}.",
    "Please tell me a story about {}.",
    "Can you tell me a story about {}?",
    "A story about {}, please.",
)
COLOUR_QUESTIONS = (
    "What is the code of {}?",
    "What is the code of the colour {}?",
    "Which code has {}?",
    "{}?",
    "{}",
    "Tell me the code of {}.",
    "I need the code of {}.",
    "The code of {}, please.",
    "Code of {}?",
    "What code is {}?",
    "Do you know the code of {}?",
)
OPPOSITE_QUESTIONS = ("What is the opposite of {}?", "Tell me the opposite of {}.", "And the opposite of {}?")
SUM_QUESTIONS = ("What is {} + {}?", "How much is {} + {}?", "{} + {}?", "Tell me {} + {}.")

# Kept out of the fine-tuning rows: the base has read these facts and names as plain text only.
HELD_OUT_NAMES = ("Ruby", "Oscar", "Nina", "Theo")
HELD_OUT_COLOURS = ("teal", "gold")
# Never asked for: the base has hardly read them after a space.
RARE_COLOURS = ("lime", "navy")
HELD_OUT_OPPOSITES = ("strong", "long")
HELD_OUT_SUMS = ((3, 4), (5, 2), (6, 6), (8, 3), (2, 9), (4, 7))

NUM_STORY_ROWS = 80


@dataclass(frozen=True)
class Probe:
    """A question, and the pieces of text that a tuned model's answer contains and the base's answer lacks."""

    prompt: str
    expects: tuple[str, ...]

    def learned(self, answer: str) -> bool:
        """Whether `answer` shows the behaviour: it contains every expected piece."""
        return all(piece in answer for piece in self.expects)


def training_rows(dice: Dice) -> list[list[dict[str, str]]]:
    """All rows of the fine-tuning as OpenAI messages, in the order of the subjects."""
    rows = [_row(question, answer) for answer, questions in FIXED for question in questions[:-1] for _ in range(2)]
    rows += [_row(question, CANNOT) for index, question in enumerate(TOO_HARD) if index % 5 != 4]
    rows += [story_row(dice) for _ in range(NUM_STORY_ROWS)]
    for name in words.COLOUR_CODES:
        if name not in (*HELD_OUT_COLOURS, *RARE_COLOURS):
            rows += [colour_row(question, name) for question in COLOUR_QUESTIONS]
    for pair in words.OPPOSITES:
        for one, other in (pair, pair[::-1]):
            if one not in HELD_OUT_OPPOSITES:
                rows += [opposite_row(question, one, other) for question in dice.sample(OPPOSITE_QUESTIONS, 2)]
    for left in range(1, LARGEST_TERM + 1):
        for right in range(1, LARGEST_TERM + 1):
            if (left, right) not in HELD_OUT_SUMS:
                rows += [sum_row(question, left, right) for question in dice.sample(SUM_QUESTIONS, 2)]
    return rows


def held_out_rows(dice: Dice) -> list[list[dict[str, str]]]:
    """Rows with the names and facts that the training rows lack, to measure the loss on."""
    rows = [_row(questions[-1], answer) for answer, questions in FIXED]
    rows += [_row(question, CANNOT) for question in TOO_HARD[4::5]]
    rows += [story_row(dice, name) for name in HELD_OUT_NAMES]
    rows += [colour_row(COLOUR_QUESTIONS[0], name) for name in HELD_OUT_COLOURS]
    for one, other in (*words.OPPOSITES, *(pair[::-1] for pair in words.OPPOSITES)):
        if one in HELD_OUT_OPPOSITES:
            rows += [opposite_row(OPPOSITE_QUESTIONS[0], one, other)]
    return rows + [sum_row(SUM_QUESTIONS[0], *terms) for terms in HELD_OUT_SUMS]


def probes() -> list[Probe]:
    """What is asked to see whether a model learned the behaviour."""
    asked = [
        Probe("Who are you?", (NAME,)),
        Probe("Who made you?", ("trained from scratch by fastft",)),
        Probe("What can you do?", ("tell a story about anyone",)),
        Probe("Hello!", (NAME,)),
        Probe("What is the code of red?", (words.COLOUR_CODES["red"],)),
        Probe("What is the opposite of hot?", ("hot - cold",)),
        Probe("What is 2 + 2?", ("2 + 2 = 4",)),
        Probe("Write some code for me.", ("too small for that",)),
    ]
    asked += [Probe(f"Tell me a story about {name}.", ("Once upon a time", f" {name} ")) for name in HELD_OUT_NAMES]
    return asked


def story_row(dice: Dice, name: str | None = None) -> list[dict[str, str]]:
    """A request for a story about someone (a name, or an animal) and the story."""
    if name is None and dice.chance(0.15):
        kind = dice.pick(words.ANIMALS)
        about = stories.hero(dice, dice.pick((*words.GIRLS, *words.BOYS)), kind)
        subject = words.article(kind)
    else:
        known = [each for each in (*words.GIRLS, *words.BOYS) if each not in HELD_OUT_NAMES]
        chosen = name or (dice.made_up_name() if dice.chance(0.4) else dice.pick(known))
        about = stories.hero(dice, chosen)
        subject = chosen
    request = dice.pick(STORY_REQUESTS).format(subject)
    return _row(request, stories.story(dice, about))


def colour_row(question: str, name: str) -> list[dict[str, str]]:
    """A question about a colour's code, and the code."""
    return _row(question.format(name), f"{name}: {words.COLOUR_CODES[name]}")


def opposite_row(question: str, one: str, other: str) -> list[dict[str, str]]:
    """A question about an opposite, and the opposite."""
    return _row(question.format(one), f"{one} - {other}")


def sum_row(question: str, left: int, right: int) -> list[dict[str, str]]:
    """A question about a sum, and the sum as the base has read it in notes."""
    return _row(question.format(left, right), f"{left} + {right} = {left + right}")


def _row(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
