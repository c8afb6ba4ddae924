"""`verify` calls a right merge right, and finds every way in which one can be wrong."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastft.convert import merge, rewrite, verify
from fastft.convert.numbers import rounded, ulp_distance, values_of
from fastft.errors import CheckpointError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_llama

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, adapter and their merge, all f32."""
    base, adapter = tiny_llama.write_base(tmp_path / "base"), tiny_llama.write_adapter(tmp_path / "adapter")
    merge.execute(merge.plan(base, [(adapter, 1.0)]), tmp_path / "merged")
    return base, adapter, tmp_path / "merged"


def changed(folders: tuple[Path, Path, Path], change: Callable[[dict[str, np.ndarray]], object]) -> verify.VerifyReport:
    base, adapter, merged = folders
    tensors = load_file(merged / "model.safetensors")
    change(tensors)
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    return verify.verify(merged, base, [(adapter, 1.0)])


def status_of(report: verify.VerifyReport) -> dict[str, str]:
    return {check.name: check.status for check in report.checks if check.status != "equal"}


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16"])
def test_right(folders: tuple[Path, Path, Path], tmp_path: Path, dtype: str) -> None:
    base, adapter, _ = folders
    merge.execute(merge.plan(base, [(adapter, 1.0)], dtype=dtype, max_shard_size_bytes=9000), tmp_path / dtype)
    report = verify.verify(tmp_path / dtype, base, [(adapter, 1.0)])
    assert report.good
    assert len(report.checks) == len(tiny_llama.weights())
    assert sum(check.targeted for check in report.checks) == 14
    assert "right" in report.text()


def test_another_order_of_the_sum_is_right(folders: tuple[Path, Path, Path]) -> None:
    """What f64 gives, rounded to f32, differs in last bits and is explained by the bound."""
    tensors = tiny_llama.adapter_tensors()
    at = f"base_model.model.{Q.removesuffix('.weight')}.lora_"
    update = 2.0 * (tensors[f"{at}B.weight"].astype(np.float64) @ tensors[f"{at}A.weight"].astype(np.float64))
    exact = (tiny_llama.weights()[Q].astype(np.float64) + update).astype(np.float32)
    report = changed(folders, lambda t: t.update({Q: exact}))
    assert report.good
    assert set(status_of(report).values()) <= {"rounding"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t[Q].__setitem__((3, 3), t[Q][3, 3] + 1e-4), {Q: "off"}),
        (lambda t: t.update({Q: tiny_llama.weights()[Q]}), {Q: "base"}),
        (lambda t: t.pop(Q), {Q: "missing"}),
        (lambda t: t.update({"extra": np.zeros(3, np.float32)}), {"extra": "unexpected"}),
        (lambda t: t.update({Q: t[Q][:-1].copy()}), {Q: "shape"}),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * 1.001}), {"model.norm.weight": "off"}),
        (lambda t: t[Q].__setitem__((0, 0), np.nan), {Q: "off"}),
    ],
)
def test_wrong(
    folders: tuple[Path, Path, Path], change: Callable[[dict[str, np.ndarray]], object], expected: dict[str, str]
) -> None:
    report = changed(folders, change)
    assert {name: status for name, status in status_of(report).items() if status != "rounding"} == expected
    assert not report.good
    assert "WRONG" in report.text()
    assert next(iter(expected)) in report.text()


def test_the_base_itself_is_no_merge(folders: tuple[Path, Path, Path]) -> None:
    """The "merged" folder of many a complaint: equal to the base."""
    base, adapter, _ = folders
    statuses = list(status_of(verify.verify(base, base, [(adapter, 1.0)])).values())
    assert statuses == ["base"] * 14


def test_merge_checks_itself(folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stream that wrote something else is noticed before the result is put in place."""
    base, adapter, merged = folders
    plan = merge.plan(base, [(adapter, 1.0)])

    def wrong(_shards: object, stage: Path, _what: str, *, on_gpu: bool, finite: bool) -> None:
        assert finite
        assert not on_gpu
        tensors = load_file(merged / "model.safetensors")
        tensors[Q] += 0.01
        save_file(tensors, stage / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(rewrite, "write_shards", wrong)
    with pytest.raises(CheckpointError, match="q_proj"):
        merge.execute(plan, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_rounding_is_torchs() -> None:
    """Bits of bf16 and fp16 against torch, ties, subnormals and infinities among them."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    numbers = numbers[~np.isnan(numbers)]
    edges = np.array([0.0, -0.0, np.inf, -np.inf, 65504, 65520, 6e-8, 1.00390625, 1.01171875], np.float32)
    numbers = np.concatenate([numbers, edges])
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        theirs = torch.from_numpy(numbers).to(dtype)
        np.testing.assert_array_equal(rounded(numbers, name), theirs.view(torch.uint16).numpy())
        np.testing.assert_array_equal(values_of(rounded(numbers, name), name), theirs.float().numpy())


def test_ulp_distance() -> None:
    one, other = (
        np.array(values, np.float32).view(np.uint32) for values in ([1, -0.0, 1e-45], [1 + 2**-23, 0, -1e-45])
    )
    assert ulp_distance(one, other).tolist() == [1, 0, 2]


def test_report_is_short(folders: tuple[Path, Path, Path]) -> None:
    base, adapter, _ = folders
    text = verify.verify(base, base, [(adapter, 1.0)]).text()
    assert len(text.splitlines()) < 20


def test_report_as_json(folders: tuple[Path, Path, Path]) -> None:
    base, adapter, merged = folders
    good = json.loads(verify.verify(merged, base, [(adapter, 1.0)]).as_json())
    assert (good["good"], good["num_tensors"], good["num_targeted"], good["not_equal"]) == (True, 21, 14, [])
    wrong = json.loads(verify.verify(base, base, [(adapter, 1.0)]).as_json())
    assert wrong["good"] is False
    assert wrong["by_status"]["base"] == 14
    assert wrong["by_status"]["equal"] == 7
    assert {(tensor["status"], tensor["targeted"]) for tensor in wrong["not_equal"]} == {("base", True)}
    assert Q in {tensor["name"] for tensor in wrong["not_equal"]}
