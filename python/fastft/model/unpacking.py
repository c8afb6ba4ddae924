"""4-bit weights on a CPU come back as the right numbers.

bitsandbytes 0.50 on CPUs with AVX-512 takes the scales of the wrong blocks where a row is no multiple of the block size
but one of 16: a training would learn against other weights, without a word. Each width that a model has is held against
fastft's own decoder, and where the library is wrong that decoder takes its place for the rest of the process.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from fastft import console

if TYPE_CHECKING:
    import torch
    from torch import nn

_OPERATION = "dequantize_4bit"


def make_right(model: "nn.Module") -> bool:
    """Unpack one 4-bit weight of each doubtful width, and put fastft's decoder in place if one comes back wrong.

    Returns:
        whether the decoder was put in place.
    """
    import bitsandbytes
    import torch

    from fastft import native

    seen: set[int] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, bitsandbytes.nn.Linear4bit) or layer.weight.device.type != "cpu":
            continue
        packed, state = layer.weight.data, layer.weight.quant_state
        width = int(state.shape[-1])
        if width % state.blocksize == 0 or width in seen:
            continue
        seen.add(width)
        ours = native.dequantize_4bit(packed, native.QuantState.from_bitsandbytes(state))
        if torch.equal(bitsandbytes.functional.dequantize_4bit(packed, state), torch.as_tensor(ours)):
            continue
        _install()
        console.note(
            f"4 bit: bitsandbytes {bitsandbytes.__version__} unpacks rows of {width} numbers ({name}) wrongly on this "
            "CPU; fastft's own decoder takes its place"
        )
        assert torch.equal(bitsandbytes.functional.dequantize_4bit(packed, state), torch.as_tensor(ours))
        return True
    return False


@cache
def _install() -> Any:
    """Register the decoder; the library object that is given back must live as long as the process."""
    import torch

    library = torch.library.Library("bitsandbytes", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that a kernel is replaced, which is meant
        library.impl(_OPERATION, _decode, "CPU")  # type: ignore[no-untyped-call]
    return library


def _decode(  # noqa: PLR0917 - the operation's own arguments
    packed: "torch.Tensor",
    absmax: "torch.Tensor",
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: "torch.dtype",
) -> "torch.Tensor":
    """The operation of bitsandbytes: u8 [numel / 2] and f32 scales [num_blocks] -> numbers of `shape` and `dtype`."""
    import torch

    from fastft import native

    # Memory that numpy has seen cannot be freed by FSDP, which does that with gathered weights: the decoder gets copies.
    state = native.QuantState(
        quant_type="nf4" if quant_type == "nf4" else "fp4",
        blocksize=blocksize,
        dtype=str(dtype).removeprefix("torch."),
        shape=tuple(shape),
        absmax=absmax.to(torch.float32, copy=True, memory_format=torch.contiguous_format),
    )
    return native.dequantize_4bit(
        packed.clone(memory_format=torch.contiguous_format), state, threads=torch.get_num_threads()
    )
