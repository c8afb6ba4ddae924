"""A whole merge that ends before its time: Ctrl-C, SIGTERM, a full disk. What stood at the target stays whole.

The command runs in a process of its own over an older good result, on a model large enough (32 MB) that most of its time
after the start is spent writing. The merge is deterministic, so "the whole new folder" means every byte of every file.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastft import publish
from fastft.convert import merge
from fastft.errors import FileError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_llama

HIDDEN, INNER, LAYERS, VOCAB = 512, 1408, 4, 4000
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
MODULES = {f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LINEARS.items()}
SINGLE, SHARDS = "2GB", "9MB"

Hashes = Mapping[str, str]
# One adapter and one shard size: what a run writes.
Kind = tuple[str, str]


class Folders(NamedTuple):
    """The sources, which no run may change."""

    base: Path
    adapters: Path

    def hashes(self) -> Hashes:
        return hashes_of(self.base) | hashes_of(self.adapters)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A base of 32 MB in f16 and the adapters "one", "two" (rank 8) and "heavy" (rank 64)."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": draw(rng, *shape) for name, shape in MODULES.items()}
    tensors |= {name: draw(rng, VOCAB, HIDDEN) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": VOCAB}
    tiny_llama.write_base(folder / "base", tensors, **sizes)
    for name, rank in (("one", 8), ("two", 8), ("heavy", 64)):
        factors = {}
        for module, (num_out, num_in) in MODULES.items():
            at = f"base_model.model.{module}.lora_"
            factors[f"{at}A.weight"], factors[f"{at}B.weight"] = draw(rng, rank, num_in), draw(rng, num_out, rank)
        tiny_llama.write_adapter(folder / "adapters" / name, factors, r=rank, lora_alpha=2 * rank)
    return Folders(folder / "base", folder / "adapters")


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape, dtype=np.float32) * 0.05).astype(np.float16)


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def running(sources: Folders, target: Path, kind: Kind, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command; no process outlives the test."""
    adapter, shard_size = kind
    words = ["convert", "merge", str(sources.base), str(sources.adapters / adapter), str(target), "--force"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastft", *words, "--max-shard-size", shard_size],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def run(sources: Folders, target: Path, kind: Kind) -> None:
    with running(sources, target, kind) as process:
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said


def beside(target: Path) -> list[Path]:
    return [path for path in target.parent.iterdir() if path != target]


def is_streaming(target: Path) -> bool:
    return any(list(path.glob("*.safetensors")) for path in beside(target) if "partial-" in path.name)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Whether the condition came true before the process ended."""
    while process.poll() is None:
        if condition():
            return True
        time.sleep(0.0005)
    return False


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_in_the_stream(sources: Folders, tmp_path: Path, name: str) -> None:
    """The scalar kernel makes the stream last for seconds, so that the signal comes in the middle of it."""
    target = tmp_path / "merged"
    run(sources, target, ("one", SHARDS))
    old = hashes_of(target)
    with running(sources, target, ("heavy", SHARDS), FASTFT_SIMD="scalar") as process:
        assert wait_until(lambda: is_streaming(target), process)
        process.send_signal(signal.Signals[name])
        said, complained = process.communicate(timeout=120)
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 143}[name]
    assert "Traceback" not in complained
    assert said == ""
    assert hashes_of(target) == old
    assert beside(target) == []


# Runs the command line in a process whose files may not grow beyond a size: what a full disk looks like to it.
LIMITED = """
import resource, sys
from fastft.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("shard_size", [SINGLE, SHARDS])
@pytest.mark.parametrize("limit", [0, 1000, 3_000_000, 8_000_000])
def test_a_disk_that_fills_up(sources: Folders, tmp_path: Path, limit: int, shard_size: str) -> None:
    """The header, the first tile, or something in the middle cannot be written: one line, the old result, no leftover."""
    target = tmp_path / "merged"
    run(sources, target, ("one", SHARDS))
    old = hashes_of(target)
    words = ["convert", "merge", str(sources.base), str(sources.adapters / "two"), str(target), "--force"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *words, "--max-shard-size", shard_size],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "too large" in errors[0]
    assert ".safetensors" in errors[0]
    assert "Traceback" not in done.stderr
    assert hashes_of(target) == old
    assert beside(target) == []


def test_no_room_is_said_before_anything_is_written(
    sources: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "merged"
    run(sources, target, ("one", SINGLE))
    old, changed = hashes_of(target), target.parent.stat().st_mtime_ns
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda _path: usage._replace(free=20_000_000))
    plan = merge.plan(sources.base, [(sources.adapters / "two", 1.0)])
    with pytest.raises(FileError, match=r"^[^\n]*3\d\.\d\d MB are needed, 20\.00 MB are free; make room there[^\n]*$"):
        merge.execute(plan, target, force=True)
    assert hashes_of(target) == old
    assert target.parent.stat().st_mtime_ns == changed
    assert beside(target) == []


def test_the_model_is_what_it_says(sources: Folders, tmp_path: Path) -> None:
    """What the hashes above stand for: base + scale * B A in f16."""
    run(sources, tmp_path / "merged", ("one", SHARDS))
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    base, factors = (
        load_file(sources.base / "model.safetensors"),
        load_file(sources.adapters / "one" / "adapter_model.safetensors"),
    )
    assert set(index["weight_map"]) == set(base)
    mine = {}
    for name in set(index["weight_map"].values()):
        mine |= load_file(tmp_path / "merged" / name)
    for name, weight in base.items():
        at = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        exact = weight.astype(np.float64)
        if f"{at}A.weight" in factors:
            exact += 2.0 * (factors[f"{at}B.weight"].astype(np.float64) @ factors[f"{at}A.weight"].astype(np.float64))
        # Half a step of f16, and a little for the sums in f32.
        assert (np.abs(mine[name] - exact) <= np.abs(exact) * 2.0**-11 + 2.0**-20).all()
