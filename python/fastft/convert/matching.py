"""How a name of an adapter finds its tensor in a base: what every level of names gives, and what the user can set.

Level 0 is equality (`names`), level 1 goes through transformers' own conversion mapping (`names_transformers`).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fastft.convert.adapter import Adapter, LowRank
from fastft.convert.internlm2 import RowMap
from fastft.errors import CheckpointError, UsageError

CLIP_CLASS = "CLIPVisionModel"


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor that (a part of) an update goes to.

    Attributes:
        name: in the files of the base.
        rows: which rows of the product go where; None: all. The rows of a (experts, rows, columns) tensor are those of
            all its experts, one after the other.
        product_rows: rows that the product B A must have, where not the tensor's own.
        product: (rows, columns) that the product must have as it is added; where `product_rows` does not say enough.
        columns: (first, count) of the product's columns that belong to the tensor; None: all.
        transposed: whether the transposed product is added; None: as the adapter's settings say.
    """

    name: str
    rows: RowMap | None = None
    product_rows: int | None = None
    product: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    transposed: bool | None = None


class Names(Protocol):
    """Finds tensors of one base."""

    def targets(self, path: str) -> Sequence[Target]:
        """Find the tensors that an update of the module `path` belongs to; none: not found."""

    def tensor(self, name: str) -> str | None:
        """Find the one tensor that a whole tensor of the adapter stands for."""

    def parameter_updates(self, adapter: Adapter) -> Iterable[tuple[LowRank, Target]]:
        """Give the updates of bare parameters, one per expert and tensor of the files."""


@dataclass(frozen=True, slots=True)
class NameOptions:
    """What the user says about names.

    Attributes:
        model_class: class of transformers that the adapter was trained on; None: the one in config.json.
        key_map: (regular expression, replacement), done one after the other on every name of the adapter.
        is_clip: the result is the vision tower of a CLIP only.
    """

    model_class: str | None = None
    key_map: tuple[tuple[re.Pattern[str], str], ...] = ()
    is_clip: bool = False

    @property
    def class_name(self) -> str | None:
        return CLIP_CLASS if self.is_clip else self.model_class


def parse_key_map(texts: Sequence[str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Read `REGEX=REPL` of `--key-map`; the last `=` separates.

    Raises:
        UsageError: no `=`, or no regular expression.
    """
    pairs = []
    for text in texts:
        pattern, separator, replacement = text.rpartition("=")
        if not separator or not pattern:
            raise UsageError(
                f"--key-map {text!r}: write REGEX=REPLACEMENT, for example '^model\\.=model.language_model.'"
            )
        try:
            compiled = re.compile(pattern)
            compiled.sub(replacement, "")
        except (re.error, IndexError) as error:
            raise UsageError(f"--key-map {text!r} is no regular expression with its replacement: {error}") from error
        pairs.append((compiled, replacement))
    return tuple(pairs)


def with_key_map(adapter: Adapter, key_map: Sequence[tuple[re.Pattern[str], str]]) -> Adapter:
    """Rename everything in an adapter; ranks and scales stay those of the names in its file.

    Raises:
        UsageError: an expression finds nothing.
        CheckpointError: two names become one.
    """
    if not key_map:
        return adapter
    modules = {name.rpartition(".")[0] for name in adapter.peft_tensors}
    names = [*adapter.low_rank, *adapter.replaced, *adapter.token_rows, *adapter.parameters, *sorted(modules)]
    renamed = {name: name for name in names}
    for pattern, replacement in key_map:
        found = {name: pattern.sub(replacement, new) for name, new in renamed.items() if pattern.search(new)}
        if not found:
            raise UsageError(
                f"--key-map {pattern.pattern!r} is in none of the names of {adapter.folder}; they look like {names[0]!r}"
            )
        renamed |= found
    if len(set(renamed.values())) != len(renamed):
        raise CheckpointError(f"{adapter.folder}: --key-map makes two of its names one")
    return replace(
        adapter,
        low_rank={renamed[path]: replace(update, path=renamed[path]) for path, update in adapter.low_rank.items()},
        replaced={renamed[name]: source for name, source in adapter.replaced.items()},
        token_rows={renamed[path]: source for path, source in adapter.token_rows.items()},
        parameters={renamed[path]: pair for path, pair in adapter.parameters.items()},
        # PEFT itself matches its patterns with the names of the file, which stay.
        renamings=tuple(key_map),
    )
