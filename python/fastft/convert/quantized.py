"""Which tensors of a plan become 4-bit, and what each becomes: for `convert quantize` and `convert merge --quantize`.

transformers decides by the modules of the model: every linear layer but the head and what is tied to it. For the plain
decoders in `_PLAIN` the names in the files say that as well (a test holds them against transformers); for other models
the class is built without weights, which costs the import of torch; and for a model that runs its own code the names of
its tensors must do.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from fastft import spelling
from fastft.convert.bitsandbytes_layout import STATE
from fastft.convert.folder import Checkpoint
from fastft.convert.four_bit import NESTED_BLOCK, FourBit, code_book, dynamic_map
from fastft.convert.plan import Bytes, Numbers, OutputTensor, Quantize, ScalesOf
from fastft.convert.size import readable
from fastft.convert.source import CONFIG_DTYPES, DTYPE_BYTES, FLOATS
from fastft.convert.tied import find_tied, is_embedding
from fastft.errors import PlanError, UsageError

# Ends of the names of heads, where the class of the model is not known.
_HEADS = ("lm_head.weight", "output.weight", "embed_out.weight", "score.weight")
# Decoders whose every matrix in a layer is an nn.Linear of the same name, and nothing else is but the head.
_PLAIN = frozenset({
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
    "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
})  # fmt: skip
_OUTSIDE_LAYERS = frozenset({"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"})
_IN_LAYER = re.compile(r"model\.layers\.\d{1,6}\.(self_attn|mlp|\w*norm)(\.\w+)?\.(weight|bias)", re.ASCII)
# A quarter of the weights and more in 16 bit is worth a word.
_MUCH = 0.25


@dataclass(frozen=True, slots=True)
class Layers:
    """The linear layers of a base.

    Attributes:
        tensors: names in the files, of those that become 4-bit; whether the transpose is quantized.
        skip: modules that stay, for config.json; None: transformers' default.
        notes: what the user should know.
    """

    tensors: Mapping[str, bool]
    skip: tuple[str, ...] | None
    notes: tuple[str, ...] = ()


def layers(base: Checkpoint, skip: Sequence[str] = ()) -> Layers:
    """Choose the tensors that transformers itself would hold in 4 bit.

    Args:
        base: the model.
        skip: further modules that stay as they are, by names, ends of names or patterns, as transformers matches them.

    Raises:
        PlanError: a linear layer lies in the files in pieces or fused with others, where transformers could not read its
            4-bit form back; or there is no linear layer.
        UsageError: `skip` names something that is no linear layer.
    """
    if base.config.get("auto_map"):
        found = _by_names(base, skip)
    else:
        found = _by_plain_names(base, skip) or _by_model(base, skip)
    if not found.tensors:
        raise PlanError(f"{base.folder}: no linear layer is left that could be quantized")
    kept = sum(source.nbytes for name, source in base.tensors.items() if name not in found.tensors)
    if kept < _MUCH * base.num_bytes:
        return found
    note = f"{readable(kept)} of {readable(base.num_bytes)} stay as they are: transformers holds linear layers in 4 bit"
    experts = any(".experts." in name for name in base.tensors if name not in found.tensors)
    note += ", not the experts of a layer, which are one parameter" if experts else ", not embeddings and heads"
    return Layers(found.tensors, found.skip, (*found.notes, note))


def held_in_training(base: Checkpoint, skipped: Collection[str]) -> set[str] | None:
    """Find the tensors that a QLoRA training of a vision-language model held in 4 bit.

    Its linear layers lie in several models at once, beside tables that look like them (positions), and `skipped` has
    their names as modules, which differ from those of the files: only the class knows.

    Returns:
        Names in the files; None for a model of which the names say enough, or whose class is not known here.
    """
    if base.config.get("auto_map") or not isinstance(base.config.get("vision_config"), dict):
        return None
    from fastft.convert.names_transformers import ModelNames, build_model

    shapes = {name: source.shape for name, source in base.tensors.items()}
    return ModelNames(shapes, build_model(base.config, None)).linear_files(skipped)


def quantized(tensors: Sequence[OutputTensor], chosen: Mapping[str, bool], four_bit: FourBit) -> list[OutputTensor]:
    """Put the 4-bit form in the place of each chosen tensor of a plan."""
    made: list[OutputTensor] = []
    for tensor in tensors:
        if tensor.name not in chosen:
            made.append(tensor)
            continue
        operation = tensor.operation
        assert not isinstance(operation, Quantize | ScalesOf | Bytes)
        if tensor.dtype not in FLOATS:
            raise PlanError(f"{tensor.name!r} is {tensor.dtype}; only {', '.join(FLOATS)} can be quantized")
        made += packed(tensor.name, operation, tensor.dtype, tensor.shape, four_bit, transposed=chosen[tensor.name])
    return made


def packed(
    name: str,
    of: Numbers,
    dtype: str,
    shape: tuple[int, ...],
    four_bit: FourBit,
    *,
    transposed: bool = False,
    offset: float | None = None,
) -> list[OutputTensor]:
    """Make the tensors that a quantized weight becomes (spec/formats.md 4.3).

    Args:
        name: of the weight.
        of: makes its numbers.
        dtype: of the numbers.
        shape: of the numbers.
        four_bit: how they are quantized.
        transposed: the transpose is.
        offset: the mean of the scales. While it is not known, the text beside the weight says 0.5, and may have another
            length later.
    """
    count = prod(shape)
    num_blocks = -(-count // four_bit.blocksize)
    state: dict[str, Any] = {
        "quant_type": four_bit.type,
        "blocksize": four_bit.blocksize,
        "dtype": CONFIG_DTYPES[dtype],
        "shape": list(shape[::-1] if transposed else shape),
    }
    made = [
        OutputTensor(name, "U8", (-(-count // 2), 1), Quantize(of, dtype, shape, four_bit, transposed, offset)),
        OutputTensor(f"{name}.absmax", "U8" if four_bit.double_quant else "F32", (num_blocks,), ScalesOf(name)),
        _given(f"{name}.quant_map", "F32", code_book(four_bit.type).astype("<f4").tobytes()),
    ]
    if four_bit.double_quant:
        num_nested = -(-num_blocks // NESTED_BLOCK)
        made += [
            OutputTensor(f"{name}.nested_absmax", "F32", (num_nested,), ScalesOf(name, nested=True)),
            _given(f"{name}.nested_quant_map", "F32", dynamic_map().astype("<f4").tobytes()),
        ]
        known = 0.5 if offset is None else offset
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": known}
    return [*made, _given(f"{name}{STATE}{four_bit.type}", "U8", json.dumps(state).encode())]


def _given(name: str, dtype: str, content: bytes) -> OutputTensor:
    return OutputTensor(name, dtype, (len(content) // DTYPE_BYTES[dtype],), Bytes(content))


def _by_plain_names(base: Checkpoint, skip: Sequence[str]) -> Layers | None:
    """Choose by the names, for models of which they say all; None: only the model's class knows."""
    plain = base.config.get("architectures") in [[name] for name in _PLAIN]
    known = all(name in _OUTSIDE_LAYERS or _IN_LAYER.fullmatch(name) for name in base.tensors)
    if not plain or not known:
        return None
    paths = [
        name.removesuffix(".weight")
        for name, source in base.tensors.items()
        if name.startswith("model.layers.") and name.endswith(".weight") and len(source.shape) == 2
    ]
    # What transformers leaves by itself: the head, what is tied to it, and the last module, which is one of them.
    tied = find_tied(base.config, base.tensors) is not None
    default = {"lm_head", "model.embed_tokens", "model.norm"} if tied else {"lm_head"}
    _check_skip(skip, [*paths, "lm_head"], base.config["architectures"][0])
    tensors = {f"{path}.weight": False for path in paths if not any(_matches(pattern, path) for pattern in skip)}
    return Layers(tensors, tuple(sorted({*default, *skip})) if skip else None)


def _matches(pattern: str, path: str) -> bool:
    """Tell whether transformers takes `pattern` for (the beginning, at a dot, or the end of) a module's path.

    Source: transformers 5.23, quantizers/quantizers_utils.py.
    """
    return re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", path) is not None or path.endswith(pattern)


def _check_skip(skip: Sequence[str], paths: Sequence[str], what: str) -> None:
    """Refuse a pattern that matches no linear layer.

    Raises:
        UsageError: naming the nearest.
    """
    for pattern in skip:
        try:
            known = any(_matches(pattern, path) for path in paths)
        except re.error as error:
            raise UsageError(f"--skip {pattern}: is no regular expression: {error}") from error
        if not known:
            ends = {path.rpartition(".")[2] for path in paths}
            near = spelling.nearest(pattern, [*sorted(ends), *paths], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"--skip {pattern}: no linear layer of {what} has that name{hint}")


def _by_model(base: Checkpoint, skip: Sequence[str]) -> Layers:
    from fastft.convert.names_transformers import ModelNames, build_model

    try:
        model = build_model(base.config, None)
    except PlanError as error:
        raise PlanError(f"{base.folder}: which layers are linear only the model's class says, and {error}") from error
    names = ModelNames({name: source.shape for name, source in base.tensors.items()}, model)
    default = names.kept_modules()
    _check_skip(skip, names.linear_modules(), type(model).__name__)
    kept = tuple(sorted({*default, *skip})) if skip else None
    return Layers(names.linear_tensors(kept), kept)


def _by_names(base: Checkpoint, skip: Sequence[str]) -> Layers:
    """Take every matrix that is no embedding, no head and no norm."""

    def stays(name: str) -> bool:
        path = name.removesuffix(".weight")
        return is_embedding(name) or name.endswith(_HEADS) or "norm" in path.lower() or path.endswith(tuple(skip))

    tensors = {
        name: False
        for name, source in base.tensors.items()
        if name.endswith(".weight") and len(source.shape) == 2 and source.dtype in FLOATS and not stays(name)
    }
    heads = {name.removesuffix(".weight") for name in base.tensors if name.endswith(_HEADS)}
    note = (
        f"the model runs its own code (auto_map), so the {len(tensors)} linear layers were told by their names; look at"
        " the plan (--dry-run), and name what must stay with --skip"
    )
    return Layers(tensors, tuple(sorted({*heads, *skip})) if skip else None, (note,))
