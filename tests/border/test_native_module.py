"""`fastft.native` as a module: what it imports, what works with numpy alone, other Pythons, other threads."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fastft import native

PACKAGE = Path(native.__file__).resolve().parents[2]


def run(code: str, *words: str, python: str = sys.executable) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    done = subprocess.run([python, "-c", code, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_is_light() -> None:
    heavy = run("import sys, fastft.native; print(sorted({name.split('.')[0] for name in sys.modules}))")
    loaded = set(json.loads(heavy.replace("'", '"')))
    assert "numpy" in loaded
    assert not loaded & {
        "torch",
        "transformers",
        "peft",
        "bitsandbytes",
        "safetensors",
        "pydantic",
        "rich",
        "ml_dtypes",
        "ruamel",
    }


ALONE = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "ml_dtypes", "safetensors", "pydantic", "rich", "peft", "huggingface_hub", "ruamel", "fire", "yaml"}:
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Blocked())
import numpy as np
from fastft import native

x = np.random.default_rng(0).standard_normal((64, 128), np.float32)
packed, state = native.quantize_4bit(x, double_quant=True)
back = native.dequantize_4bit(packed, state)
assert back.dtype == np.float32 and np.abs(back - x).max() < 0.16 * np.abs(x).max()
bits = (x.view(np.uint32) >> 16).astype(np.uint16)
packed_bits, state_bits = native.quantize_4bit(bits, dtype="bfloat16")
try:
    native.dequantize_4bit(packed_bits, state_bits)
except native.ArrayError as problem:
    assert "numpy has no bfloat16; install ml_dtypes" in str(problem), problem
else:
    raise AssertionError("bfloat16 came from nowhere")
A, B = np.ones((2, 128), np.float32), np.ones((64, 2), np.float32)
assert np.array_equal(native.merge_lora(x, A, B, 0.5), x + np.float32(1))
native.merge_lora(bits, A, B, 0.5, dtype="bfloat16", out=bits)
with native.ShardedWriter(sys.argv[1] + "/base") as writer:
    writer.add("model.layers.0.mlp.up_proj.weight", bits, dtype="bfloat16")
    writer.add("w", packed)
    for name, tensor in state.to_tensors("w").items():
        writer.add(name, tensor)
    (writer.folder / "config.json").write_text("{}")
reader = native.open_checkpoint(sys.argv[1] + "/base", bits=True)
assert np.array_equal(native.dequantize_4bit(reader["w"], native.QuantState.from_tensors("w", reader)), back)
assert reader["model.layers.0.mlp.up_proj.weight"].dtype == np.uint16
print(native.build_info()["version"])
"""


def test_numpy_alone_is_enough(tmp_path: Path) -> None:
    assert run(ALONE, str(tmp_path)) == "0.1.0"


def other_pythons() -> list[str]:
    """Pythons of another minor version, the newest first: on the path, and where pyenv keeps its own."""
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    minors = [f"3.{minor}" for minor in range(20, 10, -1) if f"3.{minor}" != own]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{minor}") for minor in minors]
    found += [str(path) for minor in minors for path in pyenv.glob(f"{minor}.*/bin/python")]
    return [python for python in found if python is not None and works(python)]


def works(python: str) -> bool:
    done = subprocess.run(
        [python, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() == "True"


OTHER = """
import array, json, sys
from fastft import _native
source, packed, absmax = array.array("f", [0.5, -1.0, 0.25, 1.0]), bytearray(2), array.array("f", [0.0])
_native.quantize_4bit(memoryview(source).cast("B"), "float32", packed, absmax, quant_type="nf4", blocksize=64)
target = bytearray(16)
_native.dequantize_4bit(packed, absmax, target, "float32", quant_type="nf4", blocksize=64)
print(json.dumps([_native.build_info()["version"], packed.hex(), memoryview(target).cast("f").tolist(), _native.__file__]))
"""


def test_another_python_takes_the_same_module() -> None:
    """The module is built against the stable interface of 3.11, so one file serves all."""
    others = other_pythons()
    if not others:
        pytest.skip("there is no other Python >= 3.11 on this machine")
    expected = json.loads(run(OTHER))
    # 0.5 and 0.25 lie nearest to the NF4 values 0.4407 (12) and 0.2461 (10); -1 and 1 are values themselves (0, 15).
    assert expected[1] == "c0af"
    for python in others:
        assert json.loads(run(OTHER, python=python)) == expected, python


def test_other_threads_run_meanwhile() -> None:
    """The work does not hold the GIL: another thread counts on, though Python itself never takes the GIL from a thread."""
    x = np.zeros(1 << 24, np.float32)
    packed, state = native.quantize_4bit(x)
    out = np.empty_like(x)
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1
            time.sleep(0)

    counter = threading.Thread(target=count)
    counter.start()
    switch_interval_s = sys.getswitchinterval()
    try:
        while counted[0] == 0:
            time.sleep(0.001)
        sys.setswitchinterval(1000)
        seen = 0
        for _ in range(20):
            before = counted[0]
            native.dequantize_4bit(packed, state, out=out, threads=1)
            seen += counted[0] > before
    finally:
        sys.setswitchinterval(switch_interval_s)
        stop.set()
        counter.join()
    assert seen > 0


def test_threads_may_call_at_the_same_time() -> None:
    x = np.random.default_rng(1).standard_normal(300_000, np.float32)
    expected = native.quantize_4bit(x)[0]
    results: list[bool] = []

    def work() -> None:
        results.extend(np.array_equal(native.quantize_4bit(x)[0], expected) for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 40


def test_build_info() -> None:
    info = native.build_info()
    assert set(info) == {"version", "level", "threads", "commit"}


def test_everything_said_to_be_there_is() -> None:
    assert sorted(native.__all__) == native.__all__
    for name in native.__all__:
        assert getattr(native, name) is not None
