"""What every test may use. Importing this imports neither torch nor transformers."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# One thread per test process: the machine has two cores, and sums must not depend on who else runs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach a hub; those that talk to a loopback server set these themselves, in a process of their own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tokenizers, data sets and models that lie beside the repository where it is developed."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is not there: real tokenizers and data sets cannot be read")
    return folder
