"""`fastft convert quantize` and `fastft convert dequantize`."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastft import console
from fastft.cli.convert_merge import checked_blocksize
from fastft.cli.job import Job
from fastft.errors import UsageError

if TYPE_CHECKING:
    from fastft.convert.rewrite import RewritePlan


def quantize(
    model: str,
    save_path: str,
    *,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    double_quant: bool = False,
    blocksize: int = 64,
    skip: tuple[str, ...] = (),
    max_shard_size: str = "2GB",
    dry_run: bool = False,
    json: bool = False,
    force: bool = False,
) -> Job:
    """Write a model in 4 bit, in bitsandbytes' layout.

    Args:
        model: folder or hub id of a model with plain weights
        save_path: folder to write; must not exist
        quant_type: the code book
        double_quant: quantize the scales too: saves 0.4 bit per weight
        blocksize: numbers that share a scale
        skip: a layer that stays as it is (the head always does); may be given several times
        max_shard_size: largest file, e.g. 2GB (2*10^9 bytes), 2GiB; a bare number is GB
        dry_run: print the plan, write nothing
        json: with --dry-run: print the plan as JSON
        force: replace save_path if it exists
    """
    if json and not dry_run:
        raise UsageError("convert quantize: --json belongs to --dry-run")
    checked_blocksize(blocksize)

    def run() -> None:
        from fastft.convert import quantize as quantizing
        from fastft.convert import size
        from fastft.convert.four_bit import FourBit
        from fastft.hub import locate

        plan = quantizing.plan_quantize(
            locate.model_called(model),
            FourBit(quant_type, double_quant, blocksize),
            skip=skip,
            max_shard_size_bytes=size.parse_size(max_shard_size),
        )
        _finish(plan, save_path, dry_run=dry_run, json=json, force=force)

    return Job(run)


def dequantize(
    model: str,
    save_path: str,
    *,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    max_shard_size: str = "2GB",
    dry_run: bool = False,
    json: bool = False,
    force: bool = False,
) -> Job:
    """Write a bitsandbytes 4-bit model with plain weights.

    Args:
        model: folder or hub id of a model in bitsandbytes 4 bit
        save_path: folder to write; must not exist
        dtype: of the written weights; auto: what they had before they were quantized
        max_shard_size: largest file, e.g. 2GB (2*10^9 bytes), 2GiB; a bare number is GB
        dry_run: print the plan, write nothing
        json: with --dry-run: print the plan as JSON
        force: replace save_path if it exists
    """
    if json and not dry_run:
        raise UsageError("convert dequantize: --json belongs to --dry-run")

    def run() -> None:
        from fastft.convert import quantize as quantizing
        from fastft.convert import size
        from fastft.hub import locate

        plan = quantizing.plan_dequantize(
            locate.model_called(model), dtype=dtype, max_shard_size_bytes=size.parse_size(max_shard_size)
        )
        _finish(plan, save_path, dry_run=dry_run, json=json, force=force)

    return Job(run)


def _finish(plan: "RewritePlan", save_path: str, *, dry_run: bool, json: bool, force: bool) -> None:
    """Print a plan, or carry it out."""
    from fastft.convert import rewrite

    if dry_run:
        console.result(plan.as_json() if json else plan.as_table())
        return
    console.result(rewrite.execute(plan, Path(save_path), force=force).line())
