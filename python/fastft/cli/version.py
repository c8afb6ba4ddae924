"""`fastft version`."""

from fastft import console
from fastft.cli.job import Job


def version() -> Job:
    """Print the version."""
    import fastft

    return Job(lambda: console.result(f"fastft {fastft.__version__}"))
