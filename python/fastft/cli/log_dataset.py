"""`fastft log-dataset`: what the model will see."""

from typing import Literal

from fastft import console
from fastft.cli.job import Job
from fastft.errors import UsageError


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
        from fastft.config import load
        from fastft.data import prepare, preview
        from fastft.hub import locate
        from fastft.model import load as model_load
        from fastft.model import quiet, tokenizer

        settings = load.load(config, overrides).config
        locate.check(settings)
        quiet.prepare_environment()
        words = tokenizer.load_tokenizer(model_load.locate(settings.model).weights_folder, settings.model)
        if settings.task == "sft":
            tokenizer.require_chat_template(words, settings.model)
        prepared = prepare.prepare(settings.data, settings.task, words, settings.train.seed)
        for line in prepared.report.lines():
            console.note(line)
        samples = prepared.train
        if index >= len(samples):
            raise UsageError(f"log-dataset: --index {index}: there are {len(samples)} samples, 0 to {len(samples) - 1}")
        colour = console.stdout().is_terminal
        for place in range(index, min(index + num, len(samples))):
            console.stdout().print(preview.view(samples, place, words, show, colour=colour))

    return Job(run)
