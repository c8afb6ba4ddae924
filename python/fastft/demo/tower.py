"""The vision tower of `fastft train demo_vision`: `python -m fastft.demo.tower FOLDER` makes it again.

A CLIP tower with random weights that has seen nothing yet; `demo_vision` trains all of it. It is small enough to be
shipped (0.3 MB in bf16).
"""

import argparse
from pathlib import Path

SEED = 6
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,  # LLaVA takes the features of the last but one
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 16,  # 16 image tokens
    "projection_dim": 32,
}


def write(folder: Path) -> None:
    """Write config.json, the weights and preprocessor_config.json into `folder`."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = CLIPVisionModel(CLIPVisionConfig(**CONFIG))
        # As wide as what is seen in a patch: with CLIP's own start (0.02) the tower hardly knows where a patch lies, and
        # 22 of 24 answers were right after 60 epochs; with this one 24 (2026-11-26).
        torch.nn.init.normal_(model.embeddings.position_embedding.weight, std=0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    side = CONFIG["image_size"]
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor.save_pretrained(folder)


def main() -> None:
    """Read the command line and make the tower."""
    parser = argparse.ArgumentParser(prog="python -m fastft.demo.tower", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the tower goes")
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
