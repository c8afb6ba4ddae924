"""Code that comes with a model is not run by any command unless `model.trust_remote_code` is true."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_llama
from fastft import demo

BASE = Path(demo.__file__).parent / "base"
CLASSES = {
    "AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", None], "AutoProcessor": "evil.Processor",
}  # fmt: skip
COMMANDS = {
    "check-dataset": ["check-dataset", "demo", "model.name=model"],
    "plan": ["plan", "demo", "model.name=model"],
    "merge": ["convert", "merge", "model", "adapter", "out"],
    "quantize": ["convert", "quantize", "model", "out"],
    "verify": ["convert", "verify", "model", "--base", "model", "--adapter", "adapter"],
    "split": ["convert", "split", "model", "out", "--max-shard-size", "1MB"],
    "pth_to_hf": ["convert", "pth_to_hf", "demo", "pytorch_model.bin", "out", "model.name=model"],
    "chat": ["chat", "model", "--prompt", "Who are you?", "--max-new-tokens", "2"],
    "train": ["train", "demo", "model.name=model", "--work-dir", "run", "train.max_steps=1"],
}


def _set(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _lay_trap(folder: Path, **config: object) -> None:
    """Put code beside a model that leaves the file `ran` where it is run, and name it in every `auto_map`."""
    model = folder / "model"
    shutil.copytree(BASE, model)
    code = (
        f"open({str(folder / 'ran')!r}, 'w').write('x')\nclass Config: pass\nModel = Tokenizer = Processor = Config\n"
    )
    (model / "evil.py").write_text(code)
    _set(model / "config.json", auto_map=CLASSES, **config)
    _set(model / "tokenizer_config.json", auto_map=CLASSES)
    (model / "processor_config.json").write_text(json.dumps({"auto_map": CLASSES, "processor_class": "Processor"}))
    tiny_llama.write_adapter(folder / "adapter", auto_mapping={"base_model_class": "Model", "parent_library": "evil"})


def _typed(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    # The model's folder is on no path: only what is asked to run its code can.
    return subprocess.run(
        [sys.executable, "-m", "fastft", *words], cwd=folder, capture_output=True, text=True, timeout=500, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def _check(command: str, folder: Path) -> None:
    done = _typed(COMMANDS[command], folder)
    assert not (folder / "ran").exists(), done.stderr
    assert "Traceback" not in done.stderr
    # Done, or refused in fastft's own words.
    assert done.returncode == 0 or (done.returncode == 1 and "error: " in done.stderr), done.stderr


@pytest.mark.parametrize("command", ["check-dataset", "plan", "merge", "quantize", "verify", "split", "pth_to_hf"])
def test_nothing_runs_it(tmp_path: Path, command: str) -> None:
    _lay_trap(tmp_path)
    _check(command, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_runs_it_where_the_kind_is_unknown(tmp_path: Path, command: str) -> None:
    """The kind of model is one that only its own code knows, so that no class of transformers stands in for it."""
    _lay_trap(tmp_path, model_type="evil", architectures=["Model"])
    _check(command, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["chat", "train"])
def test_nor_does_what_loads_the_model(tmp_path: Path, command: str) -> None:
    _lay_trap(tmp_path)
    _check(command, tmp_path)


def test_the_trap_springs_where_it_is_trusted(tmp_path: Path) -> None:
    """Else the tests above would hold for any folder."""
    _lay_trap(tmp_path, model_type="evil")
    done = _typed(["check-dataset", "demo", "model.name=model", "model.trust_remote_code=true"], tmp_path)
    assert (tmp_path / "ran").exists(), done.stderr
