"""A training that is killed again and again, at any moment: it goes on by itself and ends as if nothing had happened."""

import errno
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import forks
import tiny_run
from fastft.training import checkpoint, metrics, state
from fault_cases import leftovers
from forks import Ended, Forks

MODULES = (
    *("torch", "transformers", "peft", "bitsandbytes", "matplotlib.figure", "matplotlib.backends.backend_agg"),
    *("transformers.models.llama.modeling_llama", "transformers.trainer", "transformers.models.auto.modeling_auto"),
    *("fastft.training.run", "fastft.training.trainer", "fastft.training.refresh", "fastft.data.prepare"),
    *("fastft.config.load", "fastft.plan.for_run", "fastft.chat.session", "fire"),
)


class Training(NamedTuple):
    """A config, and what its run leaves when nothing happens to it.

    Attributes:
        words: of the command line without --work-dir.
        whole: the run folder of the unbroken run.
        seconds: that this run took.
    """

    words: list[str]
    whole: Path
    seconds: float

    def start(self, run_dir: Path) -> list[str]:
        return [*self.words, f"--work-dir={run_dir}", "--resume=auto"]


@pytest.fixture(scope="module")
def trainer_server() -> Iterator[Forks]:
    with Forks(MODULES) as started:
        yield started


@pytest.fixture(scope="module")
def training(trainer_server: Forks, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Seven steps of a tiny model with dropout, evals and sample answers; a checkpoint every other step, two kept."""
    folder = tmp_path_factory.mktemp("training")
    model = tiny_run.write_model(folder / "model")
    config = tiny_run.config(
        model,
        tiny_run.write_dialogues(folder / "rows.jsonl", 12),
        method__lora={"r": 4, "alpha": 8, "dropout": 0.2},
        train__max_steps=7,
        train__grad_accumulation=2,
        train__eval_steps=3,
        data__eval_rows=2,
        samples__prompts=("How many?",),
        samples__max_new_tokens=2,
        train__sample_steps=3,
        output__save_steps=2,
        output__keep=2,
    )
    (folder / "config.yaml").write_text(config.model_dump_json())
    words = ["train", str(folder / "config.yaml")]
    trainer_server.run(["version"])  # the server has imported all by then
    started = time.monotonic()
    done = trainer_server.run([*words, f"--work-dir={folder / 'whole'}"])
    assert done.code == 0, done.err
    return Training(words, folder / "whole", time.monotonic() - started)


def lines(path: Path) -> list[dict[str, object]]:
    """A file of metrics or samples without what a clock or a process decides."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: line[key] for key in line if key not in ("tokens_per_s", "memory_gib")} for line in found]


def check_same(training: Training, run_dir: Path) -> None:
    """The result, the last checkpoints and all measurements are those of the unbroken run, bit for bit."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines(run_dir / name) == lines(training.whole / name), name
    kept = [found.step for found in checkpoint.find(run_dir)]
    assert kept == [found.step for found in checkpoint.find(training.whole)]
    for folder in ("adapter", *(f"checkpoint-{step}" for step in kept)):
        for path in sorted((training.whole / folder).iterdir()):
            if path.suffix in (".safetensors", ".pt", ".pth"):
                assert (run_dir / folder / path.name).read_bytes() == path.read_bytes(), f"{folder}/{path.name}"
    assert "finished, step 7 of 7" in (run_dir / "report.html").read_text()
    assert leftovers(run_dir) == []


def check_after_kill(run_dir: Path, what: str) -> int | None:
    """What is there can be gone on from; the step of the newest checkpoint."""
    found = [checkpoint.examine(seen.path, with_hashes=True) for seen in checkpoint.find(run_dir)]
    assert all(one.fault is None for one in found), f"{what}: {[one.fault for one in found]}"
    for name in ("loss.png", "report.html", "config.yaml"):
        path = run_dir / name
        if path.exists():
            end = {"loss.png": b"IEND\xaeB`\x82", "report.html": b"</body></html>\n", "config.yaml": b"\n"}[name]
            assert path.read_bytes().endswith(end), f"{what}: half a {name}"
    assert not found or metrics.read(run_dir / "metrics.jsonl")[-1]["step"] >= found[0].step
    return found[0].step if found else None


def kill_over_lives(server: Forks, training: Training, folder: Path, num_kills: int) -> int:
    """Kill runs at random moments, start each again, and look at every one that came to its end; their number."""
    dice = random.Random(num_kills)
    kills = lives = 0
    while kills < num_kills or lives == 0:
        run_dir = folder / f"run-{lives}"
        expected: int | None = None
        while True:
            alive_s = dice.uniform(0, training.seconds) if kills < num_kills else None
            done = server.run(training.start(run_dir), after_s=alive_s)
            if expected is not None and "going on from" in done.err:
                assert f"going on from {run_dir}/checkpoint-{expected} (step {expected} of 7)" in done.err
            assert "is skipped" not in done.err
            if done.code == 0:
                break
            assert done.code == -signal.SIGKILL, done.err
            kills += 1
            expected = check_after_kill(run_dir, f"kill {kills}")
        check_same(training, run_dir)
        lives += 1
    print(f"{kills} kills, {lives} trainings that ended as the unbroken one")
    return lives


def test_killed_and_resumed(trainer_server: Forks, training: Training, tmp_path: Path) -> None:
    assert kill_over_lives(trainer_server, training, tmp_path, 5) > 0


@pytest.mark.slow
def test_killed_and_resumed_many_times(trainer_server: Forks, training: Training, tmp_path: Path) -> None:
    assert kill_over_lives(trainer_server, training, tmp_path, 200) > 5


def killed_at(server: Forks, training: Training, run_dir: Path, call: int) -> Ended:
    done = server.run(training.start(run_dir), watch=str(run_dir.parent), kill_at=call)
    assert done.code in (0, -signal.SIGKILL), done.err
    check_after_kill(run_dir, f"killed at call {call}: {done.calls[-1:]}")
    return done


def test_killed_at_write_calls(trainer_server: Forks, training: Training, tmp_path: Path) -> None:
    """At some of them in every part of a life: while a checkpoint is written, put in place, deleted, the page drawn."""
    if (reason := forks.can_watch()) is not None:
        pytest.skip(reason)
    run_dir = tmp_path / "run"
    for call in (40, 110, 170):
        killed_at(trainer_server, training, run_dir, call)
    done = trainer_server.run(training.start(run_dir))
    assert done.code == 0, done.err
    check_same(training, run_dir)


@pytest.mark.slow
def test_killed_at_every_write_call(trainer_server: Forks, training: Training, tmp_path: Path) -> None:
    if (reason := forks.can_watch()) is not None:
        pytest.skip(reason)
    call = 1
    while True:
        run_dir = tmp_path / f"run-{call}"
        if killed_at(trainer_server, training, run_dir, call).code == 0:
            break
        if call % 20 == 0:
            done = trainer_server.run(training.start(run_dir))
            assert done.code == 0, done.err
            check_same(training, run_dir)
        call += 1
    print(f"killed at {call - 1} calls")
    assert call > 100


def test_a_checkpoint_that_was_changed_is_skipped(trainer_server: Forks, training: Training, tmp_path: Path) -> None:
    """Cut, spoiled in the middle, or without its manifest: the next older one is taken, and the reason is said."""
    run_dir = tmp_path / "run"
    killed_late = trainer_server.run(training.start(run_dir), watch=str(tmp_path), kill_at=250)
    assert killed_late.code == -signal.SIGKILL
    newest, older = checkpoint.find(run_dir)
    weights = newest.path / state.TENSORS
    spoiled = bytearray(weights.read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    weights.write_bytes(spoiled)
    done = trainer_server.run(training.start(run_dir))
    assert done.code == 0, done.err
    assert f"{newest.path.name} is skipped: {state.TENSORS} is not what was written (its hash is another)" in done.err
    assert f"going on from {older.path}" in done.err
    check_same(training, run_dir)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_refuses_in_a_training(
    trainer_server: Forks, training: Training, tmp_path: Path, error: int
) -> None:
    """One line that names the place; checkpoints that were there are whole, and the run goes on when there is room."""
    if (reason := forks.can_watch()) is not None:
        pytest.skip(reason)
    check_refused(
        trainer_server, training, tmp_path, error, range(7, 320, 83) if error == errno.EIO else range(3, 320, 57)
    )


def check_refused(server: Forks, training: Training, folder: Path, error: int, calls: range) -> None:
    run_dir = folder / "run"
    for call in calls:
        done = server.run(training.start(run_dir), watch=str(folder), fail_at=call, error=error, lasting=True)
        what = f"call {call} {done.calls[call - 1 : call]}: {done.err}"
        assert done.code in (0, 1), what
        check_after_kill(run_dir, what)
        if done.code == 1:
            errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, what
            assert os.strerror(error) in errors[0] or "torch could not write" in errors[0], what
            assert str(run_dir) in errors[0], what
            assert "Traceback" not in done.err
            assert "bug in fastft" not in done.err, what
    done = server.run(training.start(run_dir))
    assert done.code == 0, done.err
    check_same(training, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_refuses_at_many_calls(
    trainer_server: Forks, training: Training, tmp_path: Path, error: int
) -> None:
    check_refused(trainer_server, training, tmp_path, error, range(1, 330, 5))


def test_two_trainings_of_one_folder(trainer_server: Forks, training: Training, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = training.start(run_dir)
    ended = trainer_server.together(forks.Run(words), forks.Run(words))
    assert sorted(done.code for done in ended) == [0, 1], [done.err for done in ended]
    loser = next(done for done in ended if done.code == 1)
    assert f"run folder {run_dir}: another process trains there; wait until it is done" in loser.err
    check_same(training, run_dir)
