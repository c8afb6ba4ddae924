"""`fastft plan`: what a run takes, before anything is fetched or read."""

from fastft import console
from fastft.cli.job import Job
from fastft.errors import UsageError


def plan(config: str, *overrides: str, vram: str | None = None, gpus: int = 1, json: bool = False) -> Job:
    """Tell what a run takes of a card, of RAM, disk and time.

    Reads the model's config.json only, runs one step on shapes without numbers, and needs no GPU. When the run does not
    fit it names the settings that would make it fit, the least costly first.

    Args:
        config: recipe name or config file
        overrides: values to change, e.g. data.max_length=4096
        vram: memory of one card, e.g. 8GiB; default: the GPU here, if there is one
        gpus: number of cards, each with its own copy of the model
        json: print plain data instead of a table
    """
    from fastft.convert.size import parse_size

    size = None if vram is None else parse_size(vram)
    if gpus < 1:
        raise UsageError("plan: --gpus counts from 1")

    def run() -> None:
        from json import dumps

        from fastft.config import load
        from fastft.model import quiet

        settings = load.load(config, overrides).config
        quiet.prepare_libraries()
        from fastft.plan import card, subject, table
        from fastft.plan.fit import Card

        here = card.here()
        wanted = here if size is None else Card.of_size(size)
        made = table.make(subject.read(settings, has_bf16=card.has_bf16()), wanted, gpus)
        console.result(dumps(table.to_json(made), indent=2) if json else "\n".join(table.lines(made)))

    return Job(run)
