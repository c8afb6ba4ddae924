"""`pth_to_hf --save-format huggingface`: XTuner's LLaVA checkpoint as one folder, held against its parts."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny_internlm2
import tiny_llava
from fastft.__main__ import main
from fastft.config import schema
from fastft.convert import llava as convert
from fastft.convert import pth, recorded, trained
from fastft.convert.source import joined, stretch
from fastft.errors import FastftError, PlanError
from fastft.model import llava, tokenizer

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
)

FILE = """
from peft import LoraConfig
from transformers import AutoModelForCausalLM, CLIPVisionModel
from xtuner.model import LLaVAModel

model = dict(
    type=LLaVAModel,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path='{llm}'),
    llm_lora=dict(type=LoraConfig, r=4, lora_alpha=8, lora_dropout=0.05, bias='none', task_type='CAUSAL_LM'),
    visual_encoder=dict(type=CLIPVisionModel.from_pretrained, pretrained_model_name_or_path='{clip}'),
    visual_select_layer={layer},
    visual_encoder_lora=dict(type=LoraConfig, r=2, lora_alpha=6, lora_dropout=0.05, bias='none'))
"""
ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
CASES = {
    "projector alone": (None, None),
    "llm lora": ("lora", None),
    "llm and tower lora": ("lora", "lora"),
    "llm whole, tower lora": ("whole", "lora"),
    "both whole": ("whole", "whole"),
}


@dataclass
class Made:
    """A LLaVA in memory, and XTuner's checkpoint of it.

    Attributes:
        model: as it was trained.
        processor: its processor.
        state: what XTuner saves of it.
        config: XTuner's config of the run.
    """

    model: Any
    processor: Any
    state: dict[str, Any]
    config: Path


def moved(tensor: Any) -> Any:
    return tensor + 0.1 * torch.randn_like(tensor)


def with_adapter(part: Any, rank: int, alpha: int, targets: list[str]) -> Any:
    """The part with a random adapter, as PEFT wraps it."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(part, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)).eval()
    for key, parameter in wrapped.named_parameters():
        if "lora_" in key:
            parameter.data = 0.2 * torch.randn_like(parameter)
    return wrapped


def lora_of(part: Any, prefix: str) -> dict[str, Any]:
    """An adapter's tensors, by the names of XTuner's transformers (a tower's modules lie in `vision_model`)."""
    found = {}
    for key, tensor in part.state_dict().items():
        if "lora_" in key:
            name = key.replace(".default.", ".")
            if prefix == "visual_encoder." and ".vision_model." not in name:
                name = name.replace("base_model.model.", "base_model.model.vision_model.")
            found[prefix + name] = tensor.clone()
    return found


def whole_of(part: Any, prefix: str) -> dict[str, Any]:
    """A part's tensors with new numbers, which the part gets too."""
    found = {}
    for key, parameter in part.named_parameters():
        parameter.data = moved(parameter.data)
        inner = "vision_model." if prefix == "visual_encoder." and not key.startswith("vision_model.") else ""
        found[prefix + inner + key] = parameter.data.clone()
    return found


def made(folder: Path, case: str, **llm_settings: Any) -> Made:
    from transformers import AutoModelForCausalLM

    llm, clip = tiny_llava.write_llm(folder / "llm", **llm_settings), tiny_llava.write_clip(folder / "clip")
    torch.manual_seed(5)
    words = tokenizer.load_tokenizer(llm, schema.Model(name=str(llm)))
    processor = llava.processor(words, clip)
    language = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    tower = llava.read_tower(clip, torch.float32)
    of_llm, of_tower = CASES[case]
    state = whole_of(language, "llm.") if of_llm == "whole" else {}
    state |= whole_of(tower, "visual_encoder.") if of_tower == "whole" else {}
    model = llava.put_together(language, tower, words, projector=None, select_layer=-1).eval()
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    state |= {f"projector.{name}": tensor.clone() for name, tensor in llava.projector_tensors(model).items()}
    if of_llm == "lora":
        wrapped = with_adapter(language, 4, 8, ["q_proj", "v_proj", "down_proj"])
        state |= lora_of(wrapped, "llm.")
        model.model.language_model = wrapped.base_model.model.model
    if of_tower == "lora":
        wrapped = with_adapter(tower, 2, 6, ["q_proj", "fc1"])
        state |= lora_of(wrapped, "visual_encoder.")
        model.model.vision_tower = wrapped.base_model.model
    config = folder / "config.py"
    config.write_text(FILE.format(llm=llm, clip=clip, layer=-1))
    return Made(model, processor, state, config)


def plan(given: Made, folder: Path, state: dict[str, Any] | None = None, **options: Any) -> pth.PthPlan:
    torch.save({"state_dict": given.state if state is None else state, "meta": {}}, folder / "iter_9.pth")
    settings = {"save_format": "huggingface", "dtype": "auto", **options}
    return pth.plan(recorded.of_python_file(given.config), folder / "iter_9.pth", **settings)


def answered(model: Any, processor: Any) -> Any:
    text = processor.apply_chat_template(ASKED, add_generation_prompt=True)
    inputs = processor(text=[text], images=[tiny_llava.picture()], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_folder_answers_as_the_parts_do(tmp_path: Path, case: str, *, tied: bool) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    given = made(tmp_path, case, tie_word_embeddings=tied)
    planned = plan(given, tmp_path)
    assert planned.kind == "llava"
    report = pth.execute(planned, tmp_path / "out")
    assert planned.llava is not None
    assert report.num_tensors == len(planned.llava.plan.tensors)
    assert convert.verify(planned.llava.plan, tmp_path / "out").good
    assert (tmp_path / "out" / "xtuner_config.py").read_bytes() == given.config.read_bytes()
    read, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert type(read).__name__ == "LlavaForConditionalGeneration"
    assert read.config.vision_feature_layer == -1
    expected = answered(given.model, given.processor)
    got = answered(read, AutoProcessor.from_pretrained(tmp_path / "out"))
    # f32; sums of up to 128 products in another order, in ten layers one after the other.
    assert float((got - expected).abs().max()) < 10 * 128 * 2**-24 * float(expected.abs().max())


@pytest.mark.parametrize(("dtype", "expected"), [("fp16", "float16"), ("bf16", "bfloat16"), ("auto", "float32")])
def test_all_parts_get_one_dtype(tmp_path: Path, dtype: str, expected: str) -> None:
    from safetensors.torch import load_file

    given = made(tmp_path, "llm and tower lora")
    planned = plan(given, tmp_path, dtype=dtype, max_shard_size_bytes=200_000)
    pth.execute(planned, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, expected)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == expected
    projector = tensors["multi_modal_projector.linear_2.weight"]
    assert torch.equal(projector, given.state["projector.model.2.weight"].to(projector.dtype))


def test_by_the_command_and_a_config_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config says the adapters' settings, the tower and the layer; the .pth has no record of them."""
    given = made(tmp_path, "llm and tower lora")
    torch.save(given.state, tmp_path / "x.pth")
    monkeypatch.chdir(tmp_path)
    learn = "{projector: full, tower: lora, tower_lora: {r: 2, alpha: 6}}"
    (tmp_path / "ours.yaml").write_text(
        "name: ours\ntask: sft\nmodel: {name: llm}\nmethod: {kind: lora, lora: {r: 4, alpha: 8}}\n"
        "data: {train: [{source: rows.json}]}\n"
        f"vision: {{tower: clip, select_layer: -1, learn: {learn}}}\n"
    )
    words = ["convert", "pth_to_hf", "ours.yaml", "x.pth", "out", "--save-format", "huggingface", "--dtype", "auto"]
    assert main(words) == 0
    assert "llava written to out" in capsys.readouterr().out
    pth.execute(plan(given, tmp_path), tmp_path / "by_xtuner_config")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "by_xtuner_config"))
    assert one == other
    assert (tmp_path / "out" / "fastft_config.yaml").is_file()
    assert main(["chat", "out", "--prompt", "Hello", "--max-new-tokens", "2"]) == 0
    (tmp_path / "ours.yaml").write_text((tmp_path / "ours.yaml").read_text().replace("r: 2,", "r: 3,"))
    assert main([*words[:4], "again", *words[5:]]) == 1
    assert "its LoRA has rank 2" in capsys.readouterr().err


def test_internlm2_trained_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fused projections come apart on the way, as for a folder of InternLM2 itself."""
    from safetensors.torch import load_file

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = made(tmp_path, "projector alone")
    words = tmp_path / "words"
    words.mkdir()
    for name in tiny_llava.TOKENIZER_FILES:
        (words / name).write_bytes((tiny_llava.DEMO_MODEL / name).read_bytes())
    folder = tiny_internlm2.write(tmp_path / "internlm2", words)
    base = {}
    for file in sorted(folder.glob("*.safetensors")):
        base |= load_file(file)
    hidden = json.loads((folder / "config.json").read_text())["hidden_size"]
    state = {f"llm.{name}": tensor for name, tensor in base.items()}
    for name, tensor in given.state.items():
        shape = (hidden,) if name.endswith("bias") else (hidden, hidden if ".2." in name else tensor.shape[1])
        state[name] = torch.randn(shape)
    given.config.write_text(FILE.format(llm=folder, clip=tmp_path / "clip", layer=-2))
    pth.execute(plan(given, tmp_path, state), tmp_path / "trained")
    projector = {name: tensor for name, tensor in state.items() if name.startswith("projector.")}
    pth.execute(plan(given, tmp_path, projector), tmp_path / "untrained")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("trained", "untrained"))
    assert one.keys() == other.keys()
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in one
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("no projector", r"holds no projector \(projector.model.0.weight"),
        ("half a projector", "projector is not XTuner's"),
        ("three layers", "a projector of 3 layers"),
        ("missing", r"1 missing \(for example model.layers.1.mlp.up_proj.weight\)"),
        ("extra", r"1 not in the base \(for example model.layers.7.mlp.up_proj.weight\)"),
        ("shape", "'model.norm.weight' has shape"),
        ("another projector", "the projector goes from 31 to 64"),
        ("half an adapter", "q_proj has A only"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, change: str, word: str) -> None:
    given = made(tmp_path, "llm whole, tower lora")
    state = dict(given.state)
    if change == "no projector":
        state = {name: tensor for name, tensor in state.items() if not name.startswith("projector.")}
    elif change == "half a projector":
        del state["projector.model.0.weight"]
    elif change == "three layers":
        state |= {"projector.model.4.weight": torch.zeros(64, 64), "projector.model.4.bias": torch.zeros(64)}
    elif change == "missing":
        del state["llm.model.layers.1.mlp.up_proj.weight"]
    elif change == "extra":
        state["llm.model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    elif change == "shape":
        state["llm.model.norm.weight"] = torch.zeros(63)
    elif change == "another projector":
        state["projector.model.0.weight"] = torch.zeros(64, 31)
    else:
        del state[next(name for name in state if name.startswith("visual") and "lora_B" in name)]
    with pytest.raises(FastftError, match=word):
        plan(given, tmp_path, state)
    assert not (tmp_path / "out").exists()


def test_a_config_that_does_not_name_the_tower(tmp_path: Path) -> None:
    given = made(tmp_path, "projector alone")
    given.config.write_text(given.config.read_text().replace("    visual_encoder=", "    something_else="))
    with pytest.raises(PlanError, match="does not say which one it was"):
        plan(given, tmp_path)


def test_an_adapter_in_pieces_is_refused_while_planning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a sharded training leaves can be written as it is, not computed with; weights in pieces can."""
    given = made(tmp_path, "llm lora")
    found = trained.read

    def in_pieces(path: Path, *, masters: bool) -> trained.Trained:
        read = found(path, masters=masters)
        torn = {}
        for name, source in read.tensors.items():
            half = source.numel // 2
            # Two ranges that do not touch, as those of two files.
            parts = [stretch(source, half, source.numel - half), stretch(source, 0, half)]
            torn[name] = joined(parts, source.shape) if only in name else source
        return trained.Trained(torn, read.files, meta=read.meta)

    monkeypatch.setattr(trained, "read", in_pieces)
    only = "lora_A"
    with pytest.raises(PlanError, match="lora_A.* lies in pieces"):
        plan(given, tmp_path)
    only = "projector.model.2.weight"
    pth.execute(plan(given, tmp_path), tmp_path / "out")
