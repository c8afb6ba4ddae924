"""The 4 bits that a GPU trains on against those that fastft's kernels make on a CPU.

The kernels equal bitsandbytes' CPU backend bit for bit (tests/golden/nf4, read by the Rust tests too). Its CUDA code
is built with fast arithmetic (formats 5.5): 1/scale is approximate there, so a value within some ulp of the border of
two codes may fall to the other side, values below the smallest normal number count as zero, and the 8-bit codes of
double-quantized scales are the nearest ones, where the CPU looks them up in a coarser table.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("needs_cuda")]

GOLDEN = Path(__file__).parents[1] / "golden" / "nf4"
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SMALLEST_NORMAL = 2.0**-126
# Two 4-byte floats next to each other, as part of their size; division and product on the GPU may be off by 2 such steps.
NEAR_BORDER = 4 * 2.0**-23


def _cases(code: str) -> Iterator[tuple[str, int, Any, bytes, "np.ndarray", Any]]:
    import torch

    for number, line in enumerate((GOLDEN / "cases.txt").read_text().splitlines()):
        kind, blocksize, dtype, values, packed, absmax, back = line.split()
        if kind != code:
            continue
        as_torch = getattr(torch, DTYPES[dtype])
        yield (
            f"line {number + 1}: {kind} {blocksize} {dtype}",
            int(blocksize),
            torch.frombuffer(bytearray.fromhex(values), dtype=as_torch),
            bytes.fromhex(packed),
            np.frombuffer(bytes.fromhex(absmax), np.float32),
            torch.frombuffer(bytearray.fromhex(back), dtype=as_torch),
        )


def _codes(packed: bytes, count: int) -> "np.ndarray":
    both = np.frombuffer(packed, np.uint8)
    return np.stack([both >> 4, both & 15], axis=1).reshape(-1)[:count]


def _borders() -> "np.ndarray":
    import bitsandbytes.functional as bnb

    book = bnb.get_4bit_type("nf4", device="cpu").double().numpy()
    return (book[1:] + book[:-1]) / 2


def _near_a_border(values: "np.ndarray", scales: "np.ndarray", blocksize: int) -> "np.ndarray":
    with np.errstate(all="ignore"):
        scaled = values.astype(np.float64) / np.repeat(scales.astype(np.float64), blocksize)[: len(values)]
    distance = np.abs(scaled[:, None] - _borders()[None, :]).min(axis=1)
    return distance <= NEAR_BORDER


def test_golden_nf4_cases_on_the_gpu() -> None:
    """Scales bit for bit, codes too but for values at a border; cases with inf, NaN or denormals are counted apart."""
    import bitsandbytes.functional as bnb

    compared = flipped = odd = 0
    for name, blocksize, values, packed, absmax, _ in _cases("nf4"):
        plain = values.float().numpy()
        if not np.isfinite(plain).all() or (np.abs(plain[plain != 0]) < SMALLEST_NORMAL).any() or (absmax == 0).any():
            odd += 1
            continue
        if blocksize == 32 and len(absmax) == 0:
            continue
        ours, state = bnb.quantize_4bit(values.cuda(), blocksize=blocksize, quant_type="nf4")
        assert state.absmax.cpu().numpy().tobytes() == absmax.tobytes(), name
        theirs, codes = _codes(packed, len(plain)), _codes(ours.cpu().numpy().tobytes(), len(plain))
        differ = theirs != codes
        assert not (differ & ~_near_a_border(plain, absmax, blocksize)).any(), name
        assert (np.abs(theirs[differ].astype(int) - codes[differ]) == 1).all(), name
        compared += len(plain)
        flipped += int(differ.sum())
    print(f"golden NF4: {compared} values, {flipped} at a border fell to the other side; {odd} odd cases left out")
    assert compared > 3000
    assert odd > 10


def test_golden_nf4_codes_unpack_the_same_on_the_gpu() -> None:
    """Dequantizing is a product of two given numbers, once rounded: bit for bit."""
    import bitsandbytes.functional as bnb
    import torch

    book = bnb.get_4bit_type("nf4", device="cuda")
    compared = 0
    for name, blocksize, values, packed, absmax, back in _cases("nf4"):
        plain = back.float().numpy()
        if not np.isfinite(absmax).all() or (np.abs(plain[plain != 0]) < SMALLEST_NORMAL).any():
            continue
        state = bnb.QuantState(
            absmax=torch.from_numpy(absmax.copy()).cuda(),
            shape=values.shape,
            dtype=values.dtype,
            blocksize=blocksize,
            code=book,
            quant_type="nf4",
        )
        codes = torch.frombuffer(bytearray(packed), dtype=torch.uint8).reshape(-1, 1).cuda()
        ours = bnb.dequantize_4bit(codes, state).cpu()
        assert torch.equal(ours.flatten(), back), name
        compared += len(plain)
    assert compared > 3000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_layer_like_a_models_own(dtype: str) -> None:
    """4 M Gaussian weights, as in a linear layer: how many codes a GPU and a CPU make differently, and where."""
    import bitsandbytes.functional as bnb
    import torch

    weight = (torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0)) * 0.02).to(getattr(torch, dtype))
    theirs, their_state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours, our_state = bnb.quantize_4bit(weight.cuda(), blocksize=64, quant_type="nf4")
    absmax = their_state.absmax.numpy()
    assert our_state.absmax.cpu().numpy().tobytes() == absmax.tobytes()
    plain = weight.float().flatten().numpy()
    codes = [_codes(packed.cpu().numpy().tobytes(), len(plain)) for packed in (ours, theirs)]
    (differ,) = np.nonzero(codes[0] != codes[1])
    print(f"NF4 {dtype}: {len(differ)} of {len(plain)} codes differ")
    blocks = differ // 64
    for place, block in zip(differ, blocks, strict=True):
        assert _near_a_border(plain[place : place + 1], absmax[block : block + 1], 64).all()
    # The definition; bitsandbytes' own CPU code gives other numbers in fp16 on CPUs that compute in it.
    book = bnb.get_4bit_type("nf4", device="cpu").numpy()
    expected = torch.from_numpy(book[codes[0]] * np.repeat(absmax, 64)).to(weight.dtype)
    assert torch.equal(bnb.dequantize_4bit(ours, our_state).cpu().flatten(), expected)


def test_double_quantized_scales() -> None:
    """The GPU takes the nearest 8-bit value, the CPU that of the nearest place in its table, up to 1/65535 away.

    So the CPU's value is at most 2/65535 farther than the nearest: once to the place, and once back.
    """
    import bitsandbytes.functional as bnb
    import torch

    compared = differing = 0
    for line in (GOLDEN / "nested.txt").read_text().splitlines():
        scales, offset, codes, outer, _ = (bytes.fromhex(part) for part in line.split())
        centred = np.frombuffer(scales, np.float32) - np.frombuffer(offset, np.float32)
        if not centred.any():
            continue
        ours, state = bnb.quantize_blockwise(torch.from_numpy(centred).cuda(), blocksize=256)
        assert state.absmax.cpu().numpy().tobytes() == outer
        book = state.code.cpu().double().numpy()
        with np.errstate(all="ignore"):
            scaled = centred.astype(np.float64) / np.repeat(np.frombuffer(outer, np.float32), 256)[: len(centred)]
        chosen = book[ours.cpu().numpy()]
        nearest = np.abs(scaled[:, None] - book[None, :]).min(axis=1)
        assert (np.abs(scaled - chosen) <= nearest + NEAR_BORDER).all()
        off = ours.cpu().numpy() != np.frombuffer(codes, np.uint8)
        assert (np.abs(scaled - book[np.frombuffer(codes, np.uint8)]) <= nearest + 2 / 65535).all()
        compared += len(centred)
        differing += int((off != 0).sum())
    print(f"8-bit scales: {differing} of {compared} codes differ between GPU and CPU")
    assert compared > 3000
