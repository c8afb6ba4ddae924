"""Writing tensors that lie in memory: fastft.native beside safetensors, huggingface_hub and one plain `write`.

Each contender runs in a process of its own, in turn: it makes the same bf16 tensors (the shapes of a 1.5B model), then
writes them and has every file flushed to the disk. Counted are the seconds of that, with and without the flush, and how
much the peak of its memory grew meanwhile. The files of fastft, safetensors and huggingface_hub are compared byte by
byte before anything is timed. The goal is 1.1 times one write of the same bytes, and no second copy in memory.

    python benches/commands/bench_write.py FOLDER [--gib 2] [--rounds 3] [--shard 2GB]

FOLDER decides which disk is measured (a tmpfs measures the work without one); what is written there is removed.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastft.convert.size import parse_size

HIDDEN, INNER, VOCABULARY = 1536, 8960, 151936
SHAPES = [(VOCABULARY, HIDDEN), *[(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER), (HIDDEN, HIDDEN), (HIDDEN,)] * 100]


def main() -> None:
    arguments = parse()
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    check(arguments)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.rounds):
        for name, rounds in results.items():
            rounds.append(run(arguments, name))
    report(arguments, results)


def tensors_of(num_bytes: int) -> dict[str, Any]:
    import torch

    tensors, left = {}, num_bytes // 2
    for number, shape in enumerate(SHAPES):
        rows = min(shape[0], left // (shape[1] if len(shape) > 1 else 1))
        if rows == 0:
            break
        tensors[f"model.layers.{number}.weight"] = torch.full((rows, *shape[1:]), number + 1, dtype=torch.bfloat16)
        left -= tensors[f"model.layers.{number}.weight"].numel()
    return tensors


def plain_write(tensors: dict[str, Any], folder: Path, _: int) -> Callable[[], object]:
    import numpy as np

    buffer = np.full(sum(tensor.nbytes for tensor in tensors.values()), 1, np.uint8)
    tensors.clear()  # the same memory as the others have

    def write() -> None:
        folder.mkdir()
        with (folder / "model.bin").open("wb", buffering=0) as file:
            view, done = memoryview(buffer), 0
            while done < len(view):  # Linux writes at most 2 GiB at once
                done += file.write(view[done:]) or 0

    return write


def fastft(tensors: dict[str, Any], folder: Path, limit: int) -> Callable[[], object]:
    from fastft import native

    return lambda: native.save_sharded(tensors, folder, max_shard_size=limit)


def safetensors(tensors: dict[str, Any], folder: Path, _: int) -> Callable[[], object]:
    from safetensors.torch import save_file

    def write() -> None:
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return write


def huggingface_hub(tensors: dict[str, Any], folder: Path, limit: int) -> Callable[[], object]:
    from huggingface_hub import save_torch_state_dict

    def write() -> None:
        folder.mkdir()
        save_torch_state_dict(tensors, folder, max_shard_size=limit)

    return write


CONTENDERS: dict[str, Callable[[dict[str, Any], Path, int], Callable[[], object]]] = {
    "one write": plain_write,
    "fastft": fastft,
    "safetensors save_file": safetensors,
    "huggingface_hub": huggingface_hub,
}


def child(arguments: argparse.Namespace) -> dict[str, float]:
    """One contender: seconds until the call returns, until all is on the disk, and bytes that its peak grew."""
    folder = arguments.folder / "out"
    work = CONTENDERS[arguments.child](tensors_of(int(arguments.gib * 2**30)), folder, parse_size(arguments.shard))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    start = time.perf_counter()
    work()
    returned_s = time.perf_counter() - start
    for path in folder.iterdir():
        opened = os.open(path, os.O_RDONLY)
        os.fsync(opened)
        os.close(opened)
    durable_s = time.perf_counter() - start
    return {"returned_s": returned_s, "durable_s": durable_s, "grown_bytes": max(0, status("VmHWM") - before)}


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def run(
    arguments: argparse.Namespace, name: str, *, gib: float | None = None, shard: str | None = None
) -> dict[str, float]:
    shutil.rmtree(arguments.folder / "out", ignore_errors=True)
    os.sync()
    words = ["--child", name, "--gib", str(gib or arguments.gib), "--shard", shard or arguments.shard]
    done = subprocess.run(
        [sys.executable, __file__, str(arguments.folder), *words], capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {result}", file=sys.stderr, flush=True)
    return result


def check(arguments: argparse.Namespace) -> None:
    """fastft's files are huggingface_hub's, and safetensors' where there is one."""
    for shard, names in (
        ("20MB", ["fastft", "huggingface_hub"]),
        ("1GB", ["fastft", "huggingface_hub", "safetensors save_file"]),
    ):
        found = []
        for name in names:
            run(arguments, name, gib=0.05, shard=shard)
            found.append(
                {path.name: path.read_bytes() for path in sorted((arguments.folder / "out").glob("*.safetensors"))}
            )
        assert all(files == found[0] for files in found), "the files differ"
        assert found[0]


def report(arguments: argparse.Namespace, results: dict[str, list[dict[str, float]]]) -> None:
    shutil.rmtree(arguments.folder / "out", ignore_errors=True)
    print(
        "| who | min / median / max s until the call returns | x one write | until it is on the disk | x one write | peak memory grew by MiB |"
    )
    print("|---|---|---|---|---|---|")
    for name, rounds in results.items():
        cells = []
        for key in ("returned_s", "durable_s"):
            seconds = [found[key] for found in rounds]
            ratio = statistics.median(
                found[key] / plain[key] for found, plain in zip(rounds, results["one write"], strict=True)
            )
            cells += [f"{min(seconds):.2f} / {statistics.median(seconds):.2f} / {max(seconds):.2f}", f"{ratio:.2f}"]
        print(f"| {name} | {' | '.join(cells)} | {max(found['grown_bytes'] for found in rounds) / 2**20:.0f} |")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(
        f"\n{arguments.gib} GiB of bf16, files of {arguments.shard}, {arguments.rounds} rounds in turn; fastft's call returns when all is on"
        f" the disk; {model}, {os.cpu_count()} cores, commit {commit.stdout.strip() or 'unknown'}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard", default="2GB")
    parser.add_argument("--child", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
