"""The conversation at the terminal, and the one-shot forms for scripts.

On a terminal: turns with history; RESET forgets it, EXIT or Ctrl-D leaves, Ctrl-C stops an answer. With `--prompt`, or
when stdin is no terminal, each question stands alone and only answers go to stdout.
"""

import sys

from fastft import console, stop
from fastft.chat import session
from fastft.data.dialogue import Message
from fastft.errors import UsageError


def run(talk: session.Talk, sampling: session.Sampling, *, system: str | None = None, prompt: str | None = None) -> int:
    """Talk until the user leaves, or answer what was given.

    Args:
        talk: the model.
        sampling: how it answers.
        system: system message of all questions.
        prompt: answer only this.

    Returns:
        exit code 0; 130 when Ctrl-C stopped a one-shot answer.

    Raises:
        UsageError: an empty prompt.
    """
    if system and talk.template is None:
        console.warn("chat: this model has no chat template, so the system message is not used")
    if prompt is not None:
        if not prompt.strip():
            raise UsageError("chat: --prompt is empty")
        return _answer_alone(talk, sampling, system, prompt)
    if sys.stdin.isatty():
        with stop.held():
            return _converse(talk, sampling, system)
    for line in sys.stdin:
        if line.strip():
            code = _answer_alone(talk, sampling, system, line.rstrip("\n"))
            if code:
                return code
    return 0


def _answer_alone(talk: session.Talk, sampling: session.Sampling, system: str | None, text: str) -> int:
    try:
        with stop.held():
            session.answer(talk, session.question(text, system), sampling, _write)
    except KeyboardInterrupt:
        print()
        return 130
    print()
    return 0


def _converse(talk: session.Talk, sampling: session.Sampling, system: str | None) -> int:
    import readline  # noqa: F401 - gives input() its history and line editing

    console.note("RESET forgets the conversation, EXIT or Ctrl-D leaves, Ctrl-C stops an answer")
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
            turns = []
            console.note("the conversation is forgotten")
            continue
        asked = [*turns, Message("user", text)]
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


def _write(text: str) -> None:
    print(console.printable(text), end="", flush=True)
