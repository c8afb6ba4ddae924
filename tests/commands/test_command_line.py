"""The program as a user types it: exit codes, one-line errors, what goes to stdout and what to stderr."""

import re
import subprocess
import sys

import pytest

from fastft import __main__ as program


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = program.main(words)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_no_word_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 0
    for command in ("train", "convert merge", "convert pth_to_hf", "list-cfg", "copy-cfg", "chat", "doctor"):
        assert f"  {command} " in out
    assert max(len(line) for line in out.splitlines()) <= 80


@pytest.mark.parametrize("words", [("help", "train"), ("train", "-h"), ("train", "demo", "--help"), ("HELP", "Train")])
def test_help_of_a_command(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert out.startswith("usage: fastft train CONFIG [key=value ...] [options]")
    assert "--work-dir" in out
    assert max(len(line) for line in out.splitlines()) <= 80


def test_every_option_of_every_command_is_explained() -> None:
    from fastft.cli import table, words
    from fastft.cli.help import _docstring

    for command in table.COMMANDS:
        rules = words.grammar(command.function())
        explained = _docstring(command.function())[2]
        expected = {*rules.arguments, *rules.optional_arguments, *rules.options}
        expected |= {"overrides"} if rules.takes_overrides else set()
        assert set(explained) == expected, command.name


def test_every_help_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    from fastft.cli import table

    for command in table.COMMANDS:
        code, out, _ = run(capsys, "help", *command.name.split())
        assert code == 0
        assert max(len(line) for line in out.splitlines()) <= 80, command.name


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= 80
    assert re.search(r"^  torch +\d", out, re.MULTILINE)
    monkeypatch.setattr(metadata, "version", missing)
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    assert "  torch            MISSING: pip install torch\n" in out
    assert "  tensorboard      none; for TensorBoard logs: pip install 'fastft[tensorboard]'\n" in out
    assert max(len(line) for line in out.splitlines()) <= 80


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("version",), ("-v",), ("--version",)):
        code, out, _ = run(capsys, *words)
        assert code == 0
        assert out.startswith("fastft 0.")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("trian", "demo"), "did you mean `train`?"),
        (("convert", "marge"), "did you mean `convert merge`?"),
        (("convert",), "pth_to_hf, merge"),
        (("train", "demo", "--lrr", "1"), "train.lr"),
        (("train", "demo", "--work-dirr", "x"), "did you mean --work-dir?"),
        (("convert", "merge", "--is-clip", "A", "B"), "SAVE_PATH missing"),
        (("list-cfg", "qlora"), "one word too many"),
        (("convert", "merge", "A", "B", "C", "--json"), "--json belongs to --dry-run"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], hint: str
) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert hint in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("train", "dmeo"), "did you mean"),
        (("train", "demo", "train.lrr=1"), "train.lr"),
        (("train", "no/such/file.yaml"), "no such file"),
        (("copy-cfg", "internlm2_chat_7b_qlora_alpcaa_e3", "."), "did you mean"),
        (("convert", "merge", "no/base", "no/adapter", "out"), "no/base"),
    ],
)
def test_a_users_mistake_is_exit_code_1_without_traceback(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], hint: str
) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert hint in err
    assert "Traceback" not in err
    assert "bug in fastft" not in err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "train", "dmeo", "--debug")
    assert code == 1
    assert "Traceback" in err


@pytest.mark.parametrize("words", [("help",), ("version",), ("list-cfg", "-p", "qlora"), ("config", "schema")])
def test_light_commands_import_neither_torch_nor_transformers(words: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom fastft.__main__ import main\n"
        f"assert main({list(words)!r}) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_a_closed_pipe_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fastft", "list-cfg"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert err == ""
    assert process.returncode == 0


def test_ctrl_c_exits_130_without_traceback() -> None:
    code = """
import os, signal, time
from fastft import __main__ as program
from fastft.cli.job import Job

def wait():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

program._build = lambda typed: Job(wait)
raise SystemExit(program.main(["x"]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=50)
    assert done.returncode == 130
    assert done.stderr == "stopped\n"
