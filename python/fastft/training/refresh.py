"""Draws loss.png and report.html anew whenever a checkpoint is written."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastft.training import metrics, page, report


def draw(run_dir: Path, about: page.About, *, state: str) -> None:
    """Write both from what lies in the run folder.

    Args:
        run_dir: the run folder.
        about: what the run knows of itself.
        state: `running`, `stopped` or `finished`.
    """
    config = about.config
    title = f"{config.name}: {config.method.kind}, {about.steps} steps"
    report.plot(run_dir / "loss.png", metrics.read(run_dir / "metrics.jsonl"), title)
    page.write(run_dir, about, state=state)


class Refresh(TrainerCallback):  # type: ignore[misc]  # transformers is untyped for mypy
    """Calls `draw` after each save; made only in the process that writes."""

    def __init__(self, run_dir: Path, about: page.About) -> None:
        self.run_dir = run_dir
        self.about = about

    def on_save(self, *_args: Any, **_kwargs: Any) -> None:
        """A checkpoint has been written."""
        draw(self.run_dir, self.about, state="running")
