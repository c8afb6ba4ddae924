"""`quantize_4bit`, `dequantize_4bit` and `QuantState` against bitsandbytes, and against the formula where it is wrong."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft import _native, native

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "nf4"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
LEVELS = ["scalar", "avx2", "avx512"]


def bits(tensor: Any) -> bytes:
    if isinstance(tensor, torch.Tensor):
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.tobytes()


def by_the_formula(packed: torch.Tensor, absmax: torch.Tensor, shape: Any, code: str, size: int, dtype: Any) -> Any:
    """`round(book[code] * absmax)` in torch; bitsandbytes' own code book."""
    book = bnb.get_4bit_type(code, device="cpu")
    flat = packed.reshape(-1)
    codes = torch.stack([flat >> 4, flat & 15], 1).reshape(-1)[: int(np.prod(shape))].long()
    return (book[codes] * absmax.repeat_interleave(size)[: len(codes)]).to(dtype).reshape(shape)


def golden_cases() -> list[list[str]]:
    lines = [
        line.split(" ") for name in ("cases", "large") for line in (GOLDEN / f"{name}.txt").read_text().splitlines()
    ]
    assert len(lines) > 250
    return lines


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_golden(kind: str) -> None:
    for code, size, dtype, *fields in golden_cases():
        values, packed, absmax, _ = (bytes.fromhex(field.strip("-")) for field in fields)
        tensor = torch.frombuffer(bytearray(values), dtype=DTYPES[dtype])
        array: Any = tensor
        if kind == "numpy":
            array = np.frombuffer(
                values,
                ml_dtypes.bfloat16
                if dtype == "bf16"
                else dtype.replace("f", "<f").replace("16", "2").replace("32", "4"),
            )
        got, state = native.quantize_4bit(array, quant_type=code, blocksize=int(size), check_finite=False)
        assert bits(got) == packed
        expected = np.frombuffer(absmax, np.float32)
        assert np.array_equal(np.asarray(state.absmax), expected, equal_nan=True)
        if np.isfinite(expected).all():
            assert bits(state.absmax) == absmax
            back = native.dequantize_4bit(got, state)
            formula = by_the_formula(
                torch.frombuffer(bytearray(packed), dtype=torch.uint8),
                torch.tensor(expected),
                tensor.shape,
                code,
                int(size),
                tensor.dtype,
            )
            assert bits(back) == bits(formula)
            assert type(back) is type(array)


@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    dtype=st.sampled_from(list(DTYPES.values())),
    size=st.sampled_from(BLOCKSIZES),
    code=st.sampled_from(["nf4", "fp4"]),
    seed=st.integers(0, 1 << 30),
    scale=st.sampled_from([1.0, 1e-3, 300.0]),
)
@settings(max_examples=150, deadline=None)
def test_as_bitsandbytes(shape: list[int], dtype: torch.dtype, size: int, code: Any, seed: int, scale: float) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    theirs, their_state = bnb.quantize_4bit(x, blocksize=size, quant_type=code)
    packed, state = native.quantize_4bit(x, quant_type=code, blocksize=size)
    assert torch.equal(packed, theirs)
    assert bits(state.absmax) == bits(their_state.absmax)
    assert (packed.shape, packed.dtype) == (theirs.shape, theirs.dtype)
    back = native.dequantize_4bit(packed, state)
    assert bits(back) == bits(by_the_formula(packed, state.absmax, shape, code, size, dtype))
    # bitsandbytes 0.50.2 takes the scales of other blocks where rows do not hold whole blocks (spec: formats 5.3), and
    # its plain C path gives the second zero of FP4 a sign.
    if shape[-1] % size == 0 and code == "nf4":
        assert bits(back) == bits(bnb.dequantize_4bit(theirs, their_state))


@pytest.mark.parametrize("shape", [(40, 64), (7, 128), (300, 320), (33, 50), (1, 1), (5, 999)])
@pytest.mark.parametrize("code", ["nf4", "fp4"])
def test_double_quantization_of_tensors_is_that_of_bitsandbytes(shape: tuple[int, int], code: Any) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(7)).bfloat16() * 0.02
    theirs, their_state = bnb.quantize_4bit(x, quant_type=code, compress_statistics=True)
    packed, state = native.quantize_4bit(x, quant_type=code, double_quant=True)
    assert torch.equal(packed, theirs)
    assert state.offset == their_state.offset.item()
    assert torch.equal(state.absmax, their_state.absmax)
    assert bits(state.nested_absmax) == bits(their_state.state2.absmax)
    ours = {name.removeprefix("w."): bits(tensor) for name, tensor in state.to_tensors("w").items()}
    assert ours == {name: bits(tensor) for name, tensor in their_state.as_dict(packed=True).items()}
    back = native.dequantize_4bit(packed, state)
    absmax = bnb.dequantize_blockwise(their_state.absmax, their_state.state2) + their_state.offset
    assert bits(back) == bits(by_the_formula(packed, absmax, shape, code, 64, x.dtype))


def test_the_mean_of_numpy_arrays_is_exact() -> None:
    from fractions import Fraction

    x = np.random.default_rng(3).standard_normal((64, 640), np.float32)
    packed, state = native.quantize_4bit(x, double_quant=True)
    scales = np.abs(x).reshape(-1, 64).max(axis=1)
    exact = sum(map(Fraction, scales.tolist())) / len(scales)
    # f64 adds 640 numbers with an error far below half an f32 step, unless the sum is within 2^-25 of a tie: it is not.
    assert state.offset == float(np.float32(float(exact)))
    codes, nested = np.empty(640, np.uint8), np.empty(3, np.float32)
    _native.quantize_scales(scales, state.offset, codes, nested)
    assert np.array_equal(codes, state.absmax)
    assert np.array_equal(nested, state.nested_absmax)
    assert np.abs(native.dequantize_4bit(packed, state) - x).max() < 0.16 * np.abs(x).max()


def test_scales_as_bitsandbytes_quantizes_them() -> None:
    for line in (GOLDEN / "nested.txt").read_text().splitlines():
        absmax, offset, codes, scales, back = (bytes.fromhex(field) for field in line.split(" "))
        got = np.empty(len(codes), np.uint8), np.empty(len(scales) // 4, np.float32), np.empty(len(codes), np.float32)
        (center,) = np.frombuffer(offset, np.float32)
        _native.quantize_scales(np.frombuffer(absmax, np.float32), center, got[0], got[1])
        assert (got[0].tobytes(), got[1].tobytes()) == (codes, scales)
        _native.dequantize_scales(got[0], got[1], center, got[2])
        assert got[2].tobytes() == back


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_state_goes_to_bitsandbytes_and_back(double_quant: bool) -> None:
    x = torch.randn(64, 192, generator=torch.Generator().manual_seed(1)).half()
    packed, state = native.quantize_4bit(x, double_quant=double_quant)
    theirs = state.to_bitsandbytes()
    assert bits(bnb.dequantize_4bit(packed, theirs)) == bits(native.dequantize_4bit(packed, state))
    assert theirs.absmax.data_ptr() == state.absmax.data_ptr()
    again = native.QuantState.from_bitsandbytes(
        bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=double_quant)[1]
    )
    assert (again.shape, again.dtype, again.blocksize, again.offset) == ((64, 192), "float16", 64, state.offset)
    assert torch.equal(again.absmax, state.absmax)
    assert bits(native.dequantize_4bit(packed, again)) == bits(native.dequantize_4bit(packed, state))


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_state_goes_through_a_file(double_quant: bool, tmp_path: Path) -> None:
    x = np.random.default_rng(5).standard_normal((6, 100), np.float32).astype(ml_dtypes.bfloat16)
    packed, state = native.quantize_4bit(x, double_quant=double_quant)
    native.save_sharded({"w": packed, **state.to_tensors("w")}, tmp_path / "model")
    reader = native.open_checkpoint(tmp_path / "model")
    read = native.QuantState.from_tensors("w", reader)
    assert native.dequantize_4bit(reader["w"], read).tobytes() == native.dequantize_4bit(packed, state).tobytes()
    text = bytes(reader["w.quant_state.bitsandbytes__nf4"])
    assert json.loads(text)["shape"] == [6, 100]
    assert text.startswith(b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [6, 100]')


def test_packed_bytes_may_be_stored_as_another_dtype() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    packed, state = native.quantize_4bit(x)
    expected = bits(native.dequantize_4bit(packed, state))
    for storage in (torch.bfloat16, torch.float32):
        assert bits(native.dequantize_4bit(packed.view(-1).view(storage), state)) == expected


def test_another_dtype_comes_back_when_asked_for() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    packed, state = native.quantize_4bit(x)
    for dtype, names in (
        (torch.float32, ["float32", torch.float32, np.float32, np.dtype("float32")]),
        (torch.float16, ["float16", torch.float16]),
    ):
        expected = bits(by_the_formula(packed, state.absmax, x.shape, "nf4", 64, dtype))
        for name in names:
            back = native.dequantize_4bit(packed, state, dtype=name)
            assert (back.dtype, bits(back)) == (dtype, expected)


def test_bits_stand_in_for_bfloat16() -> None:
    x = torch.randn(3, 70, generator=torch.Generator().manual_seed(6)).bfloat16()
    packed, state = native.quantize_4bit(x)
    raw = x.view(torch.uint16).numpy()
    packed_raw, state_raw = native.quantize_4bit(raw, dtype="bfloat16")
    assert bits(packed_raw) == bits(packed)
    out = np.empty(raw.shape, np.uint16)
    assert native.dequantize_4bit(packed_raw, state_raw, out=out) is out
    assert bits(out) == bits(native.dequantize_4bit(packed, state))


def test_results_go_into_the_buffers_that_are_given() -> None:
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(8)).bfloat16()
    out, back = torch.zeros(3200, 1, dtype=torch.uint8), torch.zeros_like(x)
    address = out.data_ptr(), back.data_ptr()
    packed, state = native.quantize_4bit(x, out=out)
    assert packed is out
    assert torch.equal(out, native.quantize_4bit(x)[0])
    assert native.dequantize_4bit(out, state, out=back) is back
    assert torch.equal(back, native.dequantize_4bit(out, state))
    assert (out.data_ptr(), back.data_ptr()) == address


def test_tensors_of_no_size() -> None:
    packed, state = native.quantize_4bit(np.empty((0, 5), np.float32))
    assert (packed.shape, state.absmax.shape) == ((0, 1), (0,))
    assert native.dequantize_4bit(packed, state).shape == (0, 5)
    packed, state = native.quantize_4bit(torch.tensor(3.0))
    assert native.dequantize_4bit(packed, state).item() == 3.0
    with pytest.raises(native.ArrayError, match="has no mean"):
        native.quantize_4bit(np.empty(0, np.float32), double_quant=True)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x = np.random.default_rng(9).standard_normal(3_000_001, np.float32)
    packed, state = native.quantize_4bit(x, threads=1)
    back = native.dequantize_4bit(packed, state, threads=1)
    for threads in (2, 3, 8, None):
        again, again_state = native.quantize_4bit(x, threads=threads)
        assert np.array_equal(packed, again)
        assert np.array_equal(state.absmax, again_state.absmax)
        assert np.array_equal(back, native.dequantize_4bit(packed, state, threads=threads))


DIGEST = """
import hashlib, numpy as np
from fastft import native
digest = hashlib.sha256()
random = np.random.default_rng(11)
for count in (1, 31, 64, 4095, 4096, 10007, 600000):
    bits = random.integers(0, 1 << 32, count, np.uint32)
    numbers = random.standard_normal(count, np.float32)
    wild = np.where(random.random(count) < 0.001, bits.view(np.float32), numbers)
    for dtype, x in (("float32", wild), ("float16", numbers.astype(np.float16)), ("bfloat16", (wild.view(np.uint32) >> 16).astype(np.uint16))):
        for code in ("nf4", "fp4"):
            for size in (32, 64, 256, 4096):
                packed, state = native.quantize_4bit(x, dtype=dtype, quant_type=code, blocksize=size, check_finite=False)
                digest.update(packed)
                digest.update(state.absmax)
                for out in (np.empty(count, np.uint16), np.empty(count, np.float16), np.empty(count, np.float32)):
                    native.dequantize_4bit(packed, state, out=out, dtype="bfloat16" if out.dtype == np.uint16 else out.dtype)
                    digest.update(out)
print(digest.hexdigest())
"""


def test_every_level_gives_the_same_bits() -> None:
    digests = {}
    for level in LEVELS:
        environment = {**os.environ, "FASTFT_SIMD": level}
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=False
        )
        if "asks for more than this CPU has" not in done.stderr:
            assert done.returncode == 0, done.stderr
            digests[level] = done.stdout
    assert "scalar" in digests
    assert len(set(digests.values())) == 1, digests
    assert digests["scalar"].strip() != hashlib.sha256().hexdigest()


ZEROS = np.zeros((4, 64), np.float32)
PACKED, STATE = native.quantize_4bit(ZEROS)
READ_ONLY = np.zeros((128, 1), np.uint8)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("x", "arguments", "text"),
    [
        (ZEROS.T, {}, "x: the array is not contiguous"),
        (torch.zeros(4, 64).T, {}, "x: the tensor is not contiguous"),
        (torch.zeros(4, 64, device="meta"), {}, "x: the tensor is on meta; give .cpu() of it"),
        (torch.zeros(4, 64).to_sparse(), {}, "x: a sparse or quantized tensor is not allowed"),
        (torch._neg_view(torch.zeros(4)), {}, "x: the tensor is a lazy negative"),
        ([1.0, 2.0], {}, "x: a numpy array or a torch tensor is needed, not list"),
        (np.ma.masked_array(ZEROS, ZEROS == 0), {}, "x: a masked array would lose its mask"),
        (ZEROS.astype(np.float64), {}, "x: dtype float64 is not allowed; use float32, float16, bfloat16"),
        (
            ZEROS.astype(np.uint16),
            {},
            'x: dtype uint16 is not allowed; use float32, float16, bfloat16; give dtype="bfloat16"',
        ),
        (ZEROS, {"dtype": "bfloat16"}, "x: float32 numbers cannot be taken for the bits of bfloat16; give uint16"),
        (ZEROS.astype(">f4"), {}, "x: dtype >f4 is not allowed; little-endian numbers are"),
        (ZEROS.astype(object), {}, "x: dtype object is not allowed"),
        (
            ZEROS,
            {"blocksize": 48},
            "quantize_4bit: blocksize 48 is not allowed; use 32, 64, 128, 256, 512, 1024, 2048, 4096",
        ),
        (ZEROS, {"blocksize": 64.0}, "blocksize 64.0 is not allowed"),
        (ZEROS, {"quant_type": "nf5"}, 'quant_type "nf5" is not allowed; use nf4 or fp4'),
        (ZEROS, {"threads": 0}, "quantize_4bit: threads must be at least 1"),
        (ZEROS, {"out": np.zeros(128, np.uint8)}, r"out: shape is (128,), and (128, 1) is needed"),
        (ZEROS, {"out": np.zeros((128, 1), np.int8)}, "out: dtype is int8, and uint8 is written"),
        (ZEROS, {"out": READ_ONLY}, "out: the array is read-only"),
        (ZEROS, {"out": ZEROS.view(np.uint8).reshape(-1)[:128].reshape(128, 1)}, "shares memory with"),
        (
            np.array([1, 2, np.nan], np.float32),
            {},
            "x holds NaN or infinite numbers, the first in block 0 (numbers 0 to 2)",
        ),
        (torch.tensor([0.0] * 100 + [float("inf")]), {}, "the first in block 1 (numbers 64 to 100)"),
        (np.array([np.nan], np.float32), {"double_quant": True, "check_finite": False}, "x holds NaN"),
    ],
)
def test_what_cannot_be_quantized(x: Any, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(native.ArrayError) as raised:
        native.quantize_4bit(x, **arguments)
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("packed", "changes", "arguments", "text"),
    [
        (PACKED[:-1], {}, {}, "packed has 127 bytes, and 256 numbers of shape (4, 64) have 128"),
        (PACKED, {"absmax": np.zeros(3, np.float32)}, {}, "absmax has 3 float32, and 4 float32 are needed"),
        (PACKED, {"absmax": np.zeros(4, np.uint8)}, {}, "absmax has 4 uint8, and 4 float32 are needed"),
        (PACKED, {"offset": 1.0}, {}, "belong together; some are missing"),
        (PACKED, {"dtype": "float64"}, {}, "state: dtype 'float64' is not allowed"),
        (PACKED, {"quant_type": "int4"}, {}, "state: quant_type 'int4' is not allowed"),
        (PACKED, {"blocksize": 1}, {}, "state: blocksize 1 is not allowed"),
        (PACKED, {"shape": (4, -64)}, {}, "state: shape (4, -64) is no shape"),
        (PACKED, {}, {"dtype": "int8"}, "dequantize_4bit: dtype int8 is not allowed"),
        (PACKED, {}, {"dtype": "float"}, "dtype 'float' is not known"),
        (PACKED, {}, {"out": np.zeros((4, 64), np.float16)}, "out: dtype is float16, and float32 is written"),
        (torch.tensor(PACKED), {}, {"out": torch.zeros(4, 64, requires_grad=True)}, "out: the tensor requires grad"),
    ],
)
def test_what_cannot_be_dequantized(packed: Any, changes: dict[str, Any], arguments: dict[str, Any], text: str) -> None:
    from dataclasses import replace

    with pytest.raises(native.ArrayError) as raised:
        native.dequantize_4bit(packed, replace(STATE, **changes), **arguments)
    assert text in str(raised.value)


def test_a_state_of_bitsandbytes_is_not_taken_unasked() -> None:
    with pytest.raises(native.ArrayError, match=r"for bitsandbytes' own use QuantState\.from_bitsandbytes"):
        native.dequantize_4bit(PACKED, bnb.quantize_4bit(torch.zeros(64))[1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"w.absmax": None}, "absmax is missing"),
        ({"w.quant_map": None}, "quant_map is missing"),
        ({"w.nested_absmax": np.zeros(1, np.float32)}, "nested_absmax is there, and the text has none"),
        ({"w.quant_state.bitsandbytes__nf4": None}, "exactly one of quant_state.bitsandbytes__nf4"),
        ({"w.quant_state.bitsandbytes__nf4": np.frombuffer(b"{", np.uint8)}, "quant_state: not JSON"),
        (
            {"w.quant_state.bitsandbytes__nf4": np.frombuffer(b"[]", np.uint8)},
            "quant_state: a JSON object is expected, not list",
        ),
        ({"w.quant_state.bitsandbytes__nf4": np.frombuffer(b"{}", np.uint8)}, "quant_state has quant_type = None"),
        ({"w.quant_map": np.zeros(16, np.float32)}, "quant_map is not the code book of bitsandbytes"),
        ({"w.absmax": np.zeros(5, np.float32)}, "absmax has 5 float32, and 4 float32 are needed"),
    ],
)
def test_a_file_that_is_wrong(change: dict[str, Any], text: str) -> None:
    tensors = {**STATE.to_tensors("w"), **change}
    with pytest.raises(native.CheckpointError) as raised:
        native.QuantState.from_tensors("w", {name: tensor for name, tensor in tensors.items() if tensor is not None})
    assert text in str(raised.value)


def test_the_border_checks_for_itself() -> None:
    source, packed, absmax = np.zeros(256, np.uint8), np.zeros(32, np.uint8), np.zeros(1, np.float32)
    how: Any = {"quant_type": "nf4", "blocksize": 64}
    assert _native.quantize_4bit(source, "float32", packed, absmax, **how)
    with pytest.raises(native.ArrayError, match="31 values or bytes, but 32 are needed"):
        _native.quantize_4bit(source, "float32", packed[:31], absmax, **how)
    with pytest.raises(native.ArrayError, match="x: shares memory with quantize_4bit: out"):
        _native.quantize_4bit(source, "float32", source[:32], absmax, **how)
    with pytest.raises(native.ArrayError, match="not contiguous"):
        _native.quantize_4bit(np.zeros(512, np.uint8)[::2], "float32", packed, absmax, **how)
    with pytest.raises(BufferError):
        _native.quantize_4bit(source.view(np.int32), "float32", packed, absmax, **how)
    with pytest.raises(BufferError):
        _native.quantize_4bit(source, "float32", packed, np.zeros(5, np.uint8)[1:].view(np.float32), **how)
