"""Somebody changes a file while a command reads it: that is said, and neither the old result nor anything else changes."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fault_cases import Place, Sources, leftovers
from forks import Forks

INPUTS = {
    "merge, shards over one file": (
        *("base/model.safetensors", "base/config.json"),
        *("one/adapter_model.safetensors", "one/adapter_config.json"),
    ),
    "quantize": ("base/model.safetensors", "base/config.json"),
    "dequantize": ("nf4/model.safetensors", "nf4/config.json"),
    "split": ("base/model.safetensors", "base/config.json"),
    "pth_to_hf": ("model.pth", "base/config.json"),
    "pth_to_hf, adapter": ("adapter.pth",),
}
CHANGES = [(name, files[0], "written") for name, files in INPUTS.items()]
CHANGES += [("merge, shards over one file", file, "replaced") for file in INPUTS["merge, shards over one file"]]
CHANGES += [("merge, shards over one file", "base/model.safetensors", how) for how in ("cut", "removed")]
ALL_CHANGES = [(name, file, how) for name, files in INPUTS.items() for file in files for how in ("written", "replaced")]


@pytest.mark.parametrize(("name", "file", "how"), CHANGES)
def test_an_input_that_changes_is_noticed(
    watched: Forks, tiny: Sources, tmp_path: Path, name: str, file: str, how: str
) -> None:
    check_noticed(watched, tiny, tmp_path, name, file, how)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file", "how"), ALL_CHANGES)
def test_every_input_that_changes_is_noticed(
    watched: Forks, tiny: Sources, tmp_path: Path, name: str, file: str, how: str
) -> None:
    check_noticed(watched, tiny, tmp_path, name, file, how)


def check_noticed(watched: Forks, tiny: Sources, tmp_path: Path, name: str, file: str, how: str) -> None:
    """Also when its bytes are the same afterwards: nobody can know that they were so in between."""
    sources = Sources(tmp_path / "sources", tiny.sizes)
    shutil.copytree(tiny.folder, sources.folder)
    for config in sources.folder.glob("*.yaml"):
        config.write_text(config.read_text().replace(str(tiny.folder), str(sources.folder)))
    place = Place(tmp_path, sources.case(name), watched, sources)
    whole = watched.run(place.words(), watch=str(place.folder), one_cpu=True)
    assert whole.code == 0
    place.put_back()
    # Late, when all bytes of weights have been read, and the result is about to be put in place.
    flushed = [number for number, call in enumerate(whole.calls, 1) if call.name == "fsync"]
    for call in (4, flushed[0]):
        changed = {"change_at": call, "change": str(sources.folder / file), "how": how}
        kept = (sources.folder / file).read_bytes()
        done = watched.run(place.words(), watch=str(place.folder), one_cpu=True, **changed)
        assert done.code == 1, f"{call}: {done.err}"
        assert Path(file).name in done.err
        said = ("changed while it was", "ends before byte", "No such file")
        assert any(words in done.err for words in said), done.err
        assert "Traceback" not in done.err
        assert not place.look(f"{file} {how}")
        assert leftovers(place.folder) == []
        (sources.folder / file).write_bytes(kept)


def test_a_side_file_that_changes_while_it_is_copied(watched: Forks, tiny: Sources, tmp_path: Path) -> None:
    sources = Sources(tmp_path / "sources", tiny.sizes)
    shutil.copytree(tiny.folder, sources.folder)
    tokenizer = sources.folder / "base" / "tokenizer.json"
    tokenizer.write_text('{"x": "' + "y" * 5000 + '"}')
    place = Place(tmp_path, sources.case("split"), watched, sources)
    whole = watched.run(place.words(), watch=str(place.folder), one_cpu=True)
    copied = [n for n, call in enumerate(whole.calls, 1) if call.paths[0].endswith("tokenizer.json")]
    place.put_back()
    changed = {"change_at": copied[1], "change": str(tokenizer), "how": "written"}
    done = watched.run(place.words(), watch=str(place.folder), one_cpu=True, **changed)
    assert done.code == 1
    assert "tokenizer.json: changed while it was being read" in done.err
    assert not place.look("tokenizer.json written")
