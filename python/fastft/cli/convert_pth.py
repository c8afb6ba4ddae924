"""`fastft convert pth_to_hf`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastft import console
from fastft.cli.job import Job
from fastft.errors import UsageError

if TYPE_CHECKING:
    from fastft.convert.recorded import Run


def pth_to_hf(
    config: str,
    pth: str,
    save_path: str,
    *overrides: str,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "fp16",
    fp32: bool = False,
    max_shard_size: str = "2GB",
    save_format: Literal["xtuner", "huggingface", "official"] = "xtuner",
    force: bool = False,
    safe_serialization: bool = True,
) -> Job:
    """Turn a training checkpoint into a Hugging Face folder.

    The folder holds an adapter or a whole model, as the checkpoint does. See docs/old-checkpoints.md.

    Args:
        config: the recipe or config file that it was trained with; also XTuner's .py
        pth: a .pth file, or a folder of DeepSpeed, FSDP, transformers or fastft
        save_path: folder to write; must not exist
        overrides: values of the config to change, e.g. model.name=my_folder
        dtype: of the written weights; fp16 as XTuner writes, auto keeps the file's
        fp32: the same as --dtype fp32; of a DeepSpeed folder the fp32 masters are taken
        max_shard_size: largest file, e.g. 2GB (2*10^9 bytes), 2GiB; a bare number is GB
        save_format: for vision-language models; text models come out the same
        force: replace save_path if it exists
        safe_serialization: accepted for XTuner's scripts; safetensors is always written
    """
    if not safe_serialization:
        raise UsageError("convert pth_to_hf: --safe-serialization=false: fastft writes safetensors only")

    def run() -> None:
        from fastft.convert import pth as conversion
        from fastft.convert import size

        plan = conversion.plan(
            _run(config, overrides),
            Path(pth),
            dtype="fp32" if fp32 else dtype,
            max_shard_size_bytes=size.parse_size(max_shard_size),
            save_format=save_format,
        )
        if save_format == "huggingface" and plan.kind != "llava":
            console.note("--save-format huggingface: a text model comes out the same in both formats")
        console.result(conversion.execute(plan, Path(save_path), force=force).line())

    return Job(run)


def _run(config: str, overrides: Sequence[str]) -> "Run":
    """What CONFIG says of the run; of an XTuner file only the model is read, so that its data sets do not matter."""
    from fastft.config import load
    from fastft.convert import recorded

    path = Path(config)
    if path.is_dir() or path.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        raise UsageError(f"convert pth_to_hf: {config} is no config; CONFIG comes first, then PTH, then SAVE_PATH")
    if path.suffix == ".py" and path.is_file():
        return recorded.of_python_file(path, overrides)
    return recorded.of_config(load.load(config, overrides).config)
