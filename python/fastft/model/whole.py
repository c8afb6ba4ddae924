"""A model read by transformers with every weight accounted for.

transformers draws weights that a checkpoint lacks at random and leaves out those that it has no place for, and says so
in a table that is easily overlooked. Here a missing weight is an error, and what is left out is named.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastft import console
from fastft.convert import layout
from fastft.errors import CheckpointError
from fastft.model import folder_check

_MOST_NAMES = 3
_NUMBER = re.compile(r"(?<=\.)\d{1,6}(?=\.)", re.ASCII)


def read(
    model_class: Any,
    folder: Path,
    *,
    what: str = "model",
    drawn: tuple[str, ...] = (),
    dropped: tuple[str, ...] = (),
    **how: Any,
) -> Any:
    """`from_pretrained`, and nothing missing.

    Args:
        model_class: one of transformers' Auto classes.
        folder: of the checkpoint.
        what: what errors call it.
        drawn: weights that a checkpoint of this kind lacks, and that are meant to be new.
        dropped: regular expressions of the weights that the class has no place for, and that are known to go.
        how: what `from_pretrained` takes.

    Raises:
        CheckpointError: weights are missing or of another shape; there are more layers than config.json knows; or files
            cannot be read, or fit no model.
    """
    folder_check.check_weights(folder)
    assert not layout.holds_pickles(folder), "transformers would unpickle them; see layout.without_pickles"
    with folder_check.library_errors(f"{what} {folder}: cannot be read"), _without_report():
        model, told = model_class.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **how)
    mismatched = sorted(told["mismatched_keys"], key=str)
    if mismatched:
        name, there, wanted = mismatched[0]
        raise CheckpointError(
            f"{what} {folder}: {name} is {tuple(there)} in the files, but config.json makes it {tuple(wanted)}; one of them"
            " is of another model"
        )
    missing = sorted(set(told["missing_keys"]) - set(drawn))
    if missing:
        raise CheckpointError(
            f"{what} {folder}: its files lack {len(missing)} weights of a {type(model).__name__} ({_some(missing)}); they "
            "are of another model, or incomplete"
        )
    unexpected = sorted(name for name in told["unexpected_keys"] if not any(re.search(one, name) for one in dropped))
    kinds = {_NUMBER.sub("N", name) for name in model.state_dict()}
    more = [name for name in unexpected if _NUMBER.sub("N", name) in kinds]
    if more:
        raise CheckpointError(
            f"{what} {folder}: its files hold {more[0]}, a layer that config.json does not know; the model would be cut off"
        )
    if unexpected:
        console.note(
            f"{what}: {len(unexpected)} tensors in the files are no part of a {type(model).__name__} and are not read: "
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
        text = record.getMessage()
        return "LOAD REPORT" not in text and "layers were not sharded" not in text

    logger.addFilter(keeps)
    try:
        yield
    finally:
        logger.removeFilter(keeps)
