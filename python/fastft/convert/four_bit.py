"""4-bit weights in numpy: what `verify` recomputes the native stream's numbers with.

Equal bit for bit to bitsandbytes' CPU backend (spec/formats.md section 5; checked against 0.50): blocks of consecutive
numbers share a scale; double quantization holds the scales in 8 bit, around their mean. Shares no code with the native
kernels.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastft.convert.numbers import as_float32, rounded, values_of
from fastft.convert.source import DTYPE_BYTES, Joined, Packed, QuantType, Seen, Source, read_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Float32 = NDArray[np.float32]
    UInt8 = NDArray[np.uint8]

_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
)
# The codes in ascending order of their values; FP4 has two zeros, both positive.
_ORDER = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}
_SMALLEST = 1e-38
NESTED_BLOCK = 256


@dataclass(frozen=True, slots=True)
class FourBit:
    """How weights are held in 4 bit.

    Attributes:
        type: the code book.
        double_quant: the scales are quantized too.
        blocksize: numbers that share a scale.
        weights_dtype: what the weights are rounded to before they are packed, and unpacked to; None: as in the files.
    """

    type: QuantType = "nf4"
    double_quant: bool = False
    blocksize: int = 64
    weights_dtype: str | None = None


def code_book(quant_type: str) -> "Float32":
    """Give the 16 values by their codes, f32."""
    import numpy as np

    if quant_type == "nf4":
        return np.array(_NF4, np.float32)
    magnitudes = np.array(_FP4_MAGNITUDES, np.float32)
    return np.concatenate([magnitudes, np.float32(0) - magnitudes])


def numbers_of(source: Source, start: int, count: int) -> "Float32":
    """Give numbers `start` to `start + count` of a flat F32, F16 or BF16 tensor through its lens, f32.

    Raises:
        CheckpointError: a file is cut off.
    """
    if source.lens is None or isinstance(source.lens, Joined):
        return _flat(source, start, count)
    if source.lens.transposed:
        rows, columns = source.shape
        whole = _through(source, source.lens, 0, source.numel)
        return whole.reshape(columns, rows).T.reshape(-1)[start : start + count]
    return _through(source, source.lens, start, count)


def _through(source: Source, lens: Packed | Seen, start: int, count: int) -> "Float32":
    """The same in the order of the blocks, which run over the transpose where the lens says so."""
    import numpy as np

    step = lens.blocksize * (NESTED_BLOCK if isinstance(lens, Seen) and lens.double_quant else 1)
    first = start // step * step
    last = min(-(-(start + count) // step) * step, source.numel)
    if isinstance(lens, Packed):
        found = _unpacked(source, lens, first, last - first)
    else:
        stored = replace(source, lens=None, dtype=lens.stored)
        if lens.transposed:
            numbers = np.ascontiguousarray(_flat(stored, 0, source.numel).reshape(source.shape).T).reshape(-1)
        else:
            numbers = _flat(stored, first, last - first)
        found = _seen(values_of(rounded(numbers, source.dtype), source.dtype), lens)
    return values_of(rounded(found, source.dtype), source.dtype)[start - first : start - first + count]


def _unpacked(source: Source, packed: Packed, first: int, count: int) -> "Float32":
    """Dequantize whole blocks."""
    import numpy as np

    bytes_of_codes = Source(source.file, source.offset, "U8", (-(-source.numel // 2),))
    codes = np.frombuffer(read_bytes(bytes_of_codes, first // 2, -(-count // 2)), np.uint8)
    nibbles = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:count]
    low, high = first // packed.blocksize, -(-(first + count) // packed.blocksize)
    if packed.nested is None:
        scales = _flat(packed.absmax, low, high - low)
    else:
        levels = np.frombuffer(read_bytes(packed.absmax, low, high - low), np.uint8)
        nested = _flat(packed.nested.absmax, 0, packed.nested.absmax.numel)
        places = np.arange(low, high) // NESTED_BLOCK
        scales = dynamic_map()[levels] * nested[places] + np.float32(packed.nested.offset)
    found: Float32 = code_book(packed.quant_type)[nibbles] * np.repeat(scales, packed.blocksize)[:count]
    return found


def _seen(numbers: "Float32", seen: Seen) -> "Float32":
    """Quantize and dequantize whole blocks (whole blocks of scales with double quantization)."""
    import numpy as np

    codes, exact = _coded(numbers, seen.quant_type, seen.blocksize)
    stored = exact
    if seen.double_quant:
        # Codes come from the exact scales; what is multiplied back are the stored ones.
        assert seen.offset is not None, "offsets.found comes before"
        levels, nested = codes_of_scales(exact, seen.offset)
        stored = dynamic_map()[levels] * np.repeat(nested, NESTED_BLOCK)[: len(exact)] + np.float32(seen.offset)
    found: Float32 = code_book(seen.quant_type)[codes] * np.repeat(stored, seen.blocksize)[: len(numbers)]
    return found


def codes_of(numbers: "Float32", quant_type: str, blocksize: int) -> "tuple[UInt8, Float32]":
    """Quantize whole blocks; the last of a tensor may be shorter.

    Returns:
        u8 (n/2 rounded up), two codes a byte, the first in the upper half, an odd last one followed by the code of zero;
        f32 (number of blocks), their scales.
    """
    import numpy as np

    codes, exact = _coded(numbers, quant_type, blocksize)
    if len(codes) % 2:
        codes = np.append(codes, _nearest(np.zeros(1, np.float32), quant_type))
    pairs = codes.reshape(-1, 2)
    packed: UInt8 = (pairs[:, 0] << 4 | pairs[:, 1]).astype(np.uint8)
    return packed, exact


def _coded(numbers: "Float32", quant_type: str, blocksize: int) -> "tuple[UInt8, Float32]":
    """The code of each number, and the scale of each block."""
    import numpy as np

    exact = _block_maxima(numbers, blocksize)
    full = len(numbers) // blocksize * blocksize
    inverse = np.float32(1) / np.maximum(exact, np.float32(_SMALLEST))
    scaled = numbers.copy()
    scaled[:full] *= np.repeat(inverse[: full // blocksize], blocksize)
    if full < len(numbers):
        scaled[full:] /= exact[-1]
    return _nearest(scaled, quant_type), exact


def _nearest(scaled: "Float32", quant_type: str) -> "UInt8":
    """The code of the nearest value, the lower one half-way."""
    import numpy as np

    order = np.array(_ORDER[quant_type], np.uint8)
    values = code_book(quant_type)[order]
    thresholds = (values[:-1] + values[1:]) / np.float32(2)
    found: UInt8 = order[np.searchsorted(thresholds, np.clip(scaled, -1, 1), side="left")]
    return found


def codes_of_scales(scales: "Float32", offset: float) -> "tuple[UInt8, Float32]":
    """Quantize scales to 8 bit: blocks of 256 around the offset, by a table of 65,536 entries.

    Returns:
        u8, a code for each scale; f32, the scale of each block of 256.
    """
    import numpy as np

    centered = scales - np.float32(offset)
    values = dynamic_map()
    midpoints = (values[:-1] + values[1:]) * np.float32(0.5)
    grid = np.float32(-1) + (np.float32(2) * np.arange(65536, dtype=np.float32)) / np.float32(65535)
    table = np.searchsorted(midpoints, grid, side="left").astype(np.uint8)
    padded = np.zeros(-(-len(centered) // NESTED_BLOCK) * NESTED_BLOCK, np.float32)
    padded[: len(centered)] = centered
    blocks = padded.reshape(-1, NESTED_BLOCK)
    maxima = np.abs(blocks).max(axis=1, keepdims=True)
    inverse = np.divide(np.float32(1), maxima, out=np.zeros_like(maxima), where=maxima > 0)
    scaled = np.clip(blocks * inverse, -1, 1)
    index = ((scaled + np.float32(1)) * np.float32(0.5) * np.float32(65535) + np.float32(0.5)).astype(np.int64)
    codes = np.where(maxima > 0, table[index], np.uint8(0)).reshape(-1)[: len(scales)]
    return codes, maxima.reshape(-1)


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
