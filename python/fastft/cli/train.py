"""`fastft train`."""

import json
from typing import TYPE_CHECKING, Literal

from fastft.cli.job import Job
from fastft.cli.words import BareAuto

if TYPE_CHECKING:
    from fastft.config.schema import Config


def train(
    config: str,
    *overrides: str,
    work_dir: str | None = None,
    resume: BareAuto = None,
    deepspeed: str | None = None,
    fsdp: bool = False,
    seed: int | None = None,
    nproc_per_node: int | None = None,
    nnodes: int | None = None,
    node_rank: int | None = None,
    addr: str | None = None,
    port: int | None = None,
    launcher: Literal["none", "pytorch", "slurm"] = "none",
    dry_run: bool = False,
) -> Job:
    """Fine-tune a model as a config says.

    Several processes train together with --nproc-per-node, under torchrun, or under srun with --launcher slurm; each
    holds the whole model, unless --fsdp or --deepspeed shares it out. NPROC_PER_NODE, NNODES, NODE_RANK, ADDR and PORT
    in the environment do what the options do.

    Args:
        config: recipe name (see list-cfg) or config file
        overrides: values to change, e.g. train.lr=1e-5 data.train.0.source=my.jsonl
        work_dir: folder of the run; default work_dirs/NAME
        resume: go on from a checkpoint folder, or (auto) from the newest whole one of the run
        deepspeed: zero1, zero2, zero3, zero2_offload, zero3_offload, or DeepSpeed's json file
        fsdp: share out weights, gradients and optimizer states among the processes (FSDP2)
        seed: overrides train.seed
        nproc_per_node: start so many processes on this machine, one per device
        nnodes: machines that train together; start the command on each
        node_rank: number of this machine, from 0
        addr: address of machine 0
        port: a free port on machine 0, the same on all
        launcher: pytorch: torchrun has started this process; slurm: srun has
        dry_run: check config and data, show a sample, do not train
    """

    def run() -> int | None:
        from fastft.config import load
        from fastft.hub import locate
        from fastft.training import launch

        given = [*overrides, *([f"train.seed={seed}"] if seed is not None else [])]
        given += ["distributed.fsdp=true"] if fsdp else []
        given += [f"distributed.deepspeed={json.dumps(deepspeed)}"] if deepspeed is not None else []
        # Also in the saved config, so that it leads to the same folder.
        given += [f"output.dir={json.dumps(work_dir)}"] if work_dir is not None else []
        loaded = load.load(config, given)
        locate.check(loaded.config)
        launch.refuse_accelerate()
        is_one_of_several = launch.started(launcher)
        options = {
            "nproc_per_node": nproc_per_node,
            "nnodes": nnodes,
            "node_rank": node_rank,
            "addr": addr,
            "port": port,
        }
        start = launch.Start() if is_one_of_several else launch.read(options)
        if start.processes > 1 and not dry_run:
            words = ["train", config, *given]
            words += [f"--resume={resume}"] if resume is not None else []
            return launch.run(words, start)
        _train(loaded.config, resume, dry_run=dry_run, processes=start.processes)
        return None

    return Job(run)


def _train(config: "Config", resume: str | None, *, dry_run: bool, processes: int) -> None:
    from pathlib import Path

    from fastft.training import launch
    from fastft.training import run as training

    folder = Path(config.output.dir or f"work_dirs/{config.name}")
    if dry_run:
        training.dry_run(config, work_dir=folder, processes=processes)
        return
    training.run(config, work_dir=folder, resume=resume)
    launch.leave()
