"""The device of `--device cuda` without a GPU: its calls, its refusals, and its kernel in triton's interpreter.

That a GPU gives the bits of the CPU for any numbers is tested on one (tests/gpu/test_merge_cuda.py). Here the numbers
are such that no sum is rounded, since the interpreter's multiply-adds are not fused.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_convert_architectures import make

from fastft.convert import merge, stream
from fastft.errors import PlanError

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
    "ignore:The following .*_pattern keys did not match:RuntimeWarning",
)

IN_THE_INTERPRETER = """
import sys
from pathlib import Path
from fastft.convert import merge, stream
from fastft.convert.cuda_merge import CudaMerge

base, adapter, out, match_peft = sys.argv[1:]
calls = []

class Counted(CudaMerge):
    def merge(self, tensor, *rest):
        calls.append(tensor)
        return super().merge(tensor, *rest)

stream.check_gpu.__code__ = (lambda: None).__code__
stream._gpu = lambda: Counted("cpu")
plan = merge.plan(Path(base), [(Path(adapter), 1.0)], match_peft=match_peft == "True")
merge.execute(plan, Path(out), on_gpu=True)
assert set(calls) == set(plan.changed), (set(calls), plan.changed)
"""


@pytest.mark.parametrize("match_peft", [False, True])
@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama", {"target_modules": ["q_proj", "up_proj", "embed_tokens"]}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
        ("gpt2", {}),
        ("mixtral", {}),
    ],
)
def test_the_bits_of_the_cpu(tmp_path: Path, name: str, lora: dict[str, Any], *, match_peft: bool) -> None:
    made = make(name, tmp_path, torch.bfloat16, **lora)
    merge.execute(merge.plan(made.base, [(made.adapter, 1.0)], match_peft=match_peft), tmp_path / "cpu")
    words = [sys.executable, "-c", IN_THE_INTERPRETER, made.base, made.adapter, tmp_path / "gpu", str(match_peft)]
    done = subprocess.run(
        list(map(str, words)), env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    on_cpu, on_gpu = ((tmp_path / place / "model.safetensors").read_bytes() for place in ("cpu", "gpu"))
    assert on_cpu == on_gpu


class Broken:
    """A device that fails at one of its calls."""

    def __init__(self, at: str) -> None:
        self.at = at

    def prepare(self, *_: Any) -> None:
        if self.at == "prepare":
            raise MemoryError("out of memory")

    def merge(self, *_: Any) -> tuple[bytes, bool]:
        if self.at == "short":
            return b"", True
        raise OSError("the device is gone")

    def finish(self, _: str) -> None:
        pass


@pytest.mark.parametrize(
    ("at", "error", "message"),
    [
        ("prepare", MemoryError, "out of memory"),
        ("merge", OSError, "the device is gone"),
        ("short", ValueError, "another number of bytes"),
    ],
)
def test_a_device_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, error: type[Exception], message: str
) -> None:
    made = make("llama", tmp_path, torch.bfloat16)
    monkeypatch.setattr(stream, "_gpu", lambda: Broken(at))
    monkeypatch.setattr("fastft.convert.rewrite.check_gpu", lambda: None)
    plan = merge.plan(made.base, [(made.adapter, 1.0)])
    with pytest.raises(error, match=message):
        merge.execute(plan, tmp_path / "out", on_gpu=True)
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(tmp_path: Path) -> None:
    made = make("llama", tmp_path, torch.bfloat16)
    plan = merge.plan(made.base, [(made.adapter, 1.0)])
    with pytest.raises(PlanError, match="finds no CUDA device; --device cpu"):
        merge.execute(plan, tmp_path / "out", on_gpu=True)
    assert not (tmp_path / "out").exists()
