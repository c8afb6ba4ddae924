"""Several processes: one per device, started here, by torchrun or by srun.

`--nproc-per-node`, `--nnodes`, `--node-rank`, `--addr` and `--port` win over NPROC_PER_NODE, NNODES, NODE_RANK, ADDR
and PORT in the environment, which are XTuner's. The same command is started again once per device, in this very
Python, with the variables that torchrun sets; a process knows by RANK that it is one of them, so torchrun itself
(`torchrun --nproc-per-node 8 -m fastft train ...`) does as well. Why not always torchrun: 30 s after Ctrl-C it kills
processes that are still writing their checkpoint, it ends with 1 whatever went wrong and adds a traceback, and it
imports torch a further time.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from fastft.errors import UsageError

_PORTS = range(20000, 30000)
# Seconds between two looks at the processes, and until one that shall end is killed.
_POLL_S = 0.1
_END_S = 10.0
# What a process of several reads; torch.distributed's own names.
_PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Start:
    """How many processes, and where they meet.

    Attributes:
        nproc_per_node: processes on each machine, at least 1.
        nnodes: machines, at least 1.
        node_rank: this machine's number, from 0.
        addr: address of machine 0.
        port: a free port on machine 0; None: any, on a single machine.
    """

    nproc_per_node: int = 1
    nnodes: int = 1
    node_rank: int = 0
    addr: str = "127.0.0.1"
    port: int | None = None

    @property
    def processes(self) -> int:
        """All processes together."""
        return self.nproc_per_node * self.nnodes


def read(options: Mapping[str, int | str | None], environ: Mapping[str, str] | None = None) -> Start:
    """What the options say, else the environment.

    Args:
        options: `nproc_per_node`, `nnodes`, `node_rank`, `addr`, `port`; None or missing: not given.
        environ: the environment.

    Raises:
        UsageError: a number is none or too small, or several machines have no place to meet.
    """
    env = os.environ if environ is None else environ

    def given(name: str) -> str | None:
        value = options.get(name)
        return env.get(name.upper()) or None if value is None else str(value)

    def number(name: str, default: int, least: int) -> int:
        text = given(name)
        if text is None:
            return default
        if not text.isdecimal() or int(text) < least:
            said = f"--{name.replace('_', '-')} {text}" if options.get(name) is not None else f"{name.upper()}={text}"
            raise UsageError(f"{said}: a whole number of at least {least} is needed")
        return int(text)

    nodes = number("nnodes", 1, 1)
    start = Start(
        nproc_per_node=number("nproc_per_node", 1, 1),
        nnodes=nodes,
        node_rank=number("node_rank", 0, 0),
        addr=given("addr") or "127.0.0.1",
        port=number("port", 0, 1) or None,
    )
    if start.node_rank >= nodes:
        raise UsageError(f"node rank {start.node_rank}: machines are numbered from 0 to {nodes - 1} (--nnodes {nodes})")
    if nodes > 1 and given("addr") is None:
        raise UsageError(
            "several machines need --addr (or ADDR), the address of machine 0, and the same --port on all machines"
        )
    if nodes > 1 and start.port is None:
        raise UsageError("several machines need --port (or PORT), the same free port on all machines")
    return start


def refuse_accelerate(environ: Mapping[str, str] | None = None) -> None:
    """Refuse what `accelerate launch` asks for in the environment: on a CPU accelerate ignores it in silence.

    Raises:
        UsageError: the variable, and the option that does it.
    """
    env = os.environ if environ is None else environ
    for name, option in (("ACCELERATE_USE_FSDP", "--fsdp"), ("ACCELERATE_USE_DEEPSPEED", "--deepspeed")):
        if env.get(name, "false").lower() not in ("", "0", "false"):
            raise UsageError(f"{name} is set (by `accelerate launch`?); unset it and use {option}")


def started(launcher: str, environ: MutableMapping[str, str] | None = None) -> bool:
    """Whether this process is one of several that torchrun or srun has started.

    Args:
        launcher: `pytorch`: torchrun has; `slurm`: srun has, and torch's variables are set from SLURM's here; `none`:
            whatever RANK in the environment says.
        environ: the environment; changed for `slurm`.

    Raises:
        UsageError: the launcher named has not set its variables.
    """
    env = os.environ if environ is None else environ
    if launcher == "slurm":
        env.update(from_slurm(env))
    missing = [name for name in _PLACES if name not in env]
    if launcher == "pytorch" and missing:
        raise UsageError(
            f"--launcher pytorch says that torchrun has started this process, but {missing[0]} is not set; "
            "without --launcher, --nproc-per-node N starts N processes"
        )
    return "RANK" in env


def from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """torch.distributed's variables of a task that srun has started.

    The port is PORT or MASTER_PORT if set, else one that follows from the job's number, so that all tasks agree.

    Raises:
        UsageError: this is no task of srun.
    """
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_ID")
    missing = [name for name in needed if name not in environ]
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if missing or not nodes:
        raise UsageError(
            f"--launcher slurm: {(missing or ['SLURM_NODELIST'])[0]} is not set; start it with srun, one task per device: "
            "srun --ntasks-per-node=8 fastft train ... --launcher slurm"
        )
    port = environ.get("PORT") or environ.get("MASTER_PORT")
    # "4(x2),3": machines with the same number of tasks are written once.
    here = re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", ""))
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": environ["SLURM_NTASKS"],
        "LOCAL_WORLD_SIZE": environ.get("SLURM_NTASKS_PER_NODE") or (here[0] if here else environ["SLURM_NTASKS"]),
        "MASTER_ADDR": environ.get("ADDR") or environ.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": port or str(_PORTS[int(environ["SLURM_JOB_ID"]) % len(_PORTS)]),
    }


def first_host(nodes: str) -> str:
    """The first machine of SLURM's short list: `gpu[007-012,20],login` -> `gpu007`."""
    found = re.match(r"([^\[,]+)(?:\[(\w+)[^\]]*\])?([^\[,]*)", nodes)
    if found is None:
        raise UsageError(f"--launcher slurm: the list of machines `{nodes}` cannot be read; set ADDR to the first one")
    return found[1] + (found[2] or "") + found[3]


def environments(start: Start, environ: Mapping[str, str] | None = None) -> list[dict[str, str]]:
    """The environment of each process of this machine: the current one, and torch.distributed's variables."""
    env = {"OMP_NUM_THREADS": "1", **(os.environ if environ is None else environ)}
    shared = {
        "WORLD_SIZE": str(start.processes),
        "LOCAL_WORLD_SIZE": str(start.nproc_per_node),
        "MASTER_ADDR": start.addr,
        # Any free port will do on one machine; no secret hangs on it.
        "MASTER_PORT": str(start.port or random.choice(_PORTS)),  # noqa: S311
    }
    first = start.node_rank * start.nproc_per_node
    return [
        {**env, **shared, "RANK": str(first + local), "LOCAL_RANK": str(local)} for local in range(start.nproc_per_node)
    ]


def run(words: Sequence[str], start: Start) -> int:
    """Start `fastft WORDS` once per device and wait.

    Ctrl-C, SIGTERM and SIGHUP are handed on; the processes write a checkpoint first, for as long as that takes. When
    one fails, the others cannot go on and are ended.

    Returns:
        the exit code of the process that failed first, or 0.
    """
    command = [sys.executable, "-m", "fastft", *words]
    processes: list[subprocess.Popen[bytes]] = []
    handed_on = False

    def hand_on(number: int, _frame: object) -> None:
        nonlocal handed_on
        handed_on = True
        _send(processes, signal.SIGTERM if number == signal.SIGHUP else number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    code = 0
    try:
        for env in environments(start):
            if handed_on:
                break
            # A session of their own: the terminal's Ctrl-C reaches them once, through here.
            processes.append(subprocess.Popen(command, env=env, start_new_session=True))  # noqa: S603 - our own Python
        while True:
            codes = [process.poll() for process in processes]
            code = code or next((c for c in codes if c), 0)
            if None not in codes or (code and not handed_on):
                break
            time.sleep(_POLL_S)
    finally:
        _end(processes)
        for number, handler in before.items():
            signal.signal(number, handler)
    # Killed by signal N is -N for Python, 128 + N for a shell.
    return code if code >= 0 else 128 - code


def _send(processes: Sequence["subprocess.Popen[bytes]"], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End what still runs: one that waits for a lost one in a collective does not hear SIGTERM."""
    _send(processes, signal.SIGTERM)
    for process in processes:
        try:
            process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def num_processes() -> int:
    """Processes that train together, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def leave() -> None:
    """Tell the other processes that this one is done; without it torch complains at the end."""
    if num_processes() > 1:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
