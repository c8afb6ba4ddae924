"""Where the name of a model or a data set points: a folder or file here, a thing that comes with fastft, or a hub.

Comes from `model.name` and `data.train.N.source` of a config; the folder goes to the loaders. What is here wins over a
hub, and the network is asked last.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastft import spelling
from fastft.config.mask import masked
from fastft.errors import ConfigError, FileError, HubError
from fastft.hub import huggingface, modelscope

if TYPE_CHECKING:
    from fastft.config.schema import Config, Model, Source

Hub = Literal["huggingface", "modelscope"]

PACKAGE = Path(__file__).parent.parent
DEMO_MODEL = PACKAGE / "demo" / "base"
DEMO_TOWER = PACKAGE / "demo" / "clip"
DEMO_DATA = PACKAGE / "demo" / "data"
# Models that come with fastft: what the demo starts from, and the vision tower of demo_vision.
DEMO_MODELS = {"demo": DEMO_MODEL, "demo/clip": DEMO_TOWER}
DEMO_TEXT = "demo/text"  # made on first use: 17 MB that its generator writes in two seconds
UNSET = "SET_ME"  # stands in the recipes custom_sft and custom_pretrain where the user's own data belongs
DATA_KINDS = frozenset({".json", ".jsonl", ".parquet", ".csv", ".txt", ".gz"})

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class HubDataset:
    """A data set that stays on the Hugging Face hub until `datasets` reads it."""

    id: str
    subset: str | None
    split: str
    revision: str | None


def model(wanted: "Model") -> Path:
    """The folder with the model's files; fetched from the hub when it is not on this machine.

    With `init: random` the weights are not fetched.

    Raises:
        HubError: the model is neither here nor on the hub, or cannot be fetched; says what to do.
    """
    folder = local_model(wanted.name)
    if folder is not None:
        return folder
    what = f"model {masked(wanted.name)}"
    check_id(what, wanted.name)
    fetch = modelscope.model if hub(wanted.hub) == "modelscope" else huggingface.model
    return fetch(wanted.name, revision=wanted.revision, with_weights=wanted.init == "pretrained")


def model_called(name: str) -> Path:
    """The same for a command's argument: a folder, the embedded model, or an id on the hub.

    Raises:
        HubError: see `model`.
    """
    folder = local_model(name)
    if folder is not None:
        return folder
    # The schema costs 0.15 s to import: a merge from disk to disk does not need it.
    from fastft.config.schema import Model

    return model(Model(name=name))


def dataset(wanted: "Source") -> Path | HubDataset:
    """The file or folder with the rows, or the id to give to `datasets`.

    Raises:
        ConfigError: the recipe's placeholder was not replaced.
        FileError: the source reads like a file and is not there.
        HubError: no such demo data, an impossible id, or ModelScope's copy cannot be fetched.
    """
    path = local_dataset(wanted.source)
    if path is not None:
        return path
    what = f"data set {masked(wanted.source)}"
    check_id(what, wanted.source)
    if hub(wanted.hub) == "modelscope":
        if wanted.subset is not None or wanted.split != "train":
            raise HubError(
                f"{what}: from ModelScope all files of a data set are read, so `subset` and `split` have no effect; "
                "remove them, or download the data set and give its file."
            )
        return modelscope.dataset(wanted.source, revision=wanted.revision)
    return HubDataset(wanted.source, wanted.subset, wanted.split, wanted.revision)


def check(config: "Config") -> None:
    """Refuse early, without the network, what `model` and `dataset` would refuse later.

    Raises:
        ConfigError, FileError, HubError: as they do.
    """
    if local_model(config.model.name) is None:
        check_id(f"model {masked(config.model.name)}", config.model.name)
    for source in (*config.data.train, *config.data.eval):
        if local_dataset(source.source) is None:
            check_id(f"data set {masked(source.source)}", source.source)
    hub(config.model.hub)


def hub(configured: Hub) -> Hub:
    """The hub to ask: the variable FASTFT_HUB, else the config's."""
    chosen = os.environ.get("FASTFT_HUB", "").strip().lower() or configured
    if chosen == "huggingface":
        return "huggingface"
    if chosen == "modelscope":
        return "modelscope"
    raise HubError(f"FASTFT_HUB={chosen}: no such hub; allowed are huggingface and modelscope.")


def local_model(name: str) -> Path | None:
    """The folder on this machine that a model's name means; None when a hub has to be asked.

    Raises:
        HubError: the name is that of a file, of a folder without a model, or reads like a path that is not there.
    """
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path
    if name in DEMO_MODELS:
        return DEMO_MODELS[name]
    if path.is_dir():
        raise HubError(f"model {name}: this folder holds no config.json, so it is no model; give a model's folder.")
    if path.exists():
        raise HubError(f"model {name}: this is a file; give the folder that holds config.json and the weights.")
    if _reads_like_path(name):
        raise HubError(f"model {masked(name)}: no such folder.{_similar(path)}")
    return None


def local_dataset(source: str) -> Path | None:
    """The file or folder on this machine that a source means; None when a hub has to be asked.

    Raises:
        ConfigError, FileError, HubError: see `dataset`.
    """
    if source == UNSET:
        raise ConfigError(
            "data.train.0.source: still to be set: name your own file, folder or data set, e.g. on the command line "
            "data.train.0.source=my.json, or in a copy of the recipe (`fastft copy-cfg`)."
        )
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source == DEMO_TEXT:
        from fastft.demo import corpus

        return corpus.cached_text()
    if source.startswith("demo/"):
        found = DEMO_DATA / f"{source.removeprefix('demo/')}.jsonl"
        known = sorted(file.stem for file in DEMO_DATA.glob("*.jsonl"))
        if found.stem not in known or found.parent != DEMO_DATA:
            names = ", ".join([*(f"demo/{stem}" for stem in known), DEMO_TEXT])
            raise HubError(f"data set {source}: no such demo data; there are {names}.")
        return found
    if _reads_like_path(source):
        raise FileError(f"data set {masked(source)}: no such file or folder.{_similar(path)}")
    return None


def _reads_like_path(name: str) -> bool:
    if "://" in name:
        return False
    marks = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or name.endswith("/")
    return marks or Path(name).suffix.lower() in DATA_KINDS


def _similar(path: Path) -> str:
    """A hint at a name like it in the same folder, or at the folder that is missing."""
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    close = spelling.nearest(path.name, (entry.name for entry in path.parent.iterdir()), n=1)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def check_id(what: str, name: str) -> None:
    """Refuse what no hub can have.

    Raises:
        HubError: an address, or no OWNER/NAME.
    """
    if "://" in name:
        raise HubError(f"{what}: an address cannot be given; download it, and give the file or folder.")
    if not _HUB_ID.fullmatch(name) or ".." in name or "--" in name or name.endswith((".git", ".", "-")):
        raise HubError(f"{what}: not here, and no id of a hub, which has the form OWNER/NAME.")
