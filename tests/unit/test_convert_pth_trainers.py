"""checkpoint-N of transformers' Trainer, of fastft's runs and of PEFT, as they were written by them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fastft.config.schema import Config
from fastft.convert import pth
from fastft.errors import FileError
from fastft.training import run

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_run

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def config(base: Path, kind: str) -> Config:
    values: dict[str, Any] = {"model": {"name": str(base)}, "data": {"train": [{"source": "x"}]}}
    lora = {"lora": {"r": 4, "alpha": 8}} if kind == "lora" else {}
    return Config.model_validate({**values, "method": {"kind": kind, **lora}})


def converted(settings: Config, checkpoint: Path, target: Path, dtype: str = "auto") -> dict[str, Any]:
    report = pth.execute(pth.plan(settings, checkpoint, dtype=dtype), target)
    return load_file(target / ("adapter_model.safetensors" if report.kind == "adapter" else "model.safetensors"))


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg,name-defined,misc]
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.arange(index, index + 8)
        return {"input_ids": tokens, "labels": tokens}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of transformers' own Trainer, on all weights and on an adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    folder = tmp_path_factory.mktemp("trainer")
    tiny_run.write_model(folder / "base")
    for kind in ("full", "lora"):
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        if kind == "lora":
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
        arguments = TrainingArguments(
            output_dir=str(folder / kind), max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder / "base")
        Trainer(model=model, args=arguments, train_dataset=Rows(), processing_class=tokenizer).train()
        trained = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        torch.save(trained, folder / f"{kind}.pt")
    return folder


def test_all_weights_of_transformers_trainer(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = trained / "full" / "checkpoint-2"
    converted(config(trained / "base", "full"), checkpoint, tmp_path / "hf")
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    assert not names & {"optimizer.pt", "trainer_state.json", "training_args.bin", "rng_state.pth", "scheduler.pt"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    truth = torch.load(trained / "full.pt")
    assert loaded.keys() == truth.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in truth.items())
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == tiny_run.CHATML


def test_an_adapter_of_transformers_trainer(trained: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    checkpoint = trained / "lora" / "checkpoint-2"
    converted(config(trained / "base", "lora"), checkpoint, tmp_path / "hf", "fp32")
    base = AutoModelForCausalLM.from_pretrained(trained / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "hf").state_dict()
    truth = torch.load(trained / "lora.pt")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in truth.items())


def test_all_that_a_peft_model_holds(trained: Path, tmp_path: Path) -> None:
    """`torch.save(model.state_dict())` of a PeftModel: the adapter is found among the frozen base."""
    found = converted(config(trained / "base", "lora"), trained / "lora.pt", tmp_path / "hf")
    adapter = load_file(trained / "lora" / "checkpoint-2" / "adapter_model.safetensors")
    assert found.keys() == adapter.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in adapter.items())


def test_pickled_weights_in_shards(trained: Path, tmp_path: Path) -> None:
    """What older versions of transformers wrote: pytorch_model-0000N.bin with an index, adapter_model.bin."""
    truth = torch.load(trained / "full.pt")
    old = tmp_path / "checkpoint-7"
    old.mkdir()
    names = sorted(truth)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: truth[name] for name in part}, old / file)
        weight_map |= dict.fromkeys(part, file)
    (old / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (old / "config.json").write_bytes((trained / "full" / "checkpoint-2" / "config.json").read_bytes())
    found = converted(config(trained / "base", "full"), old, tmp_path / "hf")
    assert all(torch.equal(found[name], truth[name]) for name in found)
    # The base's, since the checkpoint has no tokenizer.
    assert (tmp_path / "hf" / "tokenizer.json").exists()
    (old / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileError, match=r"1 of 2 shards.*are missing"):
        pth.plan(config(trained / "base", "full"), old)
    checkpoint = trained / "lora" / "checkpoint-2"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    torch.save(load_file(checkpoint / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_config.json").write_bytes((checkpoint / "adapter_config.json").read_bytes())
    found = converted(config(trained / "base", "lora"), adapter, tmp_path / "out")
    assert all(torch.equal(t, found[n]) for n, t in load_file(checkpoint / "adapter_model.safetensors").items())


def test_a_folder_without_a_config(trained: Path, tmp_path: Path) -> None:
    """accelerate's save_state, and FSDP's one file: the base says what the weights are."""
    truth = torch.load(trained / "full.pt")
    for name in ("pytorch_model.bin", "pytorch_model_fsdp.bin"):
        folder = tmp_path / name
        folder.mkdir()
        torch.save(truth, folder / name)
        found = converted(config(trained / "base", "full"), folder, tmp_path / f"from {name}")
        assert all(torch.equal(found[key], truth[key]) for key in found)
        assert (tmp_path / f"from {name}" / "config.json").exists()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_our_own_runs(kind: str, tmp_path: Path) -> None:
    """A run's folder is its result; checkpoint-N is what was saved then; both say the same after the last step."""
    tiny_run.write_model(tmp_path / "model")
    tiny_run.write_dialogues(tmp_path / "rows.jsonl")
    changes = {"train__max_steps": 2, "output__save_steps": 1, "samples__prompts": ()}
    settings = tiny_run.config(tmp_path / "model", tmp_path / "rows.jsonl", kind=kind, **changes)
    done = run.run(settings, work_dir=tmp_path / "run")
    plan = pth.plan(settings, done.run_dir, dtype="auto")
    assert any("is a run; its result in" in note for note in plan.notes)
    results = [
        converted(settings, place, tmp_path / f"out {number}")
        for number, place in enumerate((done.run_dir, done.run_dir / "checkpoint-2", done.artifact))
    ]
    assert all(found.keys() == results[0].keys() for found in results)
    for name, tensor in results[0].items():
        assert all(torch.equal(found[name].to(tensor.dtype), tensor) for found in results[1:]), name
    earlier = converted(settings, done.run_dir / "checkpoint-1", tmp_path / "earlier")
    assert any(not torch.equal(earlier[name].to(tensor.dtype), tensor) for name, tensor in results[0].items())
    assert (tmp_path / "out 0" / "tokenizer.json").exists()
