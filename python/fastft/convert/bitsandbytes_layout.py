"""The layout in which transformers saves weights that bitsandbytes holds in 4 bit (spec/formats.md 4.3 and 4.4).

A quantized weight `X.weight` is packed codes with companions: its scales, the code books, and a JSON text that says the
rest. `unpacked` lets the house read such a folder as plain numbers; `quantized` plans the way there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

from fastft.convert.four_bit import NESTED_BLOCK, FourBit, code_book, dynamic_map
from fastft.convert.json_file import parse_object
from fastft.convert.source import CONFIG_DTYPES, Nested, Packed, QuantType, Source, read_bytes
from fastft.errors import CheckpointError

# Models whose linear layers are transformers' Conv1D: the weight is stored as (in, out), and its transpose is quantized.
CONV1D_MODELS = frozenset({"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})

STATE = ".quant_state.bitsandbytes__"
_DTYPES = {word: dtype for dtype, word in CONFIG_DTYPES.items()}
_LONGESTSTATE_BYTES = 64 * 1024
BLOCKSIZES = tuple(2**power for power in range(5, 13))
# Any of them holds the codes; the bytes are the same.
_STORAGES = ("U8", "BF16", "F16", "F32")

# Makes the error that names the tensor.
Refuse = Callable[[str], CheckpointError]


@dataclass(frozen=True, slots=True)
class _State:
    """What the JSON text beside a packed weight says."""

    quant_type: QuantType
    blocksize: int
    dtype: str
    shape: tuple[int, ...]
    offset: float | None


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Give the quantization block of a config.json that says bitsandbytes 4 bit; None for all others."""
    block = config.get("quantization_config")
    if not isinstance(block, dict) or block.get("quant_method") != "bitsandbytes":
        return None
    return block if block.get("load_in_4bit") or block.get("_load_in_4bit") else None


def config_block(four_bit: FourBit, dtype: str, skip: tuple[str, ...] | None) -> dict[str, Any]:
    """Make the quantization block of config.json, as transformers writes it.

    Args:
        four_bit: how the weights are held.
        dtype: of the products, as safetensors names it.
        skip: modules that stay as they are; None: transformers' default.
    """
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": CONFIG_DTYPES[dtype],
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": four_bit.type,
        "bnb_4bit_use_double_quant": four_bit.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if skip is None else list(skip),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }


def is_packed(tensors: Mapping[str, Source]) -> bool:
    """Tell whether some of the tensors are 4-bit codes."""
    return any(STATE in name for name in tensors)


def unpacked(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Source]) -> dict[str, Source]:
    """See a folder's 4-bit weights as the numbers that they stand for.

    Args:
        folder: for messages.
        config: config.json.
        tensors: what the files hold.

    Returns:
        The weights of the model, in the order of the files; the companions are no tensors of their own any more.

    Raises:
        CheckpointError: a companion is missing, left over, or does not fit.
    """
    companions: dict[str, dict[str, Source]] = {}
    for name, source in tensors.items():
        base, separator, _ = name.partition(".weight.")
        if separator:
            companions.setdefault(f"{base}.weight", {})[name.removeprefix(f"{base}.weight")] = source
    found: dict[str, Source] = {}
    transposed = config.get("model_type") in CONV1D_MODELS
    for name, source in tensors.items():
        if name in companions:
            found[name] = _numbers(folder, name, source, companions.pop(name), transposed=transposed)
        elif ".weight." not in name:
            found[name] = source
    if companions:
        name, left = next(iter(companions.items()))
        raise CheckpointError(f"{folder}: holds {name}{next(iter(left))}, but no tensor {name!r}")
    return found


def _numbers(folder: Path, name: str, codes: Source, companions: Mapping[str, Source], *, transposed: bool) -> Source:
    """See one weight as its numbers."""

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(f"{folder}: the 4-bit tensor {name!r}: {reason}")

    states = [key for key in companions if key.startswith(STATE)]
    if len(states) != 1 or ".absmax" not in companions or ".quant_map" not in companions:
        raise refuse(
            f"of its companions there are {', '.join(sorted(companions))}; absmax, quant_map and one quant_state"
        )
    state = _state(companions[states[0]], f"{folder}: {name}{states[0]}", refuse)
    expected = {".absmax", ".quant_map", states[0]}
    if state.offset is not None:
        expected |= {".nested_absmax", ".nested_quant_map"}
    if set(companions) != expected or not states[0].endswith(f"__{state.quant_type}"):
        raise refuse(f"its companions are {', '.join(sorted(companions))}; {', '.join(sorted(expected))} belong to it")
    count = prod(state.shape)
    num_blocks = -(-count // state.blocksize)
    if codes.dtype not in _STORAGES or codes.nbytes != -(-count // 2):
        raise refuse(f"{codes.dtype} {codes.shape} does not hold the codes of {state.shape}")
    _check_book(companions[".quant_map"], code_book(state.quant_type), refuse)
    absmax, nested = companions[".absmax"], None
    if state.offset is None:
        _check_scales(absmax, "F32", num_blocks, refuse)
    else:
        _check_scales(absmax, "U8", num_blocks, refuse)
        _check_scales(companions[".nested_absmax"], "F32", -(-num_blocks // NESTED_BLOCK), refuse)
        _check_book(companions[".nested_quant_map"], dynamic_map(), refuse)
        nested = Nested(companions[".nested_absmax"], state.offset)
    turned = transposed and len(state.shape) == 2
    lens = Packed(state.quant_type, state.blocksize, absmax, nested, turned)
    return Source(codes.file, codes.offset, state.dtype, state.shape[::-1] if turned else state.shape, lens)


def _state(source: Source, where: str, refuse: Refuse) -> _State:
    """Read the JSON text of a packed weight; every value in it is checked."""
    if source.dtype != "U8" or source.nbytes > _LONGESTSTATE_BYTES:
        raise refuse(f"its quant_state is {source.dtype} {source.shape}, no short text")
    said = parse_object(read_bytes(source), where)
    shape, offset = said.get("shape"), said.get("nested_offset")
    problems = {
        "quant_type": said.get("quant_type") in ("nf4", "fp4"),
        "blocksize": type(said.get("blocksize")) is int and said["blocksize"] in BLOCKSIZES,
        "dtype": isinstance(said.get("dtype"), str) and said["dtype"] in _DTYPES,
        "shape": isinstance(shape, list) and bool(shape) and all(type(size) is int and size > 0 for size in shape),
        "nested_offset": offset is None or (type(offset) in (float, int) and isfinite(offset)),
        "nested_blocksize": offset is None or said.get("nested_blocksize") == NESTED_BLOCK,
        "nested_dtype": offset is None or said.get("nested_dtype") == "float32",
    }
    wrong = [key for key, right in problems.items() if not right]
    if wrong:
        raise refuse(f"its quant_state says {wrong[0]} = {said.get(wrong[0])!r}, which is not known")
    return _State(
        said["quant_type"],
        said["blocksize"],
        _DTYPES[said["dtype"]],
        tuple(said["shape"]),
        None if offset is None else float(offset),
    )


def _check_scales(source: Source, dtype: str, count: int, refuse: Refuse) -> None:
    if source.dtype != dtype or source.numel != count:
        raise refuse(f"its scales are {source.dtype} {source.shape}; {dtype} of {count} are needed")


def _check_book(source: Source, values: Any, refuse: Refuse) -> None:
    import numpy as np

    stored = source.dtype == "F32" and source.numel == len(values)
    if not stored or not np.array_equal(np.frombuffer(read_bytes(source), "<f4"), values):
        raise refuse("its code book is not bitsandbytes' own; such values cannot be read")
