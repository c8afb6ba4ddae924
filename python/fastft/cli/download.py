"""`fastft download`."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastft import console
from fastft.cli.job import Job
from fastft.errors import UsageError

if TYPE_CHECKING:
    from fastft.data.sources import HubDataset


def download(
    name: str,
    *,
    hub: Literal["huggingface", "modelscope"] = "huggingface",
    revision: str | None = None,
    data: bool = False,
    subset: str | None = None,
    split: str = "train",
    to: str | None = None,
    force: bool = False,
) -> Job:
    """Fetch a model or a data set from a hub.

    It goes into the hub's own cache, where training and conversions find it; with --to into a folder of its own. What is
    there is not fetched again, a broken-off download goes on, and what came is held against the hub's checksums.
    HF_TOKEN or MODELSCOPE_API_TOKEN opens what is private; HF_ENDPOINT and MODELSCOPE_ENDPOINT name mirrors; the variable
    FASTFT_HUB overrides --hub.

    Args:
        name: OWNER/NAME on the hub
        hub: which hub
        revision: branch, tag or commit; default: the hub's own
        data: it is a data set
        subset: configuration name of a data set, without --to
        split: split of a data set, without --to
        to: folder to put the files into; must not exist
        force: replace that folder if it holds a model
    """
    if not data and (subset is not None or split != "train"):
        raise UsageError("download: --subset and --split are for --data")
    if data and to is not None and (subset is not None or split != "train"):
        raise UsageError("download: with --to all files of a data set are fetched; leave --subset and --split away")

    def run() -> None:
        from fastft.hub import download as fetching
        from fastft.hub import locate

        asked = locate.hub(hub)
        place = None if to is None else Path(to)
        if not data:
            console.result(fetching.model(name, hub=asked, revision=revision, to=place, force=force).line(name))
        elif place is not None or asked == "modelscope" or locate.local_dataset(name) is not None:
            console.result(fetching.dataset(name, hub=asked, revision=revision, to=place, force=force).line(name))
        else:
            locate.check_id(f"data set {name}", name)
            console.result(_prepared(locate.HubDataset(name, subset, split, revision)))

    return Job(run)


def _prepared(wanted: "HubDataset") -> str:
    """Let `datasets` fetch it into its cache, as training does."""
    from fastft.data import sources

    table = sources.hub_table(wanted)
    return f"{sources.hub_name(wanted)} is in the cache of `datasets` ({len(table):,} rows)"
