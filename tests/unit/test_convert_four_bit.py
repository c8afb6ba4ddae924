"""Quantized and back, bit for bit as bitsandbytes' CPU backend does it."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from fastft.convert import four_bit
from fastft.convert.four_bit import FourBit
from fastft.convert.source import Source

torch = pytest.importorskip("torch")


def stored(tmp_path: Path, tensor: "torch.Tensor") -> Source:
    file = tmp_path / "tensor"
    file.write_bytes(b"head" + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    return Source(file, 4, names[tensor.dtype], tuple(tensor.shape))


def test_dynamic_map() -> None:
    """The table's fingerprint was taken from bitsandbytes 0.50.2 (spec/formats.md 5.4)."""
    fingerprint = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert hashlib.sha256(four_bit.dynamic_map().astype("<f4").tobytes()).hexdigest() == fingerprint


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_bitsandbytes(tmp_path: Path, dtype: str, kind: str, blocksize: int, *, double_quant: bool) -> None:
    from bitsandbytes import functional

    torch.manual_seed(0)
    weight = (torch.randn(96, 256) * 0.05).to(getattr(torch, dtype))
    weight[3] = 0
    weight[5, :7] = torch.tensor([1e-30, -1e-30, 0.0, -0.0, 3.0, -3.0, 0.5])
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, quant_type=kind, compress_statistics=double_quant
    )
    truth = functional.dequantize_4bit(packed, state)
    source = stored(tmp_path, weight)
    settings = FourBit(kind, double_quant, blocksize)  # type: ignore[arg-type]
    scales = four_bit.scales_of(source, settings)
    found = four_bit.seen_in_training(source, scales, settings, 0, weight.numel())
    back = torch.from_numpy(found.reshape(96, 256)).to(weight.dtype)
    assert torch.equal(back, truth)
    part = four_bit.seen_in_training(source, scales, settings, 1000, 3333)
    np.testing.assert_array_equal(part, found[1000:4333])


def test_a_last_block_that_is_shorter(tmp_path: Path) -> None:
    from bitsandbytes import functional

    torch.manual_seed(1)
    weight = torch.randn(5, 33)
    packed, state = functional.quantize_4bit(weight.reshape(-1), blocksize=64, quant_type="nf4")
    source = stored(tmp_path, weight)
    found = four_bit.seen_in_training(source, four_bit.scales_of(source, FourBit()), FourBit(), 0, weight.numel())
    np.testing.assert_array_equal(found, functional.dequantize_4bit(packed, state).numpy())
