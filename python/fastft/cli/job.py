"""What a command function gives back: work that has been asked for but not begun."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Job:
    """Work to be done once every word of the command line is known to be right.

    Attributes:
        run: does the work; returns the exit code, or None for 0.
    """

    run: Callable[[], int | None]
