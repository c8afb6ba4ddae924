"""NF4 from Python: fastft.native beside bitsandbytes' CPU backend, numpy, torchao where it is installed, and a memcpy.

All take turns in one process, on the same bf16 tensor. The rival of the goals is a copy that reads and writes as many
bytes together as the operation does (quantize at most 2 times its time, dequantize at most 1.3 times, two threads, 1
GiB). Results are compared before anything is timed. Slow contenders work on less and are scaled up (marked ~).

    python benches/commands/bench_nf4.py [--mib 1024] [--rounds 7] [--threads 2] [--blocksize 64]
"""

import argparse
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes import functional as bnb

from fastft import native

# Bytes of bf16 that numpy and bitsandbytes' quantize get at most: they take seconds for it.
SLOW_BYTES = 16 << 20


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    x = torch.empty(arguments.mib << 19, dtype=torch.bfloat16)
    for part in x.split(1 << 22):
        part.normal_(0, 0.02)
    x = x.view(-1, 4096)
    check(x[: (SLOW_BYTES // 8192)], arguments.blocksize)
    for name, contenders, moved in (quantize(x, arguments), dequantize(x, arguments)):
        report(name, measure(contenders, arguments.rounds), moved)
    describe(arguments)


def check(x: torch.Tensor, blocksize: int) -> None:
    """What is timed is right: every bit is bitsandbytes'; numpy's way back agrees too."""
    packed, state = native.quantize_4bit(x, blocksize=blocksize)
    theirs, their_state = bnb.quantize_4bit(x, blocksize=blocksize, quant_type="nf4")
    assert torch.equal(packed, theirs)
    assert torch.equal(state.absmax, their_state.absmax)
    back = native.dequantize_4bit(packed, state)
    assert torch.equal(back, bnb.dequantize_4bit(theirs, their_state))
    assert torch.equal(
        back, torch.from_numpy(in_numpy(packed.numpy(), state.absmax.numpy(), blocksize)).view_as(back).bfloat16()
    )


def in_numpy(packed: Any, absmax: Any, blocksize: int) -> Any:
    """f32 values of NF4, as numpy does it best: two look-ups in one table of 256 pairs."""
    book = bnb.get_4bit_type("nf4", device="cpu").numpy()
    table = np.stack([np.repeat(book, 16), np.tile(book, 16)], 1)
    return (table[packed.reshape(-1)].reshape(-1, blocksize) * absmax[:, None]).reshape(-1)


Contenders = dict[str, tuple[Callable[[], object], float]]


def quantize(x: torch.Tensor, arguments: argparse.Namespace) -> tuple[str, Contenders, int]:
    """Contenders with the factor that scales their time up to the whole tensor."""
    blocksize, threads = arguments.blocksize, arguments.threads
    out = torch.zeros((x.numel() + 1) // 2, 1, dtype=torch.uint8)
    part = x.view(-1)[: SLOW_BYTES // 2]
    moved = x.nbytes + out.nbytes + x.numel() // blocksize * 4
    contenders: Contenders = {
        "memcpy": (copier(moved, threads), 1),
        "fastft, out=": (lambda: native.quantize_4bit(x, blocksize=blocksize, out=out, threads=threads), 1),
        "fastft": (lambda: native.quantize_4bit(x, blocksize=blocksize, threads=threads), 1),
        "fastft, double": (
            lambda: native.quantize_4bit(x, blocksize=blocksize, double_quant=True, out=out, threads=threads),
            1,
        ),
        "bitsandbytes": (
            lambda: bnb.quantize_4bit(part, blocksize=blocksize, quant_type="nf4"),
            x.numel() / part.numel(),
        ),
    }
    if (ao := torchao_nf4(part, blocksize)) is not None:
        contenders["torchao"] = (ao, x.numel() / part.numel())
    return "quantize", contenders, moved


def dequantize(x: torch.Tensor, arguments: argparse.Namespace) -> tuple[str, Contenders, int]:
    """As `quantize`, the way back."""
    blocksize, threads = arguments.blocksize, arguments.threads
    packed, state = native.quantize_4bit(x, blocksize=blocksize)
    theirs = state.to_bitsandbytes()
    out = torch.zeros_like(x)
    moved = x.nbytes + packed.nbytes + x.numel() // blocksize * 4
    count = min(SLOW_BYTES // 2, x.numel())
    part, scales = packed.numpy()[: count // 2], state.absmax.numpy()[: count // blocksize]
    return (
        "dequantize",
        {
            "memcpy": (copier(moved, threads), 1),
            "fastft, out=": (lambda: native.dequantize_4bit(packed, state, out=out, threads=threads), 1),
            "fastft": (lambda: native.dequantize_4bit(packed, state, threads=threads), 1),
            "bitsandbytes": (lambda: bnb.dequantize_4bit(packed, theirs), 1),
            "numpy, to f32": (lambda: in_numpy(part, scales, blocksize), x.numel() / count),
        },
        moved,
    )


def torchao_nf4(x: torch.Tensor, blocksize: int) -> Callable[[], object] | None:
    """torchao's NF4 (with its own double quantization), if it is installed."""
    try:
        from torchao.dtypes.nf4tensor import to_nf4
    except ImportError:
        print("torchao is not installed: not measured")
        return None
    return lambda: to_nf4(x, blocksize, 256)


def copier(moved: int, threads: int) -> Callable[[], object]:
    """A memcpy that reads and writes `moved` bytes together, on so many threads (numpy lets go of the GIL)."""
    source, target = np.ones(moved // 2, np.uint8), np.zeros(moved // 2, np.uint8)
    pairs = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    workers = ThreadPoolExecutor(threads)
    return lambda: list(workers.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))


def measure(contenders: Contenders, rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turn; the first round only touches all memory."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, (work, factor) in contenders.items():
            if factor > 1 and number > 2:
                continue  # twice is enough for what takes seconds
            start = time.perf_counter()
            work()
            if number:
                times[name].append((time.perf_counter() - start) * factor)
    return times


def report(what: str, times: dict[str, list[float]], moved: int) -> None:
    copied = times["memcpy"]
    print(
        f"\n| {what} | min / median / max ms | GB/s read + written | x memcpy (median of the rounds' ratios) |\n|---|---|---|---|"
    )
    for name, seconds in times.items():
        ratio = statistics.median(own / copy for own, copy in zip(seconds, copied, strict=False))
        middle = statistics.median(seconds)
        spread = " / ".join(f"{value * 1e3:.1f}" for value in (min(seconds), middle, max(seconds)))
        scaled = "" if len(seconds) == len(copied) else "~"
        print(f"| {name} | {scaled}{spread} | {moved / middle / 1e9:.2f} | {ratio:.2f} |")


def describe(arguments: argparse.Namespace) -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(
        f"\n{arguments.mib} MiB of bf16, blocks of {arguments.blocksize}, {arguments.threads} threads, {arguments.rounds} rounds in turn;"
        f" {model}, {os.cpu_count()} cores, level {native.build_info()['level']}, commit {commit.stdout.strip() or 'unknown'}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the bf16 tensor")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--blocksize", type=int, default=64)
    return parser.parse_args()


if __name__ == "__main__":
    main()
