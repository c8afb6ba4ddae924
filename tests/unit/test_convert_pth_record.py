"""The settings of a run: from the config text inside the checkpoint, from an XTuner config, or from ours; and who wins."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastft.config.schema import Config
from fastft.convert import pth, recorded
from fastft.errors import ConfigError, FastftError, PlanError, UsageError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_llama

torch = pytest.importorskip("torch")

# In the shape of `cfg.pretty_text`: literals only, types by their dotted names.
RECORD = """
SYSTEM = ''
accumulative_counts = 16
launcher = 'none'
model = dict(
    llm=dict(
        pretrained_model_name_or_path='{base}',
        quantization_config=dict(load_in_4bit=True, type='transformers.BitsAndBytesConfig'),
        torch_dtype='torch.float16',
        type='transformers.AutoModelForCausalLM.from_pretrained'),
    lora=dict(bias='none', lora_alpha=32, lora_dropout=0.1, r=4, task_type='CAUSAL_LM', type='peft.LoraConfig'),
    type='xtuner.model.SupervisedFinetune',
    use_varlen_attn=False)
train_dataloader = dict(batch_size=1, dataset=dict(type='xtuner.dataset.process_hf_dataset'))
"""
# In the shape of a file that a person wrote.
FILE = """
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from xtuner.model import SupervisedFinetune

pretrained_model_name_or_path = '{base}'
lora_r = 4
model = dict(
    type=SupervisedFinetune,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=pretrained_model_name_or_path),
    lora=dict(type=LoraConfig, r=lora_r, lora_alpha=lora_r * 4, lora_dropout=0.05, bias='none'))
train_dataloader = dict(dataset=dict(type='a data set that we do not know'))
"""


def lora_state() -> dict[str, Any]:
    return {
        "llm." + key.replace(".weight", ".default.weight"): torch.from_numpy(array)
        for key, array in tiny_llama.adapter_tensors().items()
    }


def config(base: Path | str, kind: str = "lora", **lora: Any) -> Config:
    method: dict[str, Any] = {"kind": kind}
    if kind != "full":
        method["lora"] = {"r": 4, "alpha": 8, **lora}
    return Config.model_validate({"model": {"name": str(base)}, "method": method, "data": {"train": [{"source": "x"}]}})


def write(folder: Path, text: str | None, state: dict[str, Any] | None = None) -> Path:
    meta = {} if text is None else {"cfg": text, "epoch": 1}
    torch.save({"state_dict": state or lora_state(), "meta": meta, "message_hub": {}}, folder / "iter_5.pth")
    return folder / "iter_5.pth"


def settings_of(plan: pth.PthPlan) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan.parts[0].texts["adapter_config.json"])
    return found


def test_the_record_wins_and_the_difference_is_said(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    plan = pth.plan(config(base), write(tmp_path, RECORD.format(base="someone/else")))
    settings = settings_of(plan)
    assert (settings["lora_alpha"], settings["lora_dropout"], settings["r"]) == (32, 0.1, 4)
    assert settings["base_model_name_or_path"] == str(base)
    said = " ".join(plan.notes)
    assert "alpha 32.0, not 8.0" in said
    assert "says the base someone/else" in said
    same = pth.plan(config(base, alpha=32, dropout=0.1), write(tmp_path, RECORD.format(base=base)))
    assert same.notes == ()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("import os\nos.system('touch x')\n", "statement"),
        ("model = dict(llm=dict())", "no `model = dict"),
        ("model = (", "not Python"),
        ("x" * 2_000_000, "too large"),
        (RECORD.replace("r=4", "r='four'"), "a number is needed"),
        (RECORD.replace("r=4", "r=4, rank_pattern=dict(q=2)"), "rank_pattern"),
    ],
)
def test_a_record_that_cannot_be_read_is_said(tmp_path: Path, text: str, word: str) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    plan = pth.plan(config(base), write(tmp_path, text.replace("{base}", str(base))))
    assert settings_of(plan)["lora_alpha"] == 8
    assert word in plan.notes[0]
    assert "the settings of the config" in plan.notes[0]


def test_a_record_of_lora_under_a_config_of_full(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    plan = pth.plan(config(base, "full"), write(tmp_path, RECORD.format(base=base)))
    assert settings_of(plan)["lora_alpha"] == 32
    assert "says LoRA" in plan.notes[0]


def test_a_record_that_the_tensors_contradict(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    with pytest.raises(FastftError, match="rank 4, but .* says r 64"):
        pth.plan(config(base), write(tmp_path, RECORD.replace("r=4", "r=64").format(base=base)))


def test_an_xtuner_config_is_config_enough(tmp_path: Path) -> None:
    """Its data set is of a kind that we cannot train on; what matters here is read, and the file goes along."""
    base = tiny_llama.write_base(tmp_path / "base")
    file = tmp_path / "my_config.py"
    file.write_text(FILE.format(base=base))
    run = recorded.of_python_file(file)
    assert run.lora == recorded.LoraSettings(4, 16.0, 0.05)
    plan = pth.plan(run, write(tmp_path, None))
    pth.execute(plan, tmp_path / "hf")
    assert settings_of(plan)["lora_alpha"] == 16
    assert (tmp_path / "hf" / "xtuner_config.py").read_text() == file.read_text()
    assert not (tmp_path / "hf" / "fastft_config.yaml").exists()
    other = tiny_llama.write_base(tmp_path / "moved")
    run = recorded.of_python_file(file, [f"model.name={other}"])
    assert run.model.name == str(other)
    with pytest.raises(UsageError, match=r"only model\.name"):
        recorded.of_python_file(file, ["train.lr=1"])
    file.write_text("print('x')")
    with pytest.raises(ConfigError, match="not run|no `model"):
        recorded.of_python_file(file)


def test_the_command_takes_an_xtuner_config(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    (tmp_path / "my_config.py").write_text(FILE.format(base=base))
    words = ["convert", "pth_to_hf", str(tmp_path / "my_config.py"), str(write(tmp_path, None)), str(tmp_path / "hf")]
    done = subprocess.run(
        [sys.executable, "-m", "fastft", *words, "--save-format", "official"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "take huggingface" in done.stderr
    subprocess.run([sys.executable, "-m", "fastft", *words, "--fp32"], check=True, capture_output=True)
    found = load_file(tmp_path / "hf" / "adapter_model.safetensors")
    for name, array in tiny_llama.adapter_tensors().items():
        np.testing.assert_array_equal(found[name], array)


MMENGINE = """
import sys
from collections import OrderedDict
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from torch.utils.data import Dataset

sys.path.insert(0, sys.argv[2])
import tiny_llama


@MODELS.register_module()
class SupervisedFinetune(BaseModel):
    def __init__(self, llm, lora):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, inputs, data_samples=None, mode="loss"):
        return {"loss": (self.weight * 1.0).sum()}

    def state_dict(self, *args, **kwargs):
        return OrderedDict(
            ("llm." + key.replace(".weight", ".default.weight"), torch.from_numpy(array))
            for key, array in tiny_llama.adapter_tensors().items()
        )


@DATASETS.register_module()
class Ones(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"inputs": torch.ones(1)}


cfg = Config.fromfile(sys.argv[1])
cfg.model.type = "SupervisedFinetune"
cfg.work_dir = sys.argv[3]
cfg.train_dataloader = dict(batch_size=1, dataset=dict(type="Ones"), sampler=dict(type="DefaultSampler", shuffle=False))
cfg.train_cfg = dict(by_epoch=False, max_iters=3)
cfg.optim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-3))
cfg.param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=2)]
cfg.default_hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=3))
cfg.default_scope = "mmengine"
Runner.from_cfg(cfg).train()
"""


def test_a_checkpoint_that_mmengine_wrote(tmp_path: Path) -> None:
    """A run of mmengine's own Runner, with its logs, optimizer and schedulers beside the weights."""
    pytest.importorskip("mmengine", reason="mmengine is not installed")
    base = tiny_llama.write_base(tmp_path / "base")
    (tmp_path / "my_config.py").write_text(FILE.format(base=base))
    (tmp_path / "train.py").write_text(MMENGINE)
    tests = str(Path(tiny_llama.__file__).parent)
    words = [str(tmp_path / "my_config.py"), tests, str(tmp_path / "work")]
    subprocess.run([sys.executable, str(tmp_path / "train.py"), *words], check=True, capture_output=True)
    plan = pth.plan(config(base), tmp_path / "work" / "iter_3.pth", dtype="auto")
    assert settings_of(plan)["lora_alpha"] == 16
    assert "alpha 16.0, not 8.0" in " ".join(plan.notes)
    pth.execute(plan, tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "adapter_model.safetensors")
    for name, array in tiny_llama.adapter_tensors().items():
        np.testing.assert_array_equal(found[name], array)


def test_a_whole_peft_state_dict(tmp_path: Path) -> None:
    """What `model.state_dict()` of a PeftModel gives: the frozen base beside the adapter is left out, and it is said."""
    base = tiny_llama.write_base(tmp_path / "base")
    state = lora_state()
    for name, array in tiny_llama.weights().items():
        module = name.removesuffix(".weight")
        layered = any(module.endswith(linear) for linear in tiny_llama.LINEARS)
        key = f"{module}.base_layer.weight" if layered else name
        state[f"llm.base_model.model.{key}"] = torch.from_numpy(array)
    state["llm.base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"] = torch.ones(24)
    plan = pth.plan(config(base), write(tmp_path, None, state))
    assert "22 tensors of the frozen base" in " ".join(plan.notes)
    assert len(plan.parts[0].shards[0].tensors) == len(lora_state())


def test_dpo(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    weights = {name: torch.from_numpy(array) for name, array in tiny_llama.weights(seed=3).items()}
    state = {f"llm.{name}": tensor for name, tensor in weights.items()}
    state |= {f"ref_llm.{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
    plan = pth.plan(config(base, "full"), write(tmp_path, None, state), dtype="auto")
    assert "21 tensors of the reference model" in " ".join(plan.notes)
    pth.execute(plan, tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(np.array_equal(found[name], tensor.numpy()) for name, tensor in weights.items())
    with pytest.raises(FastftError, match="no tensor of the language model"):
        pth.plan(config(base, "full"), write(tmp_path, None, {"ref_llm.x": torch.ones(1)}))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("prefix", ["", "model."])
def test_reward_models(tmp_path: Path, prefix: str) -> None:
    """The head becomes `score` of transformers' class for sequences, for whole models and for adapters."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = tiny_llama.write_base(tmp_path / "base")
    head = torch.arange(24.0)[None]
    weights = {n: torch.from_numpy(a) for n, a in tiny_llama.weights(seed=3).items() if n != "lm_head.weight"}
    state = {f"llm.{prefix}{name.removeprefix('model.')}": tensor for name, tensor in weights.items()}
    file = write(tmp_path, None, {**state, "v_head.weight": head})
    pth.execute(pth.plan(config(base, "full"), file, dtype="auto"), tmp_path / "hf")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    loaded = model.state_dict()
    assert torch.equal(loaded["score.weight"], head)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    adapter = {
        key.replace("base_model.model.model.", f"base_model.model.{prefix}"): t for key, t in lora_state().items()
    }
    file = write(tmp_path, None, {**adapter, "v_head.weight": head})
    pth.execute(pth.plan(config(base), file, dtype="auto"), tmp_path / "adapter")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").state_dict()
    assert torch.equal(loaded["base_model.model.score.modules_to_save.default.weight"], head)
    for key, tensor in lora_state().items():
        assert torch.equal(loaded[key.removeprefix("llm.")], tensor)
    with pytest.raises(PlanError, match="v_head is not one number"):
        pth.plan(config(base, "full"), write(tmp_path, None, {**state, "v_head.weight": torch.ones(2, 24)}))
    other = tiny_llama.write_base(tmp_path / "other", model_type="internlm")
    with pytest.raises(PlanError, match="no class for reward models"):
        pth.plan(config(other, "full"), write(tmp_path, None, {**state, "v_head.weight": head}))
