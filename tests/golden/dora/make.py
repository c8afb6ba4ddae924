"""Makes norms.txt: norms of rows and of columns of random f32 matrices, by torch on a CPU with AVX2.

Made with torch 2.15.0. A line is: rows or columns; number of rows; number of columns; the values, row by row; the
norms. Numbers are little-endian f32 in hex. PEFT's DoRA takes these norms (`torch.linalg.norm`, `Tensor.norm`).
Run by hand: python tests/golden/dora/make.py
"""

from pathlib import Path

import torch

# Every rest of a division by 8, around one and several blocks; kernels of 3x3x3 and 3x7x7; 5 rows are one and a rest of 4.
WIDTHS = [*range(1, 20), 23, 24, 27, 31, 33, 147]


def main() -> None:
    """Write the file beside this one."""
    torch.manual_seed(0)
    lines = []
    for width in WIDTHS:
        values = torch.randn(5, width) * 0.02
        lines.append(("rows", values, torch.linalg.norm(values, dim=1)))
    for num_rows, width in ((1, 3), (40, 5), (17, 33)):
        values = torch.randn(num_rows, width) * 0.02
        lines.append(("columns", values, torch.linalg.norm(values.T, dim=1)))
    text = "".join(
        f"{kind} {values.shape[0]} {values.shape[1]} {_hex(values)} {_hex(norms)}\n" for kind, values, norms in lines
    )
    Path(__file__).with_name("norms.txt").write_text(text, encoding="ascii")


def _hex(values: torch.Tensor) -> str:
    return values.contiguous().numpy().astype("<f4").tobytes().hex()


if __name__ == "__main__":
    main()
