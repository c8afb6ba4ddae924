"""convert merge, verify and split as a user types them, on a folder of random numbers."""

import json
import sys
from pathlib import Path

import pytest

from fastft import __main__ as program

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_llama


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with `base` and `adapter` in it."""
    tiny_llama.write_base(tmp_path / "base")
    tiny_llama.write_adapter(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], typed: str) -> tuple[int, str, str]:
    code = program.main(typed.split())
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("how", ["", "--dequantized-base nf4", "--dequantized-base fp4 --double-quant"])
def test_merge_and_verify(folder: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    code, out, err = run(capsys, f"convert merge base adapter out --max-shard-size 10KB {how}")
    assert code == 0, err
    assert "14 of 21 tensors changed" in out
    assert (folder / "out" / "model.safetensors.index.json").exists()
    code, out, _ = run(capsys, f"convert verify out --base base --adapter adapter {how}")
    assert code == 0
    assert "right" in out
    code, out, _ = run(capsys, "convert verify base --base base --adapter adapter")
    assert code == 1
    assert "WRONG" in out
    code, out, _ = run(capsys, "convert verify base --base base --adapter adapter --json")
    assert code == 1
    assert json.loads(out)["good"] is False


def test_dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "convert merge base adapter out --dry-run --json --dequantized-base nf4")
    assert code == 0
    shown = json.loads(out)
    tensors = [tensor for file in shown["files"] for tensor in file["tensors"]]
    as_trained = {tensor["name"] for tensor in tensors if tensor.get("as_trained") == "nf4"}
    changed = {tensor["name"] for tensor in tensors if tensor["operation"] == "merge"}
    assert changed
    assert changed <= as_trained
    assert "model.embed_tokens.weight" not in as_trained
    assert not (folder / "out").exists()


def test_split(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "convert split base out --max-shard-size 10kb")
    assert code == 0
    assert "files" in out
    assert len(list((folder / "out").glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("convert merge base adapter out --double-quant", "--dequantized-base"),
        ("convert merge base adapter out --dequantized-base int8", "nf4"),
        ("convert merge base adapter out --max-shard-size 0", "zero"),
        ("convert verify out --base base", "--adapter"),
    ],
)
def test_wrong_words(folder: Path, capsys: pytest.CaptureFixture[str], typed: str, hint: str) -> None:
    code, out, err = run(capsys, typed)
    assert (code, out) == (2, "")
    assert hint in err
    assert not (folder / "out").exists()
