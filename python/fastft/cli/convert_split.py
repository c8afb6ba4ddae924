"""`fastft convert split`."""

from pathlib import Path

from fastft import console
from fastft.cli.job import Job


def split(src: str, save_path: str, *, max_shard_size: str = "2GB", force: bool = False) -> Job:
    """Write the same model in files of another size.

    Args:
        src: folder of the model
        save_path: folder to write; must not exist
        max_shard_size: largest file, e.g. 2GB (2*10^9 bytes), 2GiB; a bare number is GB
        force: replace save_path if it exists
    """

    def run() -> None:
        from fastft.convert import size
        from fastft.convert import split as splitting

        plan = splitting.plan(Path(src), max_shard_size_bytes=size.parse_size(max_shard_size))
        console.result(splitting.execute(plan, Path(save_path), force=force).line())

    return Job(run)
