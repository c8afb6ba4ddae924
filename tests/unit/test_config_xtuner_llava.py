"""The second stage of an XTuner LLaVA whose first stage lies in a .pth: the command that is printed makes it trainable."""

import json
import shlex
from pathlib import Path

import pytest

import tiny_llava
from fastft.__main__ import main
from fastft.config.load import load
from fastft.model import llava, tokenizer

torch = pytest.importorskip("torch")

FILE = """
from mmengine.optim import AmpOptimWrapper
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, CLIPImageProcessor, CLIPVisionModel
from xtuner.dataset import LLaVADataset
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.engine.runner import TrainLoop
from xtuner.model import LLaVAModel
from xtuner.utils import PROMPT_TEMPLATE

llm_name_or_path = 'llm'
visual_encoder_name_or_path = 'clip'
pretrained_pth = './work_dirs/first/iter_9.pth'
prompt_template = PROMPT_TEMPLATE.vicuna
max_length = int(512 - (28 / 14)**2)
image_processor = dict(
    type=CLIPImageProcessor.from_pretrained, pretrained_model_name_or_path=visual_encoder_name_or_path)
model = dict(
    type=LLaVAModel, freeze_llm=True, freeze_visual_encoder=True, pretrained_pth=pretrained_pth,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=llm_name_or_path),
    llm_lora=dict(type=LoraConfig, r=8, lora_alpha=16, lora_dropout=0.05, bias='none', task_type='CAUSAL_LM'),
    visual_encoder=dict(
        type=CLIPVisionModel.from_pretrained, pretrained_model_name_or_path=visual_encoder_name_or_path))
train_dataloader = dict(batch_size=2, dataset=dict(
    type=LLaVADataset, data_path='rows.json', image_folder='images', image_processor=image_processor,
    dataset_map_fn=llava_map_fn, template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
    max_length=max_length, pad_image_to_square=True))
optim_wrapper = dict(type=AmpOptimWrapper, optimizer=dict(type=AdamW, lr=2e-4), accumulative_counts=1)
train_cfg = dict(type=TrainLoop, max_epochs=1)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The parts, four rows with pictures, the config, and the projector of the first stage as XTuner leaves it."""
    monkeypatch.chdir(tmp_path)
    tiny_llava.write_llm(tmp_path / "llm")
    tiny_llava.write_clip(tmp_path / "clip")
    (tmp_path / "images").mkdir()
    rows = []
    for colour in ("red", "green", "blue", "yellow"):
        tiny_llava.picture(colour).save(tmp_path / "images" / f"{colour}.png")
        said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"A {colour} circle."}]
        rows.append({"image": f"{colour}.png", "conversations": said})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "run.py").write_text(FILE)
    (tmp_path / "work_dirs" / "first").mkdir(parents=True)
    torch.save({"state_dict": projector(), "meta": {}}, tmp_path / "work_dirs/first/iter_9.pth")
    return tmp_path


def projector() -> dict[str, "torch.Tensor"]:
    seen, hidden = tiny_llava.VISION["hidden_size"], tiny_llava.TEXT["hidden_size"]
    shapes = {"0.weight": (hidden, seen), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    generator = torch.Generator().manual_seed(3)
    return {f"projector.model.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_printed_command_makes_the_projector_that_training_starts_from(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (note,) = load("run.py").notes
    assert note.startswith("model.pretrained_pth = ")
    assert main(shlex.split(note.split("`")[1])[1:]) == 0, capsys.readouterr().err
    word = f"vision.projector={note.partition('vision.projector=')[2].partition('. Until')[0]}"
    assert word == "vision.projector=./work_dirs/first/iter_9_hf/projector"
    for chosen in (word, word.removesuffix("/projector")):
        assert main(["train", "run.py", chosen, "--dry-run"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    config = load("run.py", [word]).config
    words = tokenizer.load_tokenizer(folder / "llm", config.model)
    assert config.vision is not None
    assert config.vision.projector is not None
    made = llava.put_together(
        tiny_llava.llm("llama"),
        llava.read_tower(folder / "clip", torch.float32),
        words,
        projector=Path(config.vision.projector),
        select_layer=config.vision.select_layer,
    )
    found = llava.projector_tensors(made)
    expected = {name.removeprefix("projector."): tensor for name, tensor in projector().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_projector_for_other_parts_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    narrow = {name: tensor[:40, ...] for name, tensor in projector().items()}
    narrow["projector.model.2.weight"] = narrow["projector.model.2.weight"][:, :40].contiguous()
    torch.save({"state_dict": narrow, "meta": {}}, folder / "narrow.pth")
    assert main(["convert", "pth_to_hf", "run.py", "narrow.pth", "narrow"]) == 0, capsys.readouterr().err
    assert main(["train", "run.py", "vision.projector=narrow/projector", "--dry-run"]) == 1
    assert "the projector goes from 32 to 40" in capsys.readouterr().err


def test_how_pictures_are_made_square_is_said_where_it_differs(folder: Path) -> None:
    """XTuner crops in the first stage and fills up in the second, as is done here."""
    first = FILE.replace("llm_lora=dict(", "other=dict(").replace("pretrained_pth=pretrained_pth,", "")
    for text, said in (
        (FILE.replace("to_square=True", "to_square=False"), "pad_image_to_square = False: "),
        (first, "pad_image_to_square = True: "),
    ):
        (folder / "changed.py").write_text(text)
        assert any(note.startswith(said) for note in load("changed.py").notes)
    (folder / "changed.py").write_text(first.replace("to_square=True", "to_square=False"))
    assert not any("square" in note for note in load("changed.py").notes)
