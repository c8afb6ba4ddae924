"""A tiny random Llama with its own tokenizer, and a run's config around it, for tests of training and chat."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastft.config.schema import Config

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTIONS = tuple(f"How many apples are in basket {n}?" for n in range(24))
TEXTS = tuple(f"Basket {n} holds {n * 7 % 13} apples and {n * 5 % 11} pears, said the farmer." for n in range(24))


def write_model(folder: Path, *, chat_template: str | None = CHATML, dtype: str = "float32", **config: Any) -> Path:
    """Write config, random weights (seed 0) and tokenizer of a Llama of 2 layers and width 32."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tokenizer = write_tokenizer(folder, chat_template)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**{**settings, **config}))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, chat_template: str | None = CHATML) -> Any:
    """Write a byte-level BPE tokenizer of about 300 tokens and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*QUESTIONS, *TEXTS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return fast


def write_dialogues(path: Path, count: int = 12) -> Path:
    """Write question and answer rows; the answers differ in length."""
    rows = [{"instruction": QUESTIONS[n], "input": "", "output": "apple " * (n % 5 + 1)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_texts(path: Path, count: int = 12) -> Path:
    """Write rows of plain text."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:count]), encoding="utf-8")
    return path


def write_pairs(path: Path, count: int = 12) -> Path:
    """Write questions with a better and a worse answer; the answers differ in length."""
    rows = [
        {"prompt": QUESTIONS[n], "chosen": "apple " * (n % 5 + 1), "rejected": "pear " * (n % 3 + 1)}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_judged(path: Path, count: int = 12) -> Path:
    """Write questions with one answer each, every other one of them called good."""
    rows = [
        {"prompt": QUESTIONS[n], "completion": ("apple " if n % 2 else "pear ") * (n % 4 + 1), "label": bool(n % 2)}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(model: Path, data: Path, *, task: str = "sft", kind: str = "lora", **changes: Any) -> Config:
    """A run's config; `changes` are dotted keys with a double underscore: train__lr=1e-3."""
    method: dict[str, Any] = {"kind": kind}
    if kind in ("lora", "qlora"):
        method["lora"] = {"r": 4, "alpha": 8}
    plain: dict[str, Any] = {
        "name": "tiny",
        "task": task,
        "model": {"name": str(model)},
        "method": method,
        "data": {"train": [{"source": str(data)}], "max_length": 64, "packing": False},
        "train": {"max_steps": 6, "batch_size": 2, "grad_accumulation": 1, "lr": 0.01, "log_steps": 1},
        "output": {"save_steps": None},
    }
    return changed(plain, changes)


def changed(plain: dict[str, Any], changes: Mapping[str, Any]) -> Config:
    """A config with some values changed: dotted keys with a double underscore."""
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = plain
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return Config.model_validate(plain)
