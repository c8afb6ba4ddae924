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
    for name in (
        "popular recipe",
        "fastft",
        "fastft, packed",
        "fastft, fp32 adapters",
        "fastft, 8gb",
        "fastft, nf4 head",
    ):
        assert f"| {name} | 64 |" in text
    for name in ("popular", "fastft_plain", "fastft_8gb"):
        assert "Self CPU" in (tmp_path / f"profile_{name}.txt").read_text()
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == []  # the weights are gone


def _bench(request: pytest.FixtureRequest) -> object:
    import importlib.util

    path = request.config.rootpath / "benches" / "gpu" / "bench_train.py"
    spec = importlib.util.spec_from_file_location("bench_train", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("limit", [0, 1000, 2048, 3071, 3072, 5000, 8192, 9000])
def test_the_longest_row_is_found(limit: int, request: pytest.FixtureRequest) -> None:
    tried: list[int] = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= limit

    found = _bench(request).bisect(fits, 2048, 8192)
    assert found == (0 if limit < 2048 else min(limit, 8192) // 1024 * 1024)
    assert len(tried) == len(set(tried)) <= 6


@pytest.mark.slow
def test_weights_are_written_once_and_the_longest_row_is_looked_for(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bench = request.config.rootpath / "benches" / "gpu" / "bench_train.py"
    words = ["--shape", "tiny", "--device", "cpu", "--weights", str(tmp_path / "weights")]
    line = [sys.executable, str(bench), *words]
    subprocess.run([*line, "--only-write"], check=True)
    options = ["--longest", "8gb", "--least", "1024", "--most", "2048", "--table", str(tmp_path / "table.md")]
    done = subprocess.run([*line, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1024 tokens: fits" in done.stdout
    assert "| fastft, 8gb | 2048 |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "weights" / "config.json").is_file()
