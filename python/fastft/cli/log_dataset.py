"""`fastft log-dataset`: what the model will see."""

from typing import Literal

from fastft.cli.job import Job


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

    def run() -> None:
        from fastft.config import load
        from fastft.data import preview
        from fastft.hub import locate
        from fastft.model import tokenizer

        settings = load.load(config, overrides).config
        words = tokenizer.load_tokenizer(locate.model(settings.model), settings.model)
        preview.show(settings, words, what=show, index=index, num=num)

    return Job(run)
