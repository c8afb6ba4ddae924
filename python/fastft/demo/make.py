"""Makes the embedded base again, from nothing: `python -m fastft.demo.make FOLDER`.

The tokenizer is learned from the demo's text, the weights are drawn at random and trained by fastft's own recipe
`demo_scratch_full_demo_text`, then rounded to bf16. About twenty minutes on a busy core.
"""

import argparse
import json
import platform
import shutil
from pathlib import Path

from fastft import console, publish
from fastft.config import load
from fastft.demo import corpus, tokenizer

RECIPE = "demo_scratch_full_demo_text"
# 1.5 million weights. Widths are multiples of 32, and every matrix of 64, the block of NF4. A wider start (0.06; the habit
# for big models is 0.02) together with batches of half the size brought the loss at 1.2 M tokens from 1.01 to 0.88 in a
# first trial (2026-11-24, AMD EPYC); the two were not tried apart.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def write_shape(folder: Path) -> None:
    """Write all of the base but its weights: tokenizer, chat template, config.json, generation_config.json."""
    tokenizer.write(corpus.documents(), folder)
    numbers = {token: number for number, token in enumerate(tokenizer.SPECIAL_TOKENS)}
    end_of_text = numbers[tokenizer.END_OF_TEXT]
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    config = {**CONFIG, "vocab_size": len(vocabulary), "bos_token_id": None}
    _write_json(folder / "config.json", {**config, "eos_token_id": end_of_text, "pad_token_id": end_of_text})
    stops = [end_of_text, numbers[tokenizer.MESSAGE_END]]
    _write_json(folder / "generation_config.json", {"eos_token_id": stops, "pad_token_id": end_of_text})


def make(folder: Path, work: Path) -> None:
    """Write the whole base into `folder` (replaced if it is there).

    `work` takes the files of the training; if a broken-off one lies there, it goes on.
    """
    from fastft.training import run

    shape, run_folder = work / "shape", work / "run"
    resume = "auto" if run_folder.exists() else None
    if resume is None:
        shape.mkdir(parents=True, exist_ok=True)
        write_shape(shape)
    config = load.load(RECIPE, [f"model.name={shape}"]).config
    result = run.run(config, work_dir=run_folder, resume=resume)
    with publish.staged(folder, force=True) as staging:
        shutil.copytree(shape, staging, dirs_exist_ok=True)
        _round_weights(result.artifact / "model.safetensors", staging / "model.safetensors")
        num_weights = (staging / "model.safetensors").stat().st_size // 2
        readme = _readme(result.steps, result.seconds, result.loss, num_weights)
        (staging / "README.md").write_text(readme, encoding="utf-8")


def main() -> None:
    """Read the command line and make the base."""
    parser = argparse.ArgumentParser(prog="python -m fastft.demo.make", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the model goes; an old one is replaced")
    parser.add_argument("--work", type=Path, default=Path("work_dirs/demo_base"), help="where the training writes")
    arguments = parser.parse_args()
    make(arguments.folder, arguments.work)
    console.note(f"the base is in {arguments.folder}")


def _round_weights(trained: Path, rounded: Path) -> None:
    """Write the trained fp32 weights as bf16."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in load_file(trained).items()}
    save_file(weights, rounded, metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _readme(steps: int, seconds: float, loss: float, num_weights: int) -> str:
    """Where the model comes from, for whoever finds its folder."""
    return f"""# fastft's demo model

A Llama with {num_weights:,} weights (tied embeddings), made to show fine-tuning on any computer within two minutes.
It writes stories for small children and, asked in the chat form, answers like some villager. It knows nothing else.

- **Made by** fastft itself, from random weights: `make demo-base`, which runs `python -m fastft.demo.make`
  with the recipe `{RECIPE}` (task pretrain, method full).
- **Text:** {corpus.NUM_DOCUMENTS:,} documents from the templates in `fastft/demo` (seed {corpus.SEED}); no other text.
- **Training:** {steps:,} steps in {seconds:,.0f} s on {_processor()}, {_num_threads()} thread(s); last loss {loss:.3f} nats per token.
- **Licence:** Apache-2.0, like fastft. Text and weights were made for this project.
"""


def _processor() -> str:
    """The name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _num_threads() -> int:
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    main()
