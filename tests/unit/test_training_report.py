"""metrics.jsonl and loss.png."""

import json
import re
from pathlib import Path

import pytest

from fastft.training import metrics, report


def test_a_half_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics.append(path, {"step": 1, "loss": 2.0})
    metrics.append(path, {"step": 2, "loss": 1.0})
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in metrics.read(path)] == [1, 2]


def test_a_resumed_run_drops_what_its_checkpoint_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        metrics.append(path, {"step": step, "loss": 1.0, "answer": "ein Löwe"})
    metrics.drop_after(path, 3, 6)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert "Löwe" in path.read_text()
    metrics.drop_after(tmp_path / "missing.jsonl", 3, 6)


def test_what_a_run_does_at_its_end_comes_after_its_last_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 2, "eval_loss": 2.0}, {"step": 3, "loss": 1.0}, {"step": 3, "eval_loss": 1.0}]
    for line in [*lines, {"step": 3, "answer": "apple"}]:
        metrics.append(path, line)
    metrics.drop_after(path, 3, last=4)
    assert len(metrics.read(path)) == 4
    metrics.drop_after(path, 3, last=3)
    assert metrics.read(path) == lines[:2]


def test_the_plot_is_a_png_or_nothing(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 3 / step} for step in range(1, 40)] + [{"step": 20, "eval_loss": 0.5}]
    assert report.plot(tmp_path / "loss.png", lines, "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert not report.plot(tmp_path / "none.png", [], "a run")
    assert not (tmp_path / "none.png").exists()


def test_smoothing_neither_lags_nor_bends_a_straight_line() -> None:
    assert report.smooth([4.0]) == [4.0]
    straight = [float(value) for value in range(60)]
    assert report.smooth(straight) == pytest.approx(straight)
    # 40 points: a window of 5 around each; a single peak of 5 is spread to 1 over its neighbours.
    peak = [0.0] * 20 + [5.0] + [0.0] * 19
    assert report.smooth(peak)[17:24] == pytest.approx([0, 1, 1, 1, 1, 1, 0])


def test_the_status_line_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run of a fast machine, on a terminal that nobody has widened: nothing is cut off or wrapped."""
    import io

    from rich.console import Console

    from fastft import console

    out = io.StringIO()
    monkeypatch.setitem(
        console._consoles, "stderr", Console(file=out, width=80, force_terminal=True, color_system=None)
    )
    monkeypatch.setattr(console.sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(console, "BAR_AFTER_S", 0.0)
    with console.progress("training", 99_999, "steps", start=10_000) as advance:
        advance(10_001)
        advance(12_345, metrics.status_text(12.3456, 1.5e-4, 98_765.4, 79 * 2**30))
    shown = [line for line in re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", out.getvalue()) if "loss" in line]
    assert shown
    for line in shown:
        assert len(line.rstrip()) <= 80
        for part in ("12345/99999", "left", "loss 12.346", "lr 1.5e-04", "98,765 tok/s", "79.0 GiB"):
            assert part in line


def test_the_time_left_of_a_resumed_run_counts_its_own_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """20 s for 10 steps: the other 40 take 80 s, whatever an earlier session did."""
    from fastft import console

    clock = iter([0.0, 20.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("training", 1000, "steps", start=950) as advance:
        advance(960, "loss 1.0")
    assert "training: 960/1000 steps, 80 s left (20 s so far) loss 1.0" in capsys.readouterr().err
