"""Which base a QLoRA adapter should be merged onto: how far each result is from the weights that the training saw.

A layer of Gaussian weights is held in NF4 with double quantization, as QLoRA holds it; an update of a given size is added in
f32. The weights that the training saw are dequantized + update. Compared with them (relative Frobenius norm of the difference):
the update merged into the original bf16 weights, and merged onto the dequantized ones and rounded to bf16.

    python benches/accuracy/qlora_base.py
"""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import torch  # noqa: E402 - after the logger is quiet
from bitsandbytes import functional  # noqa: E402

OUT, IN, RANK = 2048, 1024, 16
UPDATE = 0.116  # norm of the update over norm of the weights


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    W_OI = (torch.randn(OUT, IN) * 0.02).to(torch.bfloat16)
    D_OI = torch.randn(OUT, RANK) @ torch.randn(RANK, IN)
    D_OI *= UPDATE * W_OI.float().norm() / D_OI.norm()
    packed, state = functional.quantize_4bit(W_OI, quant_type="nf4", blocksize=64, compress_statistics=True)
    held_OI = functional.dequantize_4bit(packed, state).float()
    seen_OI = held_OI + D_OI
    assert held_OI.shape == W_OI.shape
    assert 0.05 < (held_OI - W_OI.float()).norm() / W_OI.float().norm() < 0.15, "NF4 loses about a tenth"

    def error(merged: torch.Tensor) -> float:
        return float((merged.float() - seen_OI).norm() / seen_OI.norm())

    print(f"{OUT} x {IN} Gaussian bf16 weights, update of {UPDATE} of their norm, rank {RANK}")
    print(f"into the original base, bf16:    {error((W_OI.float() + D_OI).to(torch.bfloat16)):.4f}")
    print(f"onto the dequantized base, bf16: {error(seen_OI.to(torch.bfloat16)):.4f}")


if __name__ == "__main__":
    main()
