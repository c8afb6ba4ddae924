"""The hubs' libraries speak through us: one line a warning, no tokens, no bars of their own.

They log to stderr by themselves, with whole addresses; a mirror's address may hold a password, a signed one a key.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from fastft import console

# Said by a logger of its own for every repository without a model card; nobody needs it.
_IDLE = ("huggingface_hub.repocard",)
LOGGERS = ("huggingface_hub", "modelscope_hub", "datasets")


class _Spoken(logging.Handler):
    """Turns a library's warning into a note, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        lines = record.getMessage().strip().splitlines()
        text = lines[0] if lines else ""
        if text and text not in self._said and not record.name.startswith(_IDLE):
            self._said.add(text)
            console.note(f"{record.name.partition('.')[0]}: {text}")


def prepare() -> None:
    """Set what the libraries read when they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("MODELSCOPE_LOG_LEVEL", "40")
    if is_offline():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def is_offline() -> bool:
    """Whether FASTFT_OFFLINE says that no hub shall be asked."""
    return os.environ.get("FASTFT_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")


@contextmanager
def spoken_for() -> Iterator[None]:
    """Say the libraries' warnings as notes meanwhile; they must be imported before, since they set up their logs then."""
    before = {}
    spoken = _Spoken()
    for name in LOGGERS:
        logger = logging.getLogger(name)
        before[name] = (logger.handlers[:], logger.propagate)
        logger.handlers[:] = [spoken]
        logger.propagate = False
    try:
        yield
    finally:
        for name, (handlers, propagate) in before.items():
            logger = logging.getLogger(name)
            logger.handlers[:] = handlers
            logger.propagate = propagate
