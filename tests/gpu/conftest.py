"""Tests that need an accelerator; elsewhere they are skipped, with that reason.

`FASTFT_TEST_DEVICE=cpu` runs what can run on a CPU, to see that the tests themselves are right.
"""

import os
from collections.abc import Iterator

import pytest

# cuBLAS sums in a fixed order only with a workspace of its own; it reads this when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session", autouse=True)
def device() -> str:
    """The device that is tested: "cuda", or "cpu" where FASTFT_TEST_DEVICE says so."""
    import torch

    if os.environ.get("FASTFT_TEST_DEVICE") == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no accelerator: torch.cuda is not available")
    return "cuda"


@pytest.fixture
def needs_cuda(device: str) -> None:
    """Skip what has no meaning on a CPU."""
    if device != "cuda":
        pytest.skip("only a GPU has this")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Let torch use algorithms that sum in a fixed order, and refuse others."""
    import torch

    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
