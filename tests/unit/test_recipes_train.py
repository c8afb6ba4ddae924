"""Every family of models/ makes a step on a tiny model of its architecture, with the methods and tasks in turn."""

import json
from pathlib import Path
from typing import Any

import pytest

import tiny_llava
import tiny_run
import tiny_vision
from fastft.config import recipes
from fastft.config.load import load
from fastft.training import run

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
# Family: the model type of its checkpoints, as transformers knows it, and a method and a task. InternLM and InternLM2
# are read as Llama (their own layouts are in test_convert_internlm2 and test_model_load).
FAMILIES = {
    "deepseek_llm": ("llama", "lora", "sft"),
    "demo": ("llama", "qlora", "dpo"),
    "gemma": ("gemma", "qlora", "sft"),
    "gemma2": ("gemma2", "dora", "orpo"),
    "gemma3": ("gemma3_text", "qlora", "kto"),
    "glm4": ("glm", "freeze", "sft"),
    "internlm": ("llama", "full", "reward"),
    "internlm2": ("llama", "freeze", "dpo"),
    "internlm2_5": ("llama", "lora", "kto"),
    "internlm3": ("internlm3", "qlora", "dpo"),
    "llama2": ("llama", "full", "pretrain"),
    "llama3": ("llama", "dora", "sft"),
    "mistral": ("mistral", "qlora", "orpo"),
    "phi3": ("phi3", "qlora", "reward"),
    "phi4": ("phi3", "lora", "dpo"),
    "qwen1_5": ("qwen2", "full", "sft"),
    "qwen2": ("qwen2", "qlora", "pretrain"),
    "qwen2_5": ("qwen2", "lora", "reward"),
    "qwen3": ("qwen3", "lora", "orpo"),
    "vicuna": ("llama", "qlora", "sft"),
    "yi": ("llama", "freeze", "kto"),
    "yi_1_5": ("llama", "full", "orpo"),
}
# Code of its own, which no test runs.
REMOTE = {"chatglm3"}
# Families of models that see, as `tiny_vision` calls their kind, and a method.
VISION = {
    "internvl3": ("internvl", "lora"),
    "llava1_5": ("llava", "qlora"),
    "llava1_6": ("llava_next", "lora"),
    "qwen2_vl": ("qwen2_vl", "full"),
    "qwen2_5_vl": ("qwen2_5_vl", "qlora"),
    "qwen3_vl": ("qwen3_vl", "lora"),
    "gemma3": ("gemma3", "lora"),
}
# Which run in every test; the others in `make test-all`.
QUICK = {"demo", "gemma3", "qwen2_5", "phi3", "qwen2_5_vl"}


def test_no_family_is_forgotten() -> None:
    families = {path.stem for path in recipes.FOLDER.glob("models/*.yaml")}
    assert families == FAMILIES.keys() | VISION.keys() | REMOTE


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in VISION]
)
def test_a_step_with_images(family: str, tmp_path: Path) -> None:
    """The recipe as it is listed, with a tiny model and drawn images in place of the real ones."""
    kind, method = VISION[family]
    name = next(name for name in recipes.search(f"{family} {method} custom_vision") if f"_{method}_" in name)
    assert recipes.parts(name).model.family == family
    model = tiny_vision.write_model(kind, tmp_path / "model")
    rows = tiny_vision.write_rows(tmp_path)
    words = [f"model.name={model}", f"data.train.0.source={rows}", "train.max_steps=1", "train.grad_accumulation=1"]
    done = run.run(load(name, words).config, work_dir=tmp_path / "run")
    (line,) = [json.loads(line) for line in (done.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert line["loss"] > 0
    assert line["grad_norm"] > 0
    assert list(done.artifact.glob("*.safetensors"))


def test_a_step_of_each_stage_of_a_llava(tmp_path: Path) -> None:
    """XTuner's two recipes as they are listed, with tiny parts in place of the real ones."""
    clip = "clip_vit_large_p14_336"
    pretrain = f"llava_internlm2_chat_7b_{clip}_e1_gpu8_pretrain"
    finetune = f"llava_internlm2_chat_7b_qlora_{clip}_lora_e1_gpu8_finetune"
    tiny_llava.picture().save(tmp_path / "a.png")
    said = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A red circle."}]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": "a.png", "conversations": said}] * 4))
    words = [
        f"model.name={tiny_llava.write_llm(tmp_path / 'llm')}",
        f"vision.tower={tiny_llava.write_clip(tmp_path / 'clip')}",
        f"data.train.0.source={tmp_path / 'rows.json'}",
        f"data.train.0.images={tmp_path}",
        "train.max_steps=1",
        "train.batch_size=2",
    ]
    first = run.run(load(pretrain, words).config, work_dir=tmp_path / "first")
    words.append(f"vision.projector={first.artifact / 'projector'}")
    done = run.run(load(finetune, words).config, work_dir=tmp_path / "second")
    for result, names in ((first, {"projector"}), (done, {"projector", "llm_adapter", "visual_encoder_adapter"})):
        (line,) = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert line["grad_norm"] > 0
        assert {path.name for path in result.artifact.iterdir() if path.is_dir()} == names


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_a_step(family: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, method, task = FAMILIES[family]
    tokenizer = tiny_run.write_tokenizer(tmp_path / "model")
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    shape = AutoConfig.for_model(model_type, vocab_size=len(tokenizer), **SIZES, **ids)
    AutoModelForCausalLM.from_config(shape).to(torch.float32).save_pretrained(tmp_path / "model")
    write = {"pretrain": tiny_run.write_texts, "sft": tiny_run.write_dialogues, "kto": tiny_run.write_judged}
    data = write.get(task, tiny_run.write_pairs)(tmp_path / "rows.jsonl")
    kind = "lora" if method == "dora" else method
    changes = {"method__lora": {"r": 4, "dora": True}} if method == "dora" else {}
    config = tiny_run.config(tmp_path / "model", data, task=task, kind=kind, train__max_steps=1, **changes)
    done = run.run(config, work_dir=tmp_path / "run")
    (line,) = [json.loads(line) for line in (done.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert line["loss"] > 0
    assert line["grad_norm"] > 0
    assert list(done.artifact.glob("*.safetensors"))
