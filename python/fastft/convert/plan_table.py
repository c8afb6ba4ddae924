"""How a plan is shown: a table of at most 80 columns, and JSON for other programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from fastft.convert.plan import (
    Bytes,
    Cast,
    Copy,
    Dora,
    Merge,
    Operation,
    OutputTensor,
    PeftLayer,
    Quantize,
    Rows,
    ScalesOf,
    Shard,
    Shift,
)
from fastft.convert.size import readable
from fastft.convert.source import Packed, Seen, Source

if TYPE_CHECKING:
    from fastft.convert.estimate import Estimate
    from fastft.convert.rewrite import RewritePlan

_WIDTH = 80
_DTYPE_WORDS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


def as_table(plan: "RewritePlan", needed: "Estimate") -> str:
    """Write a plan as text: a line per tensor, then the totals, what it needs and what should be known."""
    lines = [f"base     {plan.base.folder}"]
    for adapter, weight in plan.adapters:
        lines.append(f"adapter  {adapter.folder}" + (f"  x {weight:g}" if weight != 1.0 else ""))
    lines += ["", *tensor_lines(plan.shards)]
    num_shards = len(plan.shards)
    lines.append(
        f"{len(plan.tensors)} tensors, {len(plan.changed)} changed, {readable(plan.num_bytes)} in {num_shards}"
        f" file{'s' if num_shards > 1 else ''}"
    )
    lines.append(needed.line())
    lines.append("with it: config.json" + "".join(f", {name}" for name in plan.side_files))
    if plan.edits.dtype is not None:
        lines.append(f"config.json: dtype becomes {plan.edits.dtype}")
    if plan.edits.vocab_size is not None:
        lines.append(f"config.json: vocab_size becomes {plan.edits.vocab_size}")
    if plan.edits.quantization is not None:
        lines.append("config.json: quantization_config is added")
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def tensor_lines(shards: Sequence[Shard]) -> list[str]:
    """Write a line per tensor, between rules."""
    lines = [_row("tensor", "shape", "dtype", "what", "in"), "-" * _WIDTH]
    for number, shard in enumerate(shards, 1):
        lines += [_tensor_row(tensor, number) for tensor in shard.tensors]
    return [*lines, "-" * _WIDTH]


def as_json(plan: "RewritePlan", needed: "Estimate") -> str:
    """Write a plan as JSON."""
    return json.dumps(
        {
            "base": str(plan.base.folder),
            "adapters": [{"folder": str(adapter.folder), "weight": weight} for adapter, weight in plan.adapters],
            "total_bytes": plan.num_bytes,
            "num_tensors": len(plan.tensors),
            "num_changed": len(plan.changed),
            "needs": asdict(needed),
            "files": [_shard(shard) for shard in plan.shards],
            "side_files": {name: str(path) for name, path in plan.side_files.items()},
            "config": {
                "dtype": plan.edits.dtype,
                "untied": plan.edits.untied,
                "vocab_size": plan.edits.vocab_size,
                "quantization_config": plan.edits.quantization,
            },
            "notes": list(plan.notes),
        },
        indent=2,
    )


def _shard(shard: Shard) -> dict[str, object]:
    return {
        "name": shard.file_name,
        "bytes": sum(tensor.nbytes for tensor in shard.tensors),
        "tensors": [
            {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape), **_operation(tensor.operation)}
            for tensor in shard.tensors
        ],
    }


def _through(source: Source) -> dict[str, object]:
    """Say where numbers come from, and what is done to them while they are read."""
    found: dict[str, object] = {"from": str(source.file)}
    match source.lens:
        case Packed():
            found["dequantized"] = source.lens.quant_type
        case Seen(quant_type=quant_type, double_quant=double_quant):
            found["as_trained"] = quant_type + (" with double quantization" if double_quant else "")
    return found


def _operation(operation: Operation) -> dict[str, object]:
    match operation:
        case Copy(source):
            return {"operation": "copy", **_through(source)}
        case Cast(source):
            return {"operation": "cast", **_through(source), "from_dtype": source.dtype}
        case Quantize(of, dtype, shape, four_bit):
            return {
                "operation": "quantize",
                "quant_type": four_bit.type,
                "blocksize": four_bit.blocksize,
                "double_quant": four_bit.double_quant,
                "of": {"dtype": dtype, "shape": list(shape), **_operation(of)},
            }
        case ScalesOf(tensor):
            return {"operation": "scales", "of": tensor}
        case Bytes():
            return {"operation": "given"}
        case Rows(parts):
            return {"operation": "rows", "from": sorted({str(part.source.file) for part in parts})}
        case Shift(source, addends):
            return {
                "operation": "shift",
                **_through(source),
                "updates": [{"from": str(addend.source.file), "scale": addend.scale} for addend in addends],
            }
        case PeftLayer(module, part):
            return {
                "operation": f"peft:{module.kind.lower()}",
                **_through(operation.source),
                "module": module.path,
                "part": part,
                "updates": [{"from": name} for name in sorted({str(source.file) for _, source in module.tensors})],
            }
        case Merge(source, deltas) | Dora(source, deltas):
            return {
                "operation": "merge" if isinstance(operation, Merge) else "dora",
                **_through(source),
                "updates": [
                    {
                        "from": str(delta.a.file),
                        "rank": delta.rank,
                        "scale": delta.scale,
                        "transposed": delta.transposed,
                        "rows": None if delta.rows is None else sum(count for _, _, count in delta.rows),
                    }
                    for delta in deltas
                ],
            }


def _tensor_row(tensor: OutputTensor, number: int) -> str:
    shape = "x".join(str(size) for size in tensor.shape) or "scalar"
    return _row(
        tensor.name, shape, _DTYPE_WORDS.get(tensor.dtype, tensor.dtype.lower()), _what(tensor.operation), str(number)
    )


def _what(operation: Operation) -> str:
    """Say the operation in at most 17 signs: `+ r=8 s=2`, `copy`, `cast`, `rows of 3`."""
    match operation:
        case Copy(Source(lens=Packed(quant_type))) | Cast(Source(lens=Packed(quant_type))):
            return f"from {quant_type}"
        case Copy(Source(lens=Seen(quant_type))) | Cast(Source(lens=Seen(quant_type))):
            return f"{quant_type} and back"
        case Quantize(Copy(), _, _, four_bit):
            return f"to {four_bit.type}"
        case Quantize(of, _, _, four_bit):
            return f"{_what(of)[:9]} to {four_bit.type}"
        case ScalesOf():
            return "scales"
        case Bytes():
            return "given"
        case Copy():
            return "copy"
        case Cast(source):
            return f"from {_DTYPE_WORDS.get(source.dtype, source.dtype)}"
        case Rows(parts):
            return f"rows of {len({part.source for part in parts})}"
        case Shift():
            return "+ bias of lora_B"
        case PeftLayer(module):
            return f"peft:{module.kind.lower()}"[:17]
        case Dora(_, deltas):
            return f"dora r={deltas[0].rank} s={deltas[0].scale:.4g}"
        case Merge(Source(lens=Packed() | Seen()), deltas):
            return f"4-bit + r={sum(delta.rank for delta in deltas)}"
        case Merge(_, deltas):
            if len(deltas) == 1:
                return f"+ r={deltas[0].rank} s={deltas[0].scale:.4g}"
            return f"+ {len(deltas)} updates r={sum(delta.rank for delta in deltas)}"


def _row(name: str, shape: str, dtype: str, what: str, file: str) -> str:
    if len(name) > 38:
        name = f"~{name[-37:]}"
    return f"{name:<38} {shape:>13} {dtype:<5} {what:<17} {file:>3}".rstrip()
