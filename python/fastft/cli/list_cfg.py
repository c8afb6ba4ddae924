"""`fastft list-cfg`: the names that `train` and `copy-cfg` take."""

from fastft import console
from fastft.cli.job import Job


def list_cfg(*, pattern: str | None = None) -> Job:
    """List the recipes: all, or the best matches first.

    Args:
        pattern: text to look for in the names; need not match exactly
    """

    def run() -> int:
        from fastft.config import recipes

        found = recipes.search(pattern) if pattern else recipes.names()
        if not found:
            console.note(f"no recipe matches `{pattern}`; `fastft list-cfg` lists all")
            return 1
        console.result("\n".join(found))
        return 0

    return Job(run)
