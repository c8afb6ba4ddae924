"""Makes cases.txt, large.txt and nested.txt with bitsandbytes' CPU backend: `python tests/golden/nf4/make.py`.

A line of cases.txt: code, block size, dtype, then in hex (little-endian) the values, the packed bytes, the scales
(f32), and the values after dequantizing. A line of nested.txt: the scales, the offset, the codes, the scales of the
codes, and the scales after dequantizing. Made with bitsandbytes 0.50.2, torch 2.15.0 on a CPU without AVX-512.

large.txt has the form of cases.txt, with the blocks that are too large for it; its lengths are no multiples of 16, so
that bitsandbytes is right on a CPU with AVX-512 too, where it was made (`make.py large` makes it alone).
"""

import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import torch

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
FOLDER = Path(__file__).parent


def hexed(tensor: torch.Tensor) -> str:
    return tensor.detach().reshape(-1).clone().view(torch.uint8).numpy().tobytes().hex() or "-"


def inputs(dtype: torch.dtype, blocksize: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    cases = [
        torch.randn(count) * scale
        for count, scale in (
            (1, 1.0),
            (2, 3.0),
            (31, 0.02),
            (64, 0.02),
            (blocksize, 1.0),
            (2 * blocksize + 33, 0.5),
            (4 * blocksize + 7, 1e-3),
        )
    ]
    # Every value of the codes times a power of two, and the thresholds between them, with their neighbours.
    book = bnb.get_4bit_type("nf4", device="cpu")
    middles = (book[1:] + book[:-1]) / 2
    edge = torch.cat(
        [
            torch.tensor([1.0]),
            book,
            middles,
            torch.nextafter(middles, torch.tensor(2.0)),
            torch.nextafter(middles, torch.tensor(-2.0)),
        ]
    )
    cases.append(edge * 4)
    zeros = torch.zeros(blocksize + 5)
    cases.append(zeros)
    for odd in (float("inf"), float("-inf"), float("nan"), 1e-39, -0.0):
        values = torch.randn(2 * blocksize + 9)
        values[3] = odd
        values[-2] = odd
        cases.append(values)
    cases.append(torch.full((blocksize,), 1e-40))
    cases.append(torch.tensor([1e-40, -1e-41, 0.0, 1e-45]).repeat(blocksize // 4 + 2))
    return [case.to(dtype) for case in cases]


def line(code: str, blocksize: int, name: str, values: torch.Tensor) -> str:
    packed, state = bnb.quantize_4bit(values, blocksize=blocksize, quant_type=code)
    back = bnb.dequantize_4bit(packed, state)
    return " ".join([code, str(blocksize), name, *map(hexed, (values, packed, state.absmax, back))])


def large() -> None:
    """Blocks of 512 to 4096: a full one with every kind of odd number but NaN and inf, zeros, NaN, and a short tail."""
    lines = []
    torch.manual_seed(2)
    for blocksize in (512, 1024, 2048, 4096):
        for code, name in (("nf4", "bf16"), ("fp4", "f16")):
            values = torch.randn(blocksize + 21) * 0.05
            values[:7] = torch.tensor([0.0, -0.0, 1e-39, -1e-39, 1e-45, 5e-8, -5e-8])
            lines.append(line(code, blocksize, name, values.to(DTYPES[name])))
    for code in ("nf4", "fp4"):
        zeros_and_nan = torch.zeros(1024 + 5)
        zeros_and_nan[600] = float("nan")
        lines.append(line(code, 512, "f32", zeros_and_nan))
    (FOLDER / "large.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    lines = []
    for code in ("nf4", "fp4"):
        for blocksize in (32, 64, 128, 256):
            for name, dtype in DTYPES.items():
                if blocksize > 64 and name != "bf16":
                    continue
                lines += [line(code, blocksize, name, values) for values in inputs(dtype, blocksize)]
    (FOLDER / "cases.txt").write_text("\n".join(lines) + "\n")
    lines = []
    torch.manual_seed(1)
    for count in (1, 2, 255, 256, 257, 700):
        for scale in (1.0, 0.03, 0.0):
            absmax = (torch.randn(count).abs() + 0.5) * scale
            offset = absmax.mean()
            codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
            back = bnb.dequantize_blockwise(codes, state) + offset
            lines.append(" ".join(map(hexed, (absmax, offset.reshape(1), codes, state.absmax, back))))
    (FOLDER / "nested.txt").write_text("\n".join(lines) + "\n")


large()
if "large" not in sys.argv:
    main()
