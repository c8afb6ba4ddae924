"""`ShardedWriter`, `save_sharded` and `open_checkpoint` against safetensors, huggingface_hub and transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import numpy as safetensors_numpy
from safetensors import torch as safetensors_torch

from fastft import native
from fastft.errors import UsageError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64,
]  # fmt: skip


def random_tensor(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits (0 and 1 for bool)."""
    count = int(np.prod(shape)) * dtype.itemsize
    content = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, count, np.uint8)
    return torch.from_numpy(content).view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# No empty ones: huggingface_hub takes all of them for one shared storage and puts them into one file.
tensors_strategy = st.dictionaries(
    st.text('abc.12\u00e9"\\', min_size=1, max_size=6),
    st.tuples(st.lists(st.integers(1, 6), max_size=3), st.sampled_from(DTYPES), st.integers(0, 1000)),
    min_size=1,
    max_size=12,
)


@given(drawn=tensors_strategy, limit=st.integers(1, 3000), threads=st.sampled_from([1, 2, 5]))
@settings(max_examples=30, deadline=None)
def test_files_are_those_of_huggingface_hub(drawn: Any, limit: int, threads: int, tmp_path_factory: Any) -> None:
    tmp_path = tmp_path_factory.mktemp("hub")
    tensors = {name: random_tensor(*how) for name, how in drawn.items()}
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    save_torch_state_dict(tensors, theirs, max_shard_size=limit)
    native.save_sharded(tensors, ours, max_shard_size=limit, threads=threads)
    their_files, our_files = files_of(theirs), files_of(ours)
    their_index, our_index = (files.pop("model.safetensors.index.json", b"{}") for files in (their_files, our_files))
    assert our_files == their_files
    index, expected = json.loads(our_index), json.loads(their_index)
    if expected:
        assert index["weight_map"] == expected["weight_map"]
        assert index["metadata"]["total_size"] == expected["metadata"]["total_size"]
        # As transformers writes it, which sorts the names and counts the numbers too.
        expected["metadata"]["total_parameters"] = sum(tensor.numel() for tensor in tensors.values())
        assert our_index.decode() == json.dumps(expected, indent=2, sort_keys=True) + "\n"


def test_a_file_is_that_of_save_file(tmp_path: Path) -> None:
    tensors = {f"{dtype}.{size}": random_tensor([size, 3], dtype, size) for dtype in DTYPES for size in (0, 1, 5)}
    native.save_sharded(tensors, tmp_path / "ours")
    safetensors_torch.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert files_of(tmp_path / "ours") == {"model.safetensors": (tmp_path / "theirs.safetensors").read_bytes()}


def test_arrays_of_numpy(tmp_path: Path) -> None:
    names = [
        "float64",
        "float32",
        "float16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "bool",
        "complex64",
    ]
    arrays = {name: np.arange(12).reshape(3, 4).astype(name) for name in names}
    arrays["scalar"] = np.array(3.5, np.float32)
    native.save_sharded(arrays, tmp_path / "ours", metadata={"a": "b"}, name="x.safetensors")
    safetensors_numpy.save_file(arrays, tmp_path / "theirs.safetensors", metadata={"a": "b"})
    assert files_of(tmp_path / "ours") == {"x.safetensors": (tmp_path / "theirs.safetensors").read_bytes()}
    with_bf16: dict[str, Any] = {
        "bf16": np.arange(5, dtype=np.float32).astype(ml_dtypes.bfloat16),
        "f8": np.arange(3).astype(ml_dtypes.float8_e4m3fn),
    }
    native.save_sharded(with_bf16, tmp_path / "bf16")
    read = safetensors_torch.load_file(tmp_path / "bf16" / "model.safetensors")
    assert torch.equal(read["bf16"], torch.arange(5, dtype=torch.bfloat16))
    assert read["f8"].dtype == torch.float8_e4m3fn
    with native.ShardedWriter(tmp_path / "bits") as writer:
        writer.add("bf16", with_bf16["bf16"].view(np.uint16), dtype="bfloat16")
        writer.add("f8", with_bf16["f8"].view(np.uint8), dtype="float8_e4m3fn")
    assert files_of(tmp_path / "bits") == files_of(tmp_path / "bf16")


def test_transformers_loads_what_was_written(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with native.ShardedWriter(tmp_path / "ours", max_shard_size="20KB") as writer:
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
        config.save_pretrained(writer.folder)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in model.state_dict().items())


def test_nothing_is_there_until_the_end(tmp_path: Path) -> None:
    target = tmp_path / "new" / "model"
    with native.ShardedWriter(target, max_shard_size=40) as writer:
        for number in range(3):
            writer.add(str(number), np.full(10, number, np.float32))
            assert not target.exists()
    assert len(files_of(target)) == 4
    assert sorted(path.name for path in target.parent.iterdir()) == ["model"]


def fail_after_two(target: Path, **arguments: Any) -> None:
    with native.ShardedWriter(target, **arguments) as writer:
        writer.add("a", np.zeros(10, np.float32))
        writer.add("b", np.zeros(10, np.float32))
        raise ZeroDivisionError


def test_a_body_that_fails_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(ZeroDivisionError):
        fail_after_two(target, max_shard_size=4)
    assert list(tmp_path.iterdir()) == []


def test_the_old_folder_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    native.save_sharded({"a": np.zeros(3, np.float32)}, target)
    before = files_of(target)
    with pytest.raises(native.FileError, match="exists already"):
        native.save_sharded({"a": np.ones(3, np.float32)}, target)
    with pytest.raises(ZeroDivisionError):
        fail_after_two(target, force=True)
    assert files_of(target) == before
    native.save_sharded({"a": np.ones(3, np.float32)}, target, force=True)
    assert files_of(target) != before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tensor_that_is_refused_does_not_count(tmp_path: Path) -> None:
    with native.ShardedWriter(tmp_path / "model") as writer:
        with pytest.raises(native.ArrayError, match="not contiguous"):
            writer.add("a", np.zeros((4, 4), np.float32).T)
        writer.add("a", np.zeros((4, 4), np.float32))
    assert list(native.open_checkpoint(tmp_path / "model")) == ["a"]


def test_a_file_that_could_not_be_written_is_the_end(tmp_path: Path) -> None:
    """Even where the caller hides the error: the folder would lack the tensor."""

    def hide_it() -> None:
        with native.ShardedWriter(tmp_path / "model", max_shard_size=4) as writer:
            with pytest.raises(native.PlanError, match="control characters"):
                writer.add("a\nb", np.zeros(10, np.float32))
            writer.add("b", np.zeros(10, np.float32))

    with pytest.raises(native.ArrayError, match="is not made: a file could not be written before"):
        hide_it()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"max_shard_size": 0}, "max_shard_size 0 is not allowed"),
        ({"max_shard_size": 1.5}, "max_shard_size 1.5 is not allowed"),
        ({"name": "a/b.safetensors"}, "name 'a/b.safetensors' is not allowed"),
        ({"name": "model.bin"}, "name 'model.bin' is not allowed"),
        ({"metadata": {"a": 1}}, "metadata holds something else than text"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(native.ArrayError) as raised:
        native.ShardedWriter(tmp_path / "model", **arguments)
    assert text in str(raised.value)
    with pytest.raises(UsageError, match="size '0GB' is zero"):
        native.ShardedWriter(tmp_path / "model", max_shard_size="0GB")


def test_names_and_tensors_that_are_refused(tmp_path: Path) -> None:
    writer = native.ShardedWriter(tmp_path / "model")
    with pytest.raises(native.ArrayError, match="write inside `with"):
        writer.add("a", np.zeros(3, np.float32))
    with writer:
        writer.add("a", np.zeros(3, np.float32))
        for name, tensor, text in (
            ("a", np.zeros(3, np.float32), "tensor 'a' was added already"),
            ("", np.zeros(3, np.float32), "'' is no name of a tensor"),
            (3, np.zeros(3, np.float32), "3 is no name of a tensor"),
            ("b", [1.0], "tensor 'b': a numpy array or a torch tensor is needed, not list"),
            ("b", np.zeros(3, np.complex128), "tensor 'b': dtype complex128 is not known"),
            ("b", torch.zeros(3, device="meta"), "tensor 'b': the tensor is on meta"),
            ("b", np.array(["x"]), "tensor 'b': dtype str32 is not known"),
        ):
            with pytest.raises(native.ArrayError) as raised:
                writer.add(name, tensor)  # type: ignore[arg-type]
            assert text in str(raised.value)
    with pytest.raises(native.ArrayError, match="in use already"), writer:
        pass


def test_tensors_that_share_memory_are_refused(tmp_path: Path) -> None:
    embedding = torch.zeros(4, 4)
    tied = {"embed": embedding, "norm": torch.ones(4), "head": embedding[1:]}
    with pytest.raises(native.ArrayError, match="'embed' and 'head' share memory; leave one out"):
        native.save_sharded(tied, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    parts = {"low": embedding[:2], "high": embedding[2:], "none": embedding[:0]}
    native.save_sharded(parts, tmp_path / "model")


PEAK = """
import sys
import numpy as np
from fastft import native

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

tensors = {str(number): np.full(8 << 20, number, np.uint8) for number in range(24)}
before = peak()
native.save_sharded(tensors, sys.argv[1], max_shard_size="100MB", threads=2)
print(peak() - before)
"""


def test_writing_copies_nothing(tmp_path: Path) -> None:
    """192 MiB are written; less than one tensor of 8 MiB comes on top."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "model")], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 8 << 20
    assert (native.open_checkpoint(tmp_path / "model")["23"] == 23).all()


# Reading


def test_reading_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {str(dtype): random_tensor([5, 3], dtype, 1) for dtype in DTYPES}
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        reader = native.open_checkpoint(path, kind="torch")
        assert set(reader) == set(tensors)
        assert len(reader) == len(tensors)
        for name, tensor in tensors.items():
            read: Any = reader[name]
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))
            info = reader.info(name)
            assert (info.dtype, info.shape, info.nbytes) == (str(tensor.dtype)[6:], (5, 3), tensor.nbytes)
    arrays = native.open_checkpoint(tmp_path)
    assert arrays["torch.bfloat16"].dtype == ml_dtypes.bfloat16
    bits: Any = native.open_checkpoint(tmp_path, bits=True)["torch.bfloat16"]
    assert bits.dtype == np.uint16
    assert bits.tobytes() == tensors["torch.bfloat16"].view(torch.uint8).numpy().tobytes()
    with pytest.raises(KeyError):
        arrays["other"]


def test_some_rows_and_a_given_array(tmp_path: Path) -> None:
    whole = np.arange(60, dtype=np.float32).reshape(20, 3)
    native.save_sharded({"w": whole, "scalar": np.array(1, np.int8)}, tmp_path / "model")
    reader = native.open_checkpoint(tmp_path / "model")
    assert np.array_equal(np.asarray(reader.read("w", rows=(4, 7))), whole[4:11])
    out = np.zeros((20, 3), np.float32)
    assert reader.read("w", out=out) is out
    assert np.array_equal(out, whole)
    assert reader["scalar"].shape == ()
    for rows in ((-1, 2), (0, 21), (20, 1), (3, -1)):
        with pytest.raises(native.ArrayError, match="are not there"):
            reader.read("w", rows=rows)
    with pytest.raises(native.ArrayError, match="are not there"):
        reader.read("scalar", rows=(0, 1))
    with pytest.raises(native.ArrayError, match=r"out: shape is \(3, 20\)"):
        reader.read("w", out=np.zeros((3, 20), np.float32))


def test_files_that_change_or_are_broken(tmp_path: Path) -> None:
    native.save_sharded({"w": np.arange(60, dtype=np.float32)}, tmp_path / "model")
    reader = native.open_checkpoint(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    with pytest.raises(native.FileError, match="changed while it was being read"):
        reader["w"]
    with pytest.raises(native.CheckpointError, match="cut off"):
        native.open_checkpoint(file)
    with pytest.raises(native.FileError, match="no weights there"):
        native.open_checkpoint(tmp_path)
    with pytest.raises(native.FileError, match="the checkpoint is not there"):
        native.open_checkpoint(tmp_path / "nothing")
    with pytest.raises(native.ArrayError, match="kind 'jax' is not allowed"):
        native.open_checkpoint(tmp_path, kind="jax")  # type: ignore[arg-type]
