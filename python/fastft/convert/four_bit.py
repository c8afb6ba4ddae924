"""Weights as a 4-bit training sees them: quantized to NF4 or FP4 and back, in numpy.

For merges onto what QLoRA was trained on (`--dequantized-base`). Equal bit for bit to bitsandbytes' CPU backend
(spec/formats.md section 5; checked against 0.50): blocks of consecutive numbers share a scale; double quantization
holds the scales in 8 bit.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastft.convert.numbers import as_float32
from fastft.convert.source import DTYPE_BYTES, Source, read_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = (
    0.0, 0.0052083334885537624, 0.1666666716337204, 0.25, 0.3333333432674408, 0.5, 0.6666666865348816, 1.0,
)  # fmt: skip
_SMALLEST = 1e-38
_NESTED_BLOCK = 256
# Numbers that are worked on at once when all scales of a tensor are needed.
_SCAN_ELEMENTS = 1024 * 1024


@dataclass(frozen=True, slots=True)
class FourBit:
    """How a 4-bit base is held.

    Attributes:
        type: the code book.
        double_quant: the scales are quantized too.
        blocksize: numbers that share a scale.
    """

    type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = False
    blocksize: int = 64


def code_book(kind: str) -> "Float32":
    """Give the 16 values of NF4, or the values of FP4 in order (its zero stands for both zeros), ascending, f32."""
    import numpy as np

    if kind == "nf4":
        return np.array(_NF4, np.float32)
    magnitudes = np.array(_FP4_MAGNITUDES, np.float32)
    return np.concatenate([-magnitudes[:0:-1], np.zeros(1, np.float32), magnitudes])


def scales_of(source: Source, four_bit: FourBit) -> "Float32":
    """Give the scale of each block of a tensor, through 8 bit and back with double quantization; f32."""
    import numpy as np

    step = _SCAN_ELEMENTS // four_bit.blocksize * four_bit.blocksize
    scales = np.concatenate(
        [
            _block_maxima(_flat(source, start, min(step, source.numel - start)), four_bit.blocksize)
            for start in range(0, source.numel, step)
        ]
    )
    return _through_8_bit(scales) if four_bit.double_quant else scales


def seen_in_training(source: Source, scales: "Float32", four_bit: FourBit, start: int, count: int) -> "Float32":
    """Give numbers `start` to `start + count` of the flat tensor after quantizing and dequantizing, f32.

    Args:
        source: the 16- or 32-bit weight.
        scales: from `scales_of`.
        four_bit: how it was held.
        start: first number; blocks are counted from the start of the tensor.
        count: how many.
    """
    import numpy as np

    blocksize = four_bit.blocksize
    first = start // blocksize * blocksize
    last = min(-(-(start + count) // blocksize) * blocksize, source.numel)
    numbers = _flat(source, first, last - first)
    # Codes come from the exact scales; what is multiplied back are the stored ones.
    exact = _block_maxima(numbers, blocksize)
    full = len(numbers) // blocksize * blocksize
    inverse = np.float32(1) / np.maximum(exact, np.float32(_SMALLEST))
    scaled = numbers.copy()
    scaled[:full] *= np.repeat(inverse[: full // blocksize], blocksize)
    if full < len(numbers):
        scaled[full:] /= exact[-1]
    values = code_book(four_bit.type)
    thresholds = (values[:-1] + values[1:]) / np.float32(2)
    codes = np.searchsorted(thresholds, np.clip(scaled, -1, 1), side="left")
    stored = scales[first // blocksize : first // blocksize + len(exact)]
    seen = values[codes] * np.repeat(stored, blocksize)[: len(numbers)]
    found: Float32 = seen[start - first : start - first + count]
    return found


def _flat(source: Source, start: int, count: int) -> "Float32":
    size = DTYPE_BYTES[source.dtype]
    content = read_bytes(source, start * size, count * size)
    return as_float32(content, Source(source.file, 0, source.dtype, (count,)))


def _block_maxima(numbers: "Float32", blocksize: int) -> "Float32":
    """Largest magnitude of each block; that of a last, shorter one is at least 1e-38."""
    import numpy as np

    full = len(numbers) // blocksize * blocksize
    maxima: Float32 = np.abs(numbers[:full].reshape(-1, blocksize)).max(axis=1)
    if full == len(numbers):
        return maxima
    return np.append(maxima, np.maximum(np.abs(numbers[full:]).max(), np.float32(_SMALLEST)))


def _through_8_bit(scales: "Float32") -> "Float32":
    """Quantize scales to 8 bit and back: blocks of 256 around their mean, by a table of 65,536 entries."""
    import numpy as np

    offset = _mean(scales)
    centered = scales - offset
    values = dynamic_map()
    midpoints = (values[:-1] + values[1:]) * np.float32(0.5)
    grid = np.float32(-1) + (np.float32(2) * np.arange(65536, dtype=np.float32)) / np.float32(65535)
    table = np.searchsorted(midpoints, grid, side="left")
    padded = np.zeros(-(-len(centered) // _NESTED_BLOCK) * _NESTED_BLOCK, np.float32)
    padded[: len(centered)] = centered
    blocks = padded.reshape(-1, _NESTED_BLOCK)
    maxima = np.abs(blocks).max(axis=1, keepdims=True)
    inverse = np.divide(np.float32(1), maxima, out=np.zeros_like(maxima), where=maxima > 0)
    scaled = np.clip(blocks * inverse, -1, 1)
    index = ((scaled + np.float32(1)) * np.float32(0.5) * np.float32(65535) + np.float32(0.5)).astype(np.int64)
    codes = np.where(maxima > 0, table[index], 0)
    back = (values[codes] * maxima).reshape(-1)[: len(scales)] + offset
    found: Float32 = back.astype(np.float32)
    return found


def _mean(scales: "Float32") -> "np.float32":
    """Mean of the scales; torch's own sum where it is installed, since bitsandbytes uses it."""
    import numpy as np

    try:
        import torch
    except ImportError:
        return np.float32(scales.mean(dtype=np.float64))
    return np.float32(torch.from_numpy(scales).mean().item())


def dynamic_map() -> "Float32":
    """Give the 256 values of bitsandbytes' signed dynamic map, ascending, f32.

    Source: bitsandbytes functional.create_dynamic_map; the steps are rounded as torch.linspace rounds them.
    """
    import numpy as np

    low = np.float32(0.1)
    values = [0.0, 1.0]
    for exponent in range(7):
        num_edges = 2**exponent + 1
        step = np.float64(np.float32(np.float32(1) - low) / np.float32(num_edges - 1))
        number = np.arange(num_edges)
        rising, falling = np.float64(low) + step * number, 1.0 - step * (num_edges - 1 - number)
        edges = np.where(number < num_edges // 2, rising, falling).astype(np.float32)
        means = np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / np.float32(2))
        values += [float(sign * mean) for mean in means for sign in (1, -1)]
    return np.array(sorted(values), np.float32)
