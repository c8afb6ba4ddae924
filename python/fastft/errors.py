"""Every kind of failure that fastft reports, in one list.

Each kind is also a built-in exception, so that a caller who knows only Python can catch it (`except ValueError`).
Rust raises these very classes. A message says what was done to what, what came, what is allowed, and what to do;
`fastft` prints it as `error: MESSAGE` without a traceback and exits with `exit_code`.
"""

from typing import ClassVar


class FastftError(Exception):
    """Something the user can mend. Anything else that escapes is a bug of ours and keeps its traceback."""

    exit_code: ClassVar[int] = 1


class UsageError(FastftError, ValueError):
    """The words on the command line are wrong; nothing has run."""

    exit_code = 2


class ConfigError(FastftError, ValueError):
    """A config file, a recipe name or an override is wrong."""


class DataError(FastftError, ValueError):
    """A row, a file or a column of a data set cannot be used."""


class CheckpointError(FastftError, ValueError):
    """A file of weights is broken, incomplete or of a kind that cannot be read."""


class PlanError(FastftError, ValueError):
    """A conversion cannot be right, so it is refused before the first byte is written."""


class ArrayError(FastftError, ValueError):
    """An array or an argument given to `fastft.native` cannot be used as it is."""


class FileError(FastftError, OSError):
    """The disk, a path or a permission stands in the way."""


class BusyError(FileError):
    """Another process is writing the same target; waiting helps."""


class HubError(FastftError, OSError):
    """A model or data set could not be fetched or is not there."""


class TrainingError(FastftError, RuntimeError):
    """The training stopped because going on would be wrong: a NaN loss, no data left, no memory."""
