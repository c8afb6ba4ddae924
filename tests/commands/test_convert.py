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
    assert shown["needs"]["disk_bytes"] == shown["total_bytes"]
    tensors = [tensor for file in shown["files"] for tensor in file["tensors"]]
    as_trained = {tensor["name"] for tensor in tensors if tensor.get("as_trained") == "nf4"}
    changed = {tensor["name"] for tensor in tensors if tensor["operation"] == "merge"}
    assert changed
    assert changed <= as_trained
    assert "model.embed_tokens.weight" not in as_trained
    assert not (folder / "out").exists()


def test_quantize_and_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "convert quantize base small --dry-run")
    assert code == 0
    assert "to nf4" in out
    assert max(len(line) for line in out.splitlines() if str(folder) not in line) <= 80
    assert not (folder / "small").exists()
    code, out, _ = run(capsys, "convert quantize base small --double-quant --blocksize 32 --skip o_proj")
    assert code == 0
    assert out.startswith("quantized into small: ")
    code, out, _ = run(capsys, "convert verify small --base base")
    assert code == 0
    assert "right" in out
    code, _, err = run(capsys, "convert quantize small smaller")
    assert code == 1
    assert "in 4 bit already" in err
    code, out, _ = run(capsys, "convert dequantize small plain --dtype fp32")
    assert code == 0
    assert out.startswith("dequantized into plain: ")
    code, out, _ = run(capsys, "convert merge small adapter out --quantize fp4")
    assert code == 0
    code, out, _ = run(capsys, "convert verify out --base small --adapter adapter")
    assert code == 0


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
        ("convert merge base adapter out --skip lm_head", "--quantize"),
        ("convert merge base adapter out --quantize nf4 --blocksize 48", "32, 64, 128"),
        ("convert verify out --adapter adapter", "--base"),
        ("convert quantize base out --quant-type int4", "nf4"),
        ("convert quantize base out --blocksize 63", "32, 64, 128"),
        ("convert quantize base out --json", "--dry-run"),
        ("convert dequantize base out --dtype int8", "bf16"),
        ("convert quantise base out", "quantize"),
    ],
)
def test_wrong_words(folder: Path, capsys: pytest.CaptureFixture[str], typed: str, hint: str) -> None:
    code, out, err = run(capsys, typed)
    assert (code, out) == (2, "")
    assert hint in err
    assert not (folder / "out").exists()
