"""`fastft convert pth_to_hf`."""

from pathlib import Path
from typing import Literal

from fastft import console
from fastft.cli.job import Job
from fastft.errors import UsageError


def pth_to_hf(
    config: str,
    pth: str,
    save_path: str,
    *overrides: str,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "fp16",
    fp32: bool = False,
    max_shard_size: str = "2GB",
    save_format: Literal["xtuner", "huggingface"] = "xtuner",
    force: bool = False,
    safe_serialization: bool = True,
) -> Job:
    """Turn a training checkpoint into a Hugging Face folder.

    The folder holds an adapter or a whole model, as the checkpoint does.

    Args:
        config: the recipe or config file that it was trained with
        pth: a .pth file, or a checkpoint-N folder
        save_path: folder to write; must not exist
        overrides: values of the config to change, e.g. model.name=my_folder
        dtype: of the written weights; fp16 as XTuner writes, auto keeps the file's
        fp32: the same as --dtype fp32
        max_shard_size: largest file, e.g. 2GB (2*10^9 bytes), 2GiB; a bare number is GB
        save_format: for vision-language models; text models come out the same
        force: replace save_path if it exists
        safe_serialization: accepted for XTuner's scripts; safetensors is always written
    """
    if not safe_serialization:
        raise UsageError("convert pth_to_hf: --safe-serialization=false: fastft writes safetensors only")

    def run() -> None:
        if save_format == "huggingface":
            console.note("--save-format huggingface: a text model comes out the same in both formats")
        from fastft.config import load
        from fastft.convert import pth as conversion
        from fastft.convert import size

        plan = conversion.plan(
            load.load(config, overrides).config,
            Path(pth),
            dtype="fp32" if fp32 else dtype,
            max_shard_size_bytes=size.parse_size(max_shard_size),
        )
        console.result(conversion.execute(plan, Path(save_path), force=force).line())

    return Job(run)
