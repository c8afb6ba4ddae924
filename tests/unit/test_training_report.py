"""metrics.jsonl and loss.png."""

import json
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
    metrics.drop_after(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert "Löwe" in path.read_text()
    metrics.drop_after(tmp_path / "missing.jsonl", 3)


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
