"""A LLaVA checkpoint of XTuner's as one folder of transformers' LlavaForConditionalGeneration (`--save-format huggingface`)."""

from collections.abc import Mapping

from fastft.convert.folder import Checkpoint
from fastft.convert.pth_parts import Job, Part
from fastft.convert.source import Source
from fastft.errors import PlanError


def parts(
    job: Job, groups: Mapping[str, Mapping[str, Source]], notes: list[str]
) -> tuple[tuple[Part, ...], list[Checkpoint], tuple[str, ...]]:
    raise PlanError(f"{job.pth}: --save-format huggingface is not built for LLaVA checkpoints; use xtuner")
