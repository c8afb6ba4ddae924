"""Quantize a checkpoint to NF4, from files to files, beside reading it once (`cat > /dev/null`).

The checkpoint is that of bench_merge.py. What is timed is the whole command, `fastft convert quantize`, until its output is
on the disk; with --bitsandbytes also transformers' own way (load in 4 bit, save_pretrained). Each starts with the base out
of the page cache (unless --warm). The result is compared with bitsandbytes' own quantization before anything is timed.

    python benches/commands/bench_quantize.py FOLDER [--shape 1.5b|7b] [--layers N] [--rounds 3] [--bitsandbytes] [--warm]
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from bench_merge import (
    MEASURED,
    SHAPES,
    command,
    describe,
    make_checkpoint,
    measure,
    read,
    report,
    run,
    tensors_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bitsandbytes", action="store_true")
    parser.add_argument("--warm", action="store_true")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    num_layers = arguments.layers or shape.num_layers
    folder: Path = arguments.folder / f"{arguments.shape}-{num_layers}"
    base, out = folder / "base", folder / "out"
    make_checkpoint(base, shape, num_layers)
    quantize(base, out)
    check(base, out)
    work: dict[str, Callable[[], int]] = {
        "cat": lambda: run(["sh", "-c", 'cat "$0"/* > /dev/null', str(base)]),
        "fastft nf4": lambda: quantize(base, out),
        "fastft nf4, double quantization": lambda: quantize(base, out, "--double-quant"),
    }
    if arguments.bitsandbytes:
        work["transformers + bitsandbytes"] = lambda: bitsandbytes(base, out)
    results = measure(work, base, out, arguments.rounds, warm=arguments.warm)
    report(describe(base, arguments.shape, num_layers, arguments.rounds, warm=arguments.warm), results, "cat")
    shutil.rmtree(out)


def quantize(base: Path, out: Path, *options: str) -> int:
    shutil.rmtree(out, ignore_errors=True)
    return command("convert", "quantize", base, out, *options)


def bitsandbytes(base: Path, out: Path) -> int:
    code = (
        "import torch; from transformers import AutoModelForCausalLM, BitsAndBytesConfig;"
        "config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_compute_dtype=torch.bfloat16);"
        "model = AutoModelForCausalLM.from_pretrained("
        "sys.argv[1], quantization_config=config, dtype=torch.bfloat16, device_map={'': 'cpu'});"
        "model.save_pretrained(sys.argv[2])"
    )
    peak_bytes = run([sys.executable, "-c", MEASURED.format(code), str(base), str(out)])
    run(["sh", "-c", 'sync "$0"/*', str(out)])
    return peak_bytes


def check(base: Path, out: Path) -> None:
    """Hold some tensors against bitsandbytes."""
    import torch
    from bitsandbytes import functional

    before, after = tensors_of(base), tensors_of(out)
    names = [name for name in before if "_proj.weight" in name]
    for name in (names[0], names[-1]):
        weight = torch.from_numpy(read(*before[name]).view(np.int16)).view(torch.bfloat16)[: 1 << 20]
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        assert np.array_equal(read(*after[name])[: 1 << 19], packed.numpy().ravel()), name
        scales = read(*after[f"{name}.absmax"]).view(np.float32)[: 1 << 14]
        assert np.array_equal(scales, state.absmax.numpy()), name


if __name__ == "__main__":
    main()
