"""The operations `dora` and `shift` of `run_plan`: against numpy in the order of torch's sums, and every refusal."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_run_plan import Files, decode, encode, exact, fused_product, numbers

from fastft.errors import CheckpointError, PlanError


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def norms(V: np.ndarray) -> np.ndarray:
    """Norms of rows as torch's CPU kernel sums them: 8 partial sums, these in order, then the rest of the row.

    A fused step is exact in f64 for the few last squares: 48 bits and 24 bits of like size.
    """
    width = V.shape[1] // 8 * 8
    partial = np.zeros((len(V), 8), np.float32)
    for first in range(0, width, 8):
        partial += V[:, first : first + 8] * V[:, first : first + 8]
    total = np.zeros(len(V), np.float32)
    for lane in range(8):
        total += partial[:, lane]
    fused_from = width + (V.shape[1] - width) // 4 * 4
    for column in range(width, V.shape[1]):
        if column < fused_from:
            total += V[:, column] * V[:, column]
        else:
            total = (total + V[:, column].astype(np.float64) ** 2).astype(np.float32)
    return np.sqrt(total)


def norms_of_columns(V: np.ndarray) -> np.ndarray:
    """The squares are added from the first row to the last."""
    total = np.zeros(V.shape[1], np.float32)
    for row in V:
        total += row * row
    return np.sqrt(total)


def delta_of(
    files: Files, A: np.ndarray, B: np.ndarray, magnitude: np.ndarray | None, dtype: str = "F32", **more: Any
) -> dict[str, Any]:
    found = {"a": files.source(encode(A, dtype), dtype), "b": files.source(encode(B, dtype), dtype), "scale": 0.5}
    if magnitude is not None:
        found["magnitude"] = files.source(encode(magnitude, dtype), dtype)
    return found | more


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 90),
    rank=st.integers(1, 12),
    dtypes=st.tuples(*[st.sampled_from(["F32", "F16", "BF16"])] * 3),
    transposed=st.booleans(),
    budget=st.sampled_from([1, 10**9]),
)
def test_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    rows: int,
    columns: int,
    rank: int,
    dtypes: tuple[str, str, str],
    transposed: bool,
    budget: int,
) -> None:
    files = Files(tmp_path_factory.mktemp("dora"))
    base_dtype, adapter_dtype, dtype = dtypes
    W = encode(numbers(1, rows, columns), base_dtype)
    shape_A, shape_B = ((rank, rows), (columns, rank)) if transposed else ((rank, columns), (rows, rank))
    A, B = (
        decode(encode(exact(seed, *shape), adapter_dtype), adapter_dtype)
        for seed, shape in ((2, shape_A), (3, shape_B))
    )
    m = decode(encode(1 + exact(4, shape_B[0]) / 2, adapter_dtype), adapter_dtype)
    op = {"kind": "dora", "source": files.source(W, base_dtype)}
    files.tensor("x", dtype, W.shape, op | {"deltas": [delta_of(files, A, B, m, adapter_dtype, transposed=transposed)]})
    product = fused_product(B, A, 0.5)
    V = decode(W, base_dtype) + (product.T if transposed else product)
    factors = m / norms_of_columns(V) if transposed else (m / norms(V))[:, None]
    assert files.run(memory_budget_bytes=budget)["x"] == encode(factors * V, dtype).tobytes()


@pytest.mark.parametrize("transposed", [False, True])
def test_threads_and_budgets_do_not_matter(files: Files, *, transposed: bool) -> None:
    """3 MB of f32: several pieces of the pass over columns, several tiles of each."""
    W, m = numbers(5, 3000, 257), 1 + exact(8, 257 if transposed else 3000) / 2
    A, B = (exact(6, 2, 3000), exact(7, 257, 2)) if transposed else (exact(6, 2, 257), exact(7, 3000, 2))
    op = {"kind": "dora", "source": files.source(W, "F32")}
    files.tensor("x", "BF16", W.shape, op | {"deltas": [delta_of(files, A, B, m, transposed=transposed)]})
    files.tensor("y", "F32", W.shape, op | {"deltas": [delta_of(files, A, B, m, transposed=transposed)]})
    product = fused_product(B, A, 0.5)
    V = W + (product.T if transposed else product)
    factors = m / norms_of_columns(V) if transposed else (m / norms(V))[:, None]
    for threads in (1, 2, 7):
        for budget in (1, 10**9):
            out = files.run(threads=threads, memory_budget_bytes=budget)
            assert out["x"] == encode(factors * V, "BF16").tobytes()
            assert out["y"] == (factors * V).tobytes()


def test_rows_without_a_magnitude_are_not_scaled(files: Files) -> None:
    """A fused weight: rows 0 to 3 and 8 to 9 are scaled, 5 and 6 only updated, 4 and 7 stay bit for bit."""
    W = numbers(9, 10, 12)
    W[4, 3], W[7, 0] = -0.0, np.inf
    A_q, B_q, A_v, B_v, m = exact(10, 3, 12), exact(11, 6, 3), exact(12, 2, 12), exact(13, 2, 2), 1 + exact(14, 6) / 2
    deltas = [
        delta_of(files, A_q, B_q, m.reshape(1, 6, 1, 1), rows=[[8, 4, 2], [0, 0, 4]]),
        delta_of(files, A_v, B_v, None, rows=[[5, 0, 2]]),
    ]
    files.tensor("x", "F32", W.shape, {"kind": "dora", "source": files.source(W, "F32"), "deltas": deltas})
    expected, scaled = W.copy(), [0, 1, 2, 3, 8, 9]
    V = W[scaled] + fused_product(B_q, A_q, 0.5)
    expected[scaled] = (m / norms(V))[:, None] * V
    expected[[5, 6]] += fused_product(B_v, A_v, 0.5)
    for budget in (1, 10**9):
        assert files.run(memory_budget_bytes=budget)["x"] == expected.tobytes()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("odd", [0.0, np.inf, np.nan])
def test_what_cannot_be_scaled_names_the_tensor(files: Files, odd: float, *, transposed: bool) -> None:
    """A row (or column) of zeros has no direction; one with infinity or NaN has no norm."""
    W = numbers(15, 9, 9)
    (W.T if transposed else W)[4, :] = odd
    A, B = np.zeros((1, 9), np.float32), np.zeros((9, 1), np.float32)
    deltas = [delta_of(files, A, B, np.ones(9, np.float32), transposed=transposed)]
    files.tensor("model.w", "F32", W.shape, {"kind": "dora", "source": files.source(W, "F32"), "deltas": deltas})
    with pytest.raises(CheckpointError, match=r'tensor "model\.w": scaled to its DoRA magnitudes it holds infinite or'):
        files.run()


def test_too_large_for_the_dtype(files: Files) -> None:
    W, A, B = np.eye(3, dtype=np.float32), np.zeros((1, 3), np.float32), np.zeros((3, 1), np.float32)
    deltas = [delta_of(files, A, B, np.array([1, 70000, 1], np.float32))]
    files.tensor("w", "F16", W.shape, {"kind": "dora", "source": files.source(W, "F32"), "deltas": deltas})
    with pytest.raises(CheckpointError, match=r'tensor "w": .* \(dtype F16\)'):
        files.run()


@pytest.mark.parametrize("side", ["a", "magnitude"])
def test_a_failure_in_the_pass_over_columns_ends_all_workers(files: Files, side: str) -> None:
    """The workers wait for each other there: the one with the cause must not leave them waiting, nor its text be lost."""
    W, A, B = numbers(16, 4000, 300), exact(17, 2, 4000), exact(18, 300, 2)
    m = np.ones(300, np.float32)
    (A if side == "a" else m).reshape(-1)[-1] = np.nan
    deltas = [delta_of(files, A, B, m, transposed=True)]
    files.tensor("w", "F32", W.shape, {"kind": "dora", "source": files.source(W, "F32"), "deltas": deltas})
    for threads in (1, 6):
        with pytest.raises(CheckpointError, match=r'tensor "w": its adapter in .* holds infinite or undefined values'):
            files.run(threads=threads)


def test_a_stop_in_the_pass_over_columns(files: Files) -> None:
    """What the watcher raises comes out, and no worker waits for ever."""
    W, A, B = numbers(19, 6000, 500), exact(20, 64, 6000), exact(21, 500, 64)
    deltas = [delta_of(files, A, B, np.ones(500, np.float32), transposed=True)]
    for index in range(4):
        op = {"kind": "dora", "source": files.source(W, "F32"), "deltas": deltas}
        files.tensor(f"w{index}", "F32", W.shape, op)

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.run(threads=3, progress=stop)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"magnitude": 7}, r"a magnitude of \[7\] does not fit 8 outputs"),
        ({"rows": [[0, 0, 9]]}, "rows .* do not fit"),
        ({"kind": "merge"}, "a merge knows no magnitudes"),
        ({"twice": True}, "two products go to the same row of a weight with magnitudes"),
        ({"twice": True, "transposed": True}, "two products go to the same row"),
        ({"transposed": True, "rows": [[0, 0, 8]]}, "the columns of a part of a weight cannot be scaled"),
        ({"dtype": "I64"}, "I64 stands where only floating point"),
    ],
)
def test_refused_plans(files: Files, change: dict[str, Any], reason: str) -> None:
    W, A, B = numbers(22, 8, 8), exact(23, 2, 8), exact(24, 8, 2)
    delta = delta_of(files, A, B, np.ones(change.get("magnitude", 8), np.float32))
    delta |= {key: change[key] for key in ("rows", "transposed") if key in change}
    op = {
        "kind": change.get("kind", "dora"),
        "source": files.source(W, "F32"),
        "deltas": [delta, delta][: 1 + ("twice" in change)],
    }
    files.tensor("w", change.get("dtype", "F32"), W.shape, op)
    with pytest.raises(PlanError, match=f'tensor "w": {reason}'):
        files.run()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_shift(files: Files, dtype: str) -> None:
    """b + s v, and the same on parts of a fused bias; what no part reaches stays bit for bit."""
    b, v, w = encode(numbers(25, 1003), dtype), exact(26, 1003), exact(27, 20)
    whole = {"source": files.source(v, "F32"), "scale": 0.3}
    parts = {"source": files.source(encode(w, "BF16"), "BF16"), "scale": 2, "rows": [[7, 10, 10], [90, 0, 5]]}
    files.tensor("x", dtype, b.shape, {"kind": "shift", "source": files.source(b, dtype), "addends": [whole]})
    files.tensor("y", dtype, b.shape, {"kind": "shift", "source": files.source(b, dtype), "addends": [parts]})
    files.tensor("z", dtype, b.shape, {"kind": "shift", "source": files.source(b, dtype), "addends": [whole, parts]})
    before, first, second = decode(b, dtype), v * np.float32(0.3), np.zeros(1003, np.float32)
    second[7:17], second[90:95] = 2 * w[10:], 2 * w[:5]
    for budget in (1, 10**9):
        out = files.run(memory_budget_bytes=budget)
        assert out["x"] == encode(before + first, dtype).tobytes()
        assert out["y"] == encode(before + second, dtype).tobytes()
        assert out["z"] == encode(before + (first + second), dtype).tobytes()


@pytest.mark.parametrize(
    ("addend", "reason"),
    [
        ({"count": 9}, r"\[9\] cannot be added to 10 values"),
        ({"count": 9, "rows": [[0, 0, 10]]}, "rows .* do not fit"),
        ({"count": 10, "scale": 1e40}, r"the scale .* is no finite number"),
    ],
)
def test_refused_shifts(files: Files, addend: dict[str, Any], reason: str) -> None:
    source = files.source(numbers(28, addend.pop("count")), "F32")
    op = {"kind": "shift", "source": files.source(numbers(29, 10), "F32")}
    files.tensor("b", "F32", (10,), op | {"addends": [{"source": source, "scale": 1.0} | addend]})
    with pytest.raises(PlanError, match=f'tensor "b": {reason}'):
        files.run()


def test_a_shift_that_overflows_names_the_tensor(files: Files) -> None:
    b = np.full(3, 65504, np.float16)
    addend = {"source": files.source(np.full(3, 40, np.float32), "F32"), "scale": 1.0}
    files.tensor("b", "F16", (3,), {"kind": "shift", "source": files.source(b, "F16"), "addends": [addend]})
    with pytest.raises(PlanError, match=r'tensor "b": the merge makes an infinite'):
        files.run()
