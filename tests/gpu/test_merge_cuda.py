"""`convert merge --device cuda` writes the bytes of `--device cpu`, for numbers of any kind."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from fastft.convert import merge
from fastft.errors import CheckpointError, PlanError

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the interpreter's test is in tests/unit"),
]

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
ODD, LARGE = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


def write(folder: Path, dtype: Any, rank: int, *, transposed: bool = False, scale: float = 2.0) -> tuple[Path, Path]:
    """A base of an odd and a large matrix, with subnormals and infinities in it, and an adapter on both."""
    random = torch.Generator().manual_seed(rank)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    weights, factors = {}, {}
    for path, rows, columns in ((ODD, 67, 131), (LARGE, 3000, 2048)):
        weight = (torch.randn(rows, columns, generator=random) * 0.05).to(dtype)
        weight[3, 5], weight[4, 7], weight[5, 1] = float("inf"), float("nan"), 1e-39
        weights[f"{path}.weight"] = weight
        num_in, num_out = (rows, columns) if transposed else (columns, rows)
        at = f"base_model.model.{path}.lora_"
        factors[f"{at}A.weight"] = torch.randn(rank, num_in, generator=random) * 0.3
        factors[f"{at}B.weight"] = torch.randn(num_out, rank, generator=random) * 0.02
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank * scale, "fan_in_fan_out": transposed}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return base, adapter


def both(base: Path, adapters: list[tuple[Path, float]], folder: Path, **options: Any) -> tuple[bytes, bytes]:
    plan = merge.plan(base, adapters, **options)
    for on_gpu in (False, True):
        merge.execute(plan, folder / str(on_gpu), on_gpu=on_gpu)
    on_cpu, on_gpu_too = ((folder / place / "model.safetensors").read_bytes() for place in ("False", "True"))
    return on_cpu, on_gpu_too


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 8, 64, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_of_the_cpu(tmp_path: Path, dtype: str, rank: int, *, transposed: bool) -> None:
    base, adapter = write(tmp_path, DTYPES[dtype], rank, transposed=transposed)
    on_cpu, on_gpu = both(base, [(adapter, 1.0)], tmp_path)
    assert on_cpu == on_gpu
    assert on_cpu != (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("to", ["bf16", "fp32"])
def test_several_adapters_into_another_dtype(tmp_path: Path, to: str) -> None:
    base, first = write(tmp_path / "first", torch.bfloat16, 8)
    _, second = write(tmp_path / "second", torch.bfloat16, 16, scale=0.7)
    # A value that is no number keeps its bits only where its dtype stays.
    weights = load_file(base / "model.safetensors")
    save_file({name: weight.nan_to_num(0.5, 1.0) for name, weight in weights.items()}, base / "model.safetensors")
    on_cpu, on_gpu = both(base, [(first, 0.5), (second, -1.5)], tmp_path, dtype=to)
    assert on_cpu == on_gpu


def test_a_value_that_does_not_fit(tmp_path: Path) -> None:
    base, adapter = write(tmp_path, torch.float16, 8, scale=1e6)
    with pytest.raises((CheckpointError, PlanError), match="infinite or undefined"):
        merge.execute(merge.plan(base, [(adapter, 1.0)]), tmp_path / "out", on_gpu=True)
    assert not (tmp_path / "out").exists()


def test_the_numbers_are_right(tmp_path: Path) -> None:
    """Against f64, within the bound of the sum."""
    base, adapter = write(tmp_path, torch.float32, 64)
    both(base, [(adapter, 1.0)], tmp_path)
    mine = load_file(tmp_path / "True" / "model.safetensors")[f"{LARGE}.weight"]
    factors = load_file(adapter / "adapter_model.safetensors")
    at = f"base_model.model.{LARGE}.lora_"
    product = factors[f"{at}B.weight"].double() @ factors[f"{at}A.weight"].double() * 2.0
    weight = load_file(base / "model.safetensors")[f"{LARGE}.weight"]
    exact = weight.double() + product
    finite = torch.isfinite(weight)
    # (r + 3) 2^-24 (|W| + s sum |b||a|), spec/formats.md 2.2
    magnitude = factors[f"{at}B.weight"].abs().double() @ factors[f"{at}A.weight"].abs().double() * 2.0
    bound = (64 + 3) * 2.0**-24 * (weight.abs().double() + magnitude)
    assert bool(((mine.double() - exact).abs() <= bound)[finite].all())
    np.testing.assert_array_equal(mine[~finite].numpy(), weight[~finite].numpy())
