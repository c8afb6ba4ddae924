"""Merges of many architectures, bit for bit against PEFT, where file names, adapter names and parameters differ.

What is expected comes from PEFT: the base in f32, merged by `merge_and_unload`, rounded once to the base's dtype and
saved by transformers, which writes the names and layouts of the hub. For Linear that is what PEFT gives in 16 bit too
(spec/formats.md 2.1, and `test_sixteen_bit_merges_of_peft_are_the_same`); for bare parameters PEFT rounds the update
first, which is off by an ulp in 8 of 100 elements. The factors are small whole numbers over a power of two, so that
the sum of their products is exact in f32 in any order.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_models import BUILDERS

from fastft.convert import merge, verify
from fastft.convert.matching import NameOptions, parse_key_map
from fastft.convert.names_transformers import ModelNames
from fastft.errors import CheckpointError, PlanError, UsageError

torch = pytest.importorskip("torch")

# peft 0.21 asks transformers 5.23 for a name that it will drop in version 6; it says that it saves the weights of a head
# that is trained; and it overlooks the parameters that it adds to "all-linear" when it checks its own rank_pattern.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
    "ignore:The following .*_pattern keys did not match:RuntimeWarning",
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# What is adapted in each architecture; "all-linear" adds the experts of Mixtral by itself.
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gemma3_text": {},
    "gpt2": {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]},
    "gpt_neox": {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head"]},
    "gemma3": {},
    "llava": {},
    "llava_next": {},
    "internvl": {},
    "qwen2_vl": {},
    "qwen2_5_vl": {},
    "qwen3_vl": {},
    "mixtral": {},
    "qwen3_moe": {"target_modules": ATTENTION, "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    "deepseek_v3": {"target_modules": ["q_a_proj", "kv_b_proj", "o_proj"], "target_parameters": EXPERTS},
    "qwen3_vl_moe": {"target_modules": [*ATTENTION, "qkv", "linear_fc1"], "target_parameters": EXPERTS},
    "jamba": {
        "target_modules": ATTENTION,
        "target_parameters": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
    },
    "gpt_oss": {"target_modules": ATTENTION, "target_parameters": EXPERTS},
    # One fused Wqkv in the files, three projections in the model.
    "nomic_bert": {"target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]},
    "clip_vision": {"target_modules": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"]},
}
FLOAT16 = ("qwen2", "gpt2", "qwen2_vl", "qwen3_moe", "gpt_oss")
# Names of transformers before 4.52 for those of today.
OLD_NAMES: dict[str, dict[str, str]] = {
    "gemma3": {
        "base_model.model.model.language_model.": "base_model.model.language_model.model.",
        "base_model.model.model.vision_tower.": "base_model.model.vision_tower.vision_model.",
        "base_model.model.lm_head.": "base_model.model.language_model.lm_head.",
    },
    "llava": {
        "base_model.model.model.language_model.": "base_model.model.language_model.model.",
        "base_model.model.model.vision_tower.": "base_model.model.vision_tower.vision_model.",
        "base_model.model.model.multi_modal_projector.": "base_model.model.multi_modal_projector.",
    },
    "qwen2_vl": {
        "base_model.model.model.language_model.": "base_model.model.model.",
        "base_model.model.model.visual.": "base_model.model.visual.",
    },
    "qwen2_5_vl": {
        "base_model.model.model.language_model.": "base_model.model.model.",
        "base_model.model.model.visual.": "base_model.model.visual.",
    },
}


class Made:
    """A base and an adapter in their folders, and the tensors that their merge must have."""

    def __init__(self, folder: Path, dtype: Any) -> None:
        self.base = folder / "base"
        self.adapter = folder / "adapter"
        self.dtype = dtype
        self.expected: dict[str, Any] = {}


def exact(*shape: int) -> Any:
    """Whole numbers from -3 to 3 over 32: their products and sums are exact in f32."""
    return torch.randint(-3, 4, shape).float() / 32


def save_base(name: str, folder: Path, dtype: Any) -> Any:
    torch.manual_seed(5)
    model = BUILDERS[name]().to(dtype)
    model.save_pretrained(folder)
    return model


def make(name: str, folder: Path, dtype: Any, **lora: Any) -> Made:
    """Save a random base and a random adapter; let PEFT merge them in f32."""
    from peft import LoraConfig, get_peft_model

    made = Made(folder, dtype)
    model = save_base(name, made.base, dtype)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **CASES[name], **lora}
    peft_model = get_peft_model(model.float(), LoraConfig(**settings))
    for key, parameter in peft_model.named_parameters():
        if "lora_" in key:
            parameter.data = exact(*parameter.shape)
    peft_model.save_pretrained(made.adapter)
    merged = peft_model.merge_and_unload()
    merged.to(dtype).save_pretrained(folder / "expected")
    made.expected = tensors(folder / "expected")
    return made


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def ours(base: Path, adapter: Path, folder: Path, names: NameOptions | None = None) -> dict[str, Any]:
    merge.execute(merge.plan(base, [(adapter, 1.0)], names=names), folder)
    report = verify.verify(folder, base, [(adapter, 1.0)], names=names)
    assert report.good, report.text()
    return tensors(folder)


def check_same(got: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def num_changed(base: Path, got: Mapping[str, Any]) -> int:
    return sum(not torch.equal(tensor, got[name]) for name, tensor in tensors(base).items())


def rename(adapter: Path, folder: Path, names: Mapping[str, str]) -> Path:
    """Copy an adapter with other names."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, folder)
    path = folder / "adapter_model.safetensors"
    renamed = {}
    for key, tensor in load_file(path).items():
        old = next((f"{to}{key.removeprefix(start)}" for start, to in names.items() if key.startswith(start)), key)
        renamed[old] = tensor
    save_file(renamed, path)
    return folder


def edit_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


@pytest.mark.parametrize("name", CASES)
def test_merge_is_pefts_rounded_once(tmp_path: Path, name: str) -> None:
    made = make(name, tmp_path, torch.float16 if name in FLOAT16 else torch.bfloat16)
    got = ours(made.base, made.adapter, tmp_path / "mine")
    check_same(got, made.expected)
    assert num_changed(made.base, got) >= 4


@pytest.mark.parametrize("name", ["gpt2", "llava"])
def test_sixteen_bit_merges_of_peft_are_the_same(tmp_path: Path, name: str) -> None:
    """For Linear and Conv1D PEFT in 16 bit rounds once too: the f32 road of the other tests is no other result."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, GPT2LMHeadModel

    made = make(name, tmp_path, torch.bfloat16)
    loader = GPT2LMHeadModel if name == "gpt2" else AutoModelForImageTextToText
    base = loader.from_pretrained(made.base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(base, made.adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "peft")
    check_same(tensors(tmp_path / "peft"), made.expected)


@pytest.mark.parametrize("name", OLD_NAMES)
def test_adapters_with_the_names_of_before_4_52(tmp_path: Path, name: str) -> None:
    """PEFT 0.21 loads none or half of them and says so in a warning only."""
    made = make(name, tmp_path, torch.bfloat16)
    old = rename(made.adapter, tmp_path / "old", OLD_NAMES[name])
    check_same(ours(made.base, old, tmp_path / "mine"), made.expected)


def test_the_merged_folder_answers_as_the_adapter_does(tmp_path: Path) -> None:
    """By logits, for a vision-language model: the names that are written are the ones that transformers reads."""
    from peft import PeftModel
    from transformers import Qwen2VLForConditionalGeneration

    made = make("qwen2_vl", tmp_path, torch.float32)
    ours(made.base, made.adapter, tmp_path / "mine")
    ids = torch.arange(3, 19).reshape(1, -1)
    base = Qwen2VLForConditionalGeneration.from_pretrained(made.base)
    plain = base(ids).logits
    with torch.no_grad():
        trained = PeftModel.from_pretrained(base, made.adapter).eval()(ids).logits
        merged, info = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "mine", output_loading_info=True)
        got = merged.eval()(ids).logits
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # f32, sums of at most 64 products of numbers below 10 taken in another order: 64 * 10 * 2^-24 is 4e-5.
    assert torch.allclose(got, trained, atol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-2)


def per_expert_adapter(folder: Path, names: Mapping[str, tuple[int, int]], *, rank: int, **config: Any) -> Any:
    """Write an adapter of Linear modules as transformers 4 had them; returns the update of each module."""
    from safetensors.torch import save_file

    folder.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 12, "target_modules": ["w1", "w2", "w3"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    scale = 12 / math.sqrt(rank) if config.get("use_rslora") else 12 / rank
    matrices, updates = {}, {}
    for name, (num_out, num_in) in names.items():
        A_RI, B_OR = exact(rank, num_in), exact(num_out, rank)
        matrices[f"base_model.model.{name}.lora_A.weight"] = A_RI
        matrices[f"base_model.model.{name}.lora_B.weight"] = B_OR
        updates[name] = (B_OR @ A_RI) * torch.tensor(scale, dtype=torch.float32)
    save_file(matrices, folder / "adapter_model.safetensors")
    return updates


MIXTRAL_EXPERTS = {
    f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{which}": (32, 48) if which == "w2" else (48, 32)
    for layer in range(2)
    for expert in range(4)
    for which in ("w1", "w2", "w3")
}


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_of_single_experts_keep_their_own_rank(tmp_path: Path, *, rslora: bool) -> None:
    """PEFT fuses them under transformers 5 and makes rsLoRA sqrt(2) too large; each expert's own rank is right."""
    save_base("mixtral", tmp_path / "base", torch.bfloat16)
    updates = per_expert_adapter(tmp_path / "adapter", MIXTRAL_EXPERTS, rank=2, use_rslora=rslora)
    expected = tensors(tmp_path / "base")
    for name, update in updates.items():
        expected[f"{name}.weight"] = (expected[f"{name}.weight"].float() + update).bfloat16()
    check_same(ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "mine"), expected)


def test_adapters_of_single_experts_on_fused_files(tmp_path: Path) -> None:
    """The base was saved with the names of transformers 5, some experts were trained with those of 4."""
    model = save_base("mixtral", tmp_path / "other", torch.bfloat16)
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    names = {name: shape for name, shape in MIXTRAL_EXPERTS.items() if ".1." in name or ".w3" in name}
    updates = per_expert_adapter(tmp_path / "adapter", names, rank=3, target_modules="some of them")
    expected = {name: tensor.float() for name, tensor in tensors(tmp_path / "base").items()}
    for name, update in updates.items():
        _, _, layer, _, _, expert, which = name.split(".")
        fused = "down_proj" if which == "w2" else "gate_up_proj"
        weight = expected[f"model.layers.{layer}.mlp.experts.{fused}"][int(expert)]
        rows = {"w1": slice(0, 48), "w3": slice(48, 96), "w2": slice(0, 32)}[which]
        weight[rows] += update
    rounded = {name: tensor.bfloat16() for name, tensor in expected.items()}
    check_same(ours(tmp_path / "base", tmp_path / "adapter", tmp_path / "mine"), rounded)


# PEFT's three layouts of a parameter (experts, d1, d2), by peft_version: is the product added transposed, for modules
# that are not transposed and for those that are (GPT-OSS). Read in its lora/layer.py at the tags v0.18.1, v0.19.0 and
# v0.19.1 (spec/formats.md 2.5).
GENERATIONS = {"absent": (True, True), "0.18.1": (True, True), "0.19.0": (True, False), "0.21.2": (False, True)}


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
@pytest.mark.parametrize("version", GENERATIONS)
def test_square_experts_of_three_generations(tmp_path: Path, name: str, version: str) -> None:
    from safetensors.torch import save_file

    transposed = GENERATIONS[version][name == "gpt_oss"]
    num_experts, rank, size = 4, 2, 32
    torch.manual_seed(1)
    builder = BUILDERS[name]()
    if name == "mixtral":
        from transformers import MixtralForCausalLM

        builder.config.intermediate_size = size
        builder = MixtralForCausalLM(builder.config)
    builder.bfloat16().save_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    matrices = {}
    for layer in range(2):
        path = f"base_model.model.model.layers.{layer}.mlp.experts"
        matrices[f"{path}.lora_A.weight"] = exact(rank * num_experts, size)
        matrices[f"{path}.lora_B.weight"] = exact(size, rank * num_experts)
    save_file(matrices, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "peft_version": version}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"target_parameters": ["experts.down_proj"]}))
    edit_config(adapter)

    expected = tensors(tmp_path / "base")
    for layer in range(2):
        path = f"base_model.model.model.layers.{layer}.mlp.experts"
        A_ERI = matrices[f"{path}.lora_A.weight"].reshape(num_experts, rank, size)
        B_ORE = matrices[f"{path}.lora_B.weight"].reshape(size, rank, num_experts)
        for expert in range(num_experts):
            update = 3.0 * (B_ORE[:, :, expert] @ A_ERI[expert])
            update = update.T if transposed else update
            if name == "gpt_oss":
                weight = expected[f"model.layers.{layer}.mlp.experts.down_proj"][expert]
                weight.copy_((weight.float() + update).bfloat16())
            else:
                key = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"
                expected[key] = (expected[key].float() + update).bfloat16()
    check_same(ours(tmp_path / "base", adapter, tmp_path / "mine"), expected)


@pytest.mark.parametrize("version", ["0.19.0.dev0", "0.19.1rc1", "mine"])
def test_square_experts_of_an_unknown_generation_are_refused(tmp_path: Path, version: str) -> None:
    made = make("gpt_oss", tmp_path, torch.bfloat16)
    edit_config(made.adapter, peft_version=version)
    with pytest.raises(PlanError, match=r"says peft_version .*changed the layout of square expert weights"):
        merge.plan(made.base, [(made.adapter, 1.0)])


def test_oblong_experts_tell_their_layout_by_their_shape(tmp_path: Path) -> None:
    made = make("deepseek_v3", tmp_path, torch.bfloat16)
    edit_config(made.adapter, peft_version="absent")
    check_same(ours(made.base, made.adapter, tmp_path / "mine"), made.expected)


def drop(adapter: Path, wanted: Callable[[str], bool]) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(path).items() if not wanted(key)}, path)


@pytest.mark.parametrize(
    ("gone", "reason"),
    [
        ("layers.1.mlp.experts.base_layer.lora", "has 1 updates for its 2 targeted parameters"),
        ("layers.1.mlp.experts.", "lacks the update of 2 parameters"),
        ("layers.1.mlp.experts.base_layer.lora_A", "one A and one B are allowed"),
    ],
)
def test_missing_experts_are_refused(tmp_path: Path, gone: str, reason: str) -> None:
    made = make("qwen3_moe", tmp_path, torch.bfloat16)
    drop(made.adapter, lambda key: gone in key)
    with pytest.raises(CheckpointError, match=reason):
        merge.plan(made.base, [(made.adapter, 1.0)])


def test_an_expert_weight_of_another_size_is_refused(tmp_path: Path) -> None:
    made = make("qwen3_moe", tmp_path, torch.bfloat16)
    other = make("mixtral", tmp_path / "other", torch.bfloat16, target_modules=[], target_parameters=EXPERTS)
    with pytest.raises(CheckpointError, match="trained on another model"):
        merge.plan(made.base, [(other.adapter, 1.0)])


def test_a_lost_module_is_listed_with_the_nearest_name(tmp_path: Path) -> None:
    made = make("llava", tmp_path, torch.bfloat16)
    lost = rename(
        made.adapter, tmp_path / "lost", {"base_model.model.model.language_model.": "base_model.model.model.text."}
    )
    with pytest.raises(PlanError, match=r"are not in the base(?s:.*)nearest(?s:.*)--key-map"):
        merge.plan(made.base, [(lost, 1.0)])


def test_key_map_brings_a_text_adapter_onto_a_vision_language_model(tmp_path: Path) -> None:
    """Trained on the language model alone: `model.layers.*`, which LLaVA's mapping does not know."""
    made = make("llava", tmp_path, torch.bfloat16, target_modules=r".*language_model.*(q_proj|down_proj)")
    text = rename(
        made.adapter, tmp_path / "text", {"base_model.model.model.language_model.": "base_model.model.model."}
    )
    with pytest.raises(PlanError, match="--key-map"):
        merge.plan(made.base, [(text, 1.0)])
    names = NameOptions(key_map=parse_key_map([r"^model\.=model.language_model."]))
    check_same(ours(made.base, text, tmp_path / "mine", names), made.expected)


@pytest.mark.parametrize(("text", "reason"), [("abc", "write REGEX"), ("(=b", "no regular"), (r"a=\2", "no regular")])
def test_key_maps_that_are_none(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_key_map([text])


def test_key_map_that_finds_nothing(tmp_path: Path) -> None:
    made = make("gpt_neox", tmp_path, torch.bfloat16)
    with pytest.raises(UsageError, match="in none of the names"):
        merge.plan(made.base, [(made.adapter, 1.0)], names=NameOptions(key_map=parse_key_map(["^visual=vision"])))
    with pytest.raises(CheckpointError, match="makes two of its names one"):
        merge.plan(made.base, [(made.adapter, 1.0)], names=NameOptions(key_map=parse_key_map([r"layers\.\d=layers.0"])))


def test_model_class_where_config_json_names_none(tmp_path: Path) -> None:
    made = make("gpt_neox", tmp_path, torch.bfloat16)
    path = made.base / "config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    with pytest.raises(PlanError, match="names the class None"):
        merge.plan(made.base, [(made.adapter, 1.0)])
    with pytest.raises(PlanError, match="--model-class GPTNeoX, which transformers"):
        merge.plan(made.base, [(made.adapter, 1.0)], names=NameOptions(model_class="GPTNeoX"))
    names = NameOptions(model_class="GPTNeoXForCausalLM")
    check_same(ours(made.base, made.adapter, tmp_path / "mine", names), made.expected)


def test_remote_code_is_not_run_for_names(tmp_path: Path) -> None:
    made = make("gpt_neox", tmp_path, torch.bfloat16)
    path = made.base / "config.json"
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}, "architectures": ["Mine"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | code))
    (made.base / "modeling_mine.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(PlanError, match=r"runs its own code \(auto_map\)"):
        merge.plan(made.base, [(made.adapter, 1.0)])
    names = NameOptions(key_map=parse_key_map(["lm_head=embed_out"]))
    check_same(ours(made.base, made.adapter, tmp_path / "mine", names), made.expected)


def test_layouts_that_an_update_cannot_follow_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interleaved rows, for example: a row range of the file is no row range of the parameter."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Interleave, WeightConverter

    model = BUILDERS["llama"]()
    shapes = {name.replace("q_proj", "qq"): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    mapping = [WeightConverter("self_attn.qq.weight", "self_attn.q_proj.weight", operations=[Interleave(dim=0)])]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _model: mapping)
    names = ModelNames(shapes, model)
    with pytest.raises(PlanError, match=r"q_proj.weight is made from the files by Interleave\(0\)"):
        names.targets("model.layers.0.self_attn.q_proj")
    assert [target.name for target in names.targets("model.layers.1.self_attn.k_proj")] == [
        "model.layers.1.self_attn.k_proj.weight"
    ]


# CLIP


def clip_folders(folder: Path) -> tuple[Path, Path, Made]:
    """A whole CLIP as on the hub, its tower alone with the names of the hub, and an adapter of the tower."""
    from safetensors.torch import save_file
    from transformers import CLIPImageProcessor, CLIPVisionModel

    made = make("clip_vision", folder, torch.float16)
    tower = folder / "tower"
    tower.mkdir()
    whole = folder / "whole"
    model = BUILDERS["clip"]().half()
    model.vision_model.load_state_dict(CLIPVisionModel.from_pretrained(made.base, dtype=torch.float16).state_dict())
    model.save_pretrained(whole)
    hub_names = {f"vision_model.{name}": tensor for name, tensor in tensors(made.base).items()}
    save_file(hub_names, tower / "model.safetensors", {"format": "pt"})
    shutil.copy(made.base / "config.json", tower)
    for place in (tower, whole):
        CLIPImageProcessor(size={"shortest_edge": 28}).save_pretrained(place)
    (whole / "tokenizer.json").write_text("{}")
    made.expected = {f"vision_model.{name}": tensor for name, tensor in made.expected.items()}
    return whole, tower, made


@pytest.mark.parametrize("old_names", [False, True])
def test_clip_towers(tmp_path: Path, *, old_names: bool) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionModel

    whole, tower, made = clip_folders(tmp_path)
    adapter = made.adapter
    if old_names:
        adapter = rename(adapter, tmp_path / "old", {"base_model.model.": "base_model.model.vision_model."})
    for base, name in ((whole, "of whole"), (tower, "of tower")):
        merged = tmp_path / name
        check_same(ours(base, adapter, merged, NameOptions(is_clip=True)), made.expected)
        config = json.loads((merged / "config.json").read_text())
        assert (config["model_type"], config["architectures"]) == ("clip_vision_model", ["CLIPVisionModel"])
        assert not (merged / "tokenizer.json").exists()
        assert CLIPImageProcessor.from_pretrained(merged).size["shortest_edge"] == 28
        loaded, info = CLIPVisionModel.from_pretrained(merged, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert loaded.dtype == torch.float16
        assert loaded.config.hidden_size == 32


def test_model_class_keeps_the_whole_clip(tmp_path: Path) -> None:
    whole, _, made = clip_folders(tmp_path)
    got = ours(whole, made.adapter, tmp_path / "mine", NameOptions(model_class="CLIPVisionModel"))
    check_same(got, tensors(whole) | made.expected)


def test_is_clip_refuses_what_is_no_clip(tmp_path: Path) -> None:
    made = make("gpt2", tmp_path, torch.bfloat16)
    with pytest.raises(PlanError, match="--is-clip is for clip and clip_vision_model, this is 'gpt2'"):
        merge.plan(made.base, [(made.adapter, 1.0)], names=NameOptions(is_clip=True))
