"""Merging: against PEFT bit for bit, in files as Hugging Face writes them, strict, and never onto a source."""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fastft.convert import merge
from fastft.convert.rewrite import RewriteReport
from fastft.errors import CheckpointError, FastftError, FileError, PlanError, UsageError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_llama


def all_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


def run(base: Path, adapter: Path, target: Path, **options: object) -> RewriteReport:
    plan = merge.plan(base, [(adapter, 1.0)], **options)  # type: ignore[arg-type]
    return merge.execute(plan, target)


def expected(base: dict[str, np.ndarray], adapter: dict[str, np.ndarray], scale: float = 2.0) -> dict[str, np.ndarray]:
    """base + scale * B A in f64."""
    merged = {name: array.astype(np.float64) for name, array in base.items()}
    for key, a in adapter.items():
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = adapter[key.replace("lora_A", "lora_B")]
            merged[f"{path}.weight"] = merged[f"{path}.weight"] + scale * (b.astype(np.float64) @ a.astype(np.float64))
    return merged


@pytest.mark.parametrize(("shards", "limit"), [(1, 10**9), (3, 10_000), (2, 1)])
def test_values_files_and_index(tmp_path: Path, shards: int, limit: int) -> None:
    """Sharded in, sharded out; files are save_file's, the index is huggingface_hub's."""
    from huggingface_hub.serialization import split_state_dict_into_shards_factory

    base = tiny_llama.write_base(tmp_path / "base", shards=shards)
    adapter = tiny_llama.write_adapter(tmp_path / "adapter")
    report = run(base, adapter, tmp_path / "merged", max_shard_size_bytes=limit)
    merged = all_tensors(tmp_path / "merged")
    truth = expected(tiny_llama.weights(), tiny_llama.adapter_tensors())
    assert set(merged) == set(truth)
    for name, array in truth.items():
        # rank 4 and values below 1: f32 sums are right to (4 + 3) * 2^-24
        np.testing.assert_allclose(merged[name], array, atol=7 * 2**-24, rtol=0)
    plan = merge.plan(base, [(adapter, 1.0)], max_shard_size_bytes=limit)
    in_order = {tensor.name: merged[tensor.name] for tensor in plan.tensors}
    theirs = split_state_dict_into_shards_factory(
        in_order,
        get_storage_size=lambda array: array.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    assert {file.name for file in (tmp_path / "merged").glob("model*.safetensors")} == set(theirs.filename_to_tensors)
    for name, tensors in theirs.filename_to_tensors.items():
        save_file({key: merged[key] for key in tensors}, tmp_path / name, metadata={"format": "pt"})
        assert (tmp_path / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    index = tmp_path / "merged" / "model.safetensors.index.json"
    assert index.exists() == theirs.is_sharded
    if theirs.is_sharded:
        numbers = {"total_parameters": sum(array.size for array in merged.values())}
        text = {"metadata": theirs.metadata | numbers, "weight_map": theirs.tensor_to_filename}
        assert index.read_text() == json.dumps(text, indent=2, sort_keys=True) + "\n"
    assert report.num_changed == tiny_llama.LAYERS * len(tiny_llama.LINEARS)
    assert report.num_tensors == len(truth)
    assert str(tmp_path / "merged") in report.line()


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16", "fp32"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    """All floating tensors are cast, others are not; config.json says so and is not touched otherwise."""
    weights = tiny_llama.weights() | {"model.counts": np.arange(3, dtype=np.int64)}
    base = tiny_llama.write_base(tmp_path / "base", weights)
    run(base, tiny_llama.write_adapter(tmp_path / "adapter"), tmp_path / "merged", dtype=dtype)
    stored = _dtypes(tmp_path / "merged" / "model.safetensors")
    want = {"auto": "F32", "bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype]
    assert stored == {name: "I64" if name == "model.counts" else want for name in weights}
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "merged"))
    word = {"auto": "float32", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[dtype]
    assert after == before | {"torch_dtype": word}
    if dtype in ("auto", "fp32"):
        assert (tmp_path / "merged" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def _dtypes(file: Path) -> dict[str, str]:
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


def test_overflow_and_numbers_that_are_none(tmp_path: Path) -> None:
    """A value that fp16 cannot hold, and an adapter with a NaN, are refused by name; nothing is left."""
    weights = tiny_llama.weights()
    weights["model.norm.weight"][3] = 1e6
    base = tiny_llama.write_base(tmp_path / "base", weights)
    adapter = tiny_llama.write_adapter(tmp_path / "adapter")
    with pytest.raises(FastftError, match=r"model\.norm\.weight"):
        run(base, adapter, tmp_path / "merged", dtype="fp16")
    tensors = tiny_llama.adapter_tensors()
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][1, 1] = np.nan
    with pytest.raises(FastftError, match="up_proj"):
        run(base, tiny_llama.write_adapter(tmp_path / "nan", tensors), tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "nan"]


def test_several_adapters_with_weights(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    folders = [
        tiny_llama.write_adapter(tmp_path / name, tiny_llama.adapter_tensors(seed=n))
        for n, name in ((1, "a"), (2, "b"))
    ]
    merge.execute(merge.plan(base, [(folders[0], 0.5), (folders[1], -1.0)]), tmp_path / "merged")
    halfway = expected(tiny_llama.weights(), tiny_llama.adapter_tensors(seed=1), 1.0)
    truth = expected(halfway, tiny_llama.adapter_tensors(seed=2), -2.0)
    for name, array in all_tensors(tmp_path / "merged").items():
        np.testing.assert_allclose(array, truth[name], atol=11 * 2**-24, rtol=0)  # rank 8 in all


def broken(change: Callable[[dict[str, np.ndarray]], object]) -> dict[str, np.ndarray]:
    tensors = tiny_llama.adapter_tensors()
    change(tensors)
    return tensors


AT = "base_model.model.model.layers.1.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.update(
                {
                    "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": np.ones((4, 24), np.float32),
                    "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": np.ones((24, 4), np.float32),
                }
            ),
            ("layers.7.self_attn.q_proj", "not in the base"),
        ),
        (lambda t: t.update({"base_model.model.score.weight": np.ones((2, 24), np.float32)}), ("score.weight",)),
        (lambda t: [t.pop(f"{AT}A.weight"), t.pop(f"{AT}B.weight")], ("layers.1.self_attn.q_proj", "lacks")),
        (lambda t: t.pop(f"{AT}B.weight"), ("layers.1.self_attn.q_proj", "belong together")),
        (lambda t: t.update({f"{AT}A.weight": np.ones((4, 23), np.float32)}), ("24 x 23", "24 x 24")),
        (lambda t: t.update({f"{AT}B.weight": np.ones((25, 4), np.float32)}), ("25 x 24", "24 x 24")),
        (
            lambda t: t.update({"base_model.model.model.norm.weight": np.ones(23, np.float32)}),
            ("model.norm.weight", "23"),
        ),
    ],
)
def test_an_adapter_that_does_not_fit_leaves_the_target_alone(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], object], words: tuple[str, ...]
) -> None:
    """One key extra, one missing, one misshaped: each is refused, and an older result stays whole."""
    base = tiny_llama.write_base(tmp_path / "base")
    run(base, tiny_llama.write_adapter(tmp_path / "good"), tmp_path / "merged")
    before = {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir()}
    bad = tiny_llama.write_adapter(tmp_path / "bad", broken(change))
    with pytest.raises((PlanError, CheckpointError)) as refusal:
        merge.execute(merge.plan(base, [(bad, 1.0)]), tmp_path / "merged", force=True)
    for word in words:
        assert word in str(refusal.value)
    assert {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir()} == before


def test_targets(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    adapter = tiny_llama.write_adapter(tmp_path / "adapter")
    plan = merge.plan(base, [(adapter, 1.0)])
    for target in (base, adapter, base / "inside", adapter / "a" / "b", tmp_path, base / ".." / "base"):
        with pytest.raises(PlanError):
            merge.execute(plan, target, force=True)
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(PlanError):
        merge.execute(plan, tmp_path / "link", force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError, match="is a file"):
        merge.execute(plan, tmp_path / "file", force=True)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious.txt").write_text("x")
    with pytest.raises(FileError, match="--force"):
        merge.execute(plan, tmp_path / "there")
    merge.execute(plan, tmp_path / "merged")
    with pytest.raises(FileError, match="--force"):
        merge.execute(plan, tmp_path / "merged")
    merge.execute(plan, tmp_path / "merged", force=True)
    assert (tmp_path / "there" / "precious.txt").read_text() == "x"
    assert sorted(path.name for path in base.iterdir()) == ["config.json", "model.safetensors"]


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = merge.plan(tiny_llama.write_base(tmp_path / "base"), [(tiny_llama.write_adapter(tmp_path / "adapter"), 1.0)])
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(FileError, match="free"):
        merge.execute(plan, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_input_that_changes_is_noticed(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    plan = merge.plan(base, [(tiny_llama.write_adapter(tmp_path / "adapter"), 1.0)])
    os.utime(base / "model.safetensors", ns=(1, 1))
    with pytest.raises(FastftError, match="changed"):
        merge.execute(plan, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_side_files_of_the_adapter_win(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    adapter = tiny_llama.write_adapter(tmp_path / "adapter")
    for name in (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
        "generation_config.json", "modeling_own.py", "LICENSE.txt", "preprocessor_config.json", "pytorch_model.bin",
        "notes.txt", "optimizer.pt",
    ):  # fmt: skip
        (base / name).write_text(f'{{"of": "base {name}"}}')
    for name in ("tokenizer.json", "README.md", "training_args.bin", "generation_config.json"):
        (adapter / name).write_text(f'{{"of": "adapter {name}"}}')
    (adapter / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    run(base, adapter, tmp_path / "merged")
    found = {file.name: file.read_text() for file in (tmp_path / "merged").iterdir() if file.suffix != ".safetensors"}
    assert set(found) - {"fastft_manifest.json"} == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "modeling_own.py",
        "LICENSE.txt", "preprocessor_config.json",
    }  # fmt: skip
    assert "adapter" in found["tokenizer.json"]
    assert "messages" in found["tokenizer_config.json"]
    assert "base" in found["generation_config.json"]


def test_modules_to_save_and_biases_replace(tmp_path: Path) -> None:
    weights = tiny_llama.weights()
    bias = "model.layers.0.self_attn.q_proj.bias"
    weights[bias] = np.zeros(24, np.float32)
    base = tiny_llama.write_base(tmp_path / "base", weights)
    tensors = tiny_llama.adapter_tensors()
    new_head = np.random.default_rng(5).standard_normal((50, 24)).astype(np.float32)
    tensors["base_model.model.lm_head.weight"] = new_head
    tensors["base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"] = np.ones(24, np.float32)
    adapter = tiny_llama.write_adapter(tmp_path / "adapter", tensors, modules_to_save=["lm_head"], bias="lora_only")
    run(base, adapter, tmp_path / "merged")
    merged = all_tensors(tmp_path / "merged")
    np.testing.assert_array_equal(merged["lm_head.weight"], new_head)
    np.testing.assert_array_equal(merged[bias], np.ones(24, np.float32))


def test_trained_tokens_and_resized_embeddings(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    rows = np.random.default_rng(3).standard_normal((3, 24)).astype(np.float32)
    tensors = tiny_llama.adapter_tensors() | {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": rows
    }
    adapter = tiny_llama.write_adapter(tmp_path / "tokens", tensors, trainable_token_indices=[49, 0, 7])
    run(base, adapter, tmp_path / "with tokens")
    truth = tiny_llama.weights()["model.embed_tokens.weight"].copy()
    truth[[49, 0, 7]] = rows
    np.testing.assert_array_equal(all_tensors(tmp_path / "with tokens")["model.embed_tokens.weight"], truth)

    grown = np.random.default_rng(4).standard_normal((2, 53, 24)).astype(np.float32)
    tensors = tiny_llama.adapter_tensors() | {
        "base_model.model.model.embed_tokens.weight": grown[0],
        "base_model.model.lm_head.weight": grown[1],
    }
    run(base, tiny_llama.write_adapter(tmp_path / "grown", tensors), tmp_path / "with more")
    merged = all_tensors(tmp_path / "with more")
    np.testing.assert_array_equal(merged["model.embed_tokens.weight"], grown[0])
    np.testing.assert_array_equal(merged["lm_head.weight"], grown[1])
    assert json.loads((tmp_path / "with more" / "config.json").read_text())["vocab_size"] == 53


def test_notes_of_a_qlora_training(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    adapter = tiny_llama.write_adapter(tmp_path / "adapter")
    (adapter / "fastft_training.json").write_text('{"quantization": {"type": "nf4"}}')
    assert "nf4" in " ".join(merge.plan(base, [(adapter, 1.0)]).notes)


def test_plan_is_shown(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    plan = merge.plan(
        base, [(tiny_llama.write_adapter(tmp_path / "adapter"), 1.0)], dtype="bf16", max_shard_size_bytes=5000
    )
    table = plan.as_table()
    assert [line for line in table.splitlines() if len(line) > 80 and str(tmp_path) not in line] == []
    assert "r=4 s=2" in table
    assert "from fp32" in table
    shown = json.loads(plan.as_json())
    assert shown["num_tensors"] == len(tiny_llama.weights())
    assert shown["total_bytes"] == sum(array.size * 2 for array in tiny_llama.weights().values())
    operations = [tensor["operation"] for file in shown["files"] for tensor in file["tensors"]]
    assert operations.count("merge") == shown["num_changed"] == 14
    assert operations.count("cast") == len(tiny_llama.weights()) - 14


def test_attention_of_torch_itself_is_refused(tmp_path: Path) -> None:
    """PEFT adds the update of out_proj twice (spec/formats.md 2.6): nothing that is written would be right."""
    weights = {"attn.in_proj_weight": np.ones((24, 8), np.float32), "attn.out_proj.weight": np.ones((8, 8), np.float32)}
    tensors = {
        f"base_model.model.attn.{inner}lora_{side}.weight": np.ones(shape, np.float32)
        for inner, num_out in (("", 24), ("base_layer.out_proj.", 8))
        for side, shape in (("A", (4, 8)), ("B", (num_out, 4)))
    }
    base = tiny_llama.write_base(tmp_path / "base", weights)
    with pytest.raises(PlanError, match=r"attn is an nn\.MultiheadAttention"):
        merge.plan(base, [(tiny_llama.write_adapter(tmp_path / "adapter", tensors, target_modules=["attn"]), 1.0)])


def test_wrong_words(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    with pytest.raises(UsageError, match="no adapter"):
        merge.plan(base, [])
    with pytest.raises(UsageError, match="fp16"):
        merge.plan(base, [(tiny_llama.write_adapter(tmp_path / "adapter"), 1.0)], dtype="half")


@settings(max_examples=60, deadline=None)
@given(
    num_out=st.integers(1, 70),
    num_in=st.integers(1, 70),
    rank=st.integers(1, 20),
    alpha=st.floats(0.25, 64),
    dtype=st.sampled_from([np.float32, np.float16]),
    limit=st.integers(1, 20_000),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(
    num_out: int, num_in: int, rank: int, alpha: float, dtype: type[np.floating], limit: int, seed: int
) -> None:
    """|error| <= half a unit in the last place + (r + 3) 2^-24 (|W| + s sum |b||a|), for any shape, rank and split."""
    rng = np.random.default_rng(seed)
    name = "model.layers.0.self_attn.q_proj"
    weight = rng.standard_normal((num_out, num_in)).astype(dtype)
    a, b = (
        rng.standard_normal((rank, num_in)).astype(np.float32),
        rng.standard_normal((num_out, rank)).astype(np.float32),
    )
    with tempfile.TemporaryDirectory() as folder:
        base = tiny_llama.write_base(Path(folder, "base"), {f"{name}.weight": weight, "b": weight[0], "a": weight[:1]})
        tensors = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        stated = {"r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"]}
        adapter = tiny_llama.write_adapter(Path(folder, "adapter"), tensors, **stated)
        run(base, adapter, Path(folder, "merged"), max_shard_size_bytes=limit)
        merged = all_tensors(Path(folder, "merged"))
    np.testing.assert_array_equal(merged["a"], weight[:1])
    scale = np.float64(np.float32(alpha / rank))
    exact = weight.astype(np.float64) + scale * (b.astype(np.float64) @ a.astype(np.float64))
    magnitude = np.abs(weight.astype(np.float64)) + scale * (
        np.abs(b).astype(np.float64) @ np.abs(a).astype(np.float64)
    )
    half_ulp = np.spacing(np.abs(exact).astype(dtype)).astype(np.float64) / 2
    error = np.abs(merged[f"{name}.weight"].astype(np.float64) - exact)
    assert (error <= half_ulp * 1.01 + (rank + 3) * 2.0**-24 * magnitude).all()


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    """A merge whose names match starts neither torch nor transformers (DESIGN section 2)."""
    import subprocess

    base = tiny_llama.write_base(tmp_path / "base")
    adapter = tiny_llama.write_adapter(tmp_path / "adapter")
    program = (
        "import sys; from pathlib import Path; from fastft.convert import merge;"
        "merge.execute(merge.plan(Path(sys.argv[1]), [(Path(sys.argv[2]), 1.0)]), Path(sys.argv[3]));"
        "sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", program, str(base), str(adapter), str(tmp_path / "merged")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
