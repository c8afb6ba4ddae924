"""Models and data sets from ModelScope, through the package `modelscope` (extra `modelscope`).

The package keeps the cache (MODELSCOPE_CACHE) and the mirror (MODELSCOPE_ENDPOINT); here stand the choice of files and
a plain word for every failure.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastft.errors import HubError
from fastft.hub.weights import IGNORED, PICKLES, SAFETENSORS, SIDE_FILES


def model(repository: str, *, revision: str | None, with_weights: bool) -> Path:
    """The folder of a model in the cache, fetched as far as it is missing there.

    Args:
        repository: OWNER/NAME; owners often differ from those on the Hugging Face hub.
        revision: branch or tag; None is the hub's default.
        with_weights: False leaves the weights out (for `init: random`).

    Raises:
        HubError: in one line, what is wrong and what to do.
    """
    what = f"model {repository}"

    def fetch(patterns: list[str]) -> Path:
        download = _package(what).snapshot_download
        return _fetched(
            what, lambda: download(repository, revision, allow_patterns=patterns, ignore_patterns=list(IGNORED))
        )

    folder = fetch([*SIDE_FILES, *(SAFETENSORS if with_weights else ())])
    if not with_weights or any(folder.glob("*.safetensors")):
        return folder
    folder = fetch([*SIDE_FILES, *PICKLES])
    if not any(folder.glob("*.bin")):
        raise HubError(f"{what}: the repository holds no weights (*.safetensors or pytorch_model*.bin).")
    return folder


def dataset(repository: str, *, revision: str | None) -> Path:
    """The folder of a data set in the cache, with all of its files.

    Raises:
        HubError: in one line, what is wrong and what to do.
    """
    what = f"data set {repository}"
    download = _package(what).dataset_snapshot_download
    return _fetched(what, lambda: download(repository, revision))


def _package(what: str) -> Any:
    try:
        import modelscope
    except ImportError as error:
        raise HubError(
            f"{what}: ModelScope needs its own package; install it with `pip install fastft[modelscope]`, or take "
            "the Hugging Face hub (hub: huggingface)."
        ) from error
    return modelscope


def _fetched(what: str, download: Callable[[], str]) -> Path:
    try:
        return Path(download())
    except Exception as error:  # its releases raise classes of their own, requests' and urllib3's
        reason = str(error).strip().splitlines()
        raise HubError(
            f"{what}: not fetched from ModelScope: {reason[0] if reason else type(error).__name__}; check the id (owners "
            "often differ from Hugging Face's), the network and MODELSCOPE_ENDPOINT."
        ) from error
