"""Which command is which function, in the order in which `help` lists them."""

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fastft.cli.job import Job
from fastft.errors import UsageError


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    Attributes:
        words: what is typed after `fastft`, e.g. ("convert", "merge").
        place: "module:function" below `fastft.cli`; imported when needed.
        shorts: one-letter options, e.g. {"p": "pattern"}.
    """

    words: tuple[str, ...]
    place: str
    shorts: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The words as one text: `convert merge`."""
        return " ".join(self.words)

    def function(self) -> Callable[..., Job]:
        """The function that builds the job."""
        module, _, name = self.place.partition(":")
        function: Callable[..., Job] = getattr(importlib.import_module(f"fastft.cli.{module}"), name)
        return function


COMMANDS = (
    Command(("list-cfg",), "list_cfg:list_cfg", {"p": "pattern"}),
    Command(("copy-cfg",), "copy_cfg:copy_cfg"),
    Command(("config", "show"), "config:show"),
    Command(("config", "schema"), "config:schema"),
    Command(("config", "import"), "config:import_"),
    Command(("check-dataset",), "check_dataset:check_dataset"),
    Command(("log-dataset",), "log_dataset:log_dataset"),
    Command(("plan",), "plan:plan"),
    Command(("train",), "train:train"),
    Command(("convert", "pth_to_hf"), "convert_pth:pth_to_hf"),
    Command(("convert", "merge"), "convert_merge:merge"),
    Command(("convert", "verify"), "convert_verify:verify"),
    Command(("convert", "quantize"), "convert_quantize:quantize"),
    Command(("convert", "dequantize"), "convert_quantize:dequantize"),
    Command(("convert", "split"), "convert_split:split"),
    Command(("chat",), "chat:chat"),
    Command(("download",), "download:download"),
    Command(("upload",), "upload:upload"),
    Command(("doctor",), "doctor:doctor"),
    Command(("help",), "help:help_", {}),
    Command(("version",), "version:version"),
)

# What XTuner or a habit of other tools calls the same thing.
ALIASES = {"-h": "help", "--help": "help", "-v": "version", "--version": "version"}


def _spelling(word: str) -> str:
    """Commands are matched whatever the case and with - and _ alike, as XTuner does."""
    return word.lower().replace("_", "-")


def find(argv: Sequence[str]) -> tuple[Command, list[str]]:
    """The command that `argv` begins with, and the words after it.

    Raises:
        UsageError: there is no such command; names the nearest.
    """
    first = ALIASES.get(argv[0], argv[0])
    words = [first, *argv[1:]]
    for command in COMMANDS:
        length = len(command.words)
        if [_spelling(w) for w in words[:length]] == [_spelling(w) for w in command.words]:
            return command, words[length:]
    groups = {c.words[0] for c in COMMANDS if len(c.words) > 1}
    group = next((g for g in groups if _spelling(g) == _spelling(first)), None)
    if group is not None:
        return _refuse_in_group(group, words[1:])
    known = [c.name for c in COMMANDS] + sorted(groups)
    nearest = difflib.get_close_matches(_spelling(first), known, n=1, cutoff=0.5)
    hint = f"did you mean `{nearest[0]}`?" if nearest else "`fastft help` lists all commands"
    raise UsageError(f"there is no command `{first}`; {hint}")


def _refuse_in_group(group: str, rest: Sequence[str]) -> tuple[Command, list[str]]:
    members = [c.words[1] for c in COMMANDS if c.words[0] == group]
    listed = ", ".join(members)
    if not rest or rest[0] in ("-h", "--help"):
        raise UsageError(f"`{group}` needs one more word: {listed}")
    nearest = difflib.get_close_matches(_spelling(rest[0]), [_spelling(m) for m in members], n=1, cutoff=0.5)
    hint = next((f"did you mean `{group} {m}`?" for m in members if _spelling(m) in nearest), f"there are {listed}")
    raise UsageError(f"there is no command `{group} {rest[0]}`; {hint}")
