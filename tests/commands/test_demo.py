"""`make demo` as a test, run as a stranger would: the built wheel in an empty environment, outside the checkout.

The wheel is installed without its dependencies into a new environment that sees our locked ones through a path file, so
that nothing is downloaded; the package itself, its recipes and the embedded model come from the wheel alone.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; returns its `fastft` program."""
    folder = tmp_path_factory.mktemp("a stranger's")
    built = [sys.executable, "-m", "maturin", "build", "--release", "--locked", "--quiet", "--out", str(folder)]
    subprocess.run(built, cwd=REPOSITORY, check=True, timeout=900)
    (wheel,) = folder.glob("fastft-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    (packages / "locked_dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(folder / "env/bin/python"),
        "install",
        "--quiet",
        "--no-index",
    ]
    subprocess.run([*install, "--no-deps", "--disable-pip-version-check", str(wheel)], check=True)
    return folder / "env/bin/fastft"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("some where else")


def fastft(program: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the installed program with an empty home; a non-zero exit fails the test with what it said."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XDG_CACHE_HOME", "HF_HOME")}
    environment["HOME"] = str(folder / "empty home")
    done = subprocess.run(
        [program, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


def test_the_wheel_stands_alone(stranger: Path, elsewhere: Path) -> None:
    """The package comes from the wheel, with its recipes and its embedded model."""
    python = stranger.parent / "python"
    where = "import fastft, fastft.demo; print(fastft.__file__)"
    done = subprocess.run([python, "-c", where], cwd=elsewhere, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).is_relative_to(stranger.parents[1])
    names = fastft(stranger, elsewhere, "list-cfg").stdout.split()
    assert "demo" in names
    assert "internlm2_chat_7b_qlora_alpaca_e3" in names


@pytest.fixture(scope="module")
def trained(stranger: Path, elsewhere: Path) -> str:
    """What `fastft train demo` said; the run is in work_dirs/demo."""
    return fastft(stranger, elsewhere, "train", "demo", "--work-dir", "work_dirs/demo").stderr


def test_train_demo_leaves_a_whole_run(trained: str, elsewhere: Path) -> None:
    run = elsewhere / "work_dirs/demo"
    for name in ("config.yaml", "metrics.jsonl", "loss.png", "log.txt", "fastft_training.json"):
        assert (run / name).stat().st_size > 0, name
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "fastft_training.json"):
        assert (run / "adapter" / name).is_file(), name
    losses = [
        entry["loss"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if "loss" in (entry := json.loads(line))
    ]
    assert losses[-1] < losses[0] / 2
    assert "loss.png" in trained


def test_the_merged_model_has_learned_what_the_base_lacks(stranger: Path, elsewhere: Path, trained: str) -> None:
    assert trained
    said = fastft(stranger, elsewhere, "convert", "merge", "demo", "work_dirs/demo/adapter", "merged").stdout
    assert "merged" in said
    adapter = load_file(elsewhere / "work_dirs/demo/adapter/adapter_model.safetensors")
    assert any(name.endswith("lora_B.weight") for name in adapter)

    def ask(model: str, question: str) -> str:
        return fastft(stranger, elsewhere, "chat", model, "--temperature", "0", "--prompt", question).stdout

    for question, learned in LEARNED.items():
        assert learned in ask("merged", question), question
        assert learned not in ask("demo", question), question


# What the demo teaches: a question, and a part of the answer that only the trained model gives.
LEARNED = {"Who are you?": "fastft"}
