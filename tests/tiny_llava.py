"""Small language models with a real tokenizer, small CLIPs and pictures, to put LLaVAs together from."""

import shutil
from pathlib import Path
from typing import Any

from fastft.hub.locate import DEMO_MODEL

# What the language models are: two layers, and the demo's tokenizer of 1,280 tokens.
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1280,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def llm(kind: str, **changes: Any) -> Any:
    """A language model with random weights, fp32: llama, qwen2, qwen3, phi3, mistral, gemma2, gpt2, gpt_neox."""
    import torch
    import transformers

    torch.manual_seed(11)
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3", "mistral": "Mistral"}
    names |= {"gemma2": "Gemma2", "gpt2": "GPT2", "gpt_neox": "GPTNeoX", "gemma3_text": "Gemma3"}
    name = names[kind]
    settings = {**TEXT, **changes}
    if kind == "gpt2":
        settings = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 1280}
    if kind == "gpt_neox":
        settings = {key: value for key, value in settings.items() if key not in ("num_key_value_heads", "head_dim")}
    config = getattr(transformers, f"{name}TextConfig" if kind == "gemma3_text" else f"{name}Config")(**settings)
    made = getattr(transformers, {"gpt2": "GPT2LMHeadModel"}.get(kind, f"{name}ForCausalLM"))(config)
    return made.eval()


def write_llm(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """Save a language model with the demo's tokenizer and chat template; returns the folder."""
    llm(kind, **changes).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO_MODEL / name, folder)
    return folder


def write_clip(folder: Path, *, whole: bool = True, seed: int = 12, **changes: Any) -> Path:
    """Save a CLIP with random weights and its image processor, whole or the tower alone; returns the folder."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(seed)
    vision = {**VISION, **changes}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if whole:
        model: Any = CLIPModel(
            CLIPConfig(text_config={**text, "vocab_size": 64}, vision_config=vision, projection_dim=8)
        )
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**vision))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2)
    model.save_pretrained(folder)
    side = vision["image_size"]
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def picture(colour: str = "red", size: tuple[int, int] = (60, 40)) -> Any:
    """A circle before a grey ground."""
    from PIL import Image, ImageDraw

    drawn = Image.new("RGB", size, (120, 120, 120))
    ImageDraw.Draw(drawn).ellipse((15, 5, 45, 35), fill=colour)
    return drawn
