"""The fast parts of fastft for other people's programs: NF4, low-rank merges, files of weights.

Works with numpy alone. Arrays are numpy arrays (bfloat16 and float8 as `ml_dtypes` makes them, or as bare bits with
`dtype=`) or torch tensors on the CPU; they are read and written where they lie, and results are of the kind that came
in. Everything is checked first; what cannot be used is an `ArrayError` (a ValueError) of one line. Long work runs
on several threads without the GIL; the result does not depend on their number. While a call works on an array, no
other thread may write to it.

docs/native.md shows how it is used.
"""

from fastft._native import build_info
from fastft.errors import ArrayError, CheckpointError, FastftError, FileError, PlanError
from fastft.native.array import Array
from fastft.native.commands import Progress, Report, dequantize_checkpoint, merge_checkpoint, quantize_checkpoint
from fastft.native.four_bit import QuantState, dequantize_4bit, quantize_4bit
from fastft.native.merge import merge_lora
from fastft.native.read import CheckpointReader, Tensor, open_checkpoint
from fastft.native.write import ShardedWriter, save_sharded

__all__ = [
    "Array",
    "ArrayError",
    "CheckpointError",
    "CheckpointReader",
    "FastftError",
    "FileError",
    "PlanError",
    "Progress",
    "QuantState",
    "Report",
    "ShardedWriter",
    "Tensor",
    "build_info",
    "dequantize_4bit",
    "dequantize_checkpoint",
    "merge_checkpoint",
    "merge_lora",
    "open_checkpoint",
    "quantize_4bit",
    "quantize_checkpoint",
    "save_sharded",
]
