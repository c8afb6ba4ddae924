"""Splitting changes nothing but the files."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fastft.convert import split
from fastft.errors import PlanError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_llama


@pytest.mark.parametrize(("before", "limit", "num_files"), [(1, 10_000, 6), (3, 10**9, 1)])
def test_split(tmp_path: Path, before: int, limit: int, num_files: int) -> None:
    source = tiny_llama.write_base(tmp_path / "base", shards=before, quantization_config={"quant_method": "any"})
    (source / "tokenizer.json").write_text("{}")
    report = split.execute(split.plan(source, max_shard_size_bytes=limit), tmp_path / "new")
    assert report.num_files == len(list((tmp_path / "new").glob("*.safetensors")))
    assert abs(report.num_files - num_files) <= 1
    found = {k: v for file in (tmp_path / "new").glob("*.safetensors") for k, v in load_file(file).items()}
    truth = tiny_llama.weights()
    assert set(found) == set(truth)
    for name, array in truth.items():
        np.testing.assert_array_equal(found[name], array)
    for file in (tmp_path / "new").glob("*.safetensors"):
        sizes = [array.nbytes for array in load_file(file).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "new" / name).read_bytes() == (source / name).read_bytes()
    index = tmp_path / "new" / "model.safetensors.index.json"
    if index.exists():
        total = sum(array.nbytes for array in truth.values())
        assert json.loads(index.read_text())["metadata"]["total_size"] == total


def test_not_onto_itself(tmp_path: Path) -> None:
    source = tiny_llama.write_base(tmp_path / "base")
    with pytest.raises(PlanError):
        split.execute(split.plan(source), source, force=True)
