"""convert pth_to_hf as a user types it: every kind of checkpoint, every kind of bad one, a full disk, rights that lack."""

import json
import os
import pickle
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fastft import __main__ as program

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_llama

torch = pytest.importorskip("torch")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base, a config of LoRA and one of a full training."""
    tiny_llama.write_base(tmp_path / "base")
    for name, method in (("lora", {"kind": "lora", "lora": {"r": 4, "alpha": 8}}), ("full", {"kind": "full"})):
        values = {"model": {"name": "base"}, "method": method, "data": {"train": [{"source": "x"}]}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(values))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(seed: int = 7) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in tiny_llama.weights(seed=seed).items()}


def run(capsys: pytest.CaptureFixture[str], typed: str) -> tuple[int, str, str]:
    code = program.main(typed.split())
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The options, on a whole model of bf16: what is written is what was asked for, and fp16 over bf16 is said."""
    bf16 = {name: tensor.bfloat16() for name, tensor in weights().items()}
    torch.save({"state_dict": {f"llm.{name}": tensor for name, tensor in bf16.items()}}, folder / "iter_1.pth")
    for options, dtype in (
        ("", torch.float16),
        ("--dtype auto", torch.bfloat16),
        ("--fp32", torch.float32),
        ("--dtype bf16 --max-shard-size 12KB", torch.bfloat16),
        ("--safe-serialization --save-format huggingface", torch.float16),
    ):
        code, out, err = run(capsys, f"convert pth_to_hf full.yaml iter_1.pth out --force {options}")
        assert code == 0, err
        assert "model written to out: 21 tensors" in out
        assert ("are bf16 and are written as fp16" in err) is (dtype == torch.float16)
        files = sorted((folder / "out").glob("*.safetensors"))
        assert (len(files) > 1) is ("shard" in options)
        found = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert found.keys() == bf16.keys()
        assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in bf16.items())
    code, _, err = run(capsys, "convert pth_to_hf full.yaml iter_1.pth out --force --save-format official")
    assert code == 2
    assert "take huggingface" in err
    code, _, err = run(capsys, "convert pth_to_hf full.yaml iter_1.pth out")
    assert code == 1
    assert "--force" in err
    code, _, err = run(capsys, "convert pth_to_hf iter_1.pth full.yaml out --force")
    assert code == 2
    assert "CONFIG comes first" in err
    code, _, err = run(capsys, "convert pth_to_hf lora.yaml iter_1.pth out --force")
    assert code == 0
    assert "says method.kind: lora, but the checkpoint holds whole weights" in err


def test_a_hub_id_whose_folder_has_no_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """config.json is enough of a base: transformers' class says which names and shapes there must be."""
    (folder / "base" / "model.safetensors").unlink()
    torch.save(weights(), folder / "x.pth")
    code, _, err = run(capsys, "convert pth_to_hf full.yaml x.pth out")
    assert code == 0, err
    torch.save({name: tensor for name, tensor in weights().items() if "norm" not in name}, folder / "x.pth")
    code, _, err = run(capsys, "convert pth_to_hf full.yaml x.pth out2")
    assert code == 1
    assert "5 missing (for example model.layers.0.input_layernorm.weight" in err


def _pickled(value: Any) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(pickle.dumps(value))  # type: ignore[return-value]


def _saved(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


class Evil:
    """Would make a file when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch was_here",)


def _cut(path: Path) -> None:
    torch.save(weights(), path)
    path.write_bytes(path.read_bytes()[:-1000])


def _bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}))
        archive.writestr("x/data/0", b"\0" * 20_000_000)


def _zero_with_a_gap(path: Path) -> None:
    path.mkdir()
    for rank in (0, 2):
        torch.save({"param_shapes": []}, path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")


def _sharded_without_files(path: Path) -> None:
    from torch.distributed import checkpoint

    with pytest.warns(UserWarning, match="single process"):
        checkpoint.save(weights(), checkpoint_id=str(path), no_dist=True)
    next(path.glob("*.distcp")).unlink()


def _other_model(path: Path) -> None:
    torch.save({name.replace("self_attn", "attention"): tensor for name, tensor in weights().items()}, path)


def _other_shape(path: Path) -> None:
    torch.save({name: tensor[:-1] if "lm_head" in name else tensor for name, tensor in weights().items()}, path)


def _untied(path: Path) -> None:
    """A config that says that the head is the embedding, over weights that say otherwise."""
    path.mkdir()
    torch.save(weights(), path / "pytorch_model.bin")
    (path / "config.json").write_text(json.dumps(tiny_llama.config(tie_word_embeddings=True)))


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (lambda path: None, "not there"),  # noqa: ARG005 - made by nobody
    "an empty file": (lambda path: path.touch(), "is empty"),
    "an empty folder": (lambda path: path.mkdir(), "no checkpoint there"),
    "text": (lambda path: path.write_text("<html>"), "is text"),  # type: ignore[dict-item,return-value]
    "cut off": (_cut, "broken or cut off"),
    "a bomb": (_bomb, "compressed"),
    "a list": (_saved([1, 2]), "holds a list"),
    "no tensor": (_saved({"a": 1}), "no tensors found"),
    "a bare pickle": (_pickled({"a": 1}), "not one of torch.save"),
    "a hostile pickle": (_pickled(Evil()), "nothing of it was run"),
    "a hostile file": (_saved({"state_dict": Evil()}), "nothing of it was run"),
    "a hostile file beside weights": (
        lambda path: torch.save({**weights(), "x": Evil()}, path),
        "nothing of it was run",
    ),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a link to itself": (lambda path: path.symlink_to(path), "not there"),
    "ZeRO with a gap": (_zero_with_a_gap, "process 1 is missing"),
    "shards without files": (_sharded_without_files, "1 of 1 files of its chunks are missing"),
    "another model": (_other_model, "not those of the base"),
    "another shape": (_other_shape, "has shape"),
    "another task": (lambda path: torch.save({"resnet.conv1.weight": torch.ones(3)}, path), "not those of the base"),
    "flat parameters": (lambda path: torch.save({"_flat_param": torch.ones(3)}, path), "flat parameters of FSDP"),
    "untied weights": (_untied, "differ, but the config.json says that they are tied"),
    "too large for fp16": (lambda path: torch.save({n: t * 1e8 for n, t in weights().items()}, path), "too large"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_checkpoints(folder: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    """One line that says what is wrong, exit code 1, soon, and nothing is left behind."""
    make, word = BAD[what]
    make(folder / "x.pth")
    before = set(folder.iterdir())
    started = time.monotonic()
    code, out, err = run(capsys, "convert pth_to_hf full.yaml x.pth out")
    assert time.monotonic() - started < 10, "a refusal takes 2 s at most on a quiet machine"
    assert code == 1
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert word in errors[0]
    assert "Traceback" not in err
    assert not out
    assert set(folder.iterdir()) == before


def test_a_target_that_is_there_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A conversion that fails in the middle of the stream leaves an older result whole."""
    torch.save(weights(), folder / "x.pth")
    assert run(capsys, "convert pth_to_hf full.yaml x.pth out")[0] == 0
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    torch.save({name: tensor * 1e8 for name, tensor in weights().items()}, folder / "x.pth")
    assert run(capsys, "convert pth_to_hf full.yaml x.pth out --force")[0] == 1
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before


def test_a_full_disk(folder: Path) -> None:
    """The system refuses files beyond a size, as a full disk does."""
    torch.save(weights(), folder / "x.pth")
    done = subprocess.run(
        [sys.executable, "-m", "fastft", "convert", "pth_to_hf", "full.yaml", "x.pth", "out"],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 1, done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["base", "full.yaml", "lora.yaml", "x.pth"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_rights_that_lack(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(weights(), folder / "x.pth")
    (folder / "x.pth").chmod(0)
    code, _, err = run(capsys, "convert pth_to_hf full.yaml x.pth out")
    assert code == 1
    assert "Permission denied" in err


def test_inputs_are_not_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(weights(), folder / "x.pth")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(capsys, "convert pth_to_hf full.yaml x.pth out")[0] == 0
    assert all(path.read_bytes() == content for path, content in before.items())


def test_peak_memory_does_not_grow(folder: Path) -> None:
    """A tensor of 77 MB in a ZeRO-2 folder, masters of 154 MB: the process stays far below."""
    rows = 600_000
    config = tiny_llama.config(vocab_size=rows, hidden_size=64, num_hidden_layers=0, tie_word_embeddings=True)
    base = folder / "big"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    (folder / "big.yaml").write_text((folder / "full.yaml").read_text().replace('"base"', '"big"'))
    tag = folder / "tag"
    tag.mkdir()
    table = torch.zeros(rows, 64, dtype=torch.bfloat16)
    table[::1000] = 1
    names = {"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}
    shapes = [{name: tensor.shape for name, tensor in names.items()}]
    torch.save({"module": names, "param_shapes": shapes, "shared_params": {}}, tag / "mp_rank_00_model_states.pt")
    flat = torch.cat([tensor.float().flatten() for tensor in names.values()])
    for rank in range(2):
        part = flat[rank * flat.numel() // 2 :][: flat.numel() // 2].clone()
        state = {"zero_stage": 2, "partition_count": 2, "single_partition_of_fp32_groups": [part]}
        torch.save({"optimizer_state_dict": state}, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    code = (
        "import sys; from pathlib import Path; from fastft.convert import pth, recorded; from fastft.config import load;"
        "from fastft.convert.folder import Checkpoint;"
        "plan = pth.plan(load.load('big.yaml').config, Path('tag'), dtype=sys.argv[1]);"
        "pth.execute(plan, Path(sys.argv[2]));"
        "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])"
    )
    peaks = {}
    for dtype in ("auto", "fp32", "fp16"):
        done = subprocess.run([sys.executable, "-c", code, dtype, dtype], capture_output=True, text=True, check=True)
        peaks[dtype] = int(done.stdout.split()[-1]) * 1024
        found = load_file(folder / dtype / "model.safetensors")["model.embed_tokens.weight"]
        assert found.dtype == {"auto": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[dtype]
        assert torch.equal(found[::1000], torch.ones(600, 64).to(found.dtype))
        assert int((found != 0).sum()) == 600 * 64
    # torch and transformers alone, which know the shapes of a base without weights, take some 500 MB.
    assert max(peaks.values()) - min(peaks.values()) < 50e6, peaks
    assert max(peaks.values()) < 900e6, peaks
