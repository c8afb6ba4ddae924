"""What torchrun is told, from XTuner's environment variables. No process is started here."""

import sys

import pytest

from fastft.errors import UsageError
from fastft.training import launch


def test_it_is_wanted_only_for_several_processes() -> None:
    assert not launch.wanted("none", {})
    assert not launch.wanted("none", {"NPROC_PER_NODE": "1", "NNODES": "1"})
    assert launch.wanted("none", {"NPROC_PER_NODE": "2"})
    assert launch.wanted("none", {"NNODES": "2"})
    assert not launch.wanted("none", {"NPROC_PER_NODE": "2", "RANK": "0"})
    assert not launch.wanted("pytorch", {"NPROC_PER_NODE": "2"})


def test_the_command_starts_this_python_and_this_program() -> None:
    env = {"NPROC_PER_NODE": "4", "NNODES": "2", "NODE_RANK": "1", "ADDR": "10.0.0.7", "PORT": "29500"}
    assert launch.command(["train", "my recipe", "train.lr=1e-5"], env) == [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--node_rank=1",
        "--nproc_per_node=4",
        "--master_addr=10.0.0.7",
        "--master_port=29500",
        "-m",
        "fastft",
        "train",
        "my recipe",
        "train.lr=1e-5",
        "--launcher=pytorch",
    ]


def test_one_machine_needs_no_address() -> None:
    words = launch.command(["train", "demo"], {"NPROC_PER_NODE": "2"})
    assert "--master_addr=127.0.0.1" in words
    port = next(int(word.partition("=")[2]) for word in words if word.startswith("--master_port="))
    assert 20000 <= port < 30000


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NNODES": "2", "PORT": "29500"}, "needs ADDR"),
        ({"NNODES": "2", "ADDR": "10.0.0.7"}, "needs PORT"),
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE=two: a whole number is needed"),
    ],
)
def test_what_is_missing_is_said(env: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        launch.command(["train", "demo"], env)
