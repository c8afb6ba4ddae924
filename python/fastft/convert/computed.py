"""Fills in the tensors whose arithmetic the native stream does not have, in numpy, block of rows by block of rows.

The stream has written the base's numbers in their place; this overwrites them before the result is put in place, so
that no second copy of the file is needed and memory stays bounded.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path

from fastft.convert.arithmetic import BLOCK_ELEMENTS, Arithmetic
from fastft.convert.folder import read_safetensors
from fastft.convert.numbers import rounded, values_of
from fastft.convert.plan import Dora, OutputTensor, Shard, Shift, is_computed
from fastft.convert.source import Source
from fastft.errors import CheckpointError, FileError


def fill_in(shards: Sequence[Shard], folder: Path) -> int:
    """Compute and overwrite the tensors of `shards` that are not the native stream's.

    Returns:
        How many there were.

    Raises:
        CheckpointError: a number that is not finite, or that the output's dtype cannot hold.
        FileError: the disk.
    """
    num_filled = 0
    for shard in shards:
        wanted = [tensor for tensor in shard.tensors if is_computed(tensor.operation)]
        if not wanted:
            continue
        written = read_safetensors(folder / shard.file_name)
        for tensor in wanted:
            _fill(tensor, written[tensor.name])
        num_filled += len(wanted)
    return num_filled


def _fill(tensor: OutputTensor, place: Source) -> None:
    import numpy as np

    assert isinstance(tensor.operation, Dora | Shift)
    arithmetic = Arithmetic(tensor.operation, tensor.dtype)
    num_rows, row_elements = tensor.shape[0], prod(tensor.shape[1:])
    step = max(1, BLOCK_ELEMENTS // max(1, row_elements))
    try:
        with place.file.open("r+b") as file:
            file.seek(place.offset)
            for start in range(0, num_rows, step):
                numbers = arithmetic.rows(start, min(step, num_rows - start))
                bits = rounded(numbers, tensor.dtype)
                if not np.isfinite(values_of(bits, tensor.dtype)).all():
                    raise CheckpointError(
                        f"tensor {tensor.name!r}: the result is not finite, or {tensor.dtype} cannot hold it;"
                        " try --dtype bf16 or fp32"
                    )
                file.write(bits.tobytes())
    except OSError as error:
        raise FileError(f"{place.file}: cannot be written: {error.strerror}") from error
