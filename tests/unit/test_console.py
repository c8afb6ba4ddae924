"""What is shown where stderr is no terminal."""

import time

import pytest

from fastft import console


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_bytes_with_their_rate_and_the_time_left(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("merging", 30_000_000, "B") as advance:
        clock[0] += 9
        advance(1_000_000)
        assert capsys.readouterr().err == ""
        clock[0] += 1
        advance(10_000_000)
        # 10 MB in 10 s: 1 MB/s, and 20 MB to go
        assert capsys.readouterr().err == "merging: 10/30 MB, 1 MB/s, 20 s left (10 s so far)\n"


def test_steps(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("training", 8, "steps") as advance:
        clock[0] += 20
        advance(0)
        assert capsys.readouterr().err == "training: 0/8 steps (20 s so far)\n"
        clock[0] += 20
        advance(2, "loss 1.5")
        assert capsys.readouterr().err == "training: 2/8 steps, 120 s left (40 s so far) loss 1.5\n"
