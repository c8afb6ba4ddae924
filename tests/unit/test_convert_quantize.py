"""`convert quantize` and `dequantize`: byte for byte what transformers and bitsandbytes save, and back."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import BUILDERS

import tiny_llama
from fastft.convert import quantize, quantized, rewrite, verify
from fastft.convert.folder import read_checkpoint, read_weights
from fastft.convert.four_bit import FourBit, numbers_of
from fastft.errors import CheckpointError, PlanError, UsageError

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings(
    # bitsandbytes 0.50 on a CPU: dtype checks of its own code, and a hint about kernels of another package.
    "ignore:.*_check_is_size.*:FutureWarning",
)

# Architectures whose names and layouts in the files differ from those of the modules, or whose layers do.
ARCHITECTURES = [
    "llama", "gpt2", "gpt_neox", "gemma3", "llava", "qwen2_vl", "qwen2_5_vl", "mixtral", "qwen3_moe", "deepseek_v3",
    "clip_vision",
]  # fmt: skip


def written_base(name: str, folder: Path, dtype: str = "bfloat16") -> Path:
    torch.manual_seed(3)
    model = BUILDERS[name]().to(getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.05)
    for name_of, buffer in model.named_buffers():
        if name_of.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # as published, and as transformers loads it
    model.save_pretrained(folder)
    return folder


def saved_by_transformers(base: Path, folder: Path, **settings: Any) -> Path:
    import transformers

    config = json.loads((base / "config.json").read_text())
    found = getattr(transformers, config["architectures"][0])
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=getattr(torch, config["dtype"]), **settings
    )
    model = found.from_pretrained(base, quantization_config=quantization, device_map={"": "cpu"}, dtype="auto")
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    import bitsandbytes
    import transformers

    config = json.loads((folder / "config.json").read_text())
    found = getattr(transformers, config["architectures"][0])
    model = found.from_pretrained(folder, dtype="auto", device_map={"": "cpu"}).eval()
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in model.modules())
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # its repacking rounds the scales (spec/training.md trap A)
    return model


def run(base: Path, out: Path, four_bit: FourBit, **options: Any) -> Path:
    rewrite.execute(quantize.plan_quantize(base, four_bit, **options), out)
    return out


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_bytes_of_save_pretrained(tmp_path: Path, name: str, quant_type: Any, *, double_quant: bool) -> None:
    base = written_base(name, tmp_path / "base")
    settings = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double_quant}
    theirs = saved_by_transformers(base, tmp_path / "theirs", **settings)
    mine = run(base, tmp_path / "mine", FourBit(quant_type, double_quant))
    assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    block = json.loads((mine / "config.json").read_text())["quantization_config"]
    assert block == json.loads((theirs / "config.json").read_text())["quantization_config"]
    assert verify.verify(mine, base, []).good


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(tmp_path: Path, dtype: str) -> None:
    base = written_base("llama", tmp_path / "base", dtype)
    theirs = saved_by_transformers(base, tmp_path / "theirs", bnb_4bit_quant_type="nf4")
    mine = run(base, tmp_path / "mine", FourBit("nf4"))
    assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


def test_it_loads_and_answers_alike(tmp_path: Path) -> None:
    base = written_base("llama", tmp_path / "base")
    theirs = saved_by_transformers(base, tmp_path / "theirs", bnb_4bit_quant_type="nf4")
    mine = run(base, tmp_path / "mine", FourBit("nf4"), max_shard_size_bytes=5_000)
    assert len(list(mine.glob("*.safetensors"))) > 1
    tokens = torch.arange(3, 19).reshape(2, 8)
    with torch.no_grad():
        expected = loaded(theirs)(tokens).logits
        model = loaded(mine)
        assert torch.equal(model(tokens).logits, expected)
        assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 11)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("skip", [(), ("o_proj", "model.layers.1")])
@pytest.mark.parametrize("name", ["Gemma", "Gemma2", "Gemma3", "Llama", "Mistral", "Phi3", "Qwen2", "Qwen3"])
def test_names_say_what_the_model_says(tmp_path: Path, name: str, skip: tuple[str, ...], *, tied: bool) -> None:
    """The layers told by names alone, without torch, are those that transformers tells by modules."""
    import transformers
    from tiny_models import TEXT

    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config(**{**TEXT, "tie_word_embeddings": tied}))
    model.save_pretrained(tmp_path / "base")
    base = read_checkpoint(tmp_path / "base")
    by_names = quantized._by_plain_names(base, skip)
    by_model = quantized._by_model(base, skip)
    assert by_names == by_model


def test_a_plain_model_is_quantized_without_torch(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    code = (
        "import sys; from pathlib import Path; from fastft.convert import quantize, rewrite;"
        "from fastft.convert.four_bit import FourBit;"
        f"rewrite.execute(quantize.plan_quantize(Path({str(base)!r}), FourBit()), Path({str(tmp_path / 'out')!r}));"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_tied_head_stays(tmp_path: Path) -> None:
    from tiny_models import TEXT
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**{**TEXT, "tie_word_embeddings": True})).to(torch.bfloat16).save_pretrained(
        tmp_path / "base"
    )
    theirs = saved_by_transformers(tmp_path / "base", tmp_path / "theirs", bnb_4bit_quant_type="nf4")
    mine = run(tmp_path / "base", tmp_path / "mine", FourBit("nf4"))
    assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


def test_further_layers_that_stay(tmp_path: Path) -> None:
    base = written_base("llama", tmp_path / "base")
    skip = ["lm_head", "model.layers.1.mlp", "o_proj"]
    theirs = saved_by_transformers(base, tmp_path / "theirs", bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip)
    mine = run(base, tmp_path / "mine", FourBit("nf4"), skip=["model.layers.1.mlp", "o_proj"])
    assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="did you mean o_proj"):
        quantize.plan_quantize(base, FourBit(), skip=["o_prj"])


@pytest.mark.parametrize("blocksize", [32, 128, 4096])
@pytest.mark.parametrize("double_quant", [False, True])
def test_block_sizes(tmp_path: Path, blocksize: int, *, double_quant: bool) -> None:
    """transformers passes no block size on; bitsandbytes does each weight."""
    from bitsandbytes import functional
    from safetensors.torch import load_file

    base = written_base("llama", tmp_path / "base")
    mine = load_file(run(base, tmp_path / "mine", FourBit("nf4", double_quant, blocksize)) / "model.safetensors")
    for name, weight in load_file(base / "model.safetensors").items():
        if "_proj" not in name:
            assert torch.equal(mine[name], weight)
            continue
        packed, state = functional.quantize_4bit(
            weight.reshape(-1), blocksize=blocksize, quant_type="nf4", compress_statistics=double_quant
        )
        state.shape = weight.shape
        expected = {name: packed, **{f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}}
        for key, value in expected.items():
            assert torch.equal(mine[key], value), key


@pytest.mark.parametrize("name", ["llama", "gpt2", "llava", "qwen2_vl"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_back_again(tmp_path: Path, name: str, *, double_quant: bool) -> None:
    """Against bitsandbytes' way back, flat: with rows that end within blocks its CPU backend errs (spec/formats.md 0.8)."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit

    base = written_base(name, tmp_path / "base")
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
    theirs = saved_by_transformers(base, tmp_path / "theirs", **settings)
    plain = tmp_path / "plain"
    rewrite.execute(quantize.plan_dequantize(theirs), plain)
    config = json.loads((plain / "config.json").read_text())
    assert "quantization_config" not in config
    import transformers

    found = getattr(transformers, config["architectures"][0])
    model = found.from_pretrained(theirs, dtype="auto", device_map={"": "cpu"})
    got = found.from_pretrained(plain, dtype="auto").state_dict()
    assert all(value.dtype == torch.bfloat16 for value in got.values())
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            shape, state.shape = state.shape, torch.Size([state.shape.numel()])
            expected = functional.dequantize_4bit(module.weight, state).reshape(shape)
        elif getattr(module, "weight", None) is not None:
            expected = module.weight
        else:
            continue
        own = got[f"{path}.weight"]
        turned = name == "gpt2" and isinstance(module, Linear4bit)
        assert torch.equal(own.T if turned else own, expected), path
    assert verify.verify(theirs, base, []).good
    again = run(plain, tmp_path / "again", FourBit("nf4", double_quant))
    assert read_weights(again)[0].keys() == read_weights(theirs)[0].keys()


def test_what_verify_finds(tmp_path: Path) -> None:
    base = written_base("llama", tmp_path / "base")
    mine = run(base, tmp_path / "mine", FourBit("nf4"))
    file = mine / "model.safetensors"
    place = read_checkpoint(mine).tensors["model.layers.1.mlp.up_proj.weight"]
    content = bytearray(file.read_bytes())
    content[place.offset + 7] ^= 0x10
    file.write_bytes(content)
    report = verify.verify(mine, base, [])
    assert [(check.name, check.status) for check in report.checks if not check.good] == [
        ("model.layers.1.mlp.up_proj.weight", "off")
    ]


def test_a_base_that_is_quantized_already(tmp_path: Path) -> None:
    mine = run(written_base("llama", tmp_path / "base"), tmp_path / "mine", FourBit("nf4"))
    with pytest.raises(PlanError, match="in 4 bit already"):
        quantize.plan_quantize(mine, FourBit())
    with pytest.raises(PlanError, match="nothing to dequantize"):
        quantize.plan_dequantize(tmp_path / "base")


def test_a_model_that_transformers_does_not_have(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base", architectures=["LlamaForPoetry"])
    with pytest.raises(PlanError, match="LlamaForPoetry"):
        quantize.plan_quantize(base, FourBit())


def test_a_model_that_runs_its_own_code(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    plan = quantize.plan_quantize(base, FourBit())
    assert "told by their names" in plan.notes[0]
    assert all(("_proj" in name) for name in plan.changed)
    assert plan.changed


def test_layers_that_are_fused_in_the_files(tmp_path: Path) -> None:
    base = written_base("nomic_bert", tmp_path / "base")
    with pytest.raises(PlanError, match="in other pieces"):
        quantize.plan_quantize(base, FourBit())


def broken(folder: Path, change: Any) -> Path:
    """Change the quant_state, or whole tensors, of a quantized folder."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def text(content: str) -> "torch.Tensor":
    return torch.from_numpy(np.frombuffer(content.encode(), np.uint8).copy())


def state(**changes: Any) -> "torch.Tensor":
    right = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [48, 32]}
    return text(json.dumps({**right, **changes}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{NAME}.absmax"), "absmax"),
        (lambda tensors: tensors.pop(STATE), "one quant_state"),
        (lambda tensors: tensors.pop(NAME), f"no tensor '{NAME}'"),
        (lambda tensors: tensors.update({f"{NAME}.nested_absmax": torch.zeros(1)}), "belong to it"),
        (lambda tensors: tensors.update({f"{NAME}.quant_map": torch.zeros(16)}), "code book"),
        (lambda tensors: tensors.update({f"{NAME}.absmax": torch.zeros(3)}), "its scales are F32"),
        (lambda tensors: tensors.update({NAME: torch.zeros((5, 1), dtype=torch.uint8)}), "does not hold the codes"),
        (lambda tensors: tensors.update({STATE: text("{")}), "not JSON"),
        (lambda tensors: tensors.update({STATE: text("[]")}), "a JSON object is expected"),
        (lambda tensors: tensors.update({STATE: text("[" * 60_000)}), "not JSON that can be read"),
        (lambda tensors: tensors.update({STATE: text("x" * 70_000)}), "no short text"),
        (lambda tensors: tensors.update({STATE: text('{"quant_type": "nf4", "quant_type": "fp4"}')}), "twice"),
        (lambda tensors: tensors.update({STATE: text('{"quant_type": "nf3"}')}), "quant_type = 'nf3'"),
        (lambda tensors: tensors.update({STATE: state(blocksize=64.0)}), "blocksize = 64.0"),
        (lambda tensors: tensors.update({STATE: state(dtype=[])}), "dtype = []"),
        (lambda tensors: tensors.update({STATE: state(shape=[48, -32])}), "shape = [48, -32]"),
        (lambda tensors: tensors.update({STATE: state(shape=[10**30, 10**30])}), "does not hold the codes"),
    ],
)
def test_folders_that_are_broken(tmp_path: Path, change: Any, message: str) -> None:
    mine = run(written_base("llama", tmp_path / "base"), tmp_path / "mine", FourBit("nf4"))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        quantize.plan_dequantize(broken(mine, change))


def test_scales_that_are_not_finite(tmp_path: Path) -> None:
    mine = run(written_base("llama", tmp_path / "base"), tmp_path / "mine", FourBit("nf4"))
    broken(mine, lambda tensors: tensors[f"{NAME}.absmax"].fill_(float("nan")))
    with pytest.raises((CheckpointError, PlanError), match="infinite or undefined"):
        rewrite.execute(quantize.plan_dequantize(mine), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = written_base("llama", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors[NAME][3, 2] = float("inf")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((CheckpointError, PlanError), match=f"{NAME}.*cannot be quantized"):
        run(base, tmp_path / "out", FourBit("nf4"))
    assert not (tmp_path / "out").exists()


def test_numbers_of_a_last_block(tmp_path: Path) -> None:
    """A weight of 5 x 33 numbers: blocks end with neither rows nor bytes."""
    from bitsandbytes import functional
    from safetensors.torch import save_file

    torch.manual_seed(0)
    base = tiny_llama.write_base(tmp_path / "base", auto_map={"AutoModel": "modeling.Mine"})
    weight = torch.randn(5, 33).to(torch.bfloat16)
    save_file({"layer.weight": weight}, base / "model.safetensors")
    mine = run(base, tmp_path / "mine", FourBit("nf4"))
    packed, state = functional.quantize_4bit(weight.reshape(-1), blocksize=64, quant_type="nf4")
    expected = functional.dequantize_4bit(packed, state).float().numpy()
    np.testing.assert_array_equal(numbers_of(read_checkpoint(mine).tensors["layer.weight"], 0, 165), expected)
