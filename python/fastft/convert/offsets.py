"""The means that double quantization needs before a file can be laid out.

Scales in 8 bit are held around their mean, and the mean stands in a text beside each weight: so all numbers of a tensor
must have been seen once before the first byte is written. The native stream reads (and merges) them for it and writes
nothing; the pages stay in memory for the second reading where there is room.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastft import _native, console
from fastft.convert.four_bit import FourBit
from fastft.convert.mean import mean
from fastft.convert.plan import (
    Bytes,
    Cast,
    Copy,
    Numbers,
    OutputTensor,
    Quantize,
    ScalesOf,
    Shard,
    native_json,
    with_sources,
)
from fastft.convert.quantized import packed
from fastft.convert.source import Seen, Source


def found(tensors: Sequence[OutputTensor]) -> list[OutputTensor]:
    """Give the same tensors with every offset known.

    Raises:
        CheckpointError, PlanError, FileError: what the stream finds wrong with the numbers.
    """
    unknown = {
        source
        for tensor in tensors
        for source in with_sources(tensor.operation)[1]
        if isinstance(source.lens, Seen) and source.lens.double_quant and source.lens.offset is None
    }
    wanted = [tensor for tensor in tensors if _waits(tensor)]
    total = sum(source.nbytes for source in unknown) + sum(_nbytes(tensor) for tensor in wanted)
    if total == 0:
        return list(tensors)
    done = 0
    known: dict[Source, Source] = {}
    with console.progress("looking at the scales", total, "B") as advance:
        for source in sorted(unknown, key=lambda source: (source.file, source.offset)):
            lens = source.lens
            assert isinstance(lens, Seen)
            stored = replace(source, lens=None, dtype=lens.stored)
            plain = Copy(stored) if stored.dtype == source.dtype else Cast(stored)
            four_bit = FourBit(lens.quant_type, blocksize=lens.blocksize)
            offset = _offset(plain, source.dtype, source.shape, four_bit, transposed=lens.transposed)
            known[source] = replace(source, lens=replace(lens, offset=offset))
            advance(done := done + source.nbytes)
        made: list[OutputTensor] = []
        texts: dict[str, OutputTensor] = {}
        for tensor in tensors:
            operation = with_sources(tensor.operation, known)[0]
            if isinstance(operation, Quantize) and _waits(tensor):
                four_bit = replace(operation.four_bit, double_quant=False)
                offset = _offset(
                    operation.of, operation.dtype, operation.shape, four_bit, transposed=operation.transposed
                )
                whole = packed(
                    tensor.name,
                    operation.of,
                    operation.dtype,
                    operation.shape,
                    operation.four_bit,
                    transposed=operation.transposed,
                    offset=offset,
                )
                texts |= {part.name: part for part in whole}
                advance(done := done + _nbytes(tensor))
            made.append(texts.get(tensor.name, replace(tensor, operation=operation)))
    return made


def _waits(tensor: OutputTensor) -> bool:
    operation = tensor.operation
    return isinstance(operation, Quantize) and operation.four_bit.double_quant and operation.offset is None


def _nbytes(tensor: OutputTensor) -> int:
    assert isinstance(tensor.operation, Quantize)
    return OutputTensor(tensor.name, tensor.operation.dtype, tensor.operation.shape, tensor.operation.of).nbytes


def _offset(of: Numbers, dtype: str, shape: tuple[int, ...], four_bit: FourBit, *, transposed: bool) -> float:
    """Have the stream make the numbers, and take the mean of their scales."""
    import numpy as np

    whole = packed("scanned", of, dtype, shape, four_bit, transposed=transposed)
    shard = Shard("nothing-is-written", tuple(part for part in whole if not isinstance(part.operation, Bytes)))
    assert any(isinstance(part.operation, ScalesOf) for part in shard.tensors)
    return mean(np.frombuffer(_native.block_maxima(native_json([shard], Path("/"))), "<f4"))
