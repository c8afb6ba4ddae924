"""fastft.data.cache and store: the same samples from the disk, nothing stale, nothing broken, nothing mixed."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastft.config.schema import Data
from fastft.data import cache, store
from fastft.data import prepare as prepare_module
from fastft.data.dialogue import Where
from fastft.data.prepare import Prepared, prepare
from fastft.errors import DataError, FileError


def write(path: Path, *pairs: tuple[str, str]) -> Path:
    rows = [{"instruction": question, "output": answer} for question, answer in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "a.jsonl", *((f"question {n}", f"answer {n}") for n in range(30)))


def run(tokenizer: Any, source: Path, task: str = "sft", **settings: Any) -> Prepared:
    values = {"train": [{"source": str(source)}], "max_length": 64, "cache": str(source.parent / "cache"), **settings}
    return prepare(Data.model_validate(values), task, tokenizer, seed=0)  # type: ignore[arg-type]


def from_cache(result: Prepared) -> list[bool]:
    return [source.from_cache for source in result.report.train.sources]


def test_the_second_run_reads_no_row(byte_tokenizer: Any, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(byte_tokenizer, source)
    assert from_cache(first) == [False]

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the rows were read again")

    monkeypatch.setattr(prepare_module, "items", forbidden)
    second = run(byte_tokenizer, source)
    assert from_cache(second) == [True]
    uncached = {**vars_of(first.report.train.sources[0]), "from_cache": True}
    assert vars_of(second.report.train.sources[0]) == uncached
    assert list(second.train) == list(first.train)
    assert [second.train.places(i) for i in range(len(second.train))] == [
        first.train.places(i) for i in range(len(first.train))
    ]
    # Ids and masks are maps of files: they need no memory of their own.
    assert isinstance(second.train.collection.parts[0].ids, np.memmap)
    # What does not decide the tokens of a source is not asked for.
    other = run(byte_tokenizer, source, packing=False, eval_rows=3, train=[{"source": str(source), "weight": 2}])
    assert from_cache(other) == [True]


def vars_of(report: Any) -> dict[str, Any]:
    return {name: getattr(report, name) for name in report.__slots__}


def test_without_a_cache_the_samples_are_the_same(byte_tokenizer: Any, source: Path) -> None:
    assert list(run(byte_tokenizer, source, cache=None).train) == list(run(byte_tokenizer, source).train)
    assert len(list((source.parent / "cache").iterdir())) == 1


def changed_data(tokenizer: Any, source: Path) -> Any:
    state = source.stat()
    source.write_text(source.read_text(encoding="utf-8").replace("answer 7", "Answer 7"), encoding="utf-8")
    os.utime(source, ns=(state.st_atime_ns, state.st_mtime_ns))  # the same size, the same time
    return tokenizer, {}


def changed_template(tokenizer: Any, _: Path) -> Any:
    other = deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("<u>", "<u> ")
    return other, {}


def changed_tokenizer(tokenizer: Any, _: Path) -> Any:
    other = deepcopy(tokenizer)
    other.add_tokens(["question"])
    return other, {}


def changed_eos(tokenizer: Any, _: Path) -> Any:
    other = deepcopy(tokenizer)
    other.eos_token = "<p>"
    return other, {}


CHANGES: list[Callable[[Any, Path], Any]] = [
    changed_data,
    changed_template,
    changed_tokenizer,
    changed_eos,
    lambda tokenizer, _: (tokenizer, {"max_length": 16}),
    lambda tokenizer, source: (tokenizer, {"train": [{"source": str(source), "max_rows": 3}]}),
    lambda tokenizer, source: (tokenizer, {"train": [{"source": str(source), "system": "S"}]}),
    lambda tokenizer, _: (tokenizer, {"task": "pretrain"}),
]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_tokens_is_noticed(byte_tokenizer: Any, source: Path, change: Any) -> None:
    first = run(byte_tokenizer, source)
    tokenizer, settings = change(byte_tokenizer, source)
    second = run(tokenizer, source, **settings)
    assert from_cache(second) == [False]
    assert list(second.train) == list(run(tokenizer, source, **{**settings, "cache": None}).train)
    assert list(second.train) != list(first.train)


def test_only_the_changed_source_is_made_anew(byte_tokenizer: Any, source: Path) -> None:
    other = write(source.parent / "b.jsonl", ("c", "d"))
    both = [{"source": str(source)}, {"source": str(other)}]
    run(byte_tokenizer, source, train=both)
    write(other, ("c", "e"))
    assert from_cache(run(byte_tokenizer, source, train=both)) == [True, False]


def test_unreadable_rows_are_refused_from_the_cache_too(byte_tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *(("q", "a") for _ in range(25)), ("", "b"), ("c", ""))
    skipped = run(byte_tokenizer, source, on_bad_row="skip")
    assert skipped.report.train.skipped == 2
    with pytest.raises(DataError, match=r"a\.jsonl:26: turn 1: the user's text is empty; mend the row"):
        run(byte_tokenizer, source)


def entry_of(source: Path) -> Path:
    (entry,) = (source.parent / "cache").iterdir()
    return entry


def cut(entry: Path) -> None:
    ids = entry / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:-4])


def flip(entry: Path) -> None:
    raw = bytearray((entry / "ids.npy").read_bytes())
    raw[-1] ^= 1
    (entry / "ids.npy").write_bytes(raw)


def pickled(entry: Path) -> None:
    """An array of objects, with a manifest that vouches for it."""
    np.save(entry / "ids.npy", np.asarray([Where("a", 1)], dtype=object), allow_pickle=True)
    restate(entry)


def misfit(entry: Path) -> None:
    np.save(entry / "starts.npy", np.asarray([0, 5], dtype=np.int64))
    restate(entry)


def restate(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
    manifest["arrays"] = {name: cache._stated(entry / f"{name}.npy") for name in store.ARRAYS}
    (entry / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def other_key(entry: Path) -> None:
    manifest = json.loads((entry / "manifest.json").read_text(encoding="utf-8"))
    manifest["about"]["encoding"]["max_length"] = 7
    (entry / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        flip,
        pickled,
        misfit,
        other_key,
        lambda entry: (entry / "manifest.json").unlink(),
        lambda entry: (entry / "manifest.json").write_text("[]"),
        lambda entry: (entry / "manifest.json").write_text('{"about": '),
        lambda entry: (entry / "learned.npy").unlink(),
    ],
)
def test_a_damaged_entry_is_said_and_made_anew(
    byte_tokenizer: Any, source: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = list(run(byte_tokenizer, source).train)
    damage(entry_of(source))
    capsys.readouterr()
    again = run(byte_tokenizer, source)
    assert from_cache(again) == [False]
    assert list(again.train) == first
    assert f"warning: cache {entry_of(source)}: not used and made anew" in capsys.readouterr().err
    assert from_cache(run(byte_tokenizer, source)) == [True]


def test_a_disk_that_does_not_keep_what_is_written_is_an_error(
    byte_tokenizer: Any, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = cache._stated
    monkeypatch.setattr(cache, "_stated", lambda path: {**stated(path), "sha256": os.urandom(4).hex()})
    with pytest.raises(FileError, match="what was written cannot be read back"):
        run(byte_tokenizer, source)


@pytest.mark.parametrize("cache_folder", ["cache", None])
def test_a_source_that_changes_while_it_is_read_is_refused(
    byte_tokenizer: Any, source: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: str | None
) -> None:
    kept_in = None if cache_folder is None else str(source.parent / cache_folder)
    items = prepare_module.items

    def slow(*words: Any, **settings: Any) -> Any:
        yield from items(*words, **settings)
        write(source, ("other", "rows"))

    monkeypatch.setattr(prepare_module, "items", slow)
    with pytest.raises(DataError, match="the file changed while it was read"):
        run(byte_tokenizer, source, cache=kept_in)
    assert kept_in is None or not list(Path(kept_in).iterdir())


def test_a_failed_run_leaves_nothing(byte_tokenizer: Any, source: Path) -> None:
    with source.open("a", encoding="utf-8") as stream:
        stream.write('{"instruction": 7}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:31"):
        run(byte_tokenizer, source)
    assert not list((source.parent / "cache").iterdir())


def test_small_sources_are_not_kept_by_auto(byte_tokenizer: Any, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(source.parent / "home"))
    run(byte_tokenizer, source, cache="auto")
    assert not (source.parent / "home").exists()
    monkeypatch.setattr(cache, "AUTO_BYTES", 100)
    run(byte_tokenizer, source, cache="auto")
    assert len(list((source.parent / "home/fastft/data").iterdir())) == 1


def test_no_room_is_said_and_the_tokens_stay_in_memory(
    byte_tokenizer: Any, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(byte_tokenizer, source, cache=str(source / "below a file"))
    assert len(result.train) > 0
    assert "not used, Not a directory; the tokens stay in memory" in capsys.readouterr().err


def _worker(tokenizer_folder: str, source: str, queue: Any) -> None:
    from transformers import AutoTokenizer

    items = prepare_module.items

    def slow(*words: Any, **settings: Any) -> Any:
        for item in items(*words, **settings):
            time.sleep(0.02)
            yield item

    prepare_module.items = slow
    result = run(AutoTokenizer.from_pretrained(tokenizer_folder), Path(source))
    queue.put((from_cache(result), [sample["input_ids"] for sample in result.train]))


def test_of_two_processes_one_makes_it_and_the_other_waits(byte_tokenizer: Any, source: Path) -> None:
    folder = str(source.parent / "tokenizer")
    byte_tokenizer.save_pretrained(folder)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=_worker, args=(folder, str(source), queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert sorted(made for made, _ in found) == [[False], [True]]
    assert found[0][1] == found[1][1] == [s["input_ids"] for s in run(byte_tokenizer, source, cache=None).train]
    assert [path.name for path in (source.parent / "cache").iterdir()] == [entry_of(source).name]


def test_a_store_of_files_is_the_store_in_memory(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    with store.Store() as memory, store.Store(tmp_path) as files:
        for number in range(20):
            ids = random.integers(0, 2**31 - 1, number % 5 + 1).astype(np.int32)
            for kept in (memory, files):
                kept.add(ids, ids % 2 == 0, Where(f"{number % 3}", number), store.digest(ids), kind=number % 4)
        ours, theirs = memory.documents(), files.documents()
    for name in ("ids", "learned", "starts", "digests", "kinds"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype == store.ARRAYS[name]
    assert list(ours.places) == list(theirs.places) == [Where(f"{n % 3}", n) for n in range(20)]
    # Any reader of .npy reads it: the header that was written last is numpy's own.
    assert np.load(tmp_path / "ids.npy").tolist() == ours.ids.tolist()


@pytest.mark.parametrize("cached", [True, False])
def test_the_tokens_of_a_source_need_no_memory(byte_tokenizer: Any, tmp_path: Path, cached: bool) -> None:
    """A source of 12 million tokens, which are 60 MB: made and read with less than half of that."""
    import tracemalloc

    rows = ((f"{n} " + "q" * 1000, "a" * 11_000) for n in range(1000))
    source = write(tmp_path / "a.jsonl", *rows)
    settings = {"max_length": 16_384, "packing": False}
    if cached:
        run(byte_tokenizer, source, **settings)
    tracemalloc.start()
    try:
        result = run(byte_tokenizer, source, **settings)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert result.train.num_tokens > 12_000_000
    assert result.report.train.stops == 1000
    assert peak_bytes < 30_000_000


def test_an_empty_store(tmp_path: Path) -> None:
    with store.Store(tmp_path) as files:
        assert len(files.documents()) == 0
    assert len(store.read(tmp_path, [])) == 0
    (tmp_path / "ids.npy").write_bytes(b"no array")
    with pytest.raises(FileError, match=r"ids\.npy: cannot be read"):
        store.read(tmp_path, [])
