"""Every command of the README and of the page on 4-bit folders, typed as it stands there."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text()
QUANTIZING = (REPOSITORY / "docs" / "quantizing.md").read_text()

ROW = {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Robin."}]}


def commands(page: str) -> list[list[str]]:
    """The commands of all `sh` blocks, in order, as words."""
    blocks = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_works_in_order(tmp_path: Path) -> None:
    typed = commands(README)
    assert len(typed) >= 9
    assert json.dumps(ROW) in README
    (tmp_path / "my.jsonl").write_text((json.dumps(ROW) + "\n") * 40)
    answers = [done for words, done in zip(typed, run(typed, tmp_path), strict=True) if words[1] == "chat"]
    assert "Robin" in answers[-1]


def test_the_page_on_4_bit_folders(tmp_path: Path) -> None:
    printed = run(commands(QUANTIZING), tmp_path)
    assert len(printed) == 4
    assert "right" in printed[1]


def run(typed: list[list[str]], folder: Path) -> list[str]:
    """What each command prints; all must end well."""
    printed = []
    for words in typed:
        assert words[0] == "fastft"
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, words
        printed.append(done.stdout)
    return printed


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) >= 5
    for link in links:
        assert (REPOSITORY / link).exists(), link


@pytest.mark.parametrize("target", re.findall(r"^make (\S+)", README, flags=re.MULTILINE))
def test_make_knows_the_target(target: str) -> None:
    environment = {**os.environ, "MAKEFLAGS": ""}
    subprocess.run(["make", "--dry-run", target], cwd=REPOSITORY, check=True, capture_output=True, env=environment)
