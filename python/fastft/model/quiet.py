"""Keep libraries from talking over fastft: each noise is named here with its cause.

`prepare_libraries` is called before the libraries are imported, by every road that loads weights; `prepare_environment`
alone where only a tokenizer is needed. Nothing is silenced by level for a whole
library; what is not listed here is shown.
"""

import logging
import os
import sys
import warnings
from typing import Any

# Said when a CPU could use kernels from a package that is not installed; import-time, no action for our user
# (bitsandbytes 0.50, spec training.md trap B).
_BITSANDBYTES_CPU_LOGGER = "bitsandbytes.backends.cpu.ops"


def prepare_environment() -> None:
    """Set what the libraries read when they are imported: no telemetry, no thread pool of tokenizers after a fork."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger(_BITSANDBYTES_CPU_LOGGER).setLevel(logging.ERROR)
    # peft 0.21 asks transformers 5.23 by the old name whether checkpointing is on; the answer is the same.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def prepare_libraries() -> None:
    """`prepare_environment`, and torch with bitsandbytes imported the quick way."""
    prepare_environment()
    _import_bitsandbytes()


def _import_bitsandbytes() -> None:
    """Import bitsandbytes without the 4 s of torch's compiler (spec training.md trap D).

    It decorates fallback kernels with torch.compile while it is imported, which peft and Trainer do in any case. The
    kernels that 4-bit training uses are in its C++ library.
    """
    if "bitsandbytes" in sys.modules:
        return
    import torch

    def as_it_is(function: Any = None, **_options: Any) -> Any:
        return function if function is not None else as_it_is

    compile_function = torch.compile
    torch.compile = as_it_is  # type: ignore[assignment]  # its overloads do not matter here
    try:
        import bitsandbytes  # noqa: F401 - for its effect
    finally:
        torch.compile = compile_function


def hide_loading_bars() -> None:
    """Hide transformers' bar "Loading weights"; fastft says itself what it reads."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
