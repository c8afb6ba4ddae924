"""A model read by transformers with every weight accounted for.

transformers draws weights that a checkpoint lacks at random and leaves out those that it has no place for, and says so
in a table that is easily overlooked. Here a missing weight is an error, and what is left out is named.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastft import console
from fastft.errors import CheckpointError

_MOST_NAMES = 3


def read(
    model_class: Any, folder: Path, *, drawn: tuple[str, ...] = (), dropped: tuple[str, ...] = (), **how: Any
) -> Any:
    """`from_pretrained`, and nothing missing.

    Args:
        model_class: one of transformers' Auto classes.
        folder: of the checkpoint.
        drawn: weights that a checkpoint of this kind lacks, and that are meant to be new.
        dropped: weights that the class has no place for, and that are known to go.
        how: what `from_pretrained` takes.

    Raises:
        CheckpointError: weights are missing; or files cannot be read, or fit no model.
    """
    import torch

    try:
        with _without_report():
            model, told = model_class.from_pretrained(folder, output_loading_info=True, **how)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as cause:
        raise CheckpointError(f"model {folder}: cannot be read: {(str(cause).splitlines() or [''])[0]}") from cause
    missing = sorted(set(told["missing_keys"]) - set(drawn))
    if missing:
        raise CheckpointError(
            f"model {folder}: its files lack {len(missing)} weights of a {type(model).__name__} ({_some(missing)}); they "
            "are of another model, or incomplete"
        )
    unexpected = sorted(set(told["unexpected_keys"]) - set(dropped))
    if unexpected:
        console.note(
            f"model: {len(unexpected)} tensors in the files are no part of a {type(model).__name__} and are not read: "
            f"{_some(unexpected)}"
        )
    return model


def _some(names: list[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of missing and unexpected weights, which is told above."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keeps(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keeps)
    try:
        yield
    finally:
        logger.removeFilter(keeps)
