"""A LLaVA that is put together from its parts: its tokenizer and processor are written by transformers, and stop as well."""

import errno
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import forks
import tiny_llava
from fault_cases import Case, hashes_of, leftovers, staging
from forks import Forks

MODULES = (
    *("torch", "transformers", "transformers.models.auto.modeling_auto", "transformers.models.llava.processing_llava"),
    *("transformers.models.clip.image_processing_pil_clip", "fastft.convert.llava", "fastft.convert.llava_result"),
    *("fastft.model.llava", "fastft.cli.convert_merge", "fastft.hub.locate", "fire"),
)


class Parts(NamedTuple):
    """A merge of one result in two ways, and a folder where the second one's result stands."""

    case: Case
    kept: Path

    def put_back(self, folder: Path) -> Path:
        """What stands there before a fault; the target."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.kept, folder)
        return folder / "result"


@pytest.fixture(scope="module")
def watched_llava() -> Iterator[Forks]:
    if (reason := forks.can_watch()) is not None:
        pytest.skip(reason)
    with Forks(MODULES) as started:
        yield started


@pytest.fixture(scope="module")
def parts(watched_llava: Forks, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A projector as XTuner's tool leaves it, without a processor: the merge makes one of both models."""
    torch = pytest.importorskip("torch")
    from fastft.model import llava

    folder = tmp_path_factory.mktemp("llava")
    llm, clip = tiny_llava.write_llm(folder / "llm"), tiny_llava.write_clip(folder / "clip")
    shapes = {"0.weight": (64, 32), "0.bias": (64,), "2.weight": (64, 64), "2.bias": (64,)}
    llava.save_projector(
        {f"model.{name}": torch.ones(shape) for name, shape in shapes.items()}, folder / "it/projector"
    )
    words = ["convert", "merge", str(llm), str(folder / "it"), "TARGET", "--visual-encoder", str(clip)]
    case = Case("a LLaVA", words, [*words, "--max-shard-size", "400KB"])
    (folder / "place").mkdir()
    case.learn(watched_llava, folder / "place" / "result")
    return Parts(case, folder / "place")


def kill_at_calls(server: Forks, parts: Parts, folder: Path, call: int, stride: int) -> None:
    num_killed = 0
    while True:
        target = parts.put_back(folder)
        words = parts.case.words(0, target)
        done = server.run(words, watch=str(target.parent), kill_at=call, one_cpu=True)
        assert done.code in (0, -signal.SIGKILL), done.err
        found = hashes_of(target.parent)
        assert found in parts.case.whole.values(), f"killed at call {call}: {done.calls[-1:]}"
        assert len(staging(target.parent)) <= 1
        if done.code == 0:
            break
        num_killed += 1
        call += stride
    assert found == parts.case.whole[0]
    assert call > 20
    print(f"killed at {num_killed} calls")


def test_killed_at_write_calls_of_a_llava(watched_llava: Forks, parts: Parts, tmp_path: Path) -> None:
    kill_at_calls(watched_llava, parts, tmp_path / "place", 5, 20)


@pytest.mark.slow
def test_killed_at_every_write_call_of_a_llava(watched_llava: Forks, parts: Parts, tmp_path: Path) -> None:
    kill_at_calls(watched_llava, parts, tmp_path / "place", 1, 1)


def fail_at_calls(server: Forks, parts: Parts, folder: Path, error: int, call: int, stride: int) -> None:
    num_failed = 0
    while True:
        target = parts.put_back(folder)
        words = parts.case.words(0, target)
        done = server.run(words, watch=str(target.parent), fail_at=call, error=error, one_cpu=True)
        what = f"call {call} {done.calls[call - 1 : call]}: {done.err}"
        assert done.code in (0, 1), what
        assert hashes_of(target.parent) == parts.case.whole[done.code], what
        failed = done.calls[call - 1].name if len(done.calls) >= call else None
        if done.code == 1:
            errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, what
            assert os.strerror(error) in errors[0], what
            assert str(target) in errors[0] or str(target.parent) in errors[0], what
            assert ".partial-" not in errors[0], what
            assert "bug in fastft" not in done.err, what
        if failed not in forks.REMOVING:
            assert leftovers(target.parent) == [], what
        if failed is None:
            print(f"{num_failed} calls failed with {os.strerror(error)}")
            return
        num_failed += 1
        call += stride


def test_write_calls_of_a_llava_are_refused(watched_llava: Forks, parts: Parts, tmp_path: Path) -> None:
    """In its last part transformers writes tokenizer and processor."""
    fail_at_calls(watched_llava, parts, tmp_path / "place", errno.ENOSPC, 91, 5)


@pytest.mark.slow
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_every_write_call_of_a_llava_is_refused(watched_llava: Forks, parts: Parts, tmp_path: Path, error: int) -> None:
    fail_at_calls(watched_llava, parts, tmp_path / "place", error, 1, 1)
