"""The bench of training on a GPU still runs: in small, on a CPU, both contenders, and it compares their losses."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_it_runs_in_small(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    bench = request.config.rootpath / "benches" / "gpu" / "bench_train.py"
    words = ["--shape", "tiny", "--device", "cpu", "--lengths", "64", "--steps", "4", "--folder", str(tmp_path)]
    table = tmp_path / "table.md"
    line = [sys.executable, str(bench), *words, "--table", str(table), "--profile", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the losses of the contenders agree" in done.stdout
    text = table.read_text()
    for name in ("popular recipe", "fastft", "fastft, packed", "fastft, fp32 adapters"):
        assert f"| {name} | 64 |" in text
    for name in ("popular", "fastft"):
        assert "Self CPU" in (tmp_path / f"profile_{name}.txt").read_text()
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == []  # the weights are gone
