"""Every command of the README, typed as it stands there."""

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

ROW = {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am Robin."}]}


def commands() -> list[list[str]]:
    """The commands of all `sh` blocks, in order, as words."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def test_every_command_works_in_order(tmp_path: Path) -> None:
    typed = commands()
    assert len(typed) >= 9
    assert json.dumps(ROW) in README
    (tmp_path / "my.jsonl").write_text((json.dumps(ROW) + "\n") * 40)
    answer = ""
    for words in typed:
        assert words[0] == "fastft"
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, words
        if words[1] == "chat":
            answer = done.stdout
    assert "Robin" in answer


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) >= 5
    for link in links:
        assert (REPOSITORY / link).exists(), link


@pytest.mark.parametrize("target", re.findall(r"^make (\S+)", README, flags=re.MULTILINE))
def test_make_knows_the_target(target: str) -> None:
    environment = {**os.environ, "MAKEFLAGS": ""}
    subprocess.run(["make", "--dry-run", target], cwd=REPOSITORY, check=True, capture_output=True, env=environment)
