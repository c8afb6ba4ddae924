"""XTuner's LLaVA checkpoints: the parts that its tools read, with every tensor in its place."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fastft.convert import merge, pth, recorded
from fastft.convert.matching import NameOptions
from fastft.errors import FastftError, PlanError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_llama

torch = pytest.importorskip("torch")

VISUAL = 16
FILE = """
from peft import LoraConfig
from transformers import AutoModelForCausalLM, CLIPVisionModel
from xtuner.model import LLaVAModel

llm_name_or_path = '{llm}'
visual_encoder_name_or_path = '{visual}'
model = dict(
    type=LLaVAModel,
    freeze_llm=True,
    freeze_visual_encoder=True,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=llm_name_or_path),
    llm_lora=dict(type=LoraConfig, r=4, lora_alpha=8, lora_dropout=0.05, bias='none', task_type='CAUSAL_LM'),
    visual_encoder=dict(
        type=CLIPVisionModel.from_pretrained, pretrained_model_name_or_path=visual_encoder_name_or_path),
    visual_encoder_lora=dict(type=LoraConfig, r=2, lora_alpha=6, lora_dropout=0.05, bias='none'))
train_dataloader = dict()
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model and a whole CLIP, as the hubs have them."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("bases")
    llm = tiny_llama.write_base(folder / "llm")
    (llm / "tokenizer.json").write_text("{}")
    vision = {"hidden_size": VISUAL, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    text = {"hidden_size": VISUAL, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=vision, text_config={**text, "vocab_size": 20}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder / "clip")
    (folder / "clip" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor"})
    )
    (folder / "llava_config.py").write_text(FILE.format(llm=llm, visual=folder / "clip"))
    return folder


def numbers(shape: tuple[int, ...], seed: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def projector() -> dict[str, Any]:
    return {
        "projector.model.0.weight": numbers((tiny_llama.HIDDEN, VISUAL), 1),
        "projector.model.0.bias": numbers((tiny_llama.HIDDEN,), 2),
        "projector.model.2.weight": numbers((tiny_llama.HIDDEN, tiny_llama.HIDDEN), 3),
        "projector.model.2.bias": numbers((tiny_llama.HIDDEN,), 4),
    }


def llm_lora() -> dict[str, Any]:
    return {
        "llm." + key.replace(".weight", ".default.weight"): torch.from_numpy(array)
        for key, array in tiny_llama.adapter_tensors().items()
    }


def llm_whole() -> dict[str, Any]:
    return {f"llm.{name}": torch.from_numpy(array) for name, array in tiny_llama.weights(seed=7).items()}


def visual_lora() -> dict[str, Any]:
    found = {}
    for layer in range(2):
        for number, name in enumerate(("q_proj", "v_proj")):
            at = f"visual_encoder.base_model.model.vision_model.encoder.layers.{layer}.self_attn.{name}"
            found[f"{at}.lora_A.default.weight"] = numbers((2, VISUAL), 10 * layer + number)
            found[f"{at}.lora_B.default.weight"] = numbers((VISUAL, 2), 100 * layer + number)
    return found


def visual_whole(bases: Path) -> dict[str, Any]:
    files = load_file(bases / "clip" / "model.safetensors")
    return {f"visual_encoder.{name}": tensor + 1 for name, tensor in files.items() if name.startswith("vision_model.")}


def plan(bases: Path, folder: Path, state: dict[str, Any], **options: Any) -> pth.PthPlan:
    torch.save({"state_dict": state, "meta": {}}, folder / "iter_9.pth")
    return pth.plan(recorded.of_python_file(bases / "llava_config.py"), folder / "iter_9.pth", **options)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_projector_alone(bases: Path, tmp_path: Path) -> None:
    """The first stage trains nothing else; the projector keeps its dtype, as in XTuner."""
    pth.execute(plan(bases, tmp_path, projector()), tmp_path / "out")
    assert files_of(tmp_path / "out") == {"projector/config.json", "projector/model.safetensors", "xtuner_config.py"}
    found = load_file(tmp_path / "out" / "projector" / "model.safetensors")
    assert found.keys() == {name.removeprefix("projector.") for name in projector()}
    for name, tensor in projector().items():
        assert torch.equal(found[name.removeprefix("projector.")], tensor)
    settings = json.loads((tmp_path / "out" / "projector" / "config.json").read_text())
    expected = {"model_type": "projector", "depth": 2, "hidden_act": "gelu", "bias": True, "torch_dtype": "float32"}
    expected |= {"visual_hidden_size": VISUAL, "llm_hidden_size": tiny_llama.HIDDEN}
    assert settings == {**expected, "architectures": ["ProjectorModel"]}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_two_adapters(bases: Path, tmp_path: Path) -> None:
    """LoRA on both: PEFT loads the one, and `convert merge --is-clip` merges the other.

    PEFT does not load it under transformers 5, whose CLIP has dropped `vision_model.` from the names in memory; older
    ones, with which XTuner runs, do.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    state = {**projector(), **llm_lora(), **visual_lora()}
    made = plan(bases, tmp_path, state)
    assert "only the language model is cast" in " ".join(made.notes)
    pth.execute(made, tmp_path / "out")
    assert files_of(tmp_path / "out") == {
        "llm_adapter/adapter_config.json", "llm_adapter/adapter_model.safetensors", "projector/config.json",
        "projector/model.safetensors", "visual_encoder_adapter/adapter_config.json",
        "visual_encoder_adapter/adapter_model.safetensors", "xtuner_config.py",
    }  # fmt: skip
    llm = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(bases / "llm"), tmp_path / "out" / "llm_adapter"
    )
    for name, tensor in llm_lora().items():
        assert torch.equal(llm.state_dict()[name.removeprefix("llm.")], tensor.half().float())
    visual = tmp_path / "out" / "visual_encoder_adapter"
    assert json.loads((visual / "adapter_config.json").read_text())["lora_alpha"] == 6
    merge.execute(merge.plan(bases / "clip", [(visual, 1.0)], names=NameOptions(is_clip=True)), tmp_path / "tower")
    tower, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "tower", bases / "clip"))
    lora = {name.removeprefix("visual_encoder.base_model.model."): tensor for name, tensor in visual_lora().items()}
    for name, tensor in tower.items():
        at = name.removesuffix(".weight")
        A, B = (lora.get(f"{at}.lora_{side}.default.weight") for side in "AB")
        expected = before[name] if A is None or B is None else before[name] + (B @ A) * 3
        assert torch.allclose(tensor, expected, rtol=1e-6, atol=1e-6), name
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in tower.items()) == 4


def test_whole_parts(bases: Path, tmp_path: Path) -> None:
    """A trained language model lies in the folder itself, the tower beside it with its image processor."""
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    state = {**projector(), **llm_whole(), **visual_whole(bases)}
    pth.execute(plan(bases, tmp_path, state, dtype="bf16"), tmp_path / "out")
    assert files_of(tmp_path / "out") == {
        "config.json", "model.safetensors", "tokenizer.json", "projector/config.json", "projector/model.safetensors",
        "visual_encoder/config.json", "visual_encoder/model.safetensors", "visual_encoder/preprocessor_config.json",
        "xtuner_config.py",
    }  # fmt: skip
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in llm_whole().items():
        assert torch.equal(llm[name.removeprefix("llm.")], tensor.bfloat16())
    tower = CLIPVisionModel.from_pretrained(tmp_path / "out" / "visual_encoder").state_dict()
    truth = {name.removeprefix("visual_encoder."): tensor for name, tensor in visual_whole(bases).items()}
    strip = "vision_model." if not any(name.startswith("vision_model.") for name in tower) else ""
    for name, tensor in truth.items():
        assert torch.equal(tower[name.removeprefix(strip)], tensor)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"projector.model.0.weight": None}, "projector is not XTuner's"),
        ({"projector.model.1.weight": (24, 24)}, "projector is not XTuner's"),
        ({"projector.model.2.weight": (24, 9)}, "projector is not XTuner's"),
        ({"projector.other": (24,)}, "projector is not XTuner's"),
        ({"something.weight": (2,)}, "belongs to no part"),
        ({"llm.base_model.model.model.extra.weight": (4, 4)}, "extra"),
        (
            {
                "visual_encoder.base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.default.weight": (
                    2,
                    9,
                )
            },
            "q_proj",
        ),
    ],
)
def test_what_does_not_fit(bases: Path, tmp_path: Path, change: dict[str, Any], word: str) -> None:
    state = {**projector(), **llm_lora(), **visual_lora()}
    for name, shape in change.items():
        if shape is None:
            del state[name]
        else:
            state[name] = torch.zeros(shape)
    with pytest.raises(FastftError, match=word):
        plan(bases, tmp_path, state)


def test_settings_that_nobody_says(bases: Path, tmp_path: Path) -> None:
    text = (bases / "llava_config.py").read_text()
    cut = text.replace("visual_encoder_lora=", "something_else=")
    (tmp_path / "config.py").write_text(cut)
    torch.save({**projector(), **visual_lora()}, tmp_path / "x.pth")
    with pytest.raises(PlanError, match="does not say its alpha"):
        pth.plan(recorded.of_python_file(tmp_path / "config.py"), tmp_path / "x.pth")
    (tmp_path / "config.py").write_text(text.replace("    visual_encoder=", "    something_else="))
    torch.save({**projector(), **visual_whole(bases)}, tmp_path / "x.pth")
    with pytest.raises(PlanError, match="does not say which one"):
        pth.plan(recorded.of_python_file(tmp_path / "config.py"), tmp_path / "x.pth")
