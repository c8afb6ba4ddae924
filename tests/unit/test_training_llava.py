"""The two stages of a LLaVA put together from a language model and a CLIP, as XTuner trains it."""

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_llava
from fastft.__main__ import main
from fastft.config.schema import Config
from fastft.convert import llava as convert
from fastft.convert import llava_result as results
from fastft.errors import CheckpointError
from fastft.training import llava_result, run

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
    "ignore:.*_check_is_size.*:FutureWarning",
)

COLOURS = ("red", "green", "blue", "yellow")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A language model, a CLIP, and four rows in LLaVA's form."""
    folder = tmp_path_factory.mktemp("parts")
    rows = []
    (folder / "images").mkdir()
    for colour in COLOURS:
        tiny_llava.picture(colour).save(folder / "images" / f"{colour}.png")
        said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"A {colour} circle."}]
        rows.append({"image": f"{colour}.png", "conversations": said})
    (folder / "rows.json").write_text(json.dumps(rows))
    return tiny_llava.write_llm(folder / "llm"), tiny_llava.write_clip(folder / "clip"), folder / "rows.json"


def config(parts: tuple[Path, Path, Path], kind: str, learn: dict[str, Any], **vision: Any) -> Config:
    llm, clip, rows = parts
    method: dict[str, Any] = {"kind": kind}
    if kind != "full":
        method["lora"] = {"r": 8, "alpha": 16, "dropout": 0.0}
    return Config.model_validate(
        {
            "name": "tiny_llava",
            "task": "sft",
            "model": {"name": str(llm)},
            "method": method,
            "data": {"train": [{"source": str(rows), "images": str(rows.parent / "images")}], "max_length": 64},
            "vision": {"tower": str(clip), "learn": learn, **vision},
            "train": {"max_steps": 6, "batch_size": 4, "grad_accumulation": 1, "lr": 0.01, "log_steps": 1},
            "output": {"save_steps": 3},
        }
    )


STAGE_1 = {"llm": "frozen", "projector": "full"}
TOWER_LORA = {"projector": "full", "tower": "lora", "tower_lora": {"r": 4, "alpha": 4}}
CASES = {
    "stage 1, plain": ("lora", STAGE_1),
    "stage 1, on 4 bit": ("qlora", STAGE_1),
    "stage 1, full": ("full", STAGE_1),
    "lora and tower": ("lora", TOWER_LORA),
    "qlora and tower": ("qlora", TOWER_LORA),
    "full": ("full", {"projector": "full"}),
    "full and tower": ("full", TOWER_LORA),
    "lora, tower whole": ("lora", {"projector": "full", "tower": "full"}),
    "tower alone": ("lora", {"llm": "frozen", "projector": "frozen", "tower": "lora"}),
}


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def seen(model: Any, artifact: Path) -> Any:
    """What a model answers to a question with an image, asked through the processor of the result."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(artifact)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    inputs = processor(text=[text], images=[tiny_llava.picture("blue")], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**inputs).logits.float()


def remembered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models of the runs that follow, as they are when their results are written."""
    models: list[Any] = []
    write = llava_result.write

    def remember(config: Any, loaded: Any, *rest: Any) -> None:
        models.append(loaded.model)
        write(config, loaded, *rest)

    monkeypatch.setattr(llava_result, "write", remember)
    return models


@pytest.mark.parametrize("case", CASES)
def test_each_stage_learns_and_one_folder_is_made_of_it(
    parts: tuple[Path, Path, Path], tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merged folder answers as the model did when its training ended."""
    from transformers import LlavaForConditionalGeneration

    kind, learn = CASES[case]
    trained = remembered(monkeypatch)
    done = run.run(config(parts, kind, learn), work_dir=tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
    assert done.artifact == tmp_path / "run" / "llava"
    names = {path.name for path in done.artifact.iterdir()}
    wanted = {"projector", "processor_config.json", "tokenizer.json", "chat_template.jinja", "fastft_training.json"}
    trains_llm = learn.get("llm") != "frozen"
    if trains_llm and kind != "full":
        wanted.add("llm_adapter")
    if trains_llm and kind == "full":
        wanted |= {"config.json", "model.safetensors", "generation_config.json"}
    if learn.get("tower") == "lora":
        wanted.add("visual_encoder_adapter")
    if learn.get("tower") == "full":
        wanted.add("visual_encoder")
    assert names - {"tokenizer_config.json"} == wanted
    assert convert.read_projector(done.artifact / "projector").config["llm_hidden_size"] == 64

    llm, merged = str(parts[0]), tmp_path / "merged"
    assert main(["convert", "merge", llm, str(done.artifact), str(merged)]) == 0
    assert main(["convert", "verify", str(merged), "--base", llm, "--adapter", str(done.artifact)]) == 0
    if case == "stage 1, on 4 bit":
        # The language model was not trained: its own weights are taken, not what 4 bit made of them.
        check_same_weights(parts[0], merged)
        return
    expected = seen(trained[0], done.artifact)
    got = seen(LlavaForConditionalGeneration.from_pretrained(merged), done.artifact)
    # Sums of up to 128 products in f32, in another order, in ten layers one after the other.
    assert float((got - expected).abs().max()) < 10 * 128 * 2**-24 * float(expected.abs().max())
    untrained = results.find(parts[0], done.artifact, None)
    assert untrained.select_layer == -2


def check_same_weights(llm: Path, merged: Path) -> None:
    from safetensors.torch import load_file

    got = load_file(merged / "model.safetensors")
    for name, weight in load_file(llm / "model.safetensors").items():
        assert torch.equal(got[f"language_model.{name}"][: weight.shape[0]], weight), name


def test_the_parts_are_those_that_were_trained(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """PEFT puts each adapter onto its own part; their ranks are those of the config."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, CLIPVisionModel

    done = run.run(config(parts, *CASES["lora and tower"]), work_dir=tmp_path / "run")
    for kind, base, name, rank in (
        (AutoModelForCausalLM, parts[0], "llm_adapter", 8),
        (CLIPVisionModel, parts[1], "visual_encoder_adapter", 4),
    ):
        model = PeftModel.from_pretrained(kind.from_pretrained(base), done.artifact / name)
        factors = {key: value for key, value in model.named_parameters() if ".lora_B." in key}
        assert factors
        # The features are those of the last layer but one, so what is behind it learns nothing.
        moved = {key for key, value in factors.items() if value.abs().sum() > 0}
        assert moved == {key for key in factors if "encoder.layers.2." not in key}, name
        assert all(value.shape[1] == rank for value in factors.values())
        settings = json.loads((done.artifact / name / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(base)
        assert settings["lora_alpha"] == {8: 16, 4: 4}[rank]
    tower = tmp_path / "tower"
    adapter = str(done.artifact / "visual_encoder_adapter")
    assert main(["convert", "merge", str(parts[1]), adapter, str(tower), "--is-clip"]) == 0
    assert type(CLIPVisionModel.from_pretrained(tower)).__name__ == "CLIPVisionModel"
    llm = tmp_path / "llm"
    assert main(["convert", "merge", str(parts[0]), str(done.artifact / "llm_adapter"), str(llm)]) == 0


def test_the_second_stage_goes_on_from_the_first(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    first = run.run(config(parts, "lora", STAGE_1), work_dir=tmp_path / "first")
    for number, place in enumerate((first.artifact / "projector", first.artifact)):
        later = config(parts, "qlora", TOWER_LORA, projector=str(place))
        run.run(later, work_dir=tmp_path / f"second {number}")
        assert losses(tmp_path / f"second {number}")[0] < losses(tmp_path / "first")[0]


@pytest.mark.parametrize("case", ["stage 1, on 4 bit", "lora and tower", "full", "full and tower"])
def test_a_resumed_run_is_the_straight_one(parts: tuple[Path, Path, Path], tmp_path: Path, case: str) -> None:
    import shutil

    from safetensors.torch import load_file

    wanted = config(parts, *CASES[case])
    straight = run.run(wanted, work_dir=tmp_path / "straight").artifact
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "llava")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-6")
    resumed = run.run(wanted, work_dir=tmp_path / "resumed", resume="auto").artifact
    files = sorted(path.relative_to(straight) for path in straight.rglob("*.safetensors"))
    assert files
    for file in files:
        one, other = load_file(straight / file), load_file(resumed / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), file


@pytest.mark.parametrize("case", ["stage 1, plain", "lora and tower", "full", "full and tower", "lora, tower whole"])
def test_chat_puts_the_parts_together(
    parts: tuple[Path, Path, Path], tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the result of fastft, and by what XTuner's tool leaves: old names in the tower's adapter, nothing said."""
    from safetensors.torch import load_file, save_file

    from fastft.chat import llava as chat
    from fastft.errors import FileError

    kept = remembered(monkeypatch)
    done = run.run(config(parts, *CASES[case]), work_dir=tmp_path / "run")
    expected = seen(kept[0], done.artifact)
    bound = 10 * 128 * 2**-24 * float(expected.abs().max())
    talk = chat.load(str(parts[0]), done.artifact)
    assert float((seen(talk.model, done.artifact) - expected).abs().max()) < bound
    if case != "lora and tower":
        return
    processor = done.artifact.rename(tmp_path / "xtuner")
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja", "fastft_training.json"):
        (processor / name).rename(tmp_path / name)
    adapter = processor / "visual_encoder_adapter" / "adapter_model.safetensors"
    old = {
        name.replace("base_model.model.", "base_model.model.vision_model.", 1): tensor
        for name, tensor in load_file(adapter).items()
    }
    save_file(old, adapter)
    config_json = adapter.parent / "adapter_config.json"
    settings = json.loads(config_json.read_text()) | {"base_model_name_or_path": None}
    config_json.write_text(json.dumps(settings))
    with pytest.raises(FileError, match="name it with --visual-encoder"):
        chat.load(str(parts[0]), processor)
    talk = chat.load(str(parts[0]), processor, visual_encoder=str(parts[1]))
    for name in ("processor_config.json", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).rename(processor / name)
    assert float((seen(talk.model, processor) - expected).abs().max()) < bound


def test_mistakes_in_chat_and_merge(parts: tuple[Path, Path, Path], tmp_path: Path, capsys: Any) -> None:
    llm = str(parts[0])
    assert main(["chat", llm, "--visual-encoder", "x", "--prompt", "a"]) == 2
    assert "belong to --llava" in capsys.readouterr().err
    assert main(["chat", llm, "--llava", str(parts[1]), "--prompt", "a"]) == 1
    assert "no projector/ there" in capsys.readouterr().err
    assert main(["convert", "merge", llm, str(parts[1]), str(tmp_path / "o"), "--visual-encoder", "x"]) == 2
    assert "is for the parts of a LLaVA" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["lora and tower", "full and tower"])
def test_a_llava_of_ours_is_no_old_checkpoint(
    parts: tuple[Path, Path, Path], tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its parts need no conversion, and a checkpoint on the way is the trainer's own."""
    done = run.run(config(parts, *CASES[case]), work_dir=tmp_path / "run")
    capsys.readouterr()
    about = str(tmp_path / "run" / "config.yaml")
    for place, reason in (
        (tmp_path / "run", f"`fastft convert merge LLM {done.artifact} SAVE_PATH`"),
        (done.artifact, f"`fastft convert merge LLM {done.artifact} SAVE_PATH`"),
        (tmp_path / "run" / "checkpoint-6", "in the midst of the training of a LLaVA"),
    ):
        assert main(["convert", "pth_to_hf", about, str(place), str(tmp_path / "out")]) == 1
        assert reason in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_parts_that_do_not_fit_are_refused_before_weights_are_read(
    parts: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastft.errors import ConfigError
    from fastft.model import load

    monkeypatch.setattr(load, "load_weights", lambda *_: pytest.fail("weights were read"))
    other = tmp_path / "stage_1" / "llava" / "projector"
    for projector, reason in ((other, "train it first .*`fastft train stage_1`"), (parts[1], "model_type is 'clip'")):
        with pytest.raises((ConfigError, CheckpointError), match=reason):
            run.run(config(parts, "lora", TOWER_LORA, projector=str(projector)), work_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="select_layer: -5 is not allowed; the tower has 3 layers"):
        run.run(config(parts, "lora", TOWER_LORA, select_layer=-5), work_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="is a llama; a CLIP is needed"):
        run.run(config((parts[0], parts[0], parts[2]), "lora", TOWER_LORA), work_dir=tmp_path / "run")


def test_adapters_stay_fp32_beside_a_language_model_in_16_bit(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A model trained whole is rounded to its base's dtype at the end; what the tower learned is not."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    llm = tmp_path / "llm"
    AutoModelForCausalLM.from_pretrained(parts[0], dtype=torch.bfloat16).save_pretrained(llm)
    for name in tiny_llava.TOKENIZER_FILES:
        (llm / name).write_bytes((parts[0] / name).read_bytes())
    done = run.run(config((llm, *parts[1:]), *CASES["full and tower"]), work_dir=tmp_path / "run").artifact
    assert {tensor.dtype for tensor in load_file(done / "model.safetensors").values()} == {torch.bfloat16}
    adapter = load_file(done / "visual_encoder_adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert all(".lora_" in name and "default" not in name for name in adapter)
    assert main(["convert", "merge", str(llm), str(done), str(tmp_path / "merged")]) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}


def test_the_tower_of_a_model_trained_whole_learns_by_its_adapters_alone(
    parts: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    done = run.run(config(parts, *CASES["full and tower"]), work_dir=tmp_path / "run")
    state = load_file(tmp_path / "run" / "checkpoint-6" / "model.safetensors")
    tower = {name: tensor for name, tensor in state.items() if "vision_tower" in name and ".lora_" not in name}
    before = load_file(parts[1] / "model.safetensors")
    assert len(tower) > 20
    for name, tensor in tower.items():
        plain = name.partition("vision_tower.")[2].replace(".base_layer", "").removeprefix("vision_model.")
        assert torch.equal(tensor, before[f"vision_model.{plain}"]), name
    factors = load_file(done.artifact / "visual_encoder_adapter" / "adapter_model.safetensors")
    moved = {name for name, tensor in factors.items() if ".lora_B." in name and tensor.abs().sum() > 0}
    assert moved == {name for name in factors if ".lora_B." in name and "layers.2." not in name}


def started(parts: tuple[Path, Path, Path], kind: str, learn: dict[str, Any], init: str) -> Config:
    """A config whose adapters have a start of their own."""
    made = config(parts, kind, learn).model_dump()
    made["method"]["lora"]["init"] = init
    if made["vision"]["learn"]["tower_lora"] is not None:
        made["vision"]["learn"]["tower_lora"]["init"] = init
    return Config.model_validate(made)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_starts_that_change_the_base(parts: tuple[Path, Path, Path], tmp_path: Path, kind: str) -> None:
    """Language model and tower start from their own weights with ranks of their own, and merge onto the original ones."""
    from transformers import LlavaForConditionalGeneration

    wanted = started(parts, "lora", TOWER_LORA, kind)
    kept: list[Any] = []
    write = llava_result.write

    def remember(config: Any, loaded: Any, *rest: Any) -> None:
        kept.append(loaded.model)
        write(config, loaded, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llava_result, "write", remember)
        done = run.run(wanted, work_dir=tmp_path / "run")
    for name, rank, alpha in (("llm_adapter", 16, 32), ("visual_encoder_adapter", 8, 8)):
        settings = json.loads((done.artifact / name / "adapter_config.json").read_text())
        assert (settings["r"], settings["lora_alpha"], settings["init_lora_weights"]) == (rank, alpha, True)
    assert main(["convert", "merge", str(parts[0]), str(done.artifact), str(tmp_path / "merged")]) == 0
    expected = seen(kept[0], done.artifact)
    got = seen(LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged"), done.artifact)
    # As above, and the base of the training was rounded once more when its largest part was taken out.
    assert float((got - expected).abs().max()) < 20 * 128 * 2**-24 * float(expected.abs().max())


def test_loftq_makes_up_for_the_language_models_4_bits(parts: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """It finds the language model's weights in its own files; a tower, never in 4 bits, cannot start so."""
    from fastft.errors import ConfigError

    done = run.run(started(parts, "qlora", {"projector": "full"}, "loftq"), work_dir=tmp_path / "run")
    plain = run.run(config(parts, "qlora", {"projector": "full"}), work_dir=tmp_path / "plain")
    assert losses(tmp_path / "run")[0] != losses(tmp_path / "plain")[0]
    assert (done.artifact / "llm_adapter").is_dir()
    assert plain.artifact.is_dir()
    with pytest.raises(
        ConfigError, match=r"loftq is for layers held in 4 bits.*vision_tower.*vision.learn.tower=frozen"
    ):
        run.run(started(parts, "qlora", TOWER_LORA, "loftq"), work_dir=tmp_path / "refused")


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"init": "pissa"}, "tower_lora.init: pissa is not built beside method full"),
        ({"modules_to_save": ["fc1"]}, "modules_to_save is not built beside method full"),
    ],
)
def test_what_adapters_beside_whole_weights_cannot_be(
    parts: tuple[Path, Path, Path], lora: dict[str, Any], reason: str
) -> None:
    learn = {"projector": "full", "tower": "lora", "tower_lora": lora}
    with pytest.raises(ValueError, match=reason):
        config(parts, "full", learn)
    with pytest.raises(ValueError, match="only for a LLaVA made of parts"):
        config(parts, "full", TOWER_LORA, tower=None)
