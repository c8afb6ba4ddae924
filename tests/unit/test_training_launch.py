"""How several processes are started: options, XTuner's environment variables, SLURM's; and how they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest

from fastft.errors import UsageError
from fastft.training import launch

# A job of 2 machines with 2 tasks each, as srun shows it to the last task.
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_one_process_is_started_by_nobody() -> None:
    assert launch.read({}, {}) == launch.Start()
    assert launch.read({}, {"NPROC_PER_NODE": "1", "NNODES": "1", "PORT": ""}).processes == 1


def test_options_win_over_the_environment() -> None:
    environ = {"NPROC_PER_NODE": "4", "NNODES": "2", "NODE_RANK": "1", "ADDR": "10.0.0.7", "PORT": "29500"}
    assert launch.read({}, environ) == launch.Start(4, 2, 1, "10.0.0.7", 29500)
    options = {"nproc_per_node": 8, "nnodes": 3, "node_rank": 0, "addr": "head", "port": 4000}
    assert launch.read(options, environ) == launch.Start(8, 3, 0, "head", 4000)
    assert launch.read({**options, "node_rank": None}, environ) == launch.Start(8, 3, 1, "head", 4000)


@pytest.mark.parametrize(
    ("options", "environ", "message"),
    [
        ({}, {"NNODES": "2", "PORT": "29500"}, "need --addr"),
        ({"nnodes": 2, "addr": "head"}, {}, "need --port"),
        ({}, {"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE=two: a whole number of at least 1 is needed"),
        ({"nproc_per_node": 0}, {}, "--nproc-per-node 0: a whole number of at least 1"),
        ({"node_rank": -1}, {}, "--node-rank -1: a whole number of at least 0"),
        ({"node_rank": 1}, {}, "numbered from 0 to 0"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, int | str | None], environ: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        launch.read(options, environ)


def test_each_process_gets_what_torchrun_gives() -> None:
    """The names and numbers are those in torchrun's documentation, for machine 1 of 3 with 2 devices each."""
    start = launch.Start(2, 3, 1, "10.0.0.7", 29500)
    shared = {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
    assert launch.environments(start, {"HOME": "/h", "OMP_NUM_THREADS": "3"}) == [
        {"HOME": "/h", "OMP_NUM_THREADS": "3", **shared, "RANK": "2", "LOCAL_RANK": "0"},
        {"HOME": "/h", "OMP_NUM_THREADS": "3", **shared, "RANK": "3", "LOCAL_RANK": "1"},
    ]
    one, two = launch.environments(launch.Start(2), {})
    assert one["MASTER_PORT"] == two["MASTER_PORT"]
    assert one["OMP_NUM_THREADS"] == "1"


def test_a_process_knows_who_started_it() -> None:
    torchrun = launch.environments(launch.Start(2), {})[1]
    assert launch.started("none", torchrun)
    assert launch.started("pytorch", torchrun)
    assert not launch.started("none", {"NPROC_PER_NODE": "2"})
    with pytest.raises(UsageError, match="--launcher pytorch says .* but RANK is not set"):
        launch.started("pytorch", {})


@pytest.mark.parametrize(
    ("name", "option"), [("ACCELERATE_USE_FSDP", "--fsdp"), ("ACCELERATE_USE_DEEPSPEED", "--deepspeed")]
)
def test_what_accelerate_would_ignore_on_a_cpu_is_refused(name: str, option: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is set .*unset it and use {option}"):
        launch.refuse_accelerate({name: "true"})
    launch.refuse_accelerate({name: "false"})


def test_slurm_says_it_in_its_own_words() -> None:
    environ = dict(SLURM)
    assert launch.started("slurm", environ)
    added = {name: value for name, value in environ.items() if name not in SLURM}
    assert added == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "24567",  # 20000 + the last four digits of the job
    }
    assert launch.from_slurm({**SLURM, "ADDR": "head", "PORT": "29500"})["MASTER_ADDR"] == "head"
    assert launch.from_slurm({**SLURM, "ADDR": "head", "PORT": "29500"})["MASTER_PORT"] == "29500"
    with pytest.raises(UsageError, match="SLURM_PROCID is not set; start it with srun"):
        launch.started("slurm", {})


@pytest.mark.parametrize(
    ("nodes", "first"),
    # As `scontrol show hostnames` spells them out; the first is from Slurm's own manual.
    [
        ("lx[15,18,32-33]", "lx15"),
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("a-[3-9]-ib,b", "a-3-ib"),
        ("gpu[007-012],x", "gpu007"),
    ],
)
def test_the_first_machine(nodes: str, first: str) -> None:
    assert launch.first_host(nodes) == first


# Stands for `fastft`: the second process fails, or all write what they were told by a signal.
STAND_IN = """
    import os, signal, sys, time
    from pathlib import Path

    folder, what = Path(sys.argv[1]), sys.argv[2]
    rank = os.environ["RANK"]

    def told(number, frame):
        time.sleep(0.2)  # a checkpoint takes its time
        (folder / f"{rank}-{what}").write_text(str(number))
        sys.exit(128 + number)

    if what == "interrupted":
        signal.signal(signal.SIGINT, told)
    (folder / f"{rank}-ready").write_text("")
    if what == "fails" and rank == "1":
        sys.exit(7)
    if what != "ends":
        time.sleep(60)
        (folder / f"{rank}-slept").write_text("")
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "fastft"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(dedent(STAND_IN))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_the_exit_code_is_that_of_the_first_failure(stand_in: Path) -> None:
    assert launch.run([str(stand_in), "ends"], launch.Start(2)) == 0
    assert launch.run([str(stand_in), "fails"], launch.Start(2)) == 7
    assert not (stand_in / "0-slept").exists()  # the other one was ended, not waited for


def test_ctrl_c_is_handed_on_and_waited_for(stand_in: Path) -> None:
    starter = f"import sys; from fastft.training import launch; sys.exit(launch.run([{str(stand_in)!r}, 'interrupted'], launch.Start(2)))"
    python = Path(launch.__file__).parents[2]
    environ = {**os.environ, "PYTHONPATH": f"{python}"}
    # The starter is the real one; its children find the stand-in first.
    code = f"import os; os.environ['PYTHONPATH'] = {str(stand_in)!r}; {starter}"
    process = subprocess.Popen([sys.executable, "-c", code], env=environ)
    until = time.monotonic() + 30
    while time.monotonic() < until and len(list(stand_in.glob("*-ready"))) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert sorted(file.name for file in stand_in.glob("*-interrupted")) == ["0-interrupted", "1-interrupted"]
