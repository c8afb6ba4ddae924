"""pth_to_hf: the tensors of a .pth are found without running anything in it, and become folders that load."""

import collections
import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastft.config.schema import Config
from fastft.convert import pickle_data, pth
from fastft.convert.pth_reader import read_state_dict
from fastft.convert.source import read_bytes
from fastft.errors import CheckpointError, FastftError, FileError, PlanError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_llama

torch = pytest.importorskip("torch")


def tensors_of(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}


def config(base: Path, kind: str = "lora", **lora: Any) -> Config:
    method: dict[str, Any] = {"kind": kind}
    if kind != "full":
        method["lora"] = {"r": 4, "alpha": 8, **lora}
    return Config.model_validate({"model": {"name": str(base)}, "method": method, "data": {"train": [{"source": "x"}]}})


def convert(settings: Config, checkpoint: Path, target: Path, **options: Any) -> pth.PthReport:
    return pth.execute(pth.plan(settings, checkpoint, **options), target)


# Reading


def raw(tensor: Any) -> bytes:
    """The bytes of a tensor as torch holds them."""
    flat = tensor.detach().clone().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64", "uint8", "bool"])
def test_bytes_are_torchs(tmp_path: Path, dtype: str) -> None:
    """Shapes, offsets into shared storages, empty tensors and scalars; compared with torch's own bytes."""
    big = torch.arange(24).reshape(4, 6).to(getattr(torch, dtype))
    state = {"whole": big, "rows": big[1:3], "scalar": big[0, 0], "empty": big[:0], "one": big[2:3, :1]}
    state["parameter"] = torch.nn.Parameter(big, requires_grad=False)
    torch.save(collections.OrderedDict(state), tmp_path / "x.pth")
    read = read_state_dict(tmp_path / "x.pth")
    assert set(read.tensors) == set(state)
    for name, tensor in state.items():
        source = read.tensors[name]
        assert source.shape == tuple(tensor.shape)
        assert read_bytes(source) == raw(tensor)


class HistoryBuffer:
    """Stands for mmengine's log object, which is not installed where the file is read."""

    def __init__(self) -> None:
        self.history = np.arange(3.0)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module", "model_state_dict", None])
def test_wrappers_of_state_dicts(tmp_path: Path, wrapper: str | None) -> None:
    state = tensors_of({"a": np.ones((2, 3), np.float32)})
    whole: Any = (
        state
        if wrapper is None
        else {
            "meta": {"epoch": 3, "cfg": "model = dict(type='SupervisedFinetune')", "numpy": np.float64(2)},
            "message_hub": {"log_scalars": collections.OrderedDict(loss=HistoryBuffer())},
            wrapper: state,
        }
    )
    torch.save(whole, tmp_path / "x.pth")
    read = read_state_dict(tmp_path / "x.pth")
    assert list(read.tensors) == ["a"]
    if wrapper is not None:
        assert read.meta["epoch"] == 3


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(protocol: int) -> None:
    binary = b"bytes" if protocol > 2 else None  # a call of _codecs.encode in protocol 2
    value = {"a": [1, 2.5, None, True, (1, 2, 3, 4), "text", binary, 2**70], "b": {"c": ()}, "d": -1}
    assert pickle_data.read(pickle.dumps(value, protocol), "x") == value


class Evil:
    """Would write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


class EvilState(dict):  # type: ignore[type-arg]
    """Would run code when its state is set, and when its items are set."""

    def __reduce__(self) -> Any:
        return exec, ("open('/tmp/fastft_was_here', 'w')",), {"__setstate__": 1}, None, iter([("k", eval)])


def test_evil_pickles_do_not_run(tmp_path: Path) -> None:
    """os.system and exec in a .pth are names without a meaning; a file that has them is refused, and it is said why."""
    mark = tmp_path / "was here"
    state = tensors_of({"a": np.ones(2, np.float32)})
    for evil, name in ((Evil(mark), r"posix\.system"), (EvilState(), r"__builtin__\.(exec|eval)")):
        for whole in ({"state_dict": state, "x": evil}, {"state_dict": {"a": evil}}, evil):
            torch.save(whole, tmp_path / "x.pth")
            with pytest.raises(CheckpointError, match=f"{name}, which would run code.*nothing of it was run"):
                read_state_dict(tmp_path / "x.pth")
    assert not mark.exists()
    assert not Path("/tmp/fastft_was_here").exists()


def test_bombs_end_soon() -> None:
    """Nested tuples as keys (2^60 hash steps), deep nesting, a long memo: an error or a value, at once."""
    bomb = b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"}h\x00K\x01s."
    pickle_data.read(bomb, "x")
    pickle_data.read(b"\x80\x02" + b"](" * 100_000 + b"e" * 100_000 + b".", "x")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02K\x01",
        b"h\x05.",
        b"\x80\x02\x82\x01.",
        b"u.",
        b"0.",
        b"e.",
        b"\x80\x02]K\x01K\x02s.",
        b"\xff",
        b"\x8c\xffabc",
        b"cos\nsystem",
        b"\x80\x02}(K\x01u.",
    ],
)
def test_broken_pickles(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^where: "):
        pickle_data.read(content, "where")


def test_files_that_are_no_pth(tmp_path: Path) -> None:
    def refused(content: bytes, word: str) -> None:
        (tmp_path / "x.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match=word):
            read_state_dict(tmp_path / "x.pth")

    refused(b"", "empty")
    refused(b"<html>", "text")
    refused(b"version https://git-lfs", "LFS")
    refused(b"GGUF", "no zip")
    new = io.BytesIO()
    torch.save({"a": torch.ones(200)}, new)
    for length in (40, 300, len(new.getvalue()) - 200, len(new.getvalue()) - 1):
        refused(new.getvalue()[:length], "broken|cut off")
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("other.txt", "x")
    refused((tmp_path / "x.pth").read_bytes(), "torch.save")
    with pytest.raises(FileError):
        read_state_dict(tmp_path / "nowhere.pth")


def rewritten(source: Path, target: Path, change: Any, compress: int = zipfile.ZIP_STORED) -> Path:
    """Copy the entries of a .pth, changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compress) as new:
        for info in old.infolist():
            content = change(info.filename, old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    return target


def test_tensors_that_are_not_where_they_should_be(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(20.0).reshape(4, 5)}, tmp_path / "x.pth")
    short = rewritten(tmp_path / "x.pth", tmp_path / "short.pth", lambda n, c: c[:8] if "/data/" in n else c)
    with pytest.raises(CheckpointError, match="only 8"):
        read_state_dict(short)
    gone = rewritten(tmp_path / "x.pth", tmp_path / "gone.pth", lambda n, c: None if "/data/" in n else c)
    with pytest.raises(CheckpointError, match="not in the file"):
        read_state_dict(gone)
    packed = rewritten(tmp_path / "x.pth", tmp_path / "z.pth", lambda _, c: c, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        read_state_dict(packed)
    big = rewritten(tmp_path / "x.pth", tmp_path / "big.pth", lambda n, c: b"big" if n.endswith("byteorder") else c)
    with pytest.raises(CheckpointError, match="big-endian"):
        read_state_dict(big)
    torch.save({"a": torch.arange(20.0).reshape(4, 5).T}, tmp_path / "t.pth")
    with pytest.raises(CheckpointError, match="contiguous"):
        read_state_dict(tmp_path / "t.pth")


# Converting


def lora_state(prefix: str, infix: str) -> dict[str, Any]:
    """The adapter as a training names it."""
    return tensors_of(
        {
            prefix + key.replace(".weight", f"{infix}.weight"): array
            for key, array in tiny_llama.adapter_tensors().items()
        }
    )


@pytest.mark.parametrize("prefix", ["", "llm.", "module.llm.", "llm._orig_mod."])
def test_xtuners_lora_becomes_peft(tmp_path: Path, prefix: str) -> None:
    """`llm.base_model.model....lora_A.default.weight` in, an adapter that PEFT loads out, in fp16."""
    base = tiny_llama.write_base(tmp_path / "base")
    torch.save({"state_dict": lora_state(prefix, ".default"), "meta": {}, "message_hub": {}}, tmp_path / "iter_5.pth")
    report = convert(config(base, dropout=0.1, rslora=True), tmp_path / "iter_5.pth", tmp_path / "hf")
    assert report.kind == "adapter"
    found = load_file(tmp_path / "hf" / "adapter_model.safetensors")
    truth = tiny_llama.adapter_tensors()
    assert set(found) == set(truth)
    for name, array in truth.items():
        assert found[name].dtype == np.float16
        np.testing.assert_array_equal(found[name], array.astype(np.float16))
    settings = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 8, 0.1)
    assert settings["use_rslora"] is True
    assert settings["target_modules"] == sorted(name.rpartition(".")[2] for name in tiny_llama.LINEARS)
    assert (tmp_path / "hf" / "fastft_config.yaml").read_text()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_loads_it(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_llama.write_base(tmp_path / "base")
    state = lora_state("llm.", ".default")
    state["llm.base_model.model.lm_head.modules_to_save.default.weight"] = torch.ones(50, 24)
    state["llm.base_model.model.lm_head.original_module.weight"] = torch.zeros(50, 24)
    torch.save(state, tmp_path / "x.pth")
    convert(config(base), tmp_path / "x.pth", tmp_path / "hf", dtype="auto")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "hf")
    loaded = model.state_dict()
    for name, tensor in state.items():
        if "original_module" not in name:
            assert torch.equal(loaded[name.removeprefix("llm.")], tensor)


@pytest.mark.parametrize(
    ("change", "settings", "word"),
    [
        ({}, {"r": 8}, "rank 4"),
        ({"llm.base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight": None}, {}, "belong together"),
        ({"llm.base_model.model.model.layers.9.x.lora_A.default.weight": (4, 24)}, {}, "belong together"),
        ({"projector.weight": (4, 4)}, {}, "projector is not XTuner's"),
        ({"llm.base_model.model.model.extra.weight": (4, 4)}, {}, "extra"),
    ],
)
def test_adapters_that_do_not_fit(tmp_path: Path, change: dict[str, Any], settings: dict[str, Any], word: str) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    state = lora_state("llm.", ".default")
    for name, shape in change.items():
        if shape is None:
            del state[name]
        else:
            state[name] = torch.zeros(shape)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(FastftError, match=word):
        convert(config(base, **settings), tmp_path / "x.pth", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_config_of_another_run(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    torch.save(lora_state("", ""), tmp_path / "x.pth")
    with pytest.raises(PlanError, match=r"method\.kind: full"):
        convert(config(base, "full"), tmp_path / "x.pth", tmp_path / "hf")


@pytest.mark.parametrize(("dtype", "word"), [("fp16", "float16"), ("bf16", "bfloat16"), ("auto", "float32")])
def test_whole_model(tmp_path: Path, dtype: str, word: str) -> None:
    """A full fine-tune becomes a folder with the base's config and tokenizer, in shards."""
    base = tiny_llama.write_base(tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    state = tensors_of({f"llm.{name}": array for name, array in tiny_llama.weights(seed=7).items()})
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    convert(config(base, "full"), tmp_path / "x.pth", tmp_path / "hf", dtype=dtype, max_shard_size_bytes=9000)
    from safetensors.torch import load_file as load_torch

    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    found = {name: load_torch(tmp_path / "hf" / file)[name] for name, file in index["weight_map"].items()}
    assert {f"llm.{name}" for name in found} == set(state)
    for name, tensor in found.items():
        assert torch.equal(tensor, state[f"llm.{name}"].to(getattr(torch, word)))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == word
    assert (tmp_path / "hf" / "tokenizer.json").exists()


def test_whole_model_that_is_not_the_bases(tmp_path: Path) -> None:
    base = tiny_llama.write_base(tmp_path / "base")
    weights = tiny_llama.weights()

    def refused(arrays: dict[str, np.ndarray], word: str) -> None:
        torch.save(tensors_of(arrays), tmp_path / "x.pth")
        with pytest.raises(PlanError, match=word):
            convert(config(base, "full"), tmp_path / "x.pth", tmp_path / "hf")

    refused({name: array for name, array in weights.items() if "norm" not in name}, "5 missing")
    refused(weights | {"extra": weights["model.norm.weight"]}, "1 not in the base")
    refused(weights | {"model.norm.weight": np.ones(3, np.float32)}, "shape")


def test_tied_head_is_written_once(tmp_path: Path) -> None:
    weights = tiny_llama.weights(tied=True)
    base = tiny_llama.write_base(tmp_path / "base", weights, tie_word_embeddings=True)
    state = tensors_of(weights)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, tmp_path / "x.pth")
    convert(config(base, "full"), tmp_path / "x.pth", tmp_path / "hf", dtype="auto")
    assert set(load_file(tmp_path / "hf" / "model.safetensors")) == set(weights)


def test_checkpoint_folders(tmp_path: Path) -> None:
    """checkpoint-N with an adapter or a whole model: config, tokenizer and notes of the folder go along."""
    base = tiny_llama.write_base(tmp_path / "base")
    adapter = tiny_llama.write_adapter(tmp_path / "run" / "checkpoint-5")
    for name in ("optimizer.pt", "trainer_state.json", "rng_state.pth"):
        (adapter / name).write_text("x")
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "fastft_training.json").write_text("{}")
    convert(config(base), adapter, tmp_path / "hf", dtype="bf16")
    assert {file.name for file in (tmp_path / "hf").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "fastft_config.yaml", "fastft_training.json",
        "tokenizer.json",
    }  # fmt: skip
    assert (tmp_path / "hf" / "adapter_config.json").read_bytes() == (adapter / "adapter_config.json").read_bytes()
    full = tiny_llama.write_base(tmp_path / "full" / "checkpoint-9", tiny_llama.weights(seed=3), shards=2)
    convert(config(base, "full"), full, tmp_path / "whole", dtype="auto")
    found = load_file(tmp_path / "whole" / "model.safetensors")
    for name, array in tiny_llama.weights(seed=3).items():
        np.testing.assert_array_equal(found[name], array)
    with pytest.raises(FileError, match="checkpoint-9"):
        convert(config(base, "full"), tmp_path / "full", tmp_path / "x")
    with pytest.raises(FileError, match="not there"):
        convert(config(base, "full"), tmp_path / "nowhere", tmp_path / "x")


def test_deepspeed_folders(tmp_path: Path) -> None:
    """XTuner's iter_N.pth under DeepSpeed is a folder; see test_convert_deepspeed.py for all kinds."""
    base = tiny_llama.write_base(tmp_path / "base")
    folder = tmp_path / "iter_500.pth"
    folder.mkdir()
    states = {"module": lora_state("llm.", ".default"), "ds_version": "0.16", "optimizer": None}
    torch.save(states, folder / "mp_rank_00_model_states.pt")
    (folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"never read")
    convert(config(base), folder, tmp_path / "hf")
    assert set(load_file(tmp_path / "hf" / "adapter_model.safetensors")) == set(tiny_llama.adapter_tensors())


def test_base_elsewhere(tmp_path: Path) -> None:
    """An adapter needs no base; it says that the names are not checked."""
    torch.save(lora_state("", ""), tmp_path / "x.pth")
    plan = pth.plan(config(Path("someone/some-model")), tmp_path / "x.pth")
    assert "not checked" in " ".join(plan.notes)


def test_base_in_pickles(tmp_path: Path) -> None:
    """A base of pytorch_model.bin files is merged without torch's loader."""
    from fastft.convert import merge, verify

    base = tiny_llama.write_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    weights = tensors_of(tiny_llama.weights())
    names = sorted(weights)
    parts = {"pytorch_model-1.bin": names[:5], "pytorch_model-2.bin": names[5:]}
    for file, part in parts.items():
        torch.save({name: weights[name] for name in part}, base / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    adapter = tiny_llama.write_adapter(tmp_path / "adapter")
    torch.save(tensors_of(tiny_llama.adapter_tensors()), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    merge.execute(merge.plan(base, [(adapter, 1.0)]), tmp_path / "merged")
    plain = tiny_llama.write_base(tmp_path / "plain")
    save_file(tiny_llama.adapter_tensors(), adapter / "adapter_model.safetensors")
    merge.execute(merge.plan(plain, [(adapter, 1.0)]), tmp_path / "merged from safetensors")
    assert verify.verify(tmp_path / "merged", base, [(adapter, 1.0)]).good
    one, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "merged from safetensors")
    )
    assert one == other
