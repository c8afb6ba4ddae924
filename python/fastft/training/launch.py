"""torchrun for whoever sets NPROC_PER_NODE, as XTuner did.

NPROC_PER_NODE, NNODES, NODE_RANK, ADDR and PORT are read from the environment; the same command is started again
once per device, in this very Python.
"""

import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence

from fastft.errors import UsageError

_PORTS = range(20000, 30000)


def wanted(launcher: str, environ: Mapping[str, str] | None = None) -> bool:
    """Whether this process should start others instead of training itself."""
    env = os.environ if environ is None else environ
    if launcher == "pytorch" or "RANK" in env:
        return False
    return _number(env, "NPROC_PER_NODE", 1) > 1 or _number(env, "NNODES", 1) > 1


def command(words: Sequence[str], environ: Mapping[str, str] | None = None) -> list[str]:
    """The torchrun command line that starts `fastft WORDS` once per device."""
    env = os.environ if environ is None else environ
    nodes = _number(env, "NNODES", 1)
    if nodes > 1 and "ADDR" not in env:
        raise UsageError("NNODES > 1 needs ADDR, the address of the first machine, and the same PORT on all machines")
    if nodes > 1 and "PORT" not in env:
        raise UsageError("NNODES > 1 needs PORT, the same free port on all machines")
    # Any free port will do on one machine; no secret hangs on it.
    port = _number(env, "PORT", random.choice(_PORTS))  # noqa: S311
    return [
        sys.executable,
        *("-m", "torch.distributed.run"),
        f"--nnodes={nodes}",
        f"--node_rank={_number(env, 'NODE_RANK', 0)}",
        f"--nproc_per_node={_number(env, 'NPROC_PER_NODE', 1)}",
        f"--master_addr={env.get('ADDR', '127.0.0.1')}",
        f"--master_port={port}",
        *("-m", "fastft"),
        *words,
        "--launcher=pytorch",
    ]


def torchrun(words: Sequence[str], *, work_dir: str | None, resume: str | None, dry_run: bool) -> int:
    """Start the processes, wait for them, and return torchrun's exit code."""
    options = [f"--work-dir={work_dir}"] if work_dir is not None else []
    options += [f"--resume={resume}"] if resume is not None else []
    options += ["--dry-run"] if dry_run else []
    environ = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen(command([*words, *options]), env=environ)  # noqa: S603 - our own Python
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the terminal sent it to the processes too; they write a checkpoint first


def num_processes() -> int:
    """Processes that train together, this one included."""
    return _number(os.environ, "WORLD_SIZE", 1)


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise UsageError(f"{name}={text}: a whole number is needed")
    return int(text)
