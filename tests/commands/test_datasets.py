"""`check-dataset` and `log-dataset` as typed: what they print, and their exit codes."""

import json
from pathlib import Path

import pytest

from fastft import __main__ as program

CONFIG = """model: {name: demo}
method: {kind: lora}
data:
  train: [{source: rows.jsonl}]
  max_length: 64
"""
GOOD = [{"instruction": f"Who is number {n}?", "output": f"It is {n}."} for n in range(4)]
BAD = {"instruction": "", "output": "nobody asked"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(CONFIG, encoding="utf-8")
    write(tmp_path, *GOOD)
    return tmp_path


def write(folder: Path, *rows: object) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = program.main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_good_data_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "check-dataset", "my.yaml")
    assert (code, err) == (0, "")
    assert "    rows: 4, format alpaca (recognised)" in out.splitlines()
    assert "  the end of a turn is learned in: 4 of 4" in out.splitlines()
    assert out.splitlines()[-1] == "fit to be learned from"
    assert sorted(path.name for path in folder.iterdir()) == ["my.yaml", "rows.jsonl"]


def test_unreadable_rows_are_all_counted_and_fail(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, *GOOD, BAD, {"instruction": "and now?", "output": ""}, BAD)
    code, out, err = run(capsys, "check-dataset", "my.yaml")
    assert code == 1
    assert err.splitlines() == ["error: 3 rows cannot be read (on_bad_row: error)"]
    assert "    rows left out: 2, turn 1: the user's text is empty (first: rows.jsonl:5)" in out.splitlines()
    assert "fit to be learned from" not in out
    code, out, err = run(capsys, "check-dataset", "my.yaml", "data.on_bad_row=skip")
    assert (code, err) == (0, "")


def test_a_limit_fails_the_check_and_the_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, *GOOD, GOOD[0])
    code, _, err = run(capsys, "check-dataset", "my.yaml", "data.check.max_duplicates=0.1")
    assert code == 1
    expected = "1 of 5 samples repeat an earlier one (20.0%); check.max_duplicates is 10.0%"
    assert err.splitlines() == [f"error: {expected}"]
    code, _, err = run(capsys, "train", "my.yaml", "--dry-run", "data.check.max_duplicates=0.1")
    assert code == 1
    assert f"error: data: {expected}; mend the data" in err
    code, _, err = run(
        capsys, "train", "my.yaml", "--dry-run", "data.check.max_duplicates=0.2", "--work-dir", "runs/my one"
    )
    assert code == 0
    # The folder that is printed, and saved in the run's config.yaml, is the one that was asked for.
    assert "output   runs/my one, checkpoint" in err
    assert "steps would be made in runs/my one;" in err


def test_nothing_to_learn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, BAD)
    code, _, err = run(capsys, "check-dataset", "my.yaml", "data.on_bad_row=skip")
    assert (code, err.splitlines()) == (1, ["error: nothing is left to learn from"])


def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "check-dataset")[0] == 2
    assert run(capsys, "check-dataset", "my.yaml", "--show", "text")[0] == 2
    code, out, err = run(capsys, "check-dataset", "my.yaml", "data.train.0.source=none.jsonl")
    assert (code, out) == (1, "")
    assert "no such file" in err
    (folder / "rows.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    code, out, err = run(capsys, "check-dataset", "my.yaml")
    assert (code, out) == (1, "")
    assert err.startswith("error: data rows.jsonl: the format is not clear from the columns a;")


@pytest.mark.usefixtures("folder")
def test_log_dataset_shows_what_is_learned(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("log-dataset", "my.yaml", "data.packing=false", "--show", "masked_text", "--index", "1", "--num", "2")
    code, out, err = run(capsys, *words)
    assert code == 0
    shown = out.split("sample ")
    assert [text.partition(",")[0] for text in shown[1:]] == ["1", "2"]
    assert "Who is number 1?" in shown[1]
    assert "[[It is 1." in shown[1]
    assert "[[It is 2." in shown[2]
    assert "train data: 4 samples" in err
    code, _, err = run(capsys, "log-dataset", "my.yaml", "data.packing=false", "--index", "4")
    assert code == 2
    assert "there are 4 samples, 0 to 3" in err


def test_a_preference_task_is_read_shown_and_known_to_train(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, {"prompt": "Who?", "chosen": "Robin.", "rejected": "No."})
    code, out, _ = run(capsys, "check-dataset", "my.yaml", "task=dpo")
    assert code == 0
    assert out.splitlines()[0] == "train data: 1 pairs"
    code, out, _ = run(capsys, "log-dataset", "my.yaml", "task=dpo", "--show", "masked_text")
    assert code == 0
    chosen, _, rejected = out.partition("pair 0, rejected:")
    assert chosen.startswith("pair 0, chosen:")
    assert "[[Robin." in chosen
    assert "[[No." in rejected
    assert run(capsys, "train", "my.yaml", "task=dpo", "--dry-run")[0] == 0
