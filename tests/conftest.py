"""What every test may use. Importing this imports neither torch nor transformers."""

import os
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """Bytes as tokens: a token per character of ASCII, so that lengths can be counted by eye."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({sign: index for index, sign in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", pad_token="<p>")
    fast.add_tokens(["<u>", "<a>"], special_tokens=True)
    fast.chat_template = (
        "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    return fast
