"""`fastft log-dataset`: what the model will see."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastft import console
from fastft.cli.job import Job
from fastft.errors import UsageError

if TYPE_CHECKING:
    from fastft.config.schema import Config
    from fastft.data.prepare import Prepared


def log_dataset(
    config: str,
    *overrides: str,
    show: Literal["text", "masked_text", "input_ids", "labels", "all"] = "text",
    index: int = 0,
    num: int = 1,
) -> Job:
    """Show samples of the data as the model will see them.

    Args:
        config: recipe name or config file
        overrides: values to change, e.g. data.max_length=512
        show: masked_text shows in colour which tokens are learned
        index: the first sample to show, from 0
        num: how many samples
    """
    if index < 0 or num < 1:
        raise UsageError("log-dataset: --index counts from 0 and --num from 1")

    def run() -> None:
        from fastft.data import formats, preview

        settings, tokenizer, prepared = read(config, overrides)
        for line in prepared.report.lines():
            console.note(line)
        samples = prepared.train
        count = len(samples) // (2 if settings.task in formats.PAIR_TASKS else 1)
        if index >= count:
            raise UsageError(f"log-dataset: --index {index}: there are {count} samples, 0 to {count - 1}")
        colour = console.stdout().is_terminal
        for place in range(index, min(index + num, count)):
            shown = preview.view_of(settings.task, samples, place, tokenizer, show, colour=colour)
            console.stdout().print(shown)

    return Job(run)


def read(config: str, overrides: Sequence[str], *, keep_going: bool = False) -> "tuple[Config, Any, Prepared]":
    """The config, the tokenizer, and the data prepared as `train` does it; no weights are read.

    Raises:
        FastftError: the config is wrong, the tokenizer or the data cannot be had, or (without `keep_going`) used.
    """
    from fastft.config import load
    from fastft.data import prepare
    from fastft.hub import locate
    from fastft.model import load as model_load
    from fastft.model import quiet
    from fastft.training import words

    settings = load.load(config, overrides).config
    locate.check(settings)
    quiet.prepare_environment()
    read = words.read(settings, model_load.locate(settings.model))
    prepared = prepare.prepare(
        settings.data,
        settings.task,
        read.tokenizer,
        settings.train.seed,
        batch_size=settings.train.batch_size,
        keep_going=keep_going,
        seer=read.seer,
    )
    return settings, read.tokenizer, prepared
