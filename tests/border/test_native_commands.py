"""The commands as functions, with progress and notes for the caller."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_llama
from fastft import native

NAME = "model.layers.0.mlp.up_proj.weight"


def make(folder: Path) -> tuple[Path, Path]:
    """A base of two tensors and a LoRA of rank 2, alpha 4 on one of them."""
    random = torch.Generator().manual_seed(0)
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    weights = {
        NAME: torch.randn(48, 32, generator=random),
        "model.embed_tokens.weight": torch.randn(64, 32, generator=random),
    }
    save_file(
        {name: tensor.bfloat16() for name, tensor in weights.items()},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    path = "base_model.model." + NAME.removesuffix(".weight")
    factors = {f"{path}.lora_A.weight": torch.ones(2, 32) / 8, f"{path}.lora_B.weight": torch.ones(48, 2) / 4}
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"]})
    )
    return base, adapter


def test_the_result_and_what_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, adapter = make(tmp_path)
    told: list[tuple[str, int, int]] = []
    report = native.merge_checkpoint(base, adapter, tmp_path / "out", progress=lambda *now: told.append(now))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    # scale 4/2, products 2 * 1/8 * 1/4
    assert torch.equal(after[NAME], (before[NAME].float() + 2 * 2 / 32).bfloat16())
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert (report.num_tensors, report.num_changed, report.num_bytes) == (2, 1, (48 + 64) * 32 * 2)
    assert report.folder == tmp_path / "out"
    assert told[-1] == ("merging", report.num_bytes, report.num_bytes)
    assert capfd.readouterr() == ("", "")


def test_several_adapters_have_weights(tmp_path: Path) -> None:
    base, adapter = make(tmp_path)
    native.merge_checkpoint(str(base), [(adapter, 0.5), (adapter, 0.25)], str(tmp_path / "out"), max_shard_size="1KB")
    reader: Any = native.open_checkpoint(tmp_path / "out", kind="torch")
    before = load_file(base / "model.safetensors")
    assert torch.equal(reader[NAME], (before[NAME].float() + 0.75 * 2 * 2 / 32).bfloat16())


def test_what_progress_raises_stops_the_work(tmp_path: Path) -> None:
    base, adapter = make(tmp_path)

    def stop(*_: object) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        native.merge_checkpoint(base, adapter, tmp_path / "out", progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_notes_are_in_the_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, adapter = make(tmp_path)
    left = tmp_path / ".out.partial-0123"
    left.mkdir()
    report = native.merge_checkpoint(base, adapter, tmp_path / "out")
    assert any("removing what an earlier run left unfinished" in note for note in report.notes)
    assert capfd.readouterr().err == ""


def test_what_is_wrong_is_an_error_of_one_line(tmp_path: Path) -> None:
    base, adapter = make(tmp_path)
    with pytest.raises(native.FileError, match="the base model is not there"):
        native.merge_checkpoint(tmp_path / "no", adapter, tmp_path / "out")
    with pytest.raises(native.ArrayError, match="max_shard_size 0 is not allowed"):
        native.merge_checkpoint(base, adapter, tmp_path / "out", max_shard_size=0)
    with pytest.raises(ValueError, match="--dtype 'int8' is not allowed"):
        native.merge_checkpoint(base, adapter, tmp_path / "out", dtype="int8")
    with pytest.raises(native.PlanError, match="cannot be written over"):
        native.merge_checkpoint(base, adapter, base, force=True)


def test_names_can_be_mapped(tmp_path: Path) -> None:
    base, adapter = make(tmp_path)
    factors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "language_model.layers"): factor for name, factor in factors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    native.merge_checkpoint(base, adapter, tmp_path / "out", key_map=[r"^language_model\.=model."])
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after[NAME], (before[NAME].float() + 2 * 2 / 32).bfloat16())


@pytest.mark.parametrize("double_quant", [False, True])
def test_quantize_and_back(double_quant: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    told: list[tuple[str, int, int]] = []
    report = native.quantize_checkpoint(
        base, tmp_path / "small", double_quant=double_quant, progress=lambda *now: told.append(now)
    )
    assert told[-1][1:] == (report.num_bytes, report.num_bytes)
    assert report.num_checked > 0
    assert 0 < report.num_changed < report.num_tensors
    plain: Any = native.open_checkpoint(base, kind="torch")
    small: Any = native.open_checkpoint(tmp_path / "small", kind="torch")
    name = next(name for name in plain if name.endswith("mlp.up_proj.weight"))
    packed, state = native.quantize_4bit(plain[name], double_quant=double_quant)
    assert report.num_bytes == sum(small.info(known).nbytes for known in small)
    assert torch.equal(small[name], packed)
    read = native.QuantState.from_tensors(name, small)
    assert (read.offset, read.shape, read.dtype) == (state.offset, state.shape, state.dtype)
    assert torch.equal(read.absmax, state.absmax)
    native.dequantize_checkpoint(tmp_path / "small", tmp_path / "back")
    back: Any = native.open_checkpoint(tmp_path / "back", kind="torch")
    assert set(back) == set(plain)
    assert torch.equal(back[name], native.dequantize_4bit(packed, state))
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_quantized(tmp_path: Path) -> None:
    base, _ = make(tmp_path)
    with pytest.raises(native.ArrayError, match="quantize_checkpoint: blocksize 48 is not allowed"):
        native.quantize_checkpoint(base, tmp_path / "out", blocksize=48)
    with pytest.raises(native.ArrayError, match="quant_type 'nf5' is not allowed"):
        native.quantize_checkpoint(base, tmp_path / "out", quant_type="nf5")  # type: ignore[arg-type]
    with pytest.raises(native.PlanError):
        native.dequantize_checkpoint(base, tmp_path / "out")


def test_the_options_of_the_command(tmp_path: Path) -> None:
    """The same bytes as what is typed."""
    from fastft.__main__ import main

    base, adapter = make(tmp_path)
    options = {"dequantized_base": "nf4", "double_quant": True, "quantize": "fp4", "blocksize": 128}
    native.merge_checkpoint(base, adapter, tmp_path / "called", **options)  # type: ignore[arg-type]
    typed = f"convert merge {base} {adapter} {tmp_path / 'typed'} --dequantized-base nf4 --double-quant --quantize fp4"
    assert main([*typed.split(), "--blocksize", "128"]) == 0
    called, wanted = (tmp_path / name / "model.safetensors" for name in ("called", "typed"))
    assert called.read_bytes() == wanted.read_bytes()
    with pytest.raises(native.ArrayError, match="48"):
        native.merge_checkpoint(base, adapter, tmp_path / "never", quantize="nf4", blocksize=48)
