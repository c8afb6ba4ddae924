"""Makes cases.txt and nested.txt with bitsandbytes' CPU backend: `python tests/golden/nf4/make.py`.

A line of cases.txt: code, block size, dtype, then in hex (little-endian) the values, the packed bytes, the scales
(f32), and the values after dequantizing. A line of nested.txt: the scales, the offset, the codes, the scales of the
codes, and the scales after dequantizing. Made with bitsandbytes 0.50.2, torch 2.15.0 on a CPU without AVX-512.
"""

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


def main() -> None:
    lines = []
    for code in ("nf4", "fp4"):
        for blocksize in (32, 64, 128, 256):
            for name, dtype in DTYPES.items():
                if blocksize > 64 and name != "bf16":
                    continue
                for values in inputs(dtype, blocksize):
                    packed, state = bnb.quantize_4bit(values, blocksize=blocksize, quant_type=code)
                    back = bnb.dequantize_4bit(packed, state)
                    lines.append(
                        " ".join([code, str(blocksize), name, *map(hexed, (values, packed, state.absmax, back))])
                    )
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


main()
