"""Any model, any adapter, any split into files: the merge is the formula in f64, within bounds that are derived.

No torch and no PEFT: the formulas are those of the papers (LoRA, rsLoRA, DoRA), on small models whose layers, dtypes, ranks
and kinds hypothesis chooses. Its finds are kept short by small sizes; large ones are the benches' and the faults'.
"""

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft import _native
from fastft.convert import merge, verify
from fastft.errors import FastftError

# Half a unit in the last place, as a part of the number, and half of the smallest number.
HALF_STEP = {"F32": (2.0**-24, 2.0**-150), "F16": (2.0**-11, 2.0**-25), "BF16": (2.0**-8, 2.0**-134)}
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}
UNIT = 2.0**-24
SPELLED = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", None: "auto"}


def encode(values: np.ndarray, dtype: str) -> bytes:
    """Values in the bytes of a dtype, nearest even."""
    if dtype != "BF16":
        return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def decode(content: bytes, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes of a dtype as f64."""
    if dtype == "BF16":
        return (
            (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape).astype(np.float64)
        )
    return np.frombuffer(content, {"F32": "<f4", "F16": "<f2"}[dtype]).reshape(shape).astype(np.float64)


def write(file: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Write a safetensors file by hand (numpy knows no bf16); gives what it holds, in f64."""
    header, data, held = {}, b"", {}
    for name, (dtype, values) in tensors.items():
        content = encode(values, dtype)
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        held[name] = decode(content, dtype, values.shape)
        data += content
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return held


def read(folder: Path) -> tuple[dict[str, tuple[str, np.ndarray]], dict[str, list[str]]]:
    """The tensors of a folder, and the names in each of its files."""
    found, files = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        infos = _native.read_header(file)
        files[file.name] = [info.name for info in infos]
        for info in infos:
            part = content[info.offset : info.offset + info.nbytes]
            assert info.name not in found
            found[info.name] = (info.dtype, decode(part, info.dtype, tuple(info.shape)))
    return found, files


@dataclass(frozen=True)
class Module:
    """A layer: `kind` linear or embedding; without a rank no adapter targets it."""

    rows: int
    columns: int
    kind: str
    dtype: str
    rank: int | None
    has_bias: bool


@dataclass(frozen=True)
class Case:
    modules: tuple[Module, ...]
    adapter_dtype: str
    alpha: float
    rslora: bool
    dora: bool
    lora_bias: bool
    transposed: bool
    out_dtype: str | None
    limit: int
    seed: int

    @property
    def has_lora_bias(self) -> bool:
        """All targeted layers have a bias then, or PEFT could not merge them."""
        targeted = [module for module in self.modules if module.rank is not None]
        return self.lora_bias and all(module.kind == "linear" and module.has_bias for module in targeted)


DTYPES = st.sampled_from(["F32", "F16", "BF16"])
MODULES = st.builds(
    Module,
    rows=st.integers(1, 45),
    columns=st.integers(1, 45),
    kind=st.sampled_from(["linear", "linear", "embedding"]),
    dtype=DTYPES,
    rank=st.one_of(st.integers(1, 18), st.none()),
    has_bias=st.booleans(),
)
CASES = st.builds(
    Case,
    modules=st.lists(MODULES, min_size=1, max_size=5).map(tuple),
    adapter_dtype=DTYPES,
    alpha=st.floats(0.25, 32),
    rslora=st.booleans(),
    dora=st.booleans(),
    lora_bias=st.booleans(),
    transposed=st.booleans(),
    out_dtype=st.one_of(st.none(), DTYPES),
    limit=st.integers(1, 20_000),
    seed=st.integers(0, 2**32 - 1),
)


def path_of(index: int, module: Module) -> str:
    return f"m.{index}.{'embed_tokens' if module.kind == 'embedding' else 'proj'}"


def write_base(folder: Path, case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    tensors = {}
    for index, module in enumerate(case.modules):
        path = path_of(index, module)
        tensors[f"{path}.weight"] = (module.dtype, rng.standard_normal((module.rows, module.columns)) * 0.1)
        if module.kind == "linear" and module.has_bias:
            tensors[f"{path}.bias"] = (module.dtype, rng.standard_normal(outputs(case, module)) * 0.1)
    tensors["a.counter"] = ("F32", np.arange(3.0))
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "made up"}')
    return write(folder / "model.safetensors", tensors)


def outputs(case: Case, module: Module) -> int:
    """A transposed layer (GPT-2's Conv1D) stores (in, out), as an embedding does."""
    return module.columns if case.transposed or module.kind == "embedding" else module.rows


def write_adapter(folder: Path, case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    ranks = {}
    for index, module in enumerate(case.modules):
        if module.rank is None:
            continue
        ranks[rf"m\.{index}\..*"] = module.rank
        num_out = outputs(case, module)
        num_in = module.rows * module.columns // num_out
        at, embedding = f"base_model.model.{path_of(index, module)}.lora_", module.kind == "embedding"
        names = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
        for name, shape in zip(names, ((module.rank, num_in), (num_out, module.rank)), strict=True):
            tensors[f"{at}{name}"] = (case.adapter_dtype, rng.standard_normal(shape) * 0.2)
        if case.dora:
            tensors[f"{at}magnitude_vector"] = (case.adapter_dtype, rng.random(num_out) + 0.5)
        if case.has_lora_bias:
            tensors[f"{at}B.bias"] = (case.adapter_dtype, rng.standard_normal(num_out) * 0.1)
    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": case.alpha,
        "rank_pattern": ranks,
        "use_rslora": case.rslora,
        "use_dora": case.dora,
        "lora_bias": case.has_lora_bias,
        "fan_in_fan_out": case.transposed,
        "target_modules": "any",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return write(folder / "adapter_model.safetensors", tensors)


def expected(
    case: Case, module: Module, at: str, factors: dict[str, np.ndarray], weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The merged weight in f64, and how far the sums in f32 may be from it before the last rounding.

    W + s B A with r fused steps, a product and a sum: (r + 3) units of the sum of the magnitudes. DoRA: that, scaled;
    the norm of that; half of N squares summed in any order (N units), a root, a division, two products.
    """
    embedding = module.kind == "embedding"
    A, B = (
        factors[f"{at}{name}"] for name in (("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight"))
    )
    rank = len(A)
    scale = float(np.float32(case.alpha / (math.sqrt(rank) if case.rslora else rank)))
    transposed = case.transposed or embedding
    product, magnitude = scale * (B @ A), scale * (np.abs(B) @ np.abs(A))
    updated = weight + (product.T if transposed else product)
    error = (rank + 3) * UNIT * (np.abs(weight) + (magnitude.T if transposed else magnitude))
    if not case.dora:
        return updated, error
    axis = 0 if transposed else 1
    norms = np.linalg.norm(updated, axis=axis, keepdims=True)
    factor = np.expand_dims(factors[f"{at}magnitude_vector"], axis) / norms
    relative = np.linalg.norm(error, axis=axis, keepdims=True) / norms + (updated.shape[axis] / 2 + 5) * UNIT
    return factor * updated, 1.01 * factor * (error + np.abs(updated) * relative / (1 - relative))


@settings(max_examples=150, deadline=None)
@given(case=CASES)
def test_the_merge_is_the_formula(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    if all(module.rank is None for module in case.modules):
        return
    with tempfile.TemporaryDirectory() as folder:
        base, adapter, target = (Path(folder, name) for name in ("base", "adapter", "merged"))
        before, factors = write_base(base, case, rng), write_adapter(adapter, case, rng)
        plan = merge.plan(base, [(adapter, 1.0)], dtype=SPELLED[case.out_dtype], max_shard_size_bytes=case.limit)
        merge.execute(plan, target)
        report = verify.verify(target, base, [(adapter, 1.0)])
        after, files = read(target)
    assert report.good, report.text()
    assert set(after) == set(before)
    for names in files.values():
        sizes = [after[name][1].size * WIDTHS[after[name][0]] for name in names]
        assert len(names) == 1 or sum(sizes) <= case.limit
    used = set()
    for index, module in enumerate(case.modules):
        path = path_of(index, module)
        at = f"base_model.model.{path}.lora_"
        dtype = case.out_dtype or module.dtype
        weight, error = before[f"{path}.weight"], np.zeros(1)
        if module.rank is not None:
            weight, error = expected(case, module, at, factors, weight)
        check(after[f"{path}.weight"], dtype, weight, error)
        used.add(f"{path}.weight")
        if f"{path}.bias" not in before:
            continue
        bias, error = before[f"{path}.bias"], np.zeros(1)
        if f"{at}B.bias" in factors and module.rank is not None:
            rank = module.rank
            shift = float(np.float32(case.alpha / (math.sqrt(rank) if case.rslora else rank))) * factors[f"{at}B.bias"]
            bias, error = bias + shift, 4 * UNIT * (np.abs(bias) + np.abs(shift))
        check(after[f"{path}.bias"], dtype, bias, error)
        used.add(f"{path}.bias")
    assert used | {"a.counter"} == set(before)


SPOILS = ("lost", "unknown", "elsewhere", "shape", "nan", "infinite", "nan in the base", "overflow")


@settings(max_examples=120, deadline=None)
@given(case=CASES, spoil=st.sampled_from(SPOILS), choice=st.integers(0, 1000))
def test_nothing_is_left_out_in_silence(case: Case, spoil: str, choice: int) -> None:
    """One tensor that is lost, unknown, of another model or shape, or no number: refused by its name, and nothing written."""
    rng = np.random.default_rng(case.seed)
    if all(module.rank is None for module in case.modules):
        return
    with tempfile.TemporaryDirectory() as folder:
        base, adapter, target = (Path(folder, name) for name in ("base", "adapter", "merged"))
        write_base(base, case, rng)
        write_adapter(adapter, case, rng)
        place = base if spoil == "nan in the base" else adapter
        file = next(place.glob("*.safetensors"))
        tensors = {name: (dtype, values) for name, (dtype, values) in read(place)[0].items()}
        names = sorted(name for name in tensors if place is adapter or name != "a.counter")
        name = names[choice % len(names)]
        said = spoiled(tensors, name, spoil, choice)
        write(file, tensors)
        with pytest.raises(FastftError) as refused:
            merge.execute(merge.plan(base, [(adapter, 1.0)], dtype=SPELLED[case.out_dtype]), target)
        assert said in str(refused.value), refused.value
        assert "\n" not in str(refused.value)
        assert sorted(path.name for path in Path(folder).iterdir()) == ["adapter", "base"]


def spoiled(tensors: dict[str, tuple[str, np.ndarray]], name: str, spoil: str, choice: int) -> str:
    """Spoil one tensor in place; gives what the refusal must name: the module at least."""
    dtype, values = tensors[name]
    module = name.removeprefix("base_model.model.").split(".lora_")[0]
    if spoil == "lost":
        del tensors[name]
    elif spoil == "unknown":
        module = "surprise"
        tensors[f"{name}.surprise"] = tensors[name]
    elif spoil == "elsewhere":
        tensors[name.replace(".m.", ".n.")] = tensors.pop(name)
        module = module if choice % 2 else "m."  # either half of the pair may be named first
    elif spoil == "shape":
        tensors[name] = (dtype, np.zeros((*values.shape[:-1], values.shape[-1] + 1)))
    elif spoil == "overflow":
        # Both matrices: beside a small one a huge one may well stay finite.
        for other in [key for key in tensors if f".{module}.lora_" in key or key == name]:
            tensors[other] = ("F32", np.full(tensors[other][1].shape, 3e38))
    else:
        values = values.copy()
        values.flat[choice % values.size] = np.inf if spoil == "infinite" else np.nan
        tensors[name] = (dtype, values)
    return module


def check(found: tuple[str, np.ndarray], dtype: str, exact: np.ndarray, error: np.ndarray) -> None:
    assert found[0] == dtype
    relative, absolute = HALF_STEP[dtype]
    allowed = error + (np.abs(exact) + error) * relative + absolute
    assert (np.abs(found[1] - exact) <= allowed).all()
