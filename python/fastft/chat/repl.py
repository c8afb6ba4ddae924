"""The conversation at the terminal, and the one-shot forms for scripts.

On a terminal: turns with history; RESET forgets it, IMAGE FILE shows an image with the next question, EXIT or Ctrl-D
leaves, Ctrl-C stops an answer. With `--prompt`, or
when stdin is no terminal, each question stands alone and only answers go to stdout.
"""

import sys
from collections.abc import Sequence

from fastft import console, stop
from fastft.chat import session
from fastft.data.dialogue import ImageRef, Message
from fastft.errors import ConfigError, DataError, UsageError


def run(
    talk: session.Talk,
    sampling: session.Sampling,
    *,
    system: str | None = None,
    prompt: str | None = None,
    images: Sequence[ImageRef] = (),
) -> int:
    """Talk until the user leaves, or answer what was given.

    Args:
        talk: the model.
        sampling: how it answers.
        system: system message of all questions.
        prompt: answer only this.
        images: stand before the first question of a conversation, or before each question that stands alone.

    Returns:
        exit code 0; 130 when Ctrl-C stopped a one-shot answer.

    Raises:
        UsageError: an empty prompt.
        ConfigError: images for a model that reads text only.
    """
    talk.require_sight(images)
    if system and talk.template is None:
        console.warn("chat: this model has no chat template, so the system message is not used")
    if prompt is not None:
        if not prompt.strip():
            raise UsageError("chat: --prompt is empty")
        return _answer_alone(talk, sampling, system, prompt, images)
    if sys.stdin.isatty():
        with stop.held():
            return _converse(talk, sampling, system, images)
    for line in sys.stdin:
        if line.strip():
            code = _answer_alone(talk, sampling, system, line.rstrip("\n"), images)
            if code:
                return code
    return 0


def _answer_alone(
    talk: session.Talk, sampling: session.Sampling, system: str | None, text: str, images: Sequence[ImageRef]
) -> int:
    try:
        with stop.held():
            session.answer(talk, session.question(text, system, images), sampling, _write)
    except KeyboardInterrupt:
        print()
        return 130
    print()
    return 0


def _converse(talk: session.Talk, sampling: session.Sampling, system: str | None, images: Sequence[ImageRef]) -> int:
    import readline  # noqa: F401 - gives input() its history and line editing

    shows = "" if talk.seer is None else "IMAGE FILE shows an image with the next question, "
    console.note(f"RESET forgets the conversation, {shows}EXIT or Ctrl-D leaves, Ctrl-C stops an answer")
    waiting = list(images)  # shown with the next question
    history = [Message("system", system)] if system else []
    turns: list[Message] = []
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            continue
        word = text.strip()
        if not word:
            continue
        if word.upper() == "EXIT":
            return 0
        if word.upper() == "RESET":
            turns, waiting = [], list(images)
            console.note("the conversation is forgotten")
            continue
        if word.upper() == "IMAGE" or word.upper().startswith("IMAGE "):
            waiting += _named(talk, word[len("IMAGE") :].strip())
            continue
        asked = [*turns, *session.question(text, images=waiting)]
        waiting = []
        said: list[str] = []

        def on_text(new: str, said: list[str] = said) -> None:
            said.append(new)
            _write(new)

        try:
            session.answer(talk, [*history, *asked], sampling, on_text)
        except KeyboardInterrupt:
            console.note(" (stopped)")
        print()
        turns = [*asked, Message("assistant", "".join(said))]


def _named(talk: session.Talk, path: str) -> list[ImageRef]:
    """The image that the user names, or what is wrong with it."""
    shown = session.image(path)
    try:
        talk.require_sight([shown])
        session.look(shown)
    except (ConfigError, DataError) as error:
        console.error(str(error))
        return []
    console.note(f"{path} is shown with the next question")
    return [shown]


def _write(text: str) -> None:
    print(console.printable(text), end="", flush=True)
