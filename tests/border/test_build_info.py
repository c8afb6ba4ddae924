"""`build_info`, and the CPU level that FASTFT_SIMD forces."""

import os
import subprocess
import sys

import pytest

from fastft import _native

PRINT_LEVEL = "from fastft import _native; print(_native.build_info()['level'])"


def run(level: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FASTFT_SIMD": level}
    return subprocess.run(
        [sys.executable, "-c", PRINT_LEVEL], env=environment, capture_output=True, text=True, check=False
    )


def test_what_it_says() -> None:
    info = _native.build_info()
    assert set(info) == {"version", "level", "threads", "commit"}
    assert info["version"] == "0.1.0"
    assert info["level"] in {"scalar", "neon", "avx2", "avx512"}
    assert info["threads"] >= 1


def test_scalar_can_be_forced() -> None:
    assert run("scalar").stdout == "scalar\n"


@pytest.mark.parametrize("level", ["AVX2", "sse9", "1"])
def test_an_unknown_level_is_an_error(level: str) -> None:
    done = run(level)
    assert done.returncode == 1
    assert f'FASTFT_SIMD="{level}" is no CPU level; use scalar, neon, avx2 or avx512' in done.stderr
