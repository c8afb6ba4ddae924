"""`merge_lora` against numpy in f64 where all numbers are exact, and against PEFT's own merge."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D

from fastft import native

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def exact(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Multiples of 1/16 from -1/2 to 1/2: products and their sums (rank up to 64) are exact in f32 and f64."""
    return random.integers(-8, 9, shape).astype(np.float32) / 16


def weights(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    return torch.from_numpy(random.standard_normal(shape, np.float32)).to(TORCH[dtype])


def expected(W: torch.Tensor, product: Any, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """One rounding of an f64 sum to f32 and one to `dtype`: W + D is exact in f64, and the kernel's f32 sum is its rounding."""
    return (W.double() + torch.from_numpy(product.astype(np.float64)) * scale).float().to(dtype)


def same(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 90),
    rank=st.integers(1, 40),
    dtypes=st.tuples(st.sampled_from(list(TORCH)), st.sampled_from(list(TORCH)), st.sampled_from(list(TORCH))),
    transposed=st.booleans(),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=150, deadline=None)
def test_one_rounding(rows: int, columns: int, rank: int, dtypes: Any, transposed: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    W = weights(random, (rows, columns), dtypes[0])
    outputs, inputs = (columns, rows) if transposed else (rows, columns)
    A, B = exact(random, (rank, inputs)), exact(random, (outputs, rank))
    product = (B.astype(np.float64) @ A).T if transposed else B.astype(np.float64) @ A
    factors = torch.from_numpy(A).to(TORCH[dtypes[1]]), torch.from_numpy(B).to(TORCH[dtypes[1]])
    before = W.clone()
    merged = native.merge_lora(W, *factors, 0.5, transposed=transposed, dtype=dtypes[2])
    assert same(merged, expected(W, product, 0.5, TORCH[dtypes[2]]))
    assert same(W, before)
    in_place = W.clone()
    assert native.merge_lora(in_place, *factors, 0.5, transposed=transposed, out=in_place) is in_place
    assert same(in_place, expected(W, product, 0.5, W.dtype))


@pytest.mark.parametrize("dtype", list(TORCH))
def test_kinds_of_arrays(dtype: str) -> None:
    random = np.random.default_rng(1)
    W, A, B = weights(random, (33, 20), dtype), exact(random, (4, 20)), exact(random, (33, 4))
    right = expected(W, B @ A, 2.0, W.dtype)
    array: Any = W.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if dtype == "bfloat16" else W.numpy()
    merged = native.merge_lora(array, A, torch.from_numpy(B), 2.0)
    assert isinstance(merged, np.ndarray)
    assert merged.dtype == array.dtype
    assert merged.tobytes() == right.view(torch.uint8).numpy().tobytes()


def test_bits_stand_in_for_bfloat16() -> None:
    random = np.random.default_rng(2)
    W, A, B = weights(random, (9, 20), "bfloat16"), exact(random, (4, 20)), exact(random, (9, 4))
    bits = W.view(torch.uint16).numpy().copy()
    right = expected(W, B @ A, 1.0, W.dtype).view(torch.uint16).numpy()
    merged = native.merge_lora(bits, A, B, 1.0, dtype="bfloat16")
    assert merged.dtype == np.uint16
    assert np.array_equal(merged, right)
    native.merge_lora(bits, A, B, 1.0, dtype="bfloat16", out=bits)
    assert np.array_equal(bits, right)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    random = np.random.default_rng(3)
    W = weights(random, (1501, 901), "bfloat16")
    A, B = weights(random, (8, 901), "float32"), weights(random, (1501, 8), "float32")
    for transposed in (False, True):
        factors = (
            (weights(random, (8, 1501), "float32"), weights(random, (901, 8), "float32")) if transposed else (A, B)
        )
        alone = native.merge_lora(W, *factors, 0.3, transposed=transposed, threads=1)
        for threads in (2, 3, 7):
            assert same(alone, native.merge_lora(W, *factors, 0.3, transposed=transposed, threads=threads))


class OneLayer(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer


def peft_layer(layer: torch.nn.Module, *, dora: bool, seed: int, exact_factors: bool) -> Any:
    """A layer of PEFT with random factors, before its merge."""
    config = LoraConfig(
        r=6, lora_alpha=9, target_modules=["layer"], use_dora=dora, fan_in_fan_out=isinstance(layer, Conv1D)
    )
    model: Any = get_peft_model(OneLayer(layer), config)
    found = model.base_model.model.layer
    random = np.random.default_rng(seed)
    for side in (found.lora_A, found.lora_B) if not isinstance(layer, torch.nn.Embedding) else ():
        weight = side["default"].weight
        values = (
            exact(random, tuple(weight.shape))
            if exact_factors
            else random.standard_normal(weight.shape, np.float32) * 0.1
        )
        weight.data = torch.from_numpy(values.astype(np.float32))
    if dora:
        m = found.lora_magnitude_vector["default"].weight
        m.data = m.data * torch.from_numpy(1 + 0.1 * random.standard_normal(m.shape).astype(np.float32))
    return found


LAYERS = {
    "linear": lambda: torch.nn.Linear(40, 56, bias=False),
    "conv1d": lambda: Conv1D(56, 40),
    "conv2d": lambda: torch.nn.Conv2d(5, 7, 3),
}


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("dtype", list(TORCH))
def test_as_peft_merges(kind: str, dtype: str) -> None:
    """With exact factors the order of the sum does not matter, so every bit is PEFT's."""
    torch.manual_seed(4)
    layer = LAYERS[kind]().to(TORCH[dtype])
    found = peft_layer(layer, dora=False, seed=5, exact_factors=True)
    W = found.base_layer.weight.data.clone()
    A, B = found.lora_A["default"].weight.data, found.lora_B["default"].weight.data
    ours = native.merge_lora(W, A, B, 9 / 6, transposed=kind == "conv1d")
    found.merge()
    assert same(ours, found.base_layer.weight.data)


@pytest.mark.parametrize("kind", list(LAYERS))
@pytest.mark.parametrize("dtype", list(TORCH))
def test_dora_as_peft_merges(kind: str, dtype: str) -> None:
    """The norms are summed in torch's own order, so every bit is PEFT's; torch's norm over several dimensions, which a
    convolution asks for, is summed in another order: one step of a 16-bit dtype, and an f32 sum of 45 squares is off by
    at most 45/2 * 2^-24 of itself on both sides, a norm by half of that."""
    torch.manual_seed(6)
    layer = LAYERS[kind]().to(TORCH[dtype])
    found = peft_layer(layer, dora=True, seed=7, exact_factors=True)
    W = found.base_layer.weight.data.clone()
    A, B = found.lora_A["default"].weight.data, found.lora_B["default"].weight.data
    magnitude = found.lora_magnitude_vector["default"].weight.data
    ours = native.merge_lora(W, A, B, 9 / 6, transposed=kind == "conv1d", magnitude=magnitude)
    in_place = W.clone()
    native.merge_lora(in_place, A, B, 9 / 6, transposed=kind == "conv1d", magnitude=magnitude, out=in_place)
    assert same(in_place, ours)
    found.merge()
    theirs = found.base_layer.weight.data
    if kind != "conv2d":
        assert same(ours, theirs)
        return
    step = {"float32": 25 * 2.0**-24, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    error = (ours.double() - theirs.double()).abs()
    assert (error <= step * theirs.double().abs()).all()
    if dtype != "float32":
        assert (error > 0).double().mean() < 0.01


def test_dora_of_many_rows_on_many_threads() -> None:
    random = np.random.default_rng(8)
    W = weights(random, (1100, 700), "bfloat16")
    for transposed in (False, True):
        inputs, outputs = (1100, 700) if transposed else (700, 1100)
        A, B, m = exact(random, (4, inputs)), exact(random, (outputs, 4)), exact(random, (outputs,)) + 1
        alone = native.merge_lora(W, A, B, 0.5, magnitude=m, transposed=transposed, threads=1)
        for threads in (2, 3, 7):
            assert same(alone, native.merge_lora(W, A, B, 0.5, magnitude=m, transposed=transposed, threads=threads))
        in_place = W.clone()
        native.merge_lora(in_place, A, B, 0.5, magnitude=m, transposed=transposed, out=in_place)
        assert same(alone, in_place)
        V = expected(W, (B @ A).T if transposed else B @ A, 0.5, torch.float32).double()
        norms = V.norm(dim=0 if transposed else 1, keepdim=True)
        right = V / norms * torch.from_numpy(m).reshape((1, -1) if transposed else (-1, 1))
        # One step of bf16: the sum of 1100 squares in f32 is off by 1100/2 * 2^-24 at most, far less than that.
        assert ((alone.double() - right).abs() <= 2.0**-7 * right.abs()).all()


def test_memory_of_the_result_is_that_of_out() -> None:
    random = np.random.default_rng(9)
    W, A, B = weights(random, (8, 8), "bfloat16"), exact(random, (2, 8)), exact(random, (8, 2))
    out = torch.empty_like(W)
    address = out.data_ptr()
    assert native.merge_lora(W, A, B, 1.0, out=out) is out
    assert out.data_ptr() == address
    assert same(out, expected(W, B @ A, 1.0, W.dtype))
    view = W[:]  # another tensor, the same memory: in place too
    native.merge_lora(W, A, B, 1.0, out=view)
    assert same(W, out)


W, A, B = np.zeros((6, 4), np.float32), np.zeros((2, 4), np.float32), np.zeros((6, 2), np.float32)
LARGE = np.full((6, 4), 60000, np.float16)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"A": B}, "W (6, 4), A (6, 2), B (6, 2): do not fit; needed are W (O, I), A (R, I), B (O, R)"),
        ({"transposed": True}, "do not fit; needed are W (I, O), A (R, I), B (O, R)"),
        ({"W": W[0]}, "W (4,), A (2, 4), B (6, 2): matrices with at least one row and column are needed"),
        ({"A": A[:0], "B": B[:, :0].copy()}, "matrices with at least one row and column are needed"),
        ({"W": W.reshape(6, 2, 2), "A": A.reshape(2, 2, 2)[:, :, :1].copy()}, "do not fit"),
        ({"W": W.reshape(6, 2, 2), "transposed": True}, "only a matrix can be stored transposed"),
        ({"W": W.astype(np.int8)}, "W: dtype int8 is not allowed"),
        ({"W": W[:, ::2]}, "W: the array is not contiguous"),
        ({"A": A * np.nan}, "A or B holds a value that is not finite"),
        ({"scale": float("nan")}, "scale nan is no finite f32"),
        ({"scale": 1e39}, "scale 1e+39 is no finite f32"),
        ({"dtype": "int8"}, "dtype int8 is not allowed"),
        ({"out": np.zeros((6, 4), np.float16)}, "out: dtype is float16, and float32 is written"),
        ({"out": np.zeros((4, 6), np.float32)}, "out: shape is (4, 6), and (6, 4) is needed"),
        ({"out": np.broadcast_to(np.float32(0), (6, 4))}, "out: the array is not contiguous"),
        (
            {"W": LARGE, "A": A + 1, "B": B + 1, "scale": 60000.0},
            "a weight would become infinite or NaN in float16",
        ),
        ({"magnitude": np.ones(4, np.float32)}, "magnitude has 4 numbers, and 6 are needed"),
        ({"magnitude": np.full(6, np.inf, np.float32)}, "magnitude holds a value that is not finite"),
        ({"magnitude": np.ones(6, np.float32)}, "or a row of W + scale * B A is zero and has no direction"),
    ],
)
def test_what_cannot_be_merged(arguments: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"W": W, "A": A, "B": B, "scale": 1.0, **arguments}
    with pytest.raises(native.ArrayError) as raised:
        native.merge_lora(**given)
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_out_that_overlaps_is_refused() -> None:
    room = np.zeros(100, np.float32)
    base, out = room[:24].reshape(6, 4), room[4:28].reshape(6, 4)
    with pytest.raises(native.ArrayError, match="out: shares memory with W; give an array of its own"):
        native.merge_lora(base, A, B, 1.0, out=out)
    with pytest.raises(native.ArrayError, match="out: shares memory with A"):
        native.merge_lora(W, room[:8].reshape(2, 4), B, 1.0, out=room[:24].reshape(6, 4))


def test_a_weight_that_is_not_finite_stays_as_it_is() -> None:
    base = np.ones((6, 4), np.float32)
    base[2, 3] = np.inf
    merged = native.merge_lora(base, A + 1, B + 1, 1.0)
    assert merged[2, 3] == np.inf
    assert (np.delete(merged.reshape(-1), 11) == 3).all()
