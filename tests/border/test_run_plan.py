"""`run_plan`: every operation against numpy and safetensors, every refusal by its text, Ctrl-C and progress."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fastft import _native
from fastft.errors import CheckpointError, FileError, PlanError

NUMPY = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "F64": np.dtype("<f8")}


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of f32 values as bf16: nearest, ties to even (finite values)."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """f32 values in the bits of a dtype."""
    return to_bf16(values) if dtype == "BF16" else values.astype(NUMPY[dtype])


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    return from_bf16(stored) if dtype == "BF16" else stored.astype(np.float32)


class Files:
    """Sources in one raw file, and a plan that is built up tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = b"head"  # sources do not start at a multiple of anything
        self.tensors: list[dict[str, Any]] = []

    def source(self, stored: np.ndarray, dtype: str, shape: tuple[int, ...] | None = None) -> dict[str, Any]:
        offset = len(self.data)
        self.data += stored.tobytes()
        return {"file": 0, "offset": offset, "dtype": dtype, "shape": shape or stored.shape}

    def tensor(self, name: str, dtype: str, shape: tuple[int, ...], op: dict[str, Any]) -> None:
        self.tensors.append({"name": name, "dtype": dtype, "shape": shape, "op": op})

    def plan(self, name: str = "out.safetensors") -> str:
        (self.folder / "source.bin").write_bytes(self.data)
        shard = {"path": str(self.folder / name), "metadata": {"format": "pt"}, "tensors": self.tensors}
        return json.dumps({"files": [str(self.folder / "source.bin")], "shards": [shard]})

    def run(self, **options: Any) -> dict[str, bytes]:
        """The bytes of each tensor in the output."""
        (self.folder / "out.safetensors").unlink(missing_ok=True)
        _native.run_plan(self.plan(), **options)
        content = (self.folder / "out.safetensors").read_bytes()
        tensors = _native.read_header(self.folder / "out.safetensors")
        return {tensor.name: content[tensor.offset : tensor.offset + tensor.nbytes] for tensor in tensors}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_copy_of_a_file_has_its_bytes(tmp_path: Path) -> None:
    arrays = {
        "model.b": np.arange(6, dtype=np.int64).reshape(2, 3),
        "model.a": numbers(1, 300, 70),
        "h\u00e9": np.ones(5, np.float16),
        "flag": np.array([True, False]),
        "empty": np.zeros((0, 2), np.float32),
        "one": np.array(3.5, np.float64),
    }
    save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "pt"})
    tensors = [
        {
            "name": info.name,
            "dtype": info.dtype,
            "shape": info.shape,
            "op": {
                "kind": "copy",
                "source": {"file": 0, "offset": info.offset, "dtype": info.dtype, "shape": info.shape},
            },
        }
        for info in reversed(_native.read_header(tmp_path / "a.safetensors"))
    ]
    plan = {
        "files": [str(tmp_path / "a.safetensors")],
        "shards": [{"path": str(tmp_path / "b.safetensors"), "metadata": {"format": "pt"}, "tensors": tensors}],
    }
    report = _native.run_plan(json.dumps(plan), threads=3, memory_budget_bytes=1)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert report["tensors"] == 6
    assert report["bytes_written"] == (tmp_path / "a.safetensors").stat().st_size


def test_files_without_data(tmp_path: Path) -> None:
    empty = {"name": "e", "dtype": "F32", "shape": [0], "op": {"kind": "rows", "parts": []}}
    shards = [{"path": str(tmp_path / f"{index}"), "tensors": [empty] * index} for index in range(2)]
    _native.run_plan(json.dumps({"files": [], "shards": shards}), threads=4)
    assert load_file(tmp_path / "0") == {}
    assert load_file(tmp_path / "1")["e"].shape == (0,)


@pytest.mark.parametrize("source", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_cast(files: Files, source: str, target: str) -> None:
    stored = encode(numbers(2, 37, 41), source)
    files.tensor("x", target, (37, 41), {"kind": "cast", "source": files.source(stored, source)})
    assert files.run()["x"] == encode(decode(stored, source), target).tobytes()


def test_cast_of_f64(files: Files) -> None:
    values = np.random.default_rng(3).standard_normal(1000)
    source = files.source(values, "F64")
    files.tensor("half", "F16", (1000,), {"kind": "cast", "source": source})
    files.tensor("single", "F32", (1000,), {"kind": "cast", "source": source})
    out = files.run()
    assert out["half"] == values.astype(np.float16).tobytes()
    assert out["single"] == values.astype(np.float32).tobytes()


def test_a_cast_that_overflows_names_the_tensor(files: Files) -> None:
    values = np.array([1.0, 65520.0], np.float32)
    files.tensor("model.big", "F16", (2,), {"kind": "cast", "source": files.source(values, "F32")})
    with pytest.raises(PlanError, match=r'tensor "model\.big": a value is too large'):
        files.run()


def test_infinity_and_nan_may_be_cast(files: Files) -> None:
    values = np.array([np.inf, -np.inf, np.nan], np.float32)
    files.tensor("x", "F16", (3,), {"kind": "cast", "source": files.source(values, "F32")})
    out = np.frombuffer(files.run()["x"], np.float16)
    assert np.array_equal(out, values.astype(np.float16), equal_nan=True)


def test_rows(files: Files) -> None:
    q, kv = numbers(4, 12, 6), numbers(5, 9, 6)
    parts = [
        {"source": files.source(kv, "F32"), "start": 3, "count": 4},
        {"source": files.source(q, "F32"), "start": 0, "count": 12},
        {"source": files.source(encode(kv, "F16"), "F16"), "start": 8, "count": 1},
        {"source": files.source(q, "F32"), "start": 5, "count": 0},
    ]
    files.tensor("x", "F32", (17, 6), {"kind": "rows", "parts": parts})
    expected = np.concatenate([kv[3:7], q, decode(encode(kv[8:9], "F16"), "F16")])
    for budget in (1, 10**9):
        assert files.run(memory_budget_bytes=budget)["x"] == expected.tobytes()


def test_rows_of_many_small_parts_with_one_row_tiles(files: Files) -> None:
    wide = numbers(6, 40, 20_000)
    source = files.source(wide, "F32")
    order = np.random.default_rng(7).permutation(40)
    parts = [{"source": source, "start": int(row), "count": 1} for row in order]
    files.tensor("x", "F32", wide.shape, {"kind": "rows", "parts": parts})
    assert files.run(memory_budget_bytes=1, threads=3)["x"] == wide[order].tobytes()


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 3000), max_size=6), dtype=st.sampled_from(["F32", "F16", "BF16", "I64"]))
def test_join(tmp_path_factory: pytest.TempPathFactory, cuts: list[int], dtype: str) -> None:
    """Pieces that begin and end anywhere, of two files in turn, copied and cast."""
    files = Files(tmp_path_factory.mktemp("join"))
    whole = np.arange(3000).reshape(50, 60) if dtype == "I64" else encode(numbers(8, 50, 60), dtype)
    ends = [0, *sorted(cuts), 3000]
    pieces = [whole.reshape(-1)[start:end] for start, end in itertools.pairwise(ends)]
    parts = [files.source(piece, dtype) for piece in pieces]
    files.tensor("copied", dtype, whole.shape, {"kind": "join", "parts": parts})
    if dtype != "I64":
        files.tensor("cast", "F32", whole.shape, {"kind": "join", "parts": parts})
    for budget in (1, 10**9):
        found = files.run(memory_budget_bytes=budget)
        assert found["copied"] == whole.tobytes()
        assert "cast" not in found or found["cast"] == decode(whole, dtype).tobytes()


def test_join_to_a_scalar(files: Files) -> None:
    value = np.array([2.5], np.float32)
    files.tensor("x", "F32", (), {"kind": "join", "parts": [files.source(value, "F32", (1, 1, 1))]})
    assert files.run()["x"] == value.tobytes()


@pytest.mark.parametrize(
    ("dtype", "shape", "sizes", "reason"),
    [
        ("F32", (2, 3), (4, 1), "the parts have 5 rows, the tensor has 6"),
        ("F32", (2**33, 2**33), (4,), "no size in bytes|too large"),
        ("I64", (4,), (4,), "I64 stands where"),
        ("F32", (3,), (), "the parts have 0 rows"),
    ],
)
def test_refused_joins(files: Files, dtype: str, shape: tuple[int, ...], sizes: tuple[int, ...], reason: str) -> None:
    parts = [files.source(np.zeros(size, np.float32), "F32") for size in sizes]
    files.tensor("x", dtype, shape, {"kind": "join", "parts": parts})
    with pytest.raises(PlanError, match=reason):
        files.run()
    files.tensors.clear()
    files.tensor("x", "F32", (9,), {"kind": "join", "parts": [{"file": 0, "offset": 0, "dtype": "F32", "shape": [9]}]})
    files.data = files.data[:4]
    with pytest.raises(PlanError, match="is not inside"):
        files.run()


def merged(base: np.ndarray, products: np.ndarray, dtype: str) -> bytes:
    return encode(base + products, dtype).tobytes()


def fused_product(B: np.ndarray, A: np.ndarray, scale: float) -> np.ndarray:
    """`f32(scale) * (B @ A)` with each sum in f32 over the rank in order, each step rounded once (FMA).

    A product of two f32 is exact in f64; adding an f32 there and rounding to f32 rounds twice, which differs from a
    fused step only where the f64 sum lies within 2^-53 of a tie: the small integers in `exact` never do.
    """
    total = np.zeros((B.shape[0], A.shape[1]), np.float32)
    for k in range(A.shape[0]):
        exact = B[:, k : k + 1].astype(np.float64) * A[k : k + 1].astype(np.float64)
        total = (exact + total).astype(np.float32)
    return total * np.float32(scale)


def exact(seed: int, *shape: int) -> np.ndarray:
    """Multiples of 1/64 below 1: products and their sums round rarely, and never twice."""
    return (np.random.default_rng(seed).integers(-64, 65, shape) / 64).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 90),
    rank=st.integers(1, 20),
    dtypes=st.tuples(*[st.sampled_from(["F32", "F16", "BF16"])] * 3),
    transposed=st.booleans(),
    budget=st.sampled_from([1, 10**9]),
)
def test_merge_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    rows: int,
    columns: int,
    rank: int,
    dtypes: tuple[str, str, str],
    transposed: bool,
    budget: int,
) -> None:
    files = Files(tmp_path_factory.mktemp("merge"))
    base_dtype, adapter_dtype, dtype = dtypes
    base = encode(numbers(8, rows, columns), base_dtype)
    shape_A, shape_B = ((rank, rows), (columns, rank)) if transposed else ((rank, columns), (rows, rank))
    A, B = encode(exact(9, *shape_A), adapter_dtype), encode(exact(10, *shape_B), adapter_dtype)
    delta = {
        "a": files.source(A, adapter_dtype),
        "b": files.source(B, adapter_dtype),
        "scale": 0.3,
        "transposed": transposed,
    }
    files.tensor(
        "x", dtype, (rows, columns), {"kind": "merge", "source": files.source(base, base_dtype), "deltas": [delta]}
    )
    product = fused_product(decode(B, adapter_dtype), decode(A, adapter_dtype), 0.3)
    product = product.T if transposed else product
    assert files.run(memory_budget_bytes=budget)["x"] == merged(decode(base, base_dtype), product, dtype)


def test_merge_as_peft_computes_it(files: Files) -> None:
    """PEFT's expression in torch, whose summation order is its own: equal after rounding to bf16 (formats 2.2)."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    base, A, B = to_bf16(numbers(11, 256, 384)), numbers(12, 16, 384) * 0.05, numbers(13, 256, 16) * 0.05
    delta = {"a": files.source(A, "F32"), "b": files.source(B, "F32"), "scale": 2.0}
    files.tensor("x", "BF16", (256, 384), {"kind": "merge", "source": files.source(base, "BF16"), "deltas": [delta]})
    weight = torch.from_numpy(base.view(np.int16)).view(torch.bfloat16)
    weight += (torch.from_numpy(B) @ torch.from_numpy(A)) * 2.0
    assert files.run()["x"] == weight.view(torch.int16).numpy().tobytes()


def test_several_deltas_are_summed_first(files: Files) -> None:
    base = numbers(14, 20, 30)
    deltas, total = [], np.zeros((20, 30), np.float32)
    for seed, scale in ((15, 0.5), (17, -1.25)):
        A, B = exact(seed, 4 + seed, 30), exact(seed + 1, 20, 4 + seed)
        deltas.append({"a": files.source(A, "F32"), "b": files.source(B, "F32"), "scale": scale})
        total = total + fused_product(B, A, scale)
    files.tensor("x", "F32", (20, 30), {"kind": "merge", "source": files.source(base, "F32"), "deltas": deltas})
    assert files.run()["x"] == (base + total).tobytes()


def test_rows_of_a_product_go_where_they_belong(files: Files) -> None:
    """A fused qkv weight: q goes to rows 0..4 and 10..14, v to rows 6..9; row 5 and row 4 stay bit for bit."""
    base = numbers(18, 14, 10)
    base[5, 3] = -0.0
    A_q, B_q, A_v, B_v = exact(19, 3, 10), exact(20, 8, 3), exact(21, 2, 10), exact(22, 6, 2)
    deltas = [
        {"a": files.source(A_q, "F32"), "b": files.source(B_q, "F32"), "scale": 1.0, "rows": [[10, 4, 4], [0, 0, 4]]},
        {"a": files.source(A_v, "F32"), "b": files.source(B_v, "F32"), "scale": 2.0, "rows": [[6, 1, 5]]},
    ]
    files.tensor("x", "F32", (14, 10), {"kind": "merge", "source": files.source(base, "F32"), "deltas": deltas})
    q, v = fused_product(B_q, A_q, 1.0), fused_product(B_v, A_v, 2.0)
    expected = base.copy()
    total = np.zeros_like(base)
    total[0:4] += q[0:4]
    total[10:14] += q[4:8]
    total[6:11] += v[1:6]
    changed = [0, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13]
    expected[changed] = (base + total)[changed]
    for budget in (1, 10**9):
        assert files.run(memory_budget_bytes=budget)["x"] == expected.tobytes()


def test_convolutions_and_experts_are_matrices(files: Files) -> None:
    base, A, B = numbers(23, 6, 4, 3, 3), exact(24, 2, 4, 3, 3), exact(25, 6, 2, 1, 1)
    delta = {"a": files.source(A, "F32"), "b": files.source(B, "F32"), "scale": 1.0}
    files.tensor("conv", "F32", base.shape, {"kind": "merge", "source": files.source(base, "F32"), "deltas": [delta]})
    experts = numbers(26, 3, 5, 7)
    A_e, B_e = exact(27, 2, 7), exact(28, 5, 2)
    delta = {"a": files.source(A_e, "F32"), "b": files.source(B_e, "F32"), "scale": 1.0, "rows": [[10, 0, 5]]}
    op = {"kind": "merge", "source": files.source(experts, "F32", (15, 7)), "deltas": [delta]}
    files.tensor("experts", "F32", experts.shape, op)
    out = files.run()
    product = fused_product(B.reshape(6, 2), A.reshape(2, 36), 1.0).reshape(base.shape)
    assert out["conv"] == (base + product).tobytes()
    experts[2] += fused_product(B_e, A_e, 1.0)
    assert out["experts"] == experts.tobytes()


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_share_one_b(files: Files, num_threads: int, *, transposed: bool) -> None:
    """PEFT's adapter of a fused weight: A is (experts * rank, in), B is (out, rank * experts), the expert fastest."""
    num_experts, rank, num_in, num_out = 5, 3, 7, 11
    A, B = exact(40, num_experts * rank, num_in), exact(41, num_out, rank * num_experts)
    a = files.source(A, "F32")
    b = files.source(B, "F32")
    rows, columns = (num_in, num_out) if transposed else (num_out, num_in)
    base = numbers(42, num_experts, rows, columns)
    deltas, expected = [], base.copy()
    for expert in range(num_experts):
        own_a = {**a, "offset": a["offset"] + expert * rank * num_in * 4, "shape": (rank, num_in)}
        delta = {"a": own_a, "b": b, "b_columns": [expert, num_experts], "scale": 0.5, "transposed": transposed}
        product = fused_product(
            B.reshape(num_out, rank, num_experts)[:, :, expert].copy(), own_of(A, expert, rank), 0.5
        )
        expected[expert] += product.T if transposed else product
        own = {"kind": "merge", "source": files.source(base[expert], "F32"), "deltas": [delta]}
        files.tensor(f"expert.{expert}", "F32", (rows, columns), own)
        deltas.append({**delta, "rows": [[expert * rows, 0, rows]]})
    stacked = files.source(base, "F32", (num_experts * rows, columns))
    files.tensor("all", "F32", base.shape, {"kind": "merge", "source": stacked, "deltas": deltas})
    out = files.run(threads=num_threads)
    assert out["all"] == expected.tobytes()
    for expert in range(num_experts):
        assert out[f"expert.{expert}"] == expected[expert].tobytes()


def own_of(A: np.ndarray, expert: int, rank: int) -> np.ndarray:
    return A[expert * rank : (expert + 1) * rank]


def test_results_do_not_depend_on_threads_or_level(files: Files, tmp_path: Path) -> None:
    base, A, B = to_bf16(numbers(29, 500, 333)), numbers(30, 13, 333), numbers(31, 500, 13)
    delta = {"a": files.source(A, "F32"), "b": files.source(B, "F32"), "scale": 0.7}
    files.tensor("x", "BF16", (500, 333), {"kind": "merge", "source": files.source(base, "BF16"), "deltas": [delta]})
    results = {
        files.run(threads=threads, memory_budget_bytes=budget)["x"] for threads in (1, 4) for budget in (1, 10**9)
    }
    code = "import sys; from fastft import _native; _native.run_plan(open(sys.argv[1]).read())"
    (tmp_path / "plan.json").write_text(files.plan("scalar.safetensors"))
    subprocess.run(
        [sys.executable, "-c", code, tmp_path / "plan.json"], env={**os.environ, "FASTFT_SIMD": "scalar"}, check=True
    )
    scalar = (tmp_path / "scalar.safetensors").read_bytes()
    assert len(results) == 1
    assert scalar == (tmp_path / "out.safetensors").read_bytes()


def small_merge(files: Files, base: np.ndarray, A: np.ndarray, dtype: str = "F32", **more: Any) -> None:
    delta = {"a": files.source(A, "F32"), "b": files.source(np.ones((2, 1), np.float32), "F32"), "scale": 1.0, **more}
    source = files.source(encode(base, dtype), dtype)
    files.tensor("layer.weight", dtype, base.shape, {"kind": "merge", "source": source, "deltas": [delta]})


def test_a_merge_that_overflows_names_the_tensor(files: Files) -> None:
    small_merge(files, np.full((2, 3), 60000, np.float32), np.full((1, 3), 60000, np.float32), "F16")
    with pytest.raises(
        PlanError, match=r'tensor "layer\.weight": the merge makes an infinite or undefined value in rows 0 to 2'
    ):
        files.run()


def test_a_base_that_is_not_finite_stays(files: Files) -> None:
    base = np.array([[np.inf, -np.inf, np.nan], [1, 2, 3]], np.float32)
    small_merge(files, base, np.ones((1, 3), np.float32))
    expected = base + np.float32(1)
    assert files.run()["layer.weight"] == expected.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_adapter_that_is_not_finite_is_refused(files: Files, bad: float) -> None:
    small_merge(files, np.zeros((2, 3), np.float32), np.array([[1, bad, 1]], np.float32))
    with pytest.raises(
        CheckpointError, match=r'tensor "layer\.weight": its adapter in .*source\.bin holds infinite or undefined'
    ):
        files.run()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scale": float("1e39")}, "no finite number"),
        ({"rows": [[0, 0, 2], [1, 0, 1]]}, "same row of the weight twice"),
        ({"rows": [[1, 0, 2]]}, "do not fit a weight of 2"),
        ({"rows": [[0, 1, 2]]}, "do not fit a weight of 2"),
        ({"rows": [[2**64 - 1, 0, 2]]}, "do not fit a weight of 2"),
        ({"transposed": True}, "does not fit a weight of 2 x 3"),
        ({"alpha": 1}, "unknown field"),
        ({"b_columns": [1, 1]}, "columns 1 and every 1 after it do not divide 1 evenly"),
        ({"b_columns": [0, 0]}, "do not divide 1 evenly"),
        ({"b_columns": [0, 2]}, "do not divide 1 evenly"),
        ({"a": {"file": 0, "offset": 0, "dtype": "I32", "shape": [1, 3]}}, "I32 stands where only floating point"),
        ({"a": {"file": 0, "offset": 0, "dtype": "F32", "shape": [2, 3]}}, "no common rank"),
        ({"a": {"file": 0, "offset": 0, "dtype": "F32", "shape": [3]}}, "no matrix"),
        ({"a": {"file": 0, "offset": 1 << 40, "dtype": "F32", "shape": [1, 3]}}, "is not inside"),
        ({"a": {"file": 0, "offset": 2**64 - 1, "dtype": "F32", "shape": [1, 3]}}, "is not inside"),
        ({"a": {"file": 0, "offset": 0, "dtype": "F32", "shape": [1, 2**63]}}, "is not inside"),
        ({"a": {"file": 7, "offset": 0, "dtype": "F32", "shape": [1, 3]}}, "there is no file 7"),
    ],
)
def test_refused_deltas(files: Files, change: dict[str, Any], reason: str) -> None:
    small_merge(files, np.zeros((2, 3), np.float32), np.ones((1, 3), np.float32), **change)
    with pytest.raises(PlanError, match=reason):
        files.run()
    assert not (files.folder / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("dtype", "shape", "op", "reason"),
    [
        ("F16", [4], {"kind": "copy", "source": [4]}, "a copy of F32"),
        ("F32", [5], {"kind": "copy", "source": [4]}, "a copy of F32"),
        ("F16", [5], {"kind": "cast", "source": [4]}, "cannot be made of"),
        ("I32", [4], {"kind": "cast", "source": [4]}, "I32 stands where"),
        ("F64", [4], {"kind": "cast", "source": [4]}, "F64 stands where"),
        ("F99", [4], {"kind": "copy", "source": [4]}, "F99"),
        ("F32", [4], {"kind": "sort", "source": [4]}, "sort"),
        ("F32", [2, 2], {"kind": "rows", "parts": [[4, 2]]}, "2 rows|do not fit"),
        ("F32", [3], {"kind": "rows", "parts": [[4, 2]]}, "the parts have 2 rows"),
        ("F32", [5], {"kind": "rows", "parts": [[4, 5]]}, "are not all in"),
        ("F32", [], {"kind": "rows", "parts": [[4, 1]]}, "at least one dimension"),
        ("F32", [2**40, 2**40], {"kind": "copy", "source": [4]}, "no size in bytes"),
    ],
)
def test_refused_operations(files: Files, dtype: str, shape: list[int], op: dict[str, Any], reason: str) -> None:
    def source(size: int) -> dict[str, Any]:
        return files.source(np.zeros(size, np.float32), "F32")

    if "source" in op:
        op = {**op, "source": source(op["source"][0])}
    else:
        op = {**op, "parts": [{"source": source(size), "start": 0, "count": count} for size, count in op["parts"]]}
    files.tensor("x", dtype, tuple(shape), op)
    with pytest.raises(PlanError, match=reason):
        files.run()
    assert not (files.folder / "out.safetensors").exists()


def test_refused_files(files: Files, tmp_path: Path) -> None:
    files.tensor("x", "F32", (2,), {"kind": "copy", "source": files.source(np.zeros(2, np.float32), "F32")})
    plan = json.loads(files.plan())
    with pytest.raises(PlanError, match="writes this file twice"):
        _native.run_plan(json.dumps({**plan, "shards": plan["shards"] * 2}))
    with pytest.raises(PlanError, match=r'out\.safetensors: tensor "x": the name is taken'):
        _native.run_plan(
            json.dumps({**plan, "shards": [{**plan["shards"][0], "tensors": plan["shards"][0]["tensors"] * 2}]})
        )
    with pytest.raises(FileError, match=r"cannot open .*gone"):
        _native.run_plan(json.dumps({**plan, "files": [str(tmp_path / "gone")]}))
    with pytest.raises(PlanError, match="cannot be read"):
        _native.run_plan("{}")
    (tmp_path / "out.safetensors").write_text("old")
    with pytest.raises(FileError, match=r"cannot create .*out\.safetensors.*exists"):
        _native.run_plan(json.dumps(plan))
    assert (tmp_path / "out.safetensors").read_text() == "old"
    with pytest.raises(ValueError, match="at least 1"):
        _native.run_plan(json.dumps(plan), threads=0)


def long_plan(folder: Path, num_bytes: int = 1 << 28) -> str:
    """A copy of a sparse file, in many small tiles."""
    with (folder / "source.bin").open("wb") as file:
        file.truncate(num_bytes)
    source = {"file": 0, "offset": 0, "dtype": "U8", "shape": [num_bytes]}
    tensor = {"name": "x", "dtype": "U8", "shape": [num_bytes], "op": {"kind": "copy", "source": source}}
    return json.dumps(
        {"files": [str(folder / "source.bin")], "shards": [{"path": str(folder / "out"), "tensors": [tensor]}]}
    )


def test_progress_grows_to_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    _native.run_plan(long_plan(tmp_path, 1 << 24), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (1 << 24, 1 << 24)
    assert seen == sorted(seen)


def test_what_progress_raises_stops_the_run(tmp_path: Path) -> None:
    def progress(done: int, total: int) -> None:
        raise KeyError((done, total))

    with pytest.raises(KeyError):
        _native.run_plan(long_plan(tmp_path), memory_budget_bytes=1, progress=progress)
    assert (tmp_path / "out").stat().st_size < 1 << 28


def endless_plan(folder: Path) -> str:
    """A merge of 32 MB that would take the scalar kernels minutes: no machine is so slow to look that it ends before."""
    side, rank = 4096, 4096
    with (folder / "source.bin").open("wb") as file:
        file.truncate(4 * side * rank)

    def source(dtype: str, *shape: int) -> dict[str, Any]:
        return {"file": 0, "offset": 0, "dtype": dtype, "shape": shape}

    delta = {"a": source("F32", rank, side), "b": source("F32", side, rank), "scale": 1.0}
    op = {"kind": "merge", "source": source("BF16", side, side), "deltas": [delta]}
    tensor = {"name": "x", "dtype": "BF16", "shape": [side, side], "op": op}
    return json.dumps(
        {"files": [str(folder / "source.bin")], "shards": [{"path": str(folder / "out"), "tensors": [tensor]}]}
    )


def test_ctrl_c_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(endless_plan(tmp_path))
    code = "import sys; from fastft import _native; print('go', flush=True); _native.run_plan(open(sys.argv[1]).read(), memory_budget_bytes=1)"
    command = [sys.executable, "-c", code, str(tmp_path / "plan.json")]
    environment = {**os.environ, "FASTFT_SIMD": "scalar"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    process.stdout.readline()
    while not (tmp_path / "out").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in error
    assert (tmp_path / "out").stat().st_size < 2 * 4096 * 4096


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(long_plan(tmp_path, 1 << 24))
    code = (
        "import resource, sys; from fastft import _native; from fastft.errors import FileError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, 1 << 22))\n"
        "try: _native.run_plan(open(sys.argv[1]).read())\n"
        "except FileError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "plan.json")], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith('tensor "x": cannot ')
    assert f"{tmp_path / 'out'}: File too large" in done.stdout
    assert (tmp_path / "out").stat().st_size <= 1 << 22


def test_an_input_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    plan = long_plan(tmp_path, 1 << 28)

    def cut(done: int, _total: int) -> None:
        if done < 1 << 28:
            os.truncate(tmp_path / "source.bin", 100)

    with pytest.raises(CheckpointError, match=r"source\.bin: the file (ends before byte|changed while it was read)"):
        _native.run_plan(plan, threads=1, memory_budget_bytes=1, progress=cut)
    (tmp_path / "out").unlink()
