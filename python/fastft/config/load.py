"""A config file or a recipe's name, with overrides, becomes one checked, frozen `Config`.

Comes from the command line; goes to training, data, model and `show`. Everything wrong is said at once, each with
file, line, key, what came and what is allowed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fastft.config import chat_templates, fields, overrides, recipes, refusals
from fastft.config.schema import Config, Section
from fastft.config.tree import MAX_BYTES, Branch, Leaf, Listing, Tree, at, grown, merge, parse
from fastft.errors import ConfigError, FileError

DEFAULT = "default"
OVERRIDE = "override"


@dataclass(frozen=True)
class Loaded:
    """A config and where each of its values comes from.

    `origin` maps a dotted key (`data.train.0.source`; a list of words is one value) to `FILE:LINE`, `override` or
    `default`. `path` is the config file, or None for a recipe. `notes` say what of an XTuner config has no counterpart.
    """

    config: Config
    origin: Mapping[str, str]
    path: Path | None
    notes: tuple[str, ...] = ()


def load(name_or_path: str, override_words: Sequence[str] = ()) -> Loaded:
    """Read, merge and check.

    Args:
        name_or_path: a YAML file or one of XTuner's Python configs (a file wins when it exists), or a recipe's name.
        override_words: `key=value` each, see `overrides.apply`.

    Raises:
        ConfigError: with one line for each of the first ten mistakes.
        FileError: the file exists and cannot be read.
    """
    path = _file(name_or_path)
    notes: tuple[str, ...] = ()
    if path is None:
        tree: Tree = recipes.tree(name_or_path)
    elif path.suffix == ".py":
        tree, notes = _imported(path)
    else:
        tree = parse(_text(path), lambda line: f"{path}:{line}")
    name = path.stem if path else name_or_path
    if not isinstance(tree, Branch):
        if not (isinstance(tree, Leaf) and tree.value is None):
            raise ConfigError(f"{tree.origin}: a config is a mapping such as `model: {{name: ...}}`.")
        tree = Branch({}, tree.origin)
    changed, complaints = overrides.apply(tree, override_words)
    assert isinstance(changed, Branch)
    full = _named(changed, name)
    values = _values(full, fields.Known(Config, None))
    try:
        config = Config.model_validate(values, strict=True)
    except ValidationError as error:
        complaints = [*complaints, *refusals.lines(error, full)]
    else:
        complaints = [*complaints, *_missing_template(config, full)]
    if complaints:
        raise ConfigError(refusals.joined(complaints))
    return Loaded(config, _origins(config, full), path, notes)


def flat(section: Section, prefix: str = "") -> dict[str, Any]:
    """Every value of a config under its dotted key, in the schema's order; a list of words is one value."""
    found: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        key = f"{prefix}{name}"
        if isinstance(value, Section):
            found |= flat(value, f"{key}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            for index, item in enumerate(value):
                found |= flat(item, f"{key}.{index}.")
        else:
            found[key] = value
    return found


def _file(name_or_path: str) -> Path | None:
    """The file meant, or None when it is a recipe's name."""
    path = Path(name_or_path)
    if not name_or_path.strip():
        raise ConfigError("config: the name is empty; give a YAML file or a recipe's name (`fastft list-cfg`).")
    try:
        is_file, exists = path.is_file(), path.exists()
    except (OSError, ValueError) as error:
        raise ConfigError(f"config {name_or_path!r}: no such file: {error}") from error
    looks_like_path = "/" in name_or_path or path.suffix in (".yaml", ".yml", ".py", ".json")
    if not is_file and looks_like_path:
        why = "is a folder, not a file" if exists else "no such file"
        raise ConfigError(f"config {name_or_path}: {why}; give a YAML file or a recipe's name (`fastft list-cfg`).")
    return path if is_file else None


def _imported(path: Path) -> tuple[Tree, tuple[str, ...]]:
    """The tree of an XTuner config, and what of it has no counterpart."""
    from fastft import console
    from fastft.config import xtuner

    found = xtuner.imported(_text(path), str(path))
    for note in found.notes:
        console.note(f"{path.name}: {note}")
    return grown(found.values, str(path)), found.notes


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FileError(f"config {path}: cannot be read: {error.strerror}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(raw) <= MAX_BYTES:
            line = raw.count(b"\n", 0, error.start) + 1
            raise ConfigError(f"{path}:{line}: not UTF-8 text; a config is a YAML file in UTF-8.") from error
        return raw.decode("latin-1")  # cut inside a character; refused as too large


def _named(tree: Branch, name: str) -> Branch:
    """The tree with `name` and `output.dir` filled in where nothing is written: they follow from the file or recipe."""
    named = merge(Branch({"name": Leaf(name, name, DEFAULT)}, tree.origin), tree)
    assert isinstance(named, Branch)
    run = named.children["name"]
    run_name = run.text if isinstance(run, Leaf) and run.text else name
    target, taken = at(named, ("output", "dir"))
    written = taken == 2 and not (isinstance(target, Leaf) and target.value is None)
    output, has_output = at(named, ("output",))
    if written or (has_output == 1 and not isinstance(output, Branch)):
        return named
    folder = f"work_dirs/{run_name}"
    filled = Branch({"output": Branch({"dir": Leaf(folder, folder, DEFAULT)}, tree.origin)}, tree.origin)
    with_folder = merge(named, filled)
    assert isinstance(with_folder, Branch)
    return with_folder


def _values(tree: Tree, known: fields.Known | None) -> Any:
    """Plain values for pydantic: tuples for lists, and the text as written wherever the schema wants text."""
    annotation = known.annotation if known else None
    if isinstance(tree, Leaf):
        if annotation is None or not fields.takes_text(annotation):
            return tree.value
        return None if tree.value is None and fields.takes_null(annotation) else tree.text
    if isinstance(tree, Listing):
        item = fields.item_of(annotation) if annotation else None
        inner = fields.Known(item, None) if item else None
        return tuple(_values(child, inner) for child in tree.items)
    section = fields.section_of(annotation) if annotation else None
    return {key: _values(child, fields.of(section, key) if section else None) for key, child in tree.children.items()}


def _missing_template(config: Config, tree: Tree) -> list[str]:
    name = config.model.chat_template
    if name is None:
        return []
    try:
        chat_templates.read(name)
    except (ConfigError, FileError) as error:
        leaf, _ = at(tree, ("model", "chat_template"))
        return [f"{leaf.origin}: model.chat_template: {error}"]
    return []


def _origins(config: Config, tree: Tree) -> dict[str, str]:
    origins = {}
    for key in flat(config):
        path = tuple(key.split("."))
        deepest, taken = at(tree, path)
        place = deepest.origin if taken == len(path) else DEFAULT
        origins[key] = OVERRIDE if place.startswith(overrides.MARK) else place
    return origins
