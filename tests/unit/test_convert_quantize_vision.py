"""Models that see in 4 bit: a LLaVA merged from its parts and a Qwen2-VL, as transformers saves them, and answering."""

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_llava
import tiny_vision
from fastft.__main__ import main
from fastft.config import schema
from fastft.convert import llava as convert
from fastft.convert.folder import read_checkpoint
from fastft.model import llava, processor, tokenizer

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore:.*_check_is_size.*:FutureWarning")

ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


def merged_llava(folder: Path) -> Path:
    """A bf16 LLaVA folder, as `convert merge` makes it of the parts."""
    # Rows of whole blocks: with others bitsandbytes' CPU backend errs (spec/formats.md 0.8).
    llm = tiny_llava.write_llm(folder / "llm")
    clip = tiny_llava.write_clip(folder / "clip", hidden_size=64, intermediate_size=128)
    words = tokenizer.load_tokenizer(llm, schema.Model(name=str(llm)))
    made = llava.processor(words, clip)
    torch.manual_seed(4)
    projector = {
        "model.0.weight": 0.3 * torch.randn(64, 64),
        "model.0.bias": 0.3 * torch.randn(64),
        "model.2.weight": 0.3 * torch.randn(64, 64),
        "model.2.bias": 0.3 * torch.randn(64),
    }
    llava.save_projector(projector, folder / "projector")
    parts = convert.LlavaParts(
        convert.read_llm(llm),
        read_checkpoint(clip),
        convert.read_projector(folder / "projector"),
        made.image_token_id,
    )
    plan = convert.plan_llava(parts, num_tokens=len(words), dtype="bf16")
    convert.execute(plan, folder / "merged", made.save_pretrained)
    return folder / "merged"


def qwen2_vl(folder: Path) -> Path:
    return tiny_vision.write_model("qwen2_vl", folder / "qwen2_vl")


MODELS = {"llava": merged_llava, "qwen2_vl": qwen2_vl}


def saved_by_transformers(base: Path, folder: Path) -> Path:
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    dtype = json.loads((base / "config.json").read_text())["dtype"]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )
    model = AutoModelForImageTextToText.from_pretrained(
        base, quantization_config=quantization, device_map={"": "cpu"}, dtype="auto"
    )
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype="auto", device_map={"": "cpu"}, output_loading_info=True
    )
    assert not any(info.values())
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # its repacking rounds the scales (spec/training.md trap A)
    return model.eval()


def answered(model: Any, asks: Any) -> Any:
    text = asks.apply_chat_template(ASKED, add_generation_prompt=True)
    inputs = asks(text=[text], images=[tiny_llava.picture("blue")], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_transformers_saves_and_answers(name: str, tmp_path: Path) -> None:
    """Head and embedding stay; tower and projector are linear layers to transformers, and are held in 4 bit."""
    from bitsandbytes.nn import Linear4bit

    base, mine = MODELS[name](tmp_path), tmp_path / "mine"
    assert main(["convert", "quantize", str(base), str(mine)]) == 0
    theirs = saved_by_transformers(base, tmp_path / "theirs")
    assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    blocks = [json.loads((place / "config.json").read_text())["quantization_config"] for place in (mine, theirs)]
    assert blocks[0] == blocks[1]
    model = loaded(mine)
    held = [path for path, module in model.named_modules() if isinstance(module, Linear4bit)]
    tower = "visual" if name == "qwen2_vl" else "vision_tower"
    assert any(f".{tower}." in path for path in held)
    assert any(".language_model." in path for path in held)
    assert not any("lm_head" in path or "embed" in path for path in held)
    asks = processor.load(mine, model_type=name)
    logits = answered(model, asks)
    assert bool(torch.isfinite(logits).all())
    assert torch.equal(logits, answered(loaded(theirs), asks))

    assert main(["convert", "dequantize", str(mine), str(tmp_path / "plain")]) == 0
    plain = loaded(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert {parameter.dtype for parameter in plain.parameters()} == {model.dtype}
    again = answered(plain, processor.load(tmp_path / "plain", model_type=name)).float()
    if name == "llava":
        # The same weights; bf16 products, rounded at other places.
        assert float((again - logits.float()).abs().max()) < 0.05 * float(logits.float().abs().max())
    assert main(["convert", "verify", str(mine), "--base", str(base)]) == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_tower_that_stays_as_it_is(name: str, tmp_path: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    base, mine = MODELS[name](tmp_path), tmp_path / "mine"
    tower = "visual" if name == "qwen2_vl" else "vision_tower"
    skip = f"model.{tower}"
    assert main(["convert", "quantize", str(base), str(mine), "--skip", skip]) == 0
    held = [path for path, module in loaded(mine).named_modules() if isinstance(module, Linear4bit)]
    assert held
    assert not any(f".{tower}." in path for path in held)


def test_chat_with_a_llava_in_4_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    assert main(["convert", "quantize", str(merged_llava(tmp_path)), str(mine), "--double-quant"]) == 0
    tiny_llava.picture().save(tmp_path / "a.png")
    words = ["chat", str(mine), "--image", str(tmp_path / "a.png"), "--prompt", "What is it?", "--max-new-tokens", "3"]
    assert main(words) == 0
    assert capsys.readouterr().out.strip()
