"""Writes the demo's instruction data; `python -m fastft.demo.generate FOLDER` makes the same files anywhere.

data/preferences.jsonl holds two answers to each question, the second of which belongs to another one.
data/chat.jsonl is what `train demo` learns from, data/chat_eval.jsonl measures it (names and facts that chat.jsonl lacks).
With `--text` it also writes text.jsonl, what the base reads (17 MB; the package makes it when it is needed).
"""

import argparse
import json
from pathlib import Path

from fastft.demo import corpus, dialogues
from fastft.demo.words import Dice

SEED = 2


def write_chat(folder: Path) -> None:
    """Write chat.jsonl (in mixed order), chat_eval.jsonl (rows {"messages": [...]}) and preferences.jsonl into `folder`."""
    dice = Dice(SEED)
    rows = dialogues.training_rows(dice)
    _write_rows(folder / "chat.jsonl", dice.sample(rows, len(rows)))
    _write_rows(folder / "chat_eval.jsonl", dialogues.held_out_rows(dice))
    _write_pairs(folder / "preferences.jsonl", dialogues.training_rows(Dice(SEED)))


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(prog="python -m fastft.demo.generate", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the files go; made if it is not there")
    parser.add_argument("--text", action="store_true", help="write text.jsonl too")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_chat(arguments.folder)
    if arguments.text:
        corpus.write(arguments.folder / "text.jsonl", corpus.NUM_DOCUMENTS)


def _write_rows(path: Path, rows: list[list[dict[str, str]]]) -> None:
    lines = [json.dumps({"messages": messages}) + "\n" for messages in rows]
    path.write_text("".join(lines), encoding="utf-8")


def _write_pairs(path: Path, rows: list[list[dict[str, str]]]) -> None:
    """Write {"prompt", "chosen", "rejected"} of dialogues with one answer, every third of them."""
    said = [(row[0]["content"], row[1]["content"]) for row in rows if len(row) == 2]
    pairs = [
        {"prompt": question, "chosen": answer, "rejected": other}
        for (question, answer), (_, other) in zip(said, said[len(said) // 2 :] + said[: len(said) // 2], strict=True)
        if answer != other
    ][::3]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


if __name__ == "__main__":
    main()
