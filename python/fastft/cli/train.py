"""`fastft train`."""

from typing import TYPE_CHECKING, Literal

from fastft.cli.job import Job
from fastft.cli.words import BareAuto

if TYPE_CHECKING:
    from pathlib import Path

    from fastft.config.schema import Config


def train(
    config: str,
    *overrides: str,
    work_dir: str | None = None,
    resume: BareAuto = None,
    seed: int | None = None,
    launcher: Literal["none", "pytorch"] = "none",
    dry_run: bool = False,
) -> Job:
    """Fine-tune a model as a config says.

    With NPROC_PER_NODE (and NNODES, NODE_RANK, ADDR, PORT) in the environment, torchrun is started on this machine.

    Args:
        config: recipe name (see list-cfg) or config file
        overrides: values to change, e.g. train.lr=1e-5 data.train.0.source=my.jsonl
        work_dir: folder of the run; default work_dirs/NAME
        resume: go on from a checkpoint folder, or (auto) from the newest whole one of the run
        seed: overrides train.seed
        launcher: pytorch says that torchrun has started this process
        dry_run: check config and data, show a sample, do not train
    """

    def run() -> int | None:
        from fastft.config import load
        from fastft.hub import locate
        from fastft.training import launch

        given = [*overrides, *([f"train.seed={seed}"] if seed is not None else [])]
        loaded = load.load(config, given)
        locate.check(loaded.config)
        if launch.wanted(launcher):
            return launch.torchrun(["train", config, *given], work_dir=work_dir, resume=resume, dry_run=dry_run)
        _train(loaded.config, work_dir, resume, dry_run=dry_run)
        return None

    return Job(run)


def run_folder(config: "Config", work_dir: str | None) -> "Path":
    """--work-dir, else output.dir, else work_dirs/NAME."""
    from pathlib import Path

    return Path(work_dir or config.output.dir or f"work_dirs/{config.name}")


def _train(config: "Config", work_dir: str | None, resume: str | None, *, dry_run: bool) -> None:
    from fastft.training import run as training

    folder = run_folder(config, work_dir)
    if dry_run:
        training.dry_run(config, work_dir=folder)
        return
    training.run(config, work_dir=folder, resume=resume)
