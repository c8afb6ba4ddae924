"""InternLM2 in its own layout and in Llama's: the same model, and adapters of either go onto the files of either."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastft.convert import internlm2, layout, merge, verify
from fastft.convert.folder import read_checkpoint
from fastft.errors import FastftError, PlanError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_internlm2 as tiny

SIZES = {"num_attention_heads": tiny.HEADS, "num_key_value_heads": tiny.KV_HEADS, "hidden_size": tiny.HIDDEN}
GROUP = tiny.HEADS // tiny.KV_HEADS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An InternLM2 folder with a small vocabulary and no tokenizer."""
    monkeypatch.setattr(tiny, "VOCAB", 40)
    (tmp_path / "tokenizer").mkdir()
    return tiny.write(tmp_path / "original", tmp_path / "tokenizer")


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    return {name: array for file in sorted(folder.glob("*.safetensors")) for name, array in load_file(file).items()}


def split_by_hand(wqkv: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What modeling_internlm2.py's rearrange says, in numpy: (kv_heads, group + 2, head_dim, hidden)."""
    grouped = wqkv.reshape(tiny.KV_HEADS, GROUP + 2, tiny.HEAD_DIM, -1)
    q, k, v = grouped[:, :GROUP], grouped[:, -2], grouped[:, -1]
    return q.reshape(-1, wqkv.shape[1]), k.reshape(-1, wqkv.shape[1]), v.reshape(-1, wqkv.shape[1])


def test_layout_is_exact(original: Path) -> None:
    folder = layout.without_remote_code(original)
    before, after = tensors_in(original), tensors_in(folder)
    for layer in range(tiny.LAYERS):
        at = f"model.layers.{layer}."
        for name, part in zip("qkv", split_by_hand(before.pop(f"{at}attention.wqkv.weight")), strict=True):
            np.testing.assert_array_equal(after.pop(f"{at}self_attn.{name}_proj.weight"), part)
        for own, llama in (
            ("attention.wo", "self_attn.o_proj"), ("feed_forward.w1", "mlp.gate_proj"),
            ("feed_forward.w3", "mlp.up_proj"), ("feed_forward.w2", "mlp.down_proj"),
            ("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"),
        ):  # fmt: skip
            np.testing.assert_array_equal(after.pop(f"{at}{llama}.weight"), before.pop(f"{at}{own}.weight"))
    for own, llama in (("model.tok_embeddings", "model.embed_tokens"), ("model.norm",) * 2, ("output", "lm_head")):
        np.testing.assert_array_equal(after.pop(f"{llama}.weight"), before.pop(f"{own}.weight"))
    assert not before
    assert not after


def test_layout_is_made_once_and_anew_when_the_original_changes(original: Path, cache: Path) -> None:
    first = layout.without_remote_code(original)
    assert first.is_relative_to(cache / "fastft" / "layouts")
    stamp = (first / "config.json").stat().st_mtime_ns
    assert layout.without_remote_code(original) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    second = layout.without_remote_code(original)
    assert second != first
    assert json.loads((second / "config.json").read_text())["rms_norm_eps"] == 1e-6


@pytest.mark.parametrize("size", ["1.8b", "7b", "20b"])
def test_config_of_the_real_sizes(shared_data: Path, size: str) -> None:
    shapes = shared_data / "model_shapes"
    config = json.loads((shapes / f"internlm2-{size}" / "config.json").read_text())
    expected = json.loads((shapes / f"internlm2-{size}-as-llama" / "config.json").read_text())
    assert layout.llama_config(config) == expected


def attention_of_internlm2(x: np.ndarray, wqkv: np.ndarray, wo: np.ndarray, theta: float) -> np.ndarray:
    """InternLM2's attention, written from modeling_internlm2.py in f64 numpy; x (tokens, hidden), causal."""
    tokens = len(x)
    fused = (x @ wqkv.T).reshape(tokens, tiny.KV_HEADS, GROUP + 2, tiny.HEAD_DIM)
    queries = fused[:, :, :GROUP].reshape(tokens, tiny.HEADS, tiny.HEAD_DIM)
    keys, values = fused[:, :, -2], fused[:, :, -1]
    frequencies = theta ** -(np.arange(0, tiny.HEAD_DIM, 2) / tiny.HEAD_DIM)
    angles = np.concatenate([np.outer(np.arange(tokens), frequencies)] * 2, axis=1)[:, None]

    def rotate(heads: np.ndarray) -> np.ndarray:
        first, second = np.split(heads, 2, axis=-1)
        return heads * np.cos(angles) + np.concatenate([-second, first], axis=-1) * np.sin(angles)

    queries, keys = rotate(queries), rotate(keys)
    out = np.zeros((tokens, tiny.HEADS, tiny.HEAD_DIM))
    for head in range(tiny.HEADS):
        scores = queries[:, head] @ keys[:, head // GROUP].T / np.sqrt(tiny.HEAD_DIM)
        scores[np.triu_indices(tokens, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ values[:, head // GROUP]
    return out.reshape(tokens, -1) @ wo.T


def logits_of_internlm2(tensors: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """The whole model in f64 numpy, from InternLM2's own tensors."""
    weights = {name: array.astype(np.float64) for name, array in tensors.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * weights[name]

    x = weights["model.tok_embeddings.weight"][ids]
    for layer in range(tiny.LAYERS):
        at = f"model.layers.{layer}."
        wqkv, wo = weights[f"{at}attention.wqkv.weight"], weights[f"{at}attention.wo.weight"]
        x = x + attention_of_internlm2(norm(x, f"{at}attention_norm.weight"), wqkv, wo, 1e6)
        y = norm(x, f"{at}ffn_norm.weight")
        w1, w2, w3 = (weights[f"{at}feed_forward.w{number}.weight"] for number in (1, 2, 3))
        gate = y @ w1.T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w3.T)) @ w2.T
    return norm(x, "model.norm.weight") @ weights["output.weight"].T


def test_transformers_reads_the_layout(original: Path) -> None:
    """LlamaForCausalLM on the laid-out folder answers as InternLM2's own arithmetic does on the original."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(layout.without_remote_code(original), output_loading_info=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    ids = [1, 5, 9, 30, 2, 7]
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(found, logits_of_internlm2(tensors_in(original), ids), atol=1e-5)


def write_adapter(folder: Path, shapes: dict[str, tuple[int, int]], seed: int = 1) -> Path:
    """An adapter of rank 4 on the modules named."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (num_out, num_in) in shapes.items():
        for side, shape in (("A", (4, num_in)), ("B", (num_out, 4))):
            key = f"base_model.model.{name}.lora_{side}.weight"
            tensors[key] = (rng.standard_normal(shape) * 0.1).astype(np.float32)
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "internlm/internlm2"}
    settings["target_modules"] = sorted({name.rpartition(".")[2] for name in shapes})  # type: ignore[assignment]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


H, INNER = tiny.HIDDEN, tiny.INTERMEDIATE
KV = tiny.KV_HEADS * tiny.HEAD_DIM
IN_LLAMA = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(tiny.LAYERS)
    for name, shape in {
        "self_attn.q_proj": (H, H), "self_attn.k_proj": (KV, H), "self_attn.v_proj": (KV, H),
        "self_attn.o_proj": (H, H), "mlp.gate_proj": (INNER, H), "mlp.up_proj": (INNER, H), "mlp.down_proj": (H, INNER),
    }.items()
} | {"lm_head": (40, H)}  # fmt: skip
IN_INTERNLM2 = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(tiny.LAYERS)
    for name, shape in {
        "attention.wqkv": (H + 2 * KV, H), "attention.wo": (H, H), "feed_forward.w1": (INNER, H),
        "feed_forward.w3": (INNER, H), "feed_forward.w2": (H, INNER),
    }.items()
} | {"output": (40, H)}  # fmt: skip


def as_llama(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names and splits as `test_layout_is_exact` proves them."""
    new = {}
    for name, array in tensors.items():
        path = name.removesuffix(".weight")
        if path.endswith("attention.wqkv"):
            for letter, part in zip("qkv", split_by_hand(array), strict=True):
                new[path.replace("attention.wqkv", f"self_attn.{letter}_proj") + ".weight"] = part
        else:
            new[f"{internlm2.llama_name(path)}.weight"] = array
    return new


@pytest.mark.parametrize("shapes", [IN_LLAMA, IN_INTERNLM2], ids=["llama names", "internlm2 names"])
def test_adapters_go_onto_both_layouts(original: Path, tmp_path: Path, shapes: dict[str, tuple[int, int]]) -> None:
    """Merged into the original files and into the laid-out ones: the same numbers, and right ones."""
    adapter = write_adapter(tmp_path / "adapter", shapes)
    laid_out = layout.without_remote_code(original)
    for base, target in ((original, tmp_path / "merged"), (laid_out, tmp_path / "merged as llama")):
        merge.execute(merge.plan(base, [(adapter, 1.0)]), target)
        assert verify.verify(target, base, [(adapter, 1.0)]).good
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "internlm2"
    merged = as_llama(tensors_in(tmp_path / "merged"))
    other = tensors_in(tmp_path / "merged as llama")
    assert set(merged) == set(other)
    for name, array in merged.items():
        np.testing.assert_array_equal(other[name], array)
    factors, before = load_file(adapter / "adapter_model.safetensors"), tensors_in(original)
    updated = {}
    for name in shapes:
        a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        updated[f"{name}.weight"] = 2 * (b @ a)
    truth = as_llama(updated) if shapes is IN_INTERNLM2 else updated
    start = as_llama(before)
    for name, array in merged.items():
        np.testing.assert_allclose(array, start[name] + truth.get(name, 0), atol=7 * 2**-24 * 2)


def test_adapter_of_another_shape(original: Path, tmp_path: Path) -> None:
    shapes = IN_LLAMA | {"model.layers.0.self_attn.k_proj": (KV + 1, H)}
    with pytest.raises(FastftError, match="another model"):
        merge.plan(original, [(write_adapter(tmp_path / "adapter", shapes), 1.0)])


def test_biases_and_buffers(tmp_path: Path, original: Path) -> None:
    """`bias: true` is Llama's attention_bias; inv_freq, a buffer of old files, is left out."""
    tensors = tensors_in(original)
    rng = np.random.default_rng(2)
    for layer in range(tiny.LAYERS):
        at = f"model.layers.{layer}.attention."
        tensors[f"{at}wqkv.bias"] = rng.standard_normal(H + 2 * KV).astype(np.float32)
        tensors[f"{at}wo.bias"] = rng.standard_normal(H).astype(np.float32)
        tensors[f"{at}rotary_emb.inv_freq"] = np.ones(4, np.float32)
    (tmp_path / "biased").mkdir()
    save_file(tensors, tmp_path / "biased" / "model.safetensors")
    (tmp_path / "biased" / "config.json").write_text(json.dumps(tiny.config() | {"bias": True}))
    folder = layout.without_remote_code(tmp_path / "biased")
    assert json.loads((folder / "config.json").read_text())["attention_bias"] is True
    found = tensors_in(folder)
    fused = tensors["model.layers.1.attention.wqkv.bias"][:, None]
    for letter, part in zip("qkv", split_by_hand(fused), strict=True):
        np.testing.assert_array_equal(found[f"model.layers.1.self_attn.{letter}_proj.bias"], part[:, 0])
    assert not [name for name in found if "inv_freq" in name]


@pytest.mark.parametrize("names", ["llama", "internlm2"])
def test_a_full_training_in_either_layout(original: Path, tmp_path: Path, names: str) -> None:
    """pth_to_hf of a whole model: trained as Llama it is written as Llama, trained by XTuner as InternLM2."""
    torch = pytest.importorskip("torch")
    from fastft.config.schema import Config
    from fastft.convert import pth

    tensors = {name: array * 2 for name, array in tensors_in(original).items()}
    trained = as_llama(tensors) if names == "llama" else tensors
    torch.save({"state_dict": {f"llm.{k}": torch.from_numpy(v.copy()) for k, v in trained.items()}}, tmp_path / "x.pth")
    settings = {"model": {"name": str(original)}, "method": {"kind": "full"}, "data": {"train": [{"source": "x"}]}}
    pth.execute(pth.plan(Config.model_validate(settings), tmp_path / "x.pth", dtype="auto"), tmp_path / "hf")
    found = tensors_in(tmp_path / "hf")
    assert set(found) == set(trained)
    for name, array in trained.items():
        np.testing.assert_array_equal(found[name], array)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == names


def test_what_is_no_internlm2(original: Path, tmp_path: Path) -> None:
    laid_out = layout.without_remote_code(original)
    with pytest.raises(PlanError, match="llama"):
        layout.without_remote_code(laid_out)
    tensors = tensors_in(original) | {"v_head.weight": np.ones((1, H), np.float32)}
    (tmp_path / "reward").mkdir()
    save_file(tensors, tmp_path / "reward" / "model.safetensors")
    (tmp_path / "reward" / "config.json").write_text(json.dumps(tiny.config()))
    with pytest.raises(PlanError, match="v_head"):
        layout.without_remote_code(tmp_path / "reward")


def test_only_config_and_tokenizer(original: Path) -> None:
    """A model that is drawn anew needs no weights."""
    for file in original.glob("model*"):
        file.unlink()
    folder = layout.without_remote_code(original)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert not list(folder.glob("*.safetensors"))


def test_internlm_of_the_first_generation(tmp_path: Path) -> None:
    """Llama's names already, with biases: only the config is new, the files are linked."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    config = {
        "architectures": ["InternLMForCausalLM"], "model_type": "internlm", "bias": True, "hidden_size": H,
        "intermediate_size": INNER, "num_attention_heads": tiny.HEADS, "num_hidden_layers": 1, "vocab_size": 40,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rotary": {"base": 10000, "type": "dynamic"},
        "hidden_act": "silu", "tie_word_embeddings": False, "auto_map": {"AutoConfig": "configuration_internlm.X"},
    }  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, shape in IN_LLAMA.items() if "layers.1" not in name}
    shapes |= {name: (H, H) for name in shapes if "k_proj" in name or "v_proj" in name}
    tensors = {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tensors |= {f"{name}.bias": np.ones(H, np.float32) for name in shapes if "self_attn" in name}
    tensors |= {name: np.ones(H, np.float32) for name in (
        "model.norm.weight", "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight",
    )}  # fmt: skip
    tensors["model.embed_tokens.weight"] = rng.standard_normal((40, H)).astype(np.float32)
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    laid_out = layout.without_remote_code(folder)
    model, told = AutoModelForCausalLM.from_pretrained(laid_out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, torch.ones(H))
    assert (laid_out / "model.safetensors").samefile(folder / "model.safetensors")
    assert set(read_checkpoint(laid_out).tensors) == set(tensors)


def test_the_real_tokenizer_goes_along(shared_data: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    original = tiny.write(tmp_path / "original", shared_data / "tokenizers" / "internlm2")
    config = json.loads((original / "tokenizer_config.json").read_text())
    config |= {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.X", None]},
    }
    (original / "tokenizer_config.json").write_text(json.dumps(config))
    (original / "tokenization_internlm2.py").write_text("raise SystemExit('this code must not run')")
    tokenizer = AutoTokenizer.from_pretrained(layout.without_remote_code(original))
    assert tokenizer("hello world").input_ids[0] == 1
    assert tokenizer.decode(tokenizer("hello world").input_ids, skip_special_tokens=True) == "hello world"
    assert tokenizer.chat_template == config["chat_template"]
