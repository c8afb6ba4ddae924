"""What cases copy from: a small model with a tokenizer, and a run of it with a checkpoint."""

from pathlib import Path

import tiny_run
from hostile.forked import Commands
from hostile.place import Place


def write_stock(folder: Path, commands: Commands | None = None) -> None:
    """Make `chatty` and, by a real training, `run`, in a new folder."""
    folder.mkdir()
    tiny_run.write_model(folder / "chatty")
    if commands is None:
        return
    place = Place(folder, folder)
    place.rows()
    place.config()
    ended = commands.run(["train", "a.yaml", "--work-dir", "run"], folder)
    assert ended.code == 0, ended.err
