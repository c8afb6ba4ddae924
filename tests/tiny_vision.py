"""Tiny random vision-language models with processors of their own, and rows with drawn images, for tests of vision.

Each is written as its family's checkpoints are on a hub: config, weights, tokenizer, chat template, preprocessor.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_run
from fastft.config.schema import Config

KINDS = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3")

# Shortened from what the families publish; tests with the real ones read ../shared/data.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% elif 'text' in c %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% if m['content'] is string %}{{ m['content'] | trim }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ c['text'] | trim }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEMPLATES = {
    "llava": VICUNA,
    "llava_next": VICUNA,
    "qwen2_vl": CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen2_5_vl": CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen3_vl": CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    "internvl": CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
    "gemma3": GEMMA,
}
SPECIALS = {
    "llava": ["<s>", "<image>"],
    "llava_next": ["<s>", "<image>"],
    "qwen": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "internvl": ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
    "gemma3": ["<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"],
}
QUESTIONS = ("What colour is it?", "Which shape do you see?", "Describe the image.", "Where is the cat?")
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}


def write_model(kind: str, folder: Path, *, tokenizer: Any = None, template: str | None = None) -> Path:
    """Write a model of a kind; tokenizer and template may be real ones, the weights are random (seed 0)."""
    import torch
    from transformers import AutoModelForImageTextToText

    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer if tokenizer is not None else write_tokenizer(kind, folder)
    words.chat_template = template or TEMPLATES[kind]
    words.save_pretrained(folder)
    config = MAKERS[kind](words, folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():  # wide enough that what an image shows reaches the answer
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def write_tokenizer(kind: str, folder: Path) -> Any:
    """A byte-level BPE tokenizer of about 320 tokens with the family's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    family = "qwen" if kind.startswith("qwen") else kind
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPECIALS[family]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(QUESTIONS, trainer)
    named: dict[str, Any] = {
        "internvl": {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        "gemma3": {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    }
    more = {"extra_special_tokens": named[family]} if family in named else {}
    bos = {"gemma3": {"bos_token": "<bos>"}, "llava": {"bos_token": "<s>"}, "llava_next": {"bos_token": "<s>"}}
    if family.startswith("llava"):  # their templates write none, and leave it to the tokenizer
        backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", backend.token_to_id("<s>"))])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>", **bos.get(family, {}), **more
    )
    fast.save_pretrained(folder)
    return fast


def _preprocessor(folder: Path, **settings: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _text(words: Any, **more: Any) -> dict[str, Any]:
    return {**TEXT, "vocab_size": len(words), "eos_token_id": words.eos_token_id, "bos_token_id": None, **more}


def _clip(**more: Any) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        **more,
    }


def _llava(words: Any, folder: Path) -> Any:
    from transformers import LlavaConfig

    _preprocessor(
        folder,
        image_processor_type="CLIPImageProcessor",
        processor_class="LlavaProcessor",
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
    )
    more = {"processor_class": "LlavaProcessor", "patch_size": 8, "num_additional_image_tokens": 1}
    (folder / "processor_config.json").write_text(json.dumps({**more, "vision_feature_select_strategy": "default"}))
    return LlavaConfig(
        text_config={"model_type": "llama", **_text(words)},
        vision_config=_clip(),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )


def _llava_next(words: Any, folder: Path) -> Any:
    from transformers import LlavaNextConfig

    grid = [[32, 64], [64, 32], [64, 64]]
    _preprocessor(
        folder,
        image_processor_type="LlavaNextImageProcessor",
        processor_class="LlavaNextProcessor",
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=grid,
    )
    more = {"processor_class": "LlavaNextProcessor", "patch_size": 8, "num_additional_image_tokens": 1}
    (folder / "processor_config.json").write_text(json.dumps({**more, "vision_feature_select_strategy": "default"}))
    return LlavaNextConfig(
        text_config={"model_type": "llama", **_text(words)},
        vision_config=_clip(),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_grid_pinpoints=grid,
    )


def _qwen_ids(words: Any) -> dict[str, int]:
    return {
        "image_token_id": words.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": words.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": words.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": words.convert_tokens_to_ids("<|vision_end|>"),
    }


def _qwen_preprocessor(folder: Path, kind: str, patch: int) -> None:
    _preprocessor(
        folder,
        image_processor_type="Qwen2VLImageProcessor",
        processor_class=kind,
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=4 * patch * patch,
        max_pixels=64 * patch * patch,
    )


def _qwen2_vl(words: Any, folder: Path) -> Any:
    from transformers import Qwen2VLConfig

    _qwen_preprocessor(folder, "Qwen2VLProcessor", 8)
    rope = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10000.0}
    return Qwen2VLConfig(
        text_config=_text(words, rope_scaling=rope, rope_parameters=rope),
        vision_config={"depth": 2, "embed_dim": 16, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 32, "patch_size": 8},
        **_qwen_ids(words),
    )


def _qwen2_5_vl(words: Any, folder: Path) -> Any:
    from transformers import Qwen2_5_VLConfig

    _qwen_preprocessor(folder, "Qwen2_5_VLProcessor", 8)
    rope = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10000.0}
    return Qwen2_5_VLConfig(
        text_config=_text(words, rope_scaling=rope, rope_parameters=rope),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        **_qwen_ids(words),
    )


def _qwen3_vl(words: Any, folder: Path) -> Any:
    from transformers import Qwen3VLConfig

    _qwen_preprocessor(folder, "Qwen3VLProcessor", 8)
    rope = {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config=_text(words, rope_scaling=rope, rope_parameters=rope, head_dim=8),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 8,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        **_qwen_ids(words),
    )


def _internvl(words: Any, folder: Path) -> Any:
    from transformers import InternVLConfig

    _preprocessor(
        folder,
        image_processor_type="GotOcr2ImageProcessor",
        processor_class="InternVLProcessor",
        size={"height": 32, "width": 32},
        crop_to_patches=False,
        min_patches=1,
        max_patches=4,
    )
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "InternVLProcessor", "image_seq_length": 4}), encoding="utf-8"
    )
    return InternVLConfig(
        text_config={"model_type": "qwen2", **_text(words)},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [32, 32],
            "patch_size": [8, 8],
        },
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        vision_feature_layer=-1,
    )


def _gemma3(words: Any, folder: Path) -> Any:
    from transformers import Gemma3Config

    _preprocessor(
        folder,
        image_processor_type="Gemma3ImageProcessor",
        processor_class="Gemma3Processor",
        size={"height": 32, "width": 32},
    )
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "Gemma3Processor", "image_seq_length": 4}), encoding="utf-8"
    )
    return Gemma3Config(
        text_config=_text(words, head_dim=8, sliding_window=64, bos_token_id=words.bos_token_id, pad_token_id=0),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
    )


MAKERS: dict[str, Callable[[Any, Path], Any]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "gemma3": _gemma3,
}

COLOURS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 220), "yellow": (230, 220, 20)}


def write_images(folder: Path, size: tuple[int, int] = (48, 40)) -> list[str]:
    """Draw one plain picture per colour; the names are those of the colours."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", size, colour).save(folder / f"{name}.png")
    return list(COLOURS)


def write_rows(folder: Path, count: int = 8) -> Path:
    """LLaVA rows about drawn images beside them: one image, two in two turns, and a row without any."""
    names = write_images(folder / "images")
    rows: list[dict[str, Any]] = []
    for n in range(count):
        first, second = names[n % 4], names[(n + 1) % 4]
        if n % 4 == 3:
            rows.append({"conversations": _turns("What is the capital of France?", "Paris")})
        elif n % 4 == 2:
            turns = [*_turns("<image>\nWhat colour is it?", first), *_turns("<image>\nAnd this one?", second)]
            rows.append({"image": [f"images/{first}.png", f"images/{second}.png"], "conversations": turns})
        else:
            turns = _turns("<image>\nWhat colour is it?", first)
            rows.append({"image": f"images/{first}.png", "conversations": turns})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def config(model: Path, data: Path, *, kind: str = "lora", **changes: Any) -> Config:
    """A vision run's config; `changes` are dotted keys with a double underscore: train__lr=1e-3."""
    method: dict[str, Any] = {"kind": kind}
    if kind in ("lora", "qlora"):
        method["lora"] = {"r": 4, "alpha": 8}
    plain: dict[str, Any] = {
        "name": "tiny",
        "task": "sft",
        "model": {"name": str(model)},
        "method": method,
        "data": {"train": [{"source": str(data)}], "max_length": 512},
        "vision": {},
        "train": {"max_steps": 4, "batch_size": 2, "grad_accumulation": 1, "lr": 0.01, "log_steps": 1},
        "output": {"save_steps": None},
    }
    return tiny_run.changed(plain, changes)
