"""The tutorial road, typed as in the docs: list-cfg, copy-cfg, download, edit, check, train, pth_to_hf, merge, chat, upload.

The model has InternLM2's architecture, file names and real tokenizer, with random weights, and comes from a hub on the
loopback device; the data are real Alpaca rows.
`python tests/commands/test_tutorial.py` runs the same road and writes its transcript to docs/tutorial.md.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tests/unit")]

import hub_server  # noqa: E402 - lies beside, tests are no package

import tiny_internlm2  # noqa: E402 - likewise

MODEL = "internlm/internlm2-chat-1_8b"
COPY = "internlm2_chat_1_8b_qlora_alpaca_e3_copy.yaml"
RUN = "work_dirs/internlm2_chat_1_8b_qlora_alpaca_e3"

# (what is done and why, what is typed); a step that starts with `edit` changes lines of the copied config.
STEPS = (
    ("Find a recipe.", "fastft list-cfg -p internlm2_chat_1_8b_qlora_alpaca"),
    ("Take a copy to edit.", "fastft copy-cfg internlm2_chat_1_8b_qlora_alpaca_e3 ."),
    (
        "Fetch the model. `train` does it by itself, into the hub's cache; here it gets a folder of its own.",
        f"fastft download {MODEL} --to internlm2-chat-tiny",
    ),
    ("Edit the copy: your model's folder (or leave the hub's id), your data, and here a short run.", f"edit {COPY}"),
    (
        "Does it fit on the card? (This model is so small that its parts round to nothing.)",
        f"fastft plan {COPY} --vram 8GiB",
    ),
    ("Is the data fit to be learned from?", f"fastft check-dataset {COPY}"),
    ("Look at what the model will learn.", f"fastft log-dataset {COPY} --show masked_text"),
    ("Train.", f"fastft train {COPY}"),
    (
        "Any checkpoint becomes an adapter folder (the finished run has one in `adapter/` already).",
        f"fastft convert pth_to_hf {COPY} {RUN}/checkpoint-4 hf --dtype auto",
    ),
    ("Merge it into the original InternLM2 files.", "fastft convert merge internlm2-chat-tiny hf merged"),
    ("Is it right?", "fastft convert verify merged --base internlm2-chat-tiny --adapter hf"),
    ("Talk to the result.", 'fastft chat merged --prompt "Give three tips for staying healthy." --max-new-tokens 8'),
    (
        "Give it to others: what would be sent, and the card. `--yes` sends it.",
        f"fastft upload {RUN} me/my-adapter --base {MODEL}",
    ),
)
# Each costs the start of torch; tests/unit has tests of both.
TESTED_ELSEWHERE = ("fastft plan ", "fastft check-dataset ")
# Lines of long lists that the transcript shows.
SHOWN_LINES = {STEPS[0][1]: 8, STEPS[-1][1]: 18}

EDITS = {
    "name: internlm/internlm2-chat-1_8b": "name: internlm2-chat-tiny",
    "source: tatsu-lab/alpaca": "source: alpaca_en_demo.json",
    "max_length: 2048": "max_length: 256",
    "max_steps: null": "max_steps: 4",
    "save_steps: 500": "save_steps: 2",
    "grad_accumulation: 16": "grad_accumulation: 1",
    "max_new_tokens: 100": "max_new_tokens: 8",
}


def walk(folder: Path, shared: Path, *, whole: bool = True) -> Iterator[tuple[str, str, str]]:
    """Do each step in `folder`, without whole only those that the next ones need or nobody else tests.

    Yields:
        why, what is typed, what came out on both channels.
    """
    tiny_internlm2.write(folder / ".served", shared / "tokenizers" / "internlm2")
    rows = json.loads((shared / "instruction/alpaca/alpaca_en_demo.json").read_text())
    (folder / "alpaca_en_demo.json").write_text(json.dumps(rows[:200]))
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / ".cache"), "HF_HUB_OFFLINE": "1"}
    for why, typed in STEPS:
        if not whole and typed.startswith(TESTED_ELSEWHERE):
            continue
        if typed.startswith("edit "):
            yield why, typed, _edit(folder / typed.removeprefix("edit "))
        elif typed.startswith("fastft download "):
            with _hub(folder / ".served") as address:
                reached = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "NO_PROXY": "127.0.0.1"}
                yield why, typed, _run(typed, folder, environment | reached)
        else:
            yield why, typed, _run(typed, folder, environment)


@contextmanager
def _hub(folder: Path) -> Iterator[str]:
    """The address of a hub that has the model's files."""
    hub_server.REPOSITORIES[MODEL] = {path.name: path.read_bytes() for path in folder.iterdir()}
    try:
        with hub_server.running() as address:
            yield address
    finally:
        del hub_server.REPOSITORIES[MODEL]


def _run(typed: str, folder: Path, environment: dict[str, str]) -> str:
    words = [sys.executable, "-m", *shlex.split(typed)]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, f"{typed}\n{done.stdout}\n{done.stderr}"
    return done.stderr + done.stdout


def _edit(file: Path) -> str:
    text = file.read_text()
    for old, new in EDITS.items():
        assert old in text, f"{old} is not in\n{text}"
        text = text.replace(old, new)
    file.write_text(text)
    return "\n".join(f"- {old}\n+ {new}" for old, new in EDITS.items()) + "\n"


def test_tutorial_road(shared_data: Path, tmp_path: Path) -> None:
    said = {typed: out for _, typed, out in walk(tmp_path, shared_data, whole=False)}
    for typed, out in said.items():
        assert "Traceback" not in out, typed
    assert "internlm2_chat_1_8b_qlora_alpaca_e3" in said[STEPS[0][1]].split()
    served = {path.name: path.read_bytes() for path in (tmp_path / ".served").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "internlm2-chat-tiny").iterdir()} == served
    assert "right: it is base + adapter" in said[STEPS[-3][1]]
    assert "nothing was sent; add --yes to send it" in said[STEPS[-1][1]]
    steps = [json.loads(line) for line in (tmp_path / RUN / "metrics.jsonl").read_text().splitlines()]
    assert max(entry["step"] for entry in steps) == 4
    _merged_is_base_plus_adapter(tmp_path)


def _merged_is_base_plus_adapter(folder: Path) -> None:
    """The key rows of the fused wqkv of layer 0, recomputed in numpy from the adapter's k_proj."""
    adapter = load_file(folder / "hf/adapter_model.safetensors")
    settings = json.loads((folder / "hf/adapter_config.json").read_text())
    scale = settings["lora_alpha"] / settings["r"]
    at = "base_model.model.model.layers.0.self_attn.k_proj.lora_{}.weight"
    A_RI, B_OR = (adapter[at.format(letter)].astype(np.float32) for letter in "AB")
    name = "model.layers.0.attention.wqkv.weight"
    base, merged = (_tensor(folder / place, name) for place in ("internlm2-chat-tiny", "merged"))
    heads = tiny_internlm2.HEADS // tiny_internlm2.KV_HEADS + 2
    grouped = (merged - base).reshape(tiny_internlm2.KV_HEADS, heads, tiny_internlm2.HEAD_DIM, -1)
    keys = grouped[:, -2].reshape(B_OR.shape[0], -1)
    assert np.abs(keys).max() > 0
    np.testing.assert_allclose(keys, scale * (B_OR @ A_RI), atol=1e-6)
    assert json.loads((folder / "merged/config.json").read_text())["model_type"] == "internlm2"


def _tensor(folder: Path, name: str) -> np.ndarray:
    files = sorted(folder.glob("*.safetensors"))
    return next(found[name] for found in map(load_file, files) if name in found)


def _write_transcript(target: Path) -> None:
    import tempfile

    lines = [
        "# The tutorial road, as it ran",
        "",
        "Made by `python tests/commands/test_tutorial.py`: a real run on a tiny model with InternLM2's architecture, file names",
        "and tokenizer (random weights: only the road is shown, not a good answer) and real Alpaca rows; the hub was played by the",
        "test. `make test` runs the same, but for `plan` and `check-dataset`, which it tests elsewhere. Without a hub: `fastft train demo`.",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for why, typed, out in walk(Path(folder), REPOSITORY.parent / "shared" / "data"):
            shown = re.sub(r"\x1b\[[0-9;]*m", "", out).replace(folder, "~").rstrip()
            every = shown.splitlines()
            if len(every) > SHOWN_LINES.get(typed, len(every)):
                shown = "\n".join([*every[: SHOWN_LINES[typed]], "..."])
            lines += ["", why, "", "```console", f"$ {typed}", shown, "```"]
    target.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    _write_transcript(REPOSITORY / "docs" / "tutorial.md")
