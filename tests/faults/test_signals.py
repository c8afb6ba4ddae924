"""Ctrl-C and SIGTERM at any moment: gone soon, with 130 or 143, the old result whole and nothing left beside it."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fault_cases import FOLDERS, Place, Sources, leftovers
from forks import Forks

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
# The aim is 1 s (benches/results); this only has to tell a process that goes from one that does not.
MOST_S = 10.0


def stop_at_random(server: Forks, place: Place, num_stops: int) -> int:
    """Stop runs at any time of their lives; how many were stopped before they had ended by themselves."""
    started = time.monotonic()
    place.finish(server)
    place.standing = 0
    total_s = time.monotonic() - started
    dice = random.Random(num_stops)
    num_stopped, slowest_s = 0, 0.0
    for number in range(num_stops):
        sent = dice.choice(list(SIGNALS))
        done = server.run(place.words(), after_s=dice.uniform(0, total_s), signal=sent)
        assert done.code in (0, SIGNALS[sent]), done.err
        assert "Traceback" not in done.err
        is_new = place.look(f"stop {number}")
        assert leftovers(place.folder) == []
        if done.code:
            num_stopped += not is_new  # else it came while the old result was removed
            assert done.err.splitlines()[-1] == "stopped"
            assert done.seconds < MOST_S
            slowest_s = max(slowest_s, done.seconds)
    print(f"{num_stops} stops, {num_stopped} before the end; the slowest went after {slowest_s:.2f} s")
    return num_stopped


@pytest.mark.parametrize("name", ["merge, shards over one file", "quantize", "pth_to_hf"])
def test_a_command_is_stopped_at_any_moment(server: Forks, medium: Sources, tmp_path: Path, name: str) -> None:
    assert stop_at_random(server, Place(tmp_path, medium.case(name), server, medium), num_stops=12) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDERS)
def test_a_command_is_stopped_many_times(server: Forks, medium: Sources, tmp_path: Path, name: str) -> None:
    assert stop_at_random(server, Place(tmp_path, medium.case(name), server, medium), num_stops=125) > 20


def check_stop(words: list[str], after_s: float, number: signal.Signals, before_main: tuple[int, ...] = ()) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastft", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    time.sleep(after_s)
    process.send_signal(number)
    sent_at = time.monotonic()
    _, said = process.communicate(timeout=120)
    assert process.returncode in (SIGNALS[number], *before_main), said
    assert time.monotonic() - sent_at < MOST_S
    if process.returncode == SIGNALS[number]:
        assert "Traceback" not in said
        assert said.splitlines()[-1] == "stopped"


@pytest.mark.parametrize("after_s", [0.05, 0.4, 1.2, 2.2, 3.1])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_training_is_stopped_while_it_starts(tmp_path: Path, after_s: float, number: signal.Signals) -> None:
    """Before, while and after torch is imported. In the first moment Python itself is not yet there to listen."""
    before_main = (-number, 1) if after_s < 0.4 else ()
    check_stop(["train", "demo", f"--work-dir={tmp_path / 'run'}"], after_s, number, before_main)
    if (tmp_path / "run").exists():
        assert leftovers(tmp_path / "run") == []


def test_a_write_from_memory_is_stopped(tmp_path: Path) -> None:
    """`fastft.native` writes 2 GB of one array; Python's own handling is enough for a library."""
    code = (
        "import sys, threading, time, os, signal, numpy as np\n"
        "from pathlib import Path\n"
        "from fastft import native\n"
        "array, folder = np.zeros(1 << 29, np.float32), Path(sys.argv[1])\n"
        "def stop():\n"
        "    while not list(folder.parent.glob('.*/*.safetensors')): time.sleep(0.001)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=stop, daemon=True).start()\n"
        "native.save_sharded({'x': array}, folder, max_shard_size='4GB', threads=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == -signal.SIGINT, done.stderr
    assert "KeyboardInterrupt" in done.stderr
    assert list(tmp_path.iterdir()) == []
