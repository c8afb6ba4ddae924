"""A recipe's name, MODEL_METHOD_DATA[_eN], becomes a config made of parts.

The parts are the files under `configs/`; `configs/README.md` says how a name is read. `names` and `search` serve
`list-cfg` and must start fast: they read the parts with regular expressions and import neither pydantic nor a YAML parser
(together 400 ms; 2 cores of a cloud machine, November 2026), nor dataclasses (12 ms).
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastft.config import llava_recipes
from fastft.errors import ConfigError

if TYPE_CHECKING:
    from fastft.config.tree import Branch, Tree

FOLDER = Path(__file__).parent.parent / "configs"
MAX_NAME = 200  # characters
METHODS = ("full", "freeze", "lora", "dora", "qlora", "qlora_6gb", "qlora_8gb")
# Methods for a small card, and the largest model, in billions of weights, that `list-cfg` shows with them.
SMALL_CARD = ("qlora_6gb", "qlora_8gb")
SMALL_CARD_BILLIONS = 9.0
# Methods that `list-cfg` shows with own data only, and tasks that it shows with the usual methods only.
RARE = ("freeze", "dora")
PREFERENCE_TASKS = ("dpo", "orpo", "kto", "reward")

# XTuner's word for a data set, where ours differs.
XTUNER_DATA = {
    "openorca": "open_orca",
    "finetune_custom_dataset": "custom_sft",
    "finetune_custom_sft": "custom_sft",
}

# Models of text families that see too.
ALSO_SEE = ("gemma3_4b_it", "gemma3_12b_it", "gemma3_27b_it")

_SECTION = re.compile(r"^(base|chat|scratch|vision|all):", re.MULTILINE)
_MODEL = re.compile(r"^  ([a-z0-9_]+):", re.MULTILINE)
_SIZE = re.compile(r"_(\d+(?:_\d)?)b(?:_|$)")
_TASK = re.compile(r"^task: *(\w+)", re.MULTILINE)
_SEES = re.compile(r"^vision:", re.MULTILINE)
_EPOCHS = re.compile(r"^train:.*?epochs: *(\d+)", re.MULTILINE | re.DOTALL)
# What may follow MODEL_METHOD_DATA, each at most once: epochs, longest sample, XTuner's number of GPUs.
_TAIL = re.compile(
    r"e(?P<epochs>[1-9]\d{0,3})|(?P<length>[1-9]\d{1,6})|(?P<kilo>[1-9]\d{0,3})k|(gpu[1-9]\d*|[1-9]\d*gpus)"
)


class ModelPart(NamedTuple):
    """A model's name in recipes: its family file and what it is fit for (`base`, `chat`, `scratch` or `vision`)."""

    name: str
    family: str
    kind: str


class DataPart(NamedTuple):
    """A data set's name in recipes, its task, its usual number of epochs, and whether it has images."""

    name: str
    task: str
    epochs: int
    sees: bool


class Recipe(NamedTuple):
    """A name taken apart. `epochs` and `max_length` are None where the name does not say."""

    model: ModelPart
    method: str
    data: DataPart
    epochs: int | None
    max_length: int | None


def names() -> list[str]:
    """Every recipe that makes sense, sorted: the named ones, then models with the methods and data that suit them."""
    products = [
        f"{model.name}_{method}_{data.name}_e{data.epochs}"
        for model in models().values()
        for method in METHODS
        for data in data_sets().values()
        if _suits(model, method, data)
    ]
    llava = llava_recipes.names((model.name, model.family) for model in models().values() if model.kind == "chat")
    return [*_named(), *sorted([*products, *llava])]


def search(pattern: str) -> list[str]:
    """The names that match, best first: the pattern as it stands, then all of its words, then words spelled like them.

    Case does not matter, and words may be separated by `-`, `_`, `.`, `/` or space.
    """
    words = [word for word in re.split(r"[-_./\s]+", pattern.lower()) if word]
    if not words:
        return names()
    joined, compact = "_".join(words), "".join(words)
    found: list[tuple[int, int, int, str]] = []
    everything = names()
    for name in everything:
        small = int(any(f"_{method}_" in name for method in (*SMALL_CARD, *RARE)))  # the general recipe comes first
        if joined in name:
            # Whole words before parts of words: `llama2_7b` before `codellama2_7b`.
            rank = 0 if f"_{joined}_" in f"_{name}_" else 1
            found.append((rank, name.find(joined), small, name))
        elif compact in name.replace("_", ""):
            found.append((2, name.replace("_", "").find(compact), small, name))
        elif all(word in name for word in words):
            found.append((3, sum(name.find(word) for word in words), small, name))
    if not found:
        found = list(_alike(words, everything))
    return [entry[-1] for entry in sorted(found)]


def find(name: str) -> dict[str, Any]:
    """The config that a recipe's name stands for, as plain values; `name` is the recipe's.

    Raises:
        ConfigError: there is no such recipe; the message names the closest ones.
    """
    from fastft.config.tree import plain

    found = plain(tree(name))
    assert isinstance(found, dict)
    return {"name": name, **found}


def tree(name: str) -> "Branch":
    """The same as a tree whose values know the part that they come from."""
    from fastft.config.tree import Branch, Leaf, merge

    if name in _named():
        return _named_recipe(name)
    together = _llava_recipe(name)
    if together is not None:
        return together
    recipe = parts(name)
    merged: Tree = _model_tree(recipe.model)
    for part in (f"methods/{recipe.method}", f"data/{recipe.data.name}"):
        merged = merge(merged, _part(part))
    for section, key, number in (("train", "epochs", recipe.epochs), ("data", "max_length", recipe.max_length)):
        if number is not None:
            place = f"recipe {name}"
            leaf = Branch({key: Leaf(number, str(number), place)}, place)
            merged = merge(merged, Branch({section: leaf}, place))
    assert isinstance(merged, Branch)
    return merged


def _llava_recipe(name: str) -> "Branch | None":
    """The config of a LLaVA that is put together; None: the name is no such recipe."""
    from fastft.config.tree import Branch, Leaf, merge

    found = llava_recipes.taken_apart(name)
    if found is None or found.model not in models() or models()[found.model].family not in llava_recipes.FAMILIES:
        return None
    numbers = _tail(found.tail)
    if numbers is None:
        return None
    merged: Tree = _model_tree(models()[found.model])
    for part in found.parts:
        merged = merge(merged, _part(part))
    place = f"recipe {name}"
    for section, key in (("train", "epochs"), ("data", "max_length")):
        number = numbers.get(key)
        if number is not None:
            leaf = Branch({key: Leaf(number, str(number), place)}, place)
            merged = merge(merged, Branch({section: leaf}, place))
    if found.projector is not None:
        leaf = Branch({"projector": Leaf(found.projector, found.projector, place)}, place)
        merged = merge(merged, Branch({"vision": leaf}, place))
    assert isinstance(merged, Branch)
    return merged


def parts(name: str) -> Recipe:
    """Take MODEL_METHOD_DATA[_eN] apart.

    Raises:
        ConfigError: it is no such name.
    """
    for model in _longest_first():
        for method in METHODS:
            head = f"{model.name}_{method}_"
            if name.startswith(head):
                recipe = _with_data(model, method, name.removeprefix(head))
                if recipe is not None:
                    return recipe
    raise ConfigError(_unknown(name))


@cache
def _longest_first() -> list[ModelPart]:
    return sorted(models().values(), key=lambda model: -len(model.name))


@cache
def models() -> dict[str, ModelPart]:
    """Every model by its name in recipes."""
    found: dict[str, ModelPart] = {}
    for path in sorted(FOLDER.glob("models/*.yaml")):
        pieces = _SECTION.split(path.read_text(encoding="utf-8"))
        for kind, body in zip(pieces[1::2], pieces[2::2], strict=True):
            if kind != "all":
                found |= {name: ModelPart(name, path.stem, kind) for name in _MODEL.findall(body)}
    return found


@cache
def data_sets() -> dict[str, DataPart]:
    """Every data set by its name in recipes."""
    found = {}
    for path in sorted(FOLDER.glob("data/*.yaml")):
        text = path.read_text(encoding="utf-8")
        task, epochs = _TASK.search(text), _EPOCHS.search(text)
        found[path.stem] = DataPart(
            path.stem,
            task.group(1) if task else "sft",
            int(epochs.group(1)) if epochs else 3,
            _SEES.search(text) is not None,
        )
    return found


def model_settings(name: str) -> dict[str, Any]:
    """What our part for a model says beside its name (its chat template); nothing for one that we do not carry."""
    from fastft.config.tree import plain

    for model in models().values():
        # Reading every family takes half a second; the text tells which one is meant.
        if name in (FOLDER / f"models/{model.family}.yaml").read_text(encoding="utf-8"):
            settings = plain(_model_tree(model))["model"]
            if settings.pop("name") == name:
                found: dict[str, Any] = settings
                return found
    return {}


def source_settings(source: str) -> dict[str, Any] | None:
    """How our part for a data set reads its rows (format, columns, system, subset); None for one that we do not carry."""
    from fastft.config.tree import plain

    for data in data_sets().values():
        if source in (FOLDER / f"data/{data.name}.yaml").read_text(encoding="utf-8"):
            for item in plain(_part(f"data/{data.name}"))["data"]["train"]:
                if item.pop("source") == source:
                    found: dict[str, Any] = item
                    return found
    return None


def part_sources(name: str) -> list[dict[str, Any]]:
    """The data sets of our part `configs/data/NAME.yaml`, each with how its rows are read."""
    from fastft.config.tree import plain

    found: list[dict[str, Any]] = plain(_part(f"data/{name}"))["data"]["train"]
    return found


@cache
def _named() -> list[str]:
    """The recipes that have a file of their own."""
    return sorted(path.stem for path in FOLDER.glob("recipes/*.yaml"))


def _suits(model: ModelPart, method: str, data: DataPart) -> bool:
    """Whether `list-cfg` shows the combination; others that can be named still work."""
    if method in SMALL_CARD:
        size = _SIZE.search(model.name)
        if size is None or float(size.group(1).replace("_", ".")) > SMALL_CARD_BILLIONS:
            return False
    if data.sees or model.kind == "vision":
        # A model that sees learns from text too, but who chooses one has images.
        return data.sees and (model.kind == "vision" or model.name in ALSO_SEE) and method in {"full", "lora", "qlora"}
    own_data = data.name.startswith("custom_")
    if method in RARE and not (own_data and data.task in {"sft", "pretrain"}):
        return False
    if data.task in PREFERENCE_TASKS and method in SMALL_CARD:
        return False
    if model.kind == "scratch":
        return method == "full" and data.task == "pretrain" and (own_data or data.name.startswith("demo"))
    if model.kind == "chat" and data.task == "pretrain":
        return False
    return own_data or data.name.startswith("demo") == model.name.startswith("demo")


def _with_data(model: ModelPart, method: str, rest: str) -> Recipe | None:
    known = {**data_sets(), **{word: data_sets()[ours] for word, ours in XTUNER_DATA.items() if ours in data_sets()}}
    for word in sorted(known, key=len, reverse=True):
        if rest == word or rest.startswith(f"{word}_"):
            tail = _tail(rest.removeprefix(word))
            if tail is not None:
                return Recipe(model, method, known[word], tail.get("epochs"), tail.get("max_length"))
    return None


def _tail(words: str) -> dict[str, int] | None:
    """The numbers in `_e3_2k_gpu8`; None when there is something else, or one of them twice."""
    found: dict[str, int] = {}
    for word in words.split("_")[1:]:
        match = _TAIL.fullmatch(word)
        if match is None:
            return None
        if match["epochs"]:
            key, number = "epochs", int(match["epochs"])
        elif match["length"] or match["kilo"]:
            key, number = "max_length", int(match["length"] or int(match["kilo"]) * 1024)
        else:
            key, number = "gpus", 0  # how many GPUs XTuner's name was tuned for: says nothing that we set
        if key in found:
            return None
        found[key] = number
    return found


def _alike(words: list[str], everything: list[str]) -> Iterator[tuple[int, int, int, str]]:
    """Names that hold, for each word, a word spelled like it; fewer corrections first."""
    from fastft import spelling

    vocabulary = sorted(
        {word for name in everything for word in name.split("_")} | models().keys() | data_sets().keys()
    )
    meant = []
    for word in words:
        close = [word] if word in vocabulary else spelling.nearest(word, vocabulary, n=4, cutoff=0.6)
        if not close and not any(word in known for known in vocabulary):
            return
        meant.append(close or [word])
    for name in everything:
        hits = [[order for order, word in enumerate(close) if f"_{word}_" in f"_{name}_"] for close in meant]
        if all(hits):
            yield 4, sum(min(orders) for orders in hits), len(name), name


def _unknown(name: str) -> str:
    from fastft import spelling

    if len(name) > MAX_NAME:
        return f"config {name[:MAX_NAME]}...: no such file and no such recipe; names of recipes are shorter."
    close = spelling.nearest(name.lower(), names(), n=3, cutoff=0.75) or search(name)[:3]
    if not close:
        close = spelling.nearest(name.lower(), names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "a recipe is MODEL_METHOD_DATA[_eN]."
    return f"config {name!r}: no such file and no such recipe; {hint} `fastft list-cfg -p WORD` searches."


def _named_recipe(name: str) -> "Branch":
    """A file of configs/recipes: `parts`, laid over each other, then what else the file says."""
    from fastft.config.tree import Branch, Leaf, Listing, merge

    own = _part(f"recipes/{name}")
    listed = own.children.get("parts")
    if not isinstance(listed, Listing):
        raise ConfigError(f"{own.origin}: parts: a list such as [models/demo, methods/qlora, data/demo] is needed.")
    merged: Tree = Branch({}, own.origin)
    for item in listed.items:
        word = item.text if isinstance(item, Leaf) else ""
        room, _, stem = word.partition("/")
        if room == "models" and stem in models():
            merged = merge(merged, _model_tree(models()[stem]))
        elif room in ("methods", "data") and (FOLDER / f"{word}.yaml").is_file():
            merged = merge(merged, _part(word))
        else:
            raise ConfigError(f"{item.origin}: parts: no such part: {word!r}.")
    rest = Branch({key: child for key, child in own.children.items() if key != "parts"}, own.origin)
    merged = merge(merged, rest)
    assert isinstance(merged, Branch)
    return merged


@cache
def _model_tree(model: ModelPart) -> "Branch":
    """`all` of the family, then the model's own entry: an id on the hub, or a mapping of model fields."""
    from fastft.config.tree import Branch, Leaf, merge

    family = _part(f"models/{model.family}")
    section = family.children[model.kind]
    assert isinstance(section, Branch)
    entry = section.children[model.name]
    if isinstance(entry, Leaf):
        entry = Branch({"name": entry}, entry.origin)
    shared = family.children.get("all", Branch({}, family.origin))
    merged = merge(shared, Branch({"model": entry}, entry.origin))
    assert isinstance(merged, Branch)
    return merged


@cache
def _part(word: str) -> "Branch":
    from fastft.config.tree import Branch, parse

    path = FOLDER / f"{word}.yaml"
    found = parse(path.read_text(encoding="utf-8"), lambda line: f"configs/{word}.yaml:{line}")
    if not isinstance(found, Branch):
        raise ConfigError(f"configs/{word}.yaml: a part is a mapping.")
    return found
