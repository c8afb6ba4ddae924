"""LLaVAs put together from parts, held against their parts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import tiny_internlm2
import tiny_llava
from fastft.config import schema
from fastft.convert import llava as convert
from fastft.convert.adapter import read_adapter
from fastft.convert.folder import read_checkpoint
from fastft.errors import CheckpointError, ConfigError, FileError, PlanError
from fastft.model import llava, tokenizer

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
)

DIALOGUE: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "What is this? "}, {"type": "image"}]},
    {"role": "assistant", "content": "A red circle."},
    {"role": "user", "content": "And the ground?"},
]


def words(folder: Path) -> Any:
    return tokenizer.load_tokenizer(folder, schema.Model(name=str(folder)))


def made(llm: Path, clip: Path, **options: Any) -> tuple[Any, Any]:
    """A LLaVA of two folders, fp32, and its processor."""
    from transformers import AutoModelForCausalLM

    processor = llava.processor(words(llm), clip)
    language = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    tower = llava.read_tower(clip, torch.float32)
    torch.manual_seed(1)
    settings = {"projector": None, "select_layer": -2, **options}
    return llava.put_together(language, tower, processor.tokenizer, **settings).eval(), processor


def batch(processor: Any, dialogue: Any = DIALOGUE, picture: Any = None) -> Any:
    text = processor.apply_chat_template(dialogue, add_generation_prompt=True)
    return processor(text=[text], images=[picture or tiny_llava.picture()], return_tensors="pt")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3", "mistral", "gemma3_text"])
def test_text_is_answered_as_by_the_language_model(tmp_path: Path, kind: str) -> None:
    """To the bit: nothing of the language model is left out or changed."""
    folder, clip = tiny_llava.write_llm(tmp_path / "llm", kind), tiny_llava.write_clip(tmp_path / "clip")
    language = tiny_llava.llm(kind)
    ids = torch.tensor([[5, 80, 300, 9, 1200]])
    with torch.no_grad():
        expected = language(ids).logits
        model, _ = made(folder, clip)
        got = model(ids).logits
    assert torch.equal(got[..., : expected.shape[-1]], expected)
    assert type(model).__name__ == "LlavaForConditionalGeneration"


def test_internlm2_goes_in_by_its_layout_as_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft.model import load

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer_folder = tmp_path / "tokenizer"
    tokenizer_folder.mkdir()
    for name in tiny_llava.TOKENIZER_FILES:
        shutil.copy(tiny_llava.DEMO_MODEL / name, tokenizer_folder)
    folder = tiny_internlm2.write(tmp_path / "internlm2", tokenizer_folder)
    laid_out = load.locate(schema.Model(name=str(folder))).weights_folder
    read = convert.read_llm(folder)
    assert "model.layers.0.self_attn.q_proj.weight" in read.tensors
    assert read.config["model_type"] == "llama"
    assert read.folder == laid_out


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gpt2", "no place for a language model of type gpt2"),
        ("gpt_neox", "type gpt_neox"),
        ("gemma2", "final_logit_soft"),
    ],
)
def test_language_models_that_llava_cannot_hold(tmp_path: Path, kind: str, reason: str) -> None:
    folder, clip = tiny_llava.write_llm(tmp_path / "llm", kind), tiny_llava.write_clip(tmp_path / "clip")
    with pytest.raises(ConfigError, match=reason):
        made(folder, clip)


@pytest.mark.parametrize("select_layer", [-2, -1, 1])
def test_features_stand_where_the_image_does(tmp_path: Path, select_layer: int) -> None:
    """The language model reads its own embeddings, and the projected features of the chosen layer in place of <image>."""
    folder, clip = tiny_llava.write_llm(tmp_path / "llm"), tiny_llava.write_clip(tmp_path / "clip")
    model, processor = made(folder, clip, select_layer=select_layer)
    inputs = batch(processor)
    ids = inputs["input_ids"]
    at = ids[0] == processor.image_token_id
    assert int(at.sum()) == 4, "a patch of 14 x 14 pixels is a token, the class token is none"
    tower = llava.read_tower(clip, torch.float32).eval()
    language = tiny_llava.llm("llama")
    with torch.no_grad():
        hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[select_layer][:, 1:]
        projector = llava.projector_tensors(model)
        first = torch.nn.functional.linear(hidden, projector["model.0.weight"], projector["model.0.bias"])
        features = torch.nn.functional.linear(
            torch.nn.functional.gelu(first), projector["model.2.weight"], projector["model.2.bias"]
        )
        embeddings = language.get_input_embeddings()(ids.clamp(max=1279))
        embeddings[0, at] = features[0]
        expected = language(inputs_embeds=embeddings).logits
        got = model(**inputs).logits
    assert torch.allclose(got[..., :1280], expected, atol=1e-5)


def test_the_dialogue_that_the_model_reads(tmp_path: Path) -> None:
    """The image comes first, on a line of its own; turns of plain text are as the language model has them."""
    folder, clip = tiny_llava.write_llm(tmp_path / "llm"), tiny_llava.write_clip(tmp_path / "clip")
    plain = words(folder)
    processor = llava.processor(words(folder), clip)
    assert processor.apply_chat_template(DIALOGUE) == (
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\nA red circle.<|im_end|>\n"
        "<|im_start|>user\nAnd the ground?<|im_end|>\n"
    )
    text_only = [{"role": "user", "content": " Hello "}, {"role": "assistant", "content": "Good day."}]
    assert processor.apply_chat_template(text_only) == plain.apply_chat_template(text_only, tokenize=False)
    two = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Both?"}, {"type": "image"}]}]
    assert "user\n<image>\n<image>\nBoth?<" in processor.apply_chat_template(two)


def test_images_are_filled_up_to_a_square(tmp_path: Path) -> None:
    """What lies at the edge of a wide picture is seen."""
    folder, clip = tiny_llava.write_llm(tmp_path / "llm"), tiny_llava.write_clip(tmp_path / "clip")
    wide = tiny_llava.picture(size=(120, 40))
    edge = tiny_llava.picture(size=(120, 40))
    edge.paste((0, 0, 255), (0, 0, 12, 40))
    whole, cut = (llava.processor(words(folder), clip, to_square=square) for square in (True, False))
    first, second = (whole.image_processor(image, return_tensors="pt")["pixel_values"] for image in (wide, edge))
    assert first.shape == (1, 3, 28, 28)
    assert not torch.equal(first, second)
    first, second = (cut.image_processor(image, return_tensors="pt")["pixel_values"] for image in (wide, edge))
    assert torch.equal(first, second)


def test_rows_for_the_image_token(tmp_path: Path) -> None:
    """A full table grows to a multiple of 64 by the mean of its rows; one with room stays."""
    clip = tiny_llava.write_clip(tmp_path / "clip")
    model, processor = made(tiny_llava.write_llm(tmp_path / "full"), clip)
    assert processor.image_token_id == 1280
    table, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert table.shape[0] == head.shape[0] == model.config.text_config.vocab_size == 1344
    for grown in (table, head):
        expected = grown[:1280].double().mean(dim=0).float()
        assert torch.allclose(grown[1280:], expected.expand(64, -1), atol=1e-7)
    model, processor = made(tiny_llava.write_llm(tmp_path / "with room", vocab_size=1300), clip)
    assert model.get_input_embeddings().weight.shape[0] == 1300
    assert processor.image_token_id == 1280


# One folder


def trained(tmp_path: Path, *, llm: Path, clip: Path, tower_lora: bool) -> tuple[Any, Any, convert.LlavaParts]:
    """A LLaVA with random adapters on its parts, and the parts as a training leaves them."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    model, processor = made(llm, clip)
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    llava.save_projector(llava.projector_tensors(model), tmp_path / "projector")
    adapters = {}
    parts = {"llm_adapter": (AutoModelForCausalLM, llm, ["q_proj", "v_proj", "down_proj"])}
    if tower_lora:
        parts["visual_encoder_adapter"] = (CLIPVisionModel, clip, ["q_proj", "fc1"])
    for name, (kind, base, targets) in parts.items():
        part = get_peft_model(kind.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        for key, parameter in part.named_parameters():
            if "lora_" in key:
                parameter.data = 0.2 * torch.randn_like(parameter)
        part.save_pretrained(tmp_path / name)
        adapters[name] = read_adapter(tmp_path / name)
        # A module with an adapter on works wherever it stands.
        if name == "llm_adapter":
            model.model.language_model = part.base_model.model.model
            rows = model.lm_head.weight.shape[0] - 1280
            model.model.language_model.embed_tokens.weight.data = torch.cat(
                [
                    t := model.model.language_model.embed_tokens.weight.data[:1280],
                    t.mean(0, keepdim=True).expand(rows, -1),
                ]
            )
        else:
            model.model.vision_tower = part.base_model.model
    return (
        model.eval(),
        processor,
        convert.LlavaParts(
            convert.read_llm(llm),
            read_checkpoint(clip),
            convert.read_projector(tmp_path / "projector"),
            processor.image_token_id,
            adapters["llm_adapter"],
            adapters.get("visual_encoder_adapter"),
        ),
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tower_lora", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_one_folder_answers_as_the_parts_do(tmp_path: Path, *, tied: bool, tower_lora: bool, whole: bool) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    llm = tiny_llava.write_llm(tmp_path / "llm", tie_word_embeddings=tied)
    clip = tiny_llava.write_clip(tmp_path / "clip", whole=whole)
    model, processor, parts = trained(tmp_path, llm=llm, clip=clip, tower_lora=tower_lora)
    inputs = batch(processor)
    with torch.no_grad():
        expected = model(**inputs).logits
    plan = convert.plan_llava(parts, num_tokens=len(processor.tokenizer))
    assert any("new rows are the mean" in note for note in plan.notes)
    merged = tmp_path / "merged"
    convert.execute(plan, merged, processor.save_pretrained)
    assert convert.verify(plan, merged).good
    read, info = AutoModelForImageTextToText.from_pretrained(merged, output_loading_info=True)
    assert not any(info.values())
    assert type(read).__name__ == "LlavaForConditionalGeneration"
    again = AutoProcessor.from_pretrained(merged)
    assert not list(merged.glob("*scratch*"))
    with torch.no_grad():
        same = batch(again)
        assert torch.equal(same["input_ids"], inputs["input_ids"])
        assert torch.equal(same["pixel_values"], inputs["pixel_values"])
        got = read.eval()(**same).logits
    # f32; sums of up to 128 products in another order, in ten layers one after the other.
    assert float((got - expected).abs().max()) < 10 * 128 * 2**-24 * float(expected.abs().max())


def test_all_parts_get_one_dtype(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    llm, clip = tiny_llava.write_llm(tmp_path / "llm"), tiny_llava.write_clip(tmp_path / "clip")
    _, processor, parts = trained(tmp_path, llm=llm, clip=clip, tower_lora=True)
    plan = convert.plan_llava(parts, num_tokens=len(processor.tokenizer), dtype="bf16", max_shard_size_bytes=200_000)
    merged = tmp_path / "merged"
    convert.execute(plan, merged, processor.save_pretrained)
    files = sorted(merged.glob("*.safetensors"))
    assert len(files) > 1
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.bfloat16}
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    assert convert.verify(plan, merged).good


def test_verify_sees_another_projector(tmp_path: Path) -> None:
    llm, clip = tiny_llava.write_llm(tmp_path / "llm"), tiny_llava.write_clip(tmp_path / "clip")
    _, processor, parts = trained(tmp_path, llm=llm, clip=clip, tower_lora=False)
    convert.execute(convert.plan_llava(parts), tmp_path / "merged", processor.save_pretrained)
    other, _ = made(llm, clip)
    llava.save_projector(llava.projector_tensors(other), tmp_path / "other")
    parts = convert.LlavaParts(parts.llm, parts.tower, convert.read_projector(tmp_path / "other"), 1280)
    report = convert.verify(convert.plan_llava(parts), tmp_path / "merged")
    wrong = {check.name for check in report.checks if not check.good}
    assert not report.good
    assert "multi_modal_projector.linear_1.weight" in wrong
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in wrong
    assert not any(name.startswith("vision_tower") for name in wrong)


def test_projectors_that_do_not_fit(tmp_path: Path) -> None:
    llm, clip = tiny_llava.write_llm(tmp_path / "llm"), tiny_llava.write_clip(tmp_path / "clip")
    model, _ = made(llm, clip)
    folder = tmp_path / "projector"
    llava.save_projector(llava.projector_tensors(model), folder)

    def changed(**changes: Any) -> Path:
        other = tmp_path / "changed"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(folder, other)
        config = json.loads((folder / "config.json").read_text()) | changes
        (other / "config.json").write_text(json.dumps(config))
        return other

    assert convert.read_projector(folder).has_bias
    with pytest.raises(PlanError, match="a projector of 4 layers"):
        convert.read_projector(changed(depth=4))
    with pytest.raises(CheckpointError, match="model_type is 'llama'"):
        convert.read_projector(changed(model_type="llama"))
    with pytest.raises(CheckpointError, match="its tensors are"):
        convert.read_projector(changed(llm_hidden_size=128))
    with pytest.raises(FileError, match="did you mean .*projector"):
        convert.read_projector(tmp_path)
    wider = tiny_llava.write_llm(tmp_path / "wider", hidden_size=128, head_dim=32)
    with pytest.raises(
        ConfigError, match="the projector goes from 32 to 64; .*a width of 32, the language model of 128"
    ):
        made(wider, clip, projector=folder)
    with pytest.raises(ConfigError, match="select_layer: -9 is not allowed; the tower has 3 layers"):
        made(llm, clip, select_layer=-9)


def test_towers_that_are_none(tmp_path: Path) -> None:
    llm, clip = tiny_llava.write_llm(tmp_path / "llm"), tiny_llava.write_clip(tmp_path / "clip")
    with pytest.raises(ConfigError, match="is a llama; a CLIP is needed"):
        llava.read_tower(llm, torch.float32)
    with pytest.raises(FileError, match=r"config\.json"):
        llava.read_tower(tmp_path / "nothing", torch.float32)
    for path in clip.glob("*processor*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="its image processor cannot be read"):
        llava.processor(words(llm), clip)
