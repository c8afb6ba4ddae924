"""What a hostile case is."""

from collections.abc import Callable
from dataclasses import dataclass, field

from hostile.place import Place

Make = Callable[[Place], object]


@dataclass(frozen=True)
class Case:
    """Files that are laid out on the spot, a command over them, and what must come of it.

    Attributes:
        name: of the test.
        make: lays the files out.
        words: of the command, run in the folder of the files.
        says: what the error must name, each of them: the file, the key or tensor, the cause; or what must be said beside
            a result.
        code: exit code; 0: a good input, or one that may pass when it is said aloud.
        stdin: of the command.
        outputs: names in the folder that the command may make or change, run folders say; all else must stay.
        is_result: what it says is its result, on stdout (verify, check-dataset), and no error.
        many_lines: a config's mistakes are said all at once, one a line.
    """

    name: str
    make: Make
    words: tuple[str, ...]
    says: tuple[str, ...]
    code: int = 1
    stdin: str = ""
    outputs: tuple[str, ...] = field(default=())
    is_result: bool = False
    many_lines: bool = False


MERGE = ("convert", "merge", "base", "adapter", "out")
QUANTIZE = ("convert", "quantize", "base", "out")
DEQUANTIZE = ("convert", "dequantize", "base", "out")
SPLIT = ("convert", "split", "base", "out")
VERIFY = ("convert", "verify", "merged", "--base", "base", "--adapter", "adapter")
PTH = ("convert", "pth_to_hf", "a.yaml", "a.pth", "out")
TRAIN = ("train", "a.yaml", "--work-dir", "work")
CHAT = ("chat", "chatty", "--prompt", "How many?", "--max-new-tokens", "2")
CHECK = ("check-dataset", "a.yaml")
PLAN = ("plan", "a.yaml")


def control(name: str, make: Make, words: tuple[str, ...], *outputs: str, stdin: str = "") -> Case:
    """A good input, which must be accepted."""
    return Case(name, make, words, (), 0, stdin, outputs)
