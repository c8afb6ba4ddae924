"""Merges of vision-language models, held against the model with its adapter on, with a real picture.

transformers has renamed these models' modules more than once. The files of the hub keep the oldest names, files saved
by transformers 5 have others, and adapters carry those of the version that trained them: every pair must give the same
answers. What is expected are the logits that PEFT computes with the adapter beside the base.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from tiny_models import BUILDERS

from fastft.convert import merge, verify
from fastft.convert.matching import NameOptions
from fastft.errors import CheckpointError, PlanError

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
)

PHOTOGRAPH = Path(__file__).parents[2] / "../shared/data/multimodal/resource/mscoco_twocat_000000039769.jpg"
IMAGE_TOKEN = 60
NEW = "base_model.model.model."
OLD = "base_model.model."
# The names that the files on the hub have for those that transformers 5 saves.
HUB_FILES: dict[str, dict[str, str]] = {
    "llava": {"vision_tower.": "vision_tower.vision_model."},
    "llava_next": {"vision_tower.": "vision_tower.vision_model."},
    "gemma3": {"vision_tower.": "vision_tower.vision_model."},
    "internvl": {},
    "qwen2_vl": {},
    "qwen2_5_vl": {},
    "qwen3_vl": {},
}
# What an adapter trained before transformers 4.52 calls the modules; Qwen3-VL came later.
_LANGUAGE = {
    f"{NEW}language_model.": f"{OLD}language_model.model.",
    f"{NEW}multi_modal_projector.": f"{OLD}multi_modal_projector.",
}
_TOWER_OF_CLIP = {f"{NEW}vision_tower.": f"{OLD}vision_tower.vision_model."}
_QWEN = {f"{NEW}language_model.": f"{OLD}model.", f"{NEW}visual.": f"{OLD}visual."}
OLD_ADAPTERS: dict[str, dict[str, str]] = {
    "llava": _LANGUAGE | _TOWER_OF_CLIP,
    "llava_next": _LANGUAGE | _TOWER_OF_CLIP,
    "gemma3": _LANGUAGE | _TOWER_OF_CLIP,
    "internvl": _LANGUAGE | {f"{NEW}vision_tower.": f"{OLD}vision_tower."},
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
}
# The projector, trained whole beside the adapter.
PROJECTORS = {name: "merger" if name.startswith("qwen") else "multi_modal_projector" for name in HUB_FILES}
PAIRS = [
    (name, files, names)
    for name in HUB_FILES
    for files in ("hub", "saved", "version 5")
    for names in ("new", "old")
    if (HUB_FILES[name] or files != "hub") and (name in OLD_ADAPTERS or names == "new")
]


@dataclass(frozen=True)
class Trained:
    """A base in every layout of its files, an adapter with its names of now and before, and the answers to a picture."""

    name: str
    folder: Path
    inputs: Mapping[str, Any]
    plain: Any
    logits: Any

    def base(self, files: str) -> Path:
        return self.folder / files

    def adapter(self, names: str) -> Path:
        return self.folder / f"adapter {names}"


def picture() -> Any:
    """A photograph where the shared data is there, else something drawn."""
    if PHOTOGRAPH.is_file():
        return Image.open(PHOTOGRAPH).convert("RGB")
    drawn = Image.new("RGB", (90, 60), (30, 60, 200))
    ImageDraw.Draw(drawn).ellipse((10, 5, 60, 55), fill=(220, 40, 30))
    return drawn


def seen(name: str) -> dict[str, Any]:
    """Pixels as the model's own image processor makes them, and the number of image tokens."""
    square = {"height": 28, "width": 28}
    if name.startswith("qwen"):
        patch = 16 if name == "qwen3_vl" else 14
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (4 * patch) ** 2}
        made = Qwen2VLImageProcessorPil(patch_size=patch, size=size)(picture(), return_tensors="pt")
        count = int(made["image_grid_thw"].prod()) // 4
    elif name == "llava_next":
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        pinpoints = [[28, 56], [56, 28], [56, 56]]
        made = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=square, image_grid_pinpoints=pinpoints)(
            picture(), return_tensors="pt"
        )
        count = -1
    elif name == "internvl":
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        made = GotOcr2ImageProcessorPil(size=square)(picture(), return_tensors="pt")
        made = {"pixel_values": made["pixel_values"]}
        count = 1
    elif name == "gemma3":
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        made = Gemma3ImageProcessorPil(size=square)(picture(), return_tensors="pt")
        made = {"pixel_values": made["pixel_values"]}
        count = 4
    else:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        made = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=square)(picture(), return_tensors="pt")
        count = 4
    return {**made, "count": count}


def inputs_of(name: str, model: Any) -> dict[str, Any]:
    """A row of words around the image tokens, and the pixels."""
    found = seen(name)
    count = found.pop("count")
    if name == "llava_next":
        features = model.model.get_image_features(found["pixel_values"], found["image_sizes"])
        count = sum(len(part) for part in features.pooler_output)
    start, end = ([62], [63]) if name.startswith("qwen") else ([], [])
    ids = torch.tensor([[1, 5, *start, *[IMAGE_TOKEN] * count, *end, 9, 11, 20]])
    if name == "gemma3" or name.startswith("qwen"):
        key = "token_type_ids" if name == "gemma3" else "mm_token_type_ids"
        found[key] = (ids == IMAGE_TOKEN).long()
    return {"input_ids": ids, **found}


def renamed(source: Path, target: Path, names: Mapping[str, str], file: str) -> None:
    """Copy a folder with other names of its tensors."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    path = target / file
    new = {}
    for key, tensor in load_file(path).items():
        start = next((start for start in names if key.startswith(start)), None)
        new[key if start is None else names[start] + key.removeprefix(start)] = tensor
    assert new.keys() != load_file(path).keys() or not names
    save_file(new, path, {"format": "pt"})


@pytest.fixture(scope="module", params=list(HUB_FILES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    from peft import LoraConfig, get_peft_model

    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    model = BUILDERS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder / "saved")
    model.save_pretrained(folder / "version 5", save_original_format=False)
    if HUB_FILES[name]:
        renamed(folder / "saved", folder / "hub", HUB_FILES[name], "model.safetensors")
    inputs = inputs_of(name, model)
    with torch.no_grad():
        plain = model(**inputs).logits
        blind = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
        assert not torch.allclose(plain, blind, atol=1e-2), "the answer must depend on the picture"
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=[PROJECTORS[name]])
        adapted = get_peft_model(model, lora)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                parameter.data += 0.1 * torch.randn_like(parameter)
        logits = adapted(**inputs).logits
    assert not torch.allclose(plain, logits, atol=1e-2)
    adapted.save_pretrained(folder / "adapter new")
    if name in OLD_ADAPTERS:
        renamed(folder / "adapter new", folder / "adapter old", OLD_ADAPTERS[name], "adapter_model.safetensors")
    return Trained(name, folder, inputs, plain, logits)


@pytest.mark.parametrize("files", ["hub", "saved", "version 5"])
@pytest.mark.parametrize("names", ["new", "old"])
def test_merged_answers_are_those_of_the_adapter(trained: Trained, tmp_path: Path, files: str, names: str) -> None:
    from transformers import AutoModelForImageTextToText

    base, adapter = trained.base(files), trained.adapter(names)
    if not base.exists() or not adapter.exists():
        assert (trained.name, files, names) not in PAIRS
        return
    merged = tmp_path / "merged"
    merge.execute(merge.plan(base, [(adapter, 1.0)]), merged)
    report = verify.verify(merged, base, [(adapter, 1.0)])
    assert report.good, report.text()
    model, info = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        got = model.eval()(**trained.inputs).logits
    # f32, where sums of up to 64 products are taken in another order: 64 * 2^-24 of what is summed, in some ten layers
    # one after the other.
    bound = 10 * 64 * 2**-24 * float(trained.logits.abs().max())
    assert float((got - trained.logits).abs().max()) < max(bound, 1e-4)


@pytest.mark.parametrize("names", ["new", "old"])
def test_a_wrong_key_is_refused(trained: Trained, tmp_path: Path, names: str) -> None:
    """One module that the model has not, one tensor too few, one of another shape: no merge."""
    from safetensors.torch import load_file, save_file

    if not trained.adapter(names).exists():
        return
    adapter = tmp_path / "adapter"
    shutil.copytree(trained.adapter(names), adapter)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("q_proj.lora_A.weight"))
    pair = {key, key.replace("lora_A", "lora_B")}
    wrong = {k.replace("q_proj", "query") if k in pair else k: tensor for k, tensor in tensors.items()}
    save_file(wrong, path)
    with pytest.raises(CheckpointError, match=r"matrices for \S+query, but target_modules .* does not name it"):
        merge.plan(trained.base("saved"), [(adapter, 1.0)])
    settings = json.loads((adapter / "adapter_config.json").read_text())
    named = settings | {"target_modules": [*settings["target_modules"], "query"]}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    with pytest.raises(PlanError, match=r"1 of its modules are not in the base(?s:.*)query"):
        merge.plan(trained.base("saved"), [(adapter, 1.0)])
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file({k: tensor for k, tensor in tensors.items() if k != key}, path)
    with pytest.raises(CheckpointError, match="has B only; A and B belong together"):
        merge.plan(trained.base("saved"), [(adapter, 1.0)])
    save_file(tensors | {key: torch.zeros(4, 7)}, path)
    with pytest.raises(CheckpointError, match="trained on another model"):
        merge.plan(trained.base("saved"), [(adapter, 1.0)])


def test_verify_sees_a_merge_that_left_a_part_out(trained: Trained, tmp_path: Path) -> None:
    """The merge of the language model alone is not the whole: what PEFT makes of old names, in silence."""
    from safetensors.torch import load_file, save_file

    text_only = tmp_path / "text only"
    shutil.copytree(trained.adapter("new"), text_only)
    path = text_only / "adapter_model.safetensors"
    kept = {key: tensor for key, tensor in load_file(path).items() if "language_model" in key}
    save_file(kept, path)
    settings = json.loads((text_only / "adapter_config.json").read_text())
    # An adapter that names what it lacks is refused; this one looks as if nothing else had been trained.
    targets = [name for name in settings["target_modules"] if any(f".{name}.lora_A" in key for key in kept)]
    changes = {"modules_to_save": None, "target_modules": targets}
    (text_only / "adapter_config.json").write_text(json.dumps(settings | changes))
    base, merged = trained.base("version 5"), tmp_path / "merged"
    merge.execute(merge.plan(base, [(text_only, 1.0)]), merged)
    report = verify.verify(merged, base, [(trained.adapter("new"), 1.0)])
    assert not report.good
    off = {check.name for check in report.checks if not check.good}
    assert off
    assert not any("language_model" in name for name in off), sorted(off)


def test_onto_the_4_bit_base_of_a_qlora_training(trained: Trained, tmp_path: Path) -> None:
    """The vision tower's linear layers were in 4 bit too, its tables of positions were not."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    from fastft.model import quantization

    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = trained.base("hub" if trained.base("hub").exists() else "saved")
    packed = AutoModelForImageTextToText.from_pretrained(base, quantization_config=four_bit, dtype=torch.float32)
    held = quantization.describe(packed)
    assert held is not None
    # What 4 bit make of the weights, taken flat: bitsandbytes is wrong on a CPU for rows that end within a block
    # (spec/formats.md 0.8), which these models' do.
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    for path, module in packed.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            shape, state.shape = state.shape, torch.Size([state.shape.numel()])
            weight = functional.dequantize_4bit(module.weight, state).reshape(shape)
            model.get_submodule(path).weight.data = weight
    adapter = tmp_path / "adapter"
    shutil.copytree(trained.adapter("new"), adapter)
    (adapter / "fastft_training.json").write_text(json.dumps({"quantization": held.to_json()}))
    merged = tmp_path / "merged"
    merge.execute(merge.plan(base, [(adapter, 1.0)]), merged)
    assert verify.verify(merged, base, [(adapter, 1.0)]).good
    with torch.no_grad():
        logits = PeftModel.from_pretrained(model, adapter).eval()(**trained.inputs).logits
        got = AutoModelForImageTextToText.from_pretrained(merged).eval()(**trained.inputs).logits
    bound = 10 * 64 * 2**-24 * float(logits.abs().max())
    assert float((got - logits).abs().max()) < max(bound, 1e-4)
    assert float((got - trained.logits).abs().max()) > 1e-2


# The vision tower of XTuner's LLaVA models, merged with --is-clip

CLIP_NAMES = {"as XTuner writes them": f"{OLD}vision_model.", "of transformers 5": OLD}


def clip_bases(folder: Path, dtype: Any) -> dict[str, Path]:
    """A whole CLIP; the tower alone with the names of the hub; the tower as transformers 5 saves it."""
    from safetensors.torch import load_file, save_file
    from transformers import CLIPModel, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(4)
    whole = BUILDERS["clip"]().to(dtype)
    for parameter in whole.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    bases = {name: folder / name for name in ("whole", "hub", "saved")}
    whole.save_pretrained(bases["whole"])
    CLIPVisionModel.from_pretrained(bases["whole"], dtype=dtype).save_pretrained(bases["saved"])
    bases["hub"].mkdir()
    saved = load_file(bases["saved"] / "model.safetensors")
    if not any(key.startswith("vision_model.") for key in saved):
        saved = {f"vision_model.{key}": tensor for key, tensor in saved.items()}
    # Old files count their positions, too.
    saved["vision_model.embeddings.position_ids"] = torch.arange(5).reshape(1, -1)
    save_file(saved, bases["hub"] / "model.safetensors", {"format": "pt"})
    shutil.copy(bases["saved"] / "config.json", bases["hub"])
    for base in bases.values():
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(base)
    assert isinstance(whole, CLIPModel)
    return bases


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("names", CLIP_NAMES)
def test_a_merged_tower_gives_the_features_of_the_adapted_one(tmp_path: Path, names: str, dtype: str) -> None:
    """XTuner's settings of the tower: rank 64, alpha 16, the four layers of attention and the two of the MLP."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoImageProcessor, CLIPVisionModel

    kind = getattr(torch, dtype)
    bases = clip_bases(tmp_path, kind)
    tower = CLIPVisionModel.from_pretrained(bases["saved"], dtype=torch.float32)
    targets = ["q_proj", "v_proj", "k_proj", "out_proj", "fc1", "fc2"]
    adapted = get_peft_model(tower, LoraConfig(r=64, lora_alpha=16, target_modules=targets, lora_dropout=0.05)).eval()
    for key, parameter in adapted.named_parameters():
        if "lora_" in key:
            parameter.data = 0.15 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "new")
    adapter = tmp_path / "new"
    if CLIP_NAMES[names] != OLD:
        adapter = tmp_path / "adapter"
        renamed(tmp_path / "new", adapter, {OLD: CLIP_NAMES[names]}, "adapter_model.safetensors")
    pixels = AutoImageProcessor.from_pretrained(bases["whole"])(picture(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = adapted(pixels).last_hidden_state
        before = CLIPVisionModel.from_pretrained(bases["saved"], dtype=torch.float32)(pixels).last_hidden_state
    for name, base in bases.items():
        merged = tmp_path / f"merged {name}"
        options = NameOptions(is_clip=True)
        merge.execute(merge.plan(base, [(adapter, 1.0)], names=options), merged)
        assert verify.verify(merged, base, [(adapter, 1.0)], names=options).good
        model, info = CLIPVisionModel.from_pretrained(merged, dtype="auto", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert model.dtype == kind
        processed = AutoImageProcessor.from_pretrained(merged)(picture(), return_tensors="pt")["pixel_values"]
        assert torch.equal(processed, pixels)
        with torch.no_grad():
            got = model.float().eval()(processed).last_hidden_state
        # The weights of the merged tower are rounded once to their dtype: half a unit of the last place each.
        bound = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-20}[dtype] * float(features.abs().max())
        assert float((got - features).abs().max()) < 4 * bound, name
        assert float((got - before).abs().max()) > 16 * bound


def test_an_adapter_of_another_tower_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionConfig, CLIPVisionModel

    bases = clip_bases(tmp_path, torch.float32)
    config = CLIPVisionConfig(
        hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    other = get_peft_model(CLIPVisionModel(config), LoraConfig(r=2, target_modules=["q_proj"]))
    other.save_pretrained(tmp_path / "other")
    for base in bases.values():
        with pytest.raises((PlanError, CheckpointError), match=r"are not in the base|trained on another model"):
            merge.plan(base, [(tmp_path / "other", 1.0)], names=NameOptions(is_clip=True))
