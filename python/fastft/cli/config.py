"""`fastft config show` and `fastft config schema`."""

from fastft import console
from fastft.cli.job import Job


def show(config: str, *overrides: str) -> Job:
    """Print a config as used, with the source of each value.

    Args:
        config: recipe name or config file
        overrides: values to change, e.g. train.lr=1e-5
    """

    def run() -> None:
        from fastft.config import load
        from fastft.config import show as view

        console.result(view.full(load.load(config, overrides)).rstrip("\n"))

    return Job(run)


def schema() -> Job:
    """Print the JSON schema of a config file, for editors."""

    def run() -> None:
        from fastft.config import show as view

        console.result(view.json_schema())

    return Job(run)
