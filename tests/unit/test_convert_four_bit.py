"""Quantized and back, bit for bit as bitsandbytes' CPU backend does it."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastft.convert import four_bit
from fastft.convert.mean import mean
from fastft.convert.source import Seen, Source

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
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    offset = float(state.offset) if double_quant else None
    lens = Seen(kind, blocksize, names[dtype], double_quant, offset)  # type: ignore[arg-type]
    source = replace(stored(tmp_path, weight), lens=lens)
    found = four_bit.numbers_of(source, 0, weight.numel())
    back = torch.from_numpy(found.reshape(96, 256)).to(weight.dtype)
    assert torch.equal(back, truth)
    np.testing.assert_array_equal(four_bit.numbers_of(source, 1000, 3333), found[1000:4333])
    exact = weight.float().reshape(-1, blocksize).abs().amax(1)
    codes, scales = four_bit.codes_of(weight.float().reshape(-1).numpy(), kind, blocksize)
    np.testing.assert_array_equal(codes, packed.reshape(-1).numpy())
    np.testing.assert_array_equal(scales, exact.numpy())
    if double_quant:
        assert mean(scales) == float(state.offset)
        codes, nested = four_bit.codes_of_scales(scales, float(state.offset))
        np.testing.assert_array_equal(codes, state.absmax.numpy())
        np.testing.assert_array_equal(nested, state.state2.absmax.numpy())


def test_a_last_block_that_is_shorter(tmp_path: Path) -> None:
    from bitsandbytes import functional

    torch.manual_seed(1)
    weight = torch.randn(5, 33)
    packed, state = functional.quantize_4bit(weight.reshape(-1), blocksize=64, quant_type="nf4")
    source = replace(stored(tmp_path, weight), lens=Seen("nf4", 64, "F32"))
    found = four_bit.numbers_of(source, 0, weight.numel())
    np.testing.assert_array_equal(found, functional.dequantize_4bit(packed, state).numpy())
    codes, scales = four_bit.codes_of(weight.reshape(-1).numpy(), "nf4", 64)
    np.testing.assert_array_equal(codes, packed.reshape(-1).numpy())
    np.testing.assert_array_equal(scales, state.absmax.numpy())
