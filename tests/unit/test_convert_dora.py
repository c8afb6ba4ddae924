"""DoRA and biases of lora_B, where more than one thing meets: many sizes, 4-bit bases and results, fused weights."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy

from fastft.convert import merge, verify
from fastft.convert.four_bit import FourBit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_internlm2
import tiny_llama

torch = pytest.importorskip("torch")

# peft 0.21 asks transformers 5.23 for a name that it will drop in version 6; it takes a bias of lora_B for a matrix that
# was saved in pieces; bitsandbytes says which optional package it did without.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:.*LoRA tensor.s. have invalid shape",
)


def save(folder: Path, file: str, tensors: dict[str, Any], config: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{file}.safetensors")
    name = "adapter_config.json" if file == "adapter_model" else "config.json"
    (folder / name).write_text(json.dumps(config))
    return folder


def merged_by_peft(layer: str, weight: Any, A: Any, B: Any, magnitude: Any, scale: float) -> Any:
    """The weight after the merge of PEFT's own layer class."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Embedding, Linear

    num_rows, num_columns = weight.shape
    linear = layer == "linear"
    base = torch.nn.Linear(num_columns, num_rows, False) if linear else torch.nn.Embedding(num_rows, num_columns)
    base.weight.data = weight
    rank = A.shape[0]
    settings = {"r": rank, "lora_alpha": scale * rank, "use_dora": True}
    module = (Linear if linear else Embedding)(base, "default", config=LoraConfig(**settings), **settings)
    if linear:
        module.lora_A["default"].weight.data, module.lora_B["default"].weight.data = A, B
    else:
        module.lora_embedding_A["default"].data, module.lora_embedding_B["default"].data = A, B
    module.lora_magnitude_vector["default"].weight.data = magnitude
    module.merge()
    return base.weight.data


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layer", ["linear", "embedding"])
def test_bit_for_bit_in_many_sizes(tmp_path: Path, layer: str, dtype: str) -> None:
    """Rows of 1 to 4,099 numbers, columns of as many; the f32 case shows each last bit of the norms.

    The factors are small multiples of 1/64, whose products and sums are exact: torch takes those of small matrices in
    another order. The order of the norms' sums is torch's on a CPU with AVX2 (older ones end a row differently).
    """
    from safetensors.torch import load_file

    torch.manual_seed(1)
    tensors, adapter, expected = {}, {}, {}
    sizes = [(7, 1), (9, 5), (40, 8), (64, 27), (300, 100), (128, 1024), (4099, 33), (33, 4099), (1000, 512)]
    for index, (num_rows, num_columns) in enumerate(sizes):
        rank = (1, 4, 16)[index % 3]
        path = f"m.{index}" if layer == "linear" else f"m.{index}.embed_tokens"
        weight = (torch.randn(num_rows, num_columns) * 0.02).to(getattr(torch, dtype))
        a_width, b_rows = (num_columns, num_rows) if layer == "linear" else (num_rows, num_columns)
        A, B = (torch.randint(-8, 9, shape) / 64 for shape in ((rank, a_width), (b_rows, rank)))
        magnitude = torch.rand(b_rows) + 0.5
        tensors[f"{path}.weight"] = weight.clone()
        at = f"base_model.model.{path}.lora_"
        names = ("A.weight", "B.weight") if layer == "linear" else ("embedding_A", "embedding_B")
        adapter |= {f"{at}{names[0]}": A.clone(), f"{at}{names[1]}": B.clone(), f"{at}magnitude_vector": magnitude}
        expected[f"{path}.weight"] = merged_by_peft(layer, weight, A, B, magnitude, 2.0)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": "m.*"}
    config["rank_pattern"] = {f".*{index}.*": (1, 4, 16)[index % 3] for index in range(len(sizes))}
    config["alpha_pattern"] = {f".*{index}.*": 2 * (1, 4, 16)[index % 3] for index in range(len(sizes))}
    base = save(tmp_path / "base", "model", tensors, {"model_type": "made up"})
    folder = save(tmp_path / "adapter", "adapter_model", adapter, config)
    merge.execute(merge.plan(base, [(folder, 1.0)]), tmp_path / "mine")
    mine = load_file(tmp_path / "mine" / "model.safetensors")
    assert {name: int((tensor != mine[name]).sum()) for name, tensor in expected.items()} == dict.fromkeys(expected, 0)
    report = verify.verify(tmp_path / "mine", base, [(folder, 1.0)])
    assert report.good, report.text()


def llama(folder: Path, **lora: Any) -> tuple[Path, Path]:
    """A random bf16 Llama with biases and a random adapter of it."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        attention_bias=True,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn_like(parameter.data) * 0.1
    model.save_pretrained(folder / "base")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | lora
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = torch.randn_like(parameter.data) * 0.05
        elif "magnitude" in name:
            parameter.data *= torch.rand_like(parameter.data) * 0.2 + 0.9
    adapted.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def merged_onto(base: Path, weights: dict[str, Any], adapter: Path, dtype: Any = torch.bfloat16) -> dict[str, Any]:
    """PEFT's merge onto a model of the base's class that has `weights`."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    model.load_state_dict(weights, strict=True)
    return dict(PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict())


def tensors_of(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def through_4_bit(tensors: dict[str, Any], kind: str, *, double_quant: bool) -> dict[str, Any]:
    """The linear layers quantized and dequantized by bitsandbytes; flat, for its CPU code wants whole blocks."""
    from bitsandbytes import functional

    seen = dict(tensors)
    for name, weight in tensors.items():
        if name.endswith("proj.weight"):
            packed, state = functional.quantize_4bit(
                weight.reshape(-1), blocksize=64, quant_type=kind, compress_statistics=double_quant
            )
            seen[name] = functional.dequantize_4bit(packed, state).reshape(weight.shape)
    return seen


def quantized_by_transformers(base: Path, folder: Path, kind: str, *, double_quant: bool) -> Path:
    """The base as transformers and bitsandbytes save it in 4 bit."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    return folder


def differing(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, int]:
    assert set(mine) == set(theirs)
    return {name: int((mine[name] != theirs[name]).sum()) for name in mine if not torch.equal(mine[name], theirs[name])}


KINDS: dict[str, dict[str, Any]] = {"dora": {"use_dora": True}, "biases": {"lora_bias": True, "target_modules": "x"}}
KINDS["biases"]["target_modules"] = ["q_proj", "k_proj", "o_proj"]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("case", KINDS)
def test_onto_a_base_in_4_bit(tmp_path: Path, case: str, kind: str, *, double_quant: bool) -> None:
    """A folder that bitsandbytes made, merged into 16 bit: PEFT's merge onto the dequantized weights, bit for bit."""
    base, adapter = llama(tmp_path, **KINDS[case])
    packed = quantized_by_transformers(base, tmp_path / "packed", kind, double_quant=double_quant)
    theirs = merged_onto(base, through_4_bit(tensors_of(base), kind, double_quant=double_quant), adapter)
    merge.execute(merge.plan(packed, [(adapter, 1.0)]), tmp_path / "mine")
    assert differing(tensors_of(tmp_path / "mine"), theirs) == {}
    assert verify.verify(tmp_path / "mine", packed, [(adapter, 1.0)]).good


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("case", KINDS)
def test_onto_what_qlora_saw(tmp_path: Path, case: str, *, double_quant: bool) -> None:
    """--dequantized-base nf4: the same from the 16-bit base."""
    base, adapter = llama(tmp_path, **KINDS[case])
    theirs = merged_onto(base, through_4_bit(tensors_of(base), "nf4", double_quant=double_quant), adapter)
    four_bit = FourBit("nf4", double_quant)
    merge.execute(merge.plan(base, [(adapter, 1.0)], four_bit=four_bit), tmp_path / "mine")
    assert differing(tensors_of(tmp_path / "mine"), theirs) == {}
    assert verify.verify(tmp_path / "mine", base, [(adapter, 1.0)], four_bit=four_bit).good


@pytest.mark.parametrize("onto", ["16 bit", "4 bit"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("case", KINDS)
def test_a_result_in_4_bit(tmp_path: Path, case: str, onto: str, *, double_quant: bool) -> None:
    """--quantize nf4: what transformers and bitsandbytes save of PEFT's merge, every byte of every tensor."""
    base, adapter = llama(tmp_path, **KINDS[case])
    weights, start = tensors_of(base), base
    if onto == "4 bit":
        start = quantized_by_transformers(base, tmp_path / "packed", "nf4", double_quant=double_quant)
        weights = through_4_bit(weights, "nf4", double_quant=double_quant)
    plain = tmp_path / "plain"
    config = json.loads((base / "config.json").read_text())
    save(plain, "model", merged_onto(base, weights, adapter), config)
    expected = quantized_by_transformers(plain, tmp_path / "expected", "nf4", double_quant=double_quant)
    merge.execute(merge.plan(start, [(adapter, 1.0)], quantize=FourBit("nf4", double_quant)), tmp_path / "mine")
    assert differing(tensors_of(tmp_path / "mine"), tensors_of(expected)) == {}


def test_fused_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA and lora_bias trained on q, k and v of the Llama layout, merged into InternLM2's fused wqkv.

    Each row of the fused weight is a row of q, k or v: the same numbers come out as in the files of Llama's layout.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tiny_internlm2, "VOCAB", 40)
    (tmp_path / "tokenizer").mkdir()
    original = tiny_internlm2.write(tmp_path / "original", tmp_path / "tokenizer")
    config = json.loads((original / "config.json").read_text()) | {"bias": True}
    (original / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(3)
    hidden, width = tiny_internlm2.HIDDEN, tiny_internlm2.HEAD_DIM
    kv = tiny_internlm2.KV_HEADS * width
    tensors = {name: array for file in original.glob("*.safetensors") for name, array in load_numpy(file).items()}
    adapter: dict[str, np.ndarray] = {}
    expected: dict[str, np.ndarray] = {}
    group = tiny_internlm2.HEADS // tiny_internlm2.KV_HEADS
    for layer in range(tiny_internlm2.LAYERS):
        fused = f"model.layers.{layer}.attention.wqkv"
        tensors[f"{fused}.bias"] = rng.standard_normal(hidden + 2 * kv).astype(np.float32)
        W, b = (
            tensors[f"{fused}.{part}"].reshape(tiny_internlm2.KV_HEADS, group + 2, width, -1).copy()
            for part in ("weight", "bias")
        )
        for letter, heads in (
            ("q", slice(0, group)),
            ("k", slice(group, group + 1)),
            ("v", slice(group + 1, group + 2)),
        ):
            num_out = hidden if letter == "q" else kv
            at = f"base_model.model.model.layers.{layer}.self_attn.{letter}_proj.lora_"
            A, B = rng.standard_normal((4, hidden)) * 0.1, rng.standard_normal((num_out, 4)) * 0.1
            m, v = rng.random(num_out) + 0.5, rng.standard_normal(num_out)
            parts = {"A.weight": A, "B.weight": B, "magnitude_vector": m, "B.bias": v}
            adapter |= {f"{at}{part}": array.astype(np.float32) for part, array in parts.items()}
            V = W[:, heads].reshape(num_out, hidden) + 2 * (B @ A)
            W[:, heads] = ((m / np.linalg.norm(V, axis=1))[:, None] * V).reshape(W[:, heads].shape)
            b[:, heads] += 2 * v.reshape(b[:, heads].shape)
        expected |= {f"{fused}.weight": W.reshape(-1, hidden), f"{fused}.bias": b.reshape(-1)}
    for file in original.glob("*.safetensors"):
        file.unlink()
    (original / "model.safetensors.index.json").unlink(missing_ok=True)
    save_numpy(tensors, original / "model.safetensors", metadata={"format": "pt"})
    folder = tiny_llama.write_adapter(
        tmp_path / "adapter", adapter, use_dora=True, lora_bias=True, target_modules=["q_proj", "k_proj", "v_proj"]
    )
    merge.execute(merge.plan(original, [(folder, 1.0)]), tmp_path / "mine")
    assert verify.verify(tmp_path / "mine", original, [(folder, 1.0)]).good
    mine = load_numpy(tmp_path / "mine" / "model.safetensors")
    for name, array in tensors.items():
        # f32 with a norm of 24 to 32 squares: some 20 roundings of 2^-24 of numbers below 4.
        np.testing.assert_allclose(mine[name], expected.get(name, array), rtol=0, atol=20 * 2**-24 * 4)
        assert (mine[name] != array).mean() > (0.9 if name in expected else -1)


@pytest.fixture
def in_f32(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base, DoRA adapter and their merge, all f32."""
    rng = np.random.default_rng(4)
    tensors = tiny_llama.adapter_tensors()
    for name, (num_out, _) in tiny_llama.LINEARS.items():
        for layer in range(tiny_llama.LAYERS):
            at = f"base_model.model.model.layers.{layer}.{name}.lora_magnitude_vector"
            tensors[at] = (rng.random(num_out) + 0.5).astype(np.float32)
    base = tiny_llama.write_base(tmp_path / "base")
    adapter = tiny_llama.write_adapter(tmp_path / "adapter", tensors, use_dora=True)
    merge.execute(merge.plan(base, [(adapter, 1.0)]), tmp_path / "merged")
    return base, adapter, tmp_path / "merged"


@pytest.mark.parametrize(("factor", "status"), [(1.0, "rounding"), (1 + 2**-14, "off")])
def test_verify_knows_what_an_order_of_sums_explains(
    in_f32: tuple[Path, Path, Path], factor: float, status: str
) -> None:
    """The merge in f64, rounded to f32, is right; with magnitudes that are off by 2^-14 it is not."""
    base, adapter, merged = in_f32
    weights, factors = load_numpy(base / "model.safetensors"), load_numpy(adapter / "adapter_model.safetensors")
    result = load_numpy(merged / "model.safetensors")
    for name in result:
        at = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{at}A.weight" not in factors:
            continue
        A, B, m = (factors[f"{at}{part}"].astype(np.float64) for part in ("A.weight", "B.weight", "magnitude_vector"))
        V = weights[name] + 2 * (B @ A)
        result[name] = ((factor * m / np.linalg.norm(V, axis=1))[:, None] * V).astype(np.float32)
    save_numpy(result, merged / "model.safetensors", metadata={"format": "pt"})
    report = verify.verify(merged, base, [(adapter, 1.0)])
    assert {check.status for check in report.checks if check.targeted} == {status}
    assert report.good is (status == "rounding")
