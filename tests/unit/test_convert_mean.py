"""The mean without torch has torch's bits, for any length and number of threads."""

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from fastft.convert import mean

torch = pytest.importorskip("torch")

LENGTHS = [
    *range(1, 70), 100, 255, 256, 257, 1000, 4095, 4096, 4097, 32767, 32768, 32769, 65536, 98304, 131073, 300007, 704512,
]  # fmt: skip


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 9, 16], indirect=True)
def test_the_bits_of_torch(threads: int) -> None:
    random = np.random.default_rng(threads)
    differing = []
    for length in LENGTHS:
        numbers = np.abs(random.standard_normal(length)).astype(np.float32) * np.float32(0.05)
        if mean.mean(numbers) != float(torch.from_numpy(numbers).mean()):
            differing.append(length)
    assert mean.torch_threads() == threads
    assert differing == []


def test_the_order_matters() -> None:
    """Else the test above could not fail: the exact mean has other bits."""
    random = np.random.default_rng(0)
    arrays = [np.abs(random.standard_normal(4096)).astype(np.float32) for _ in range(50)]
    assert any(mean.mean(numbers) != float(np.float32(numbers.mean(dtype=np.float64))) for numbers in arrays)


def test_as_many_threads_as_torch_starts() -> None:
    code = "from fastft.convert import mean; print(mean.torch_threads()); import torch; print(torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    guessed, started = done.stdout.split()
    assert guessed == started
