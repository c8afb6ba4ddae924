"""`fastft plan`, typed as docs/memory.md shows it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "memory.md").read_text()
# Of meta-llama/Llama-2-7b-hf, whose config.json is all that a plan reads.
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


def _typed(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_table_on_the_page(tmp_path: Path) -> None:
    block = re.search(r"```\n\$ (fastft plan .*)\n([\s\S]*?)```", PAGE)
    assert block is not None
    model = tmp_path / "meta-llama" / "Llama-2-7b-hf"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(LLAMA_2_7B))
    done = _typed(shlex.split(block[1]), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == block[2]
    assert max(len(line) for line in done.stdout.splitlines()) <= 80


def test_plain_data_and_wrong_use(tmp_path: Path) -> None:
    done = _typed(["fastft", "plan", "demo", "--json", "--vram", "2GiB"], tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["fits"] is True
    assert plan["card_bytes"] == 2 * 2**30
    parts = ("layers", "embedding", "head", "trained", "gradients", "optimizer", "working")
    assert plan["peak_bytes"] == sum(plan[f"{name}_bytes"] for name in parts)
    assert _typed(["fastft", "plan", "demo", "--gpus", "0"], tmp_path).returncode == 2
