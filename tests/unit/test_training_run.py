"""A run from config to files: each task with each method learns, and leaves what the README says."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

import tiny_run
from fastft.errors import ConfigError, DataError, FileError, TrainingError
from fastft.training import checkpoint, refresh, run
from fastft.training.trainer import FastftTrainer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "sft": tiny_run.write_dialogues(folder / "dialogues.jsonl"),
        "pretrain": tiny_run.write_texts(folder / "texts.jsonl"),
    }


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
@pytest.mark.parametrize("task", ["pretrain", "sft"])
def test_the_loss_falls_and_the_files_are_there(
    task: str, kind: str, model: Path, data: dict[str, Path], tmp_path: Path
) -> None:
    packing = {"data__packing": True} if kind == "lora" else {}
    config = tiny_run.config(
        model, data[task], task=task, kind=kind, samples__prompts=("Basket",), samples__max_new_tokens=2, **packing
    )
    done = run.run(config, work_dir=tmp_path / "run")
    losses = [line["loss"] for line in _metrics(done.run_dir)]
    assert len(losses) == 6
    assert losses[-1] < 0.95 * losses[0]
    assert done.loss == losses[-1]
    folder = "model" if kind == "full" else "adapter"
    assert done.artifact == tmp_path / "run" / folder
    weights = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    for name in (weights, "tokenizer.json", "chat_template.jinja", "fastft_training.json"):
        assert (done.artifact / name).is_file(), name
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "loss.png", "report.html", "log.txt", "checkpoint-6"):
        assert (done.run_dir / name).exists(), name
    assert (done.run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(done.run_dir.rglob("training_args.bin"))
    assert not [f for f in done.run_dir.iterdir() if f.name.startswith(".")]
    record = json.loads((done.artifact / "fastft_training.json").read_text())
    assert (record["task"], record["method"], record["base"]["name"]) == (task, kind, str(model.resolve()))
    assert (record["quantization"] is not None) == (kind == "qlora")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_fp32_weights_with_products_in_bf16(
    kind: str, model: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does by itself, here on a CPU: linear layers give bf16, weights stay fp32, a resumed run is the same."""
    import shutil

    import torch
    from safetensors.torch import load_file

    from fastft.model import device

    monkeypatch.setattr(device, "products_dtype", lambda *_args: torch.bfloat16)
    seen: set[torch.dtype] = set()
    linear = torch.nn.Linear.forward

    def watched(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        y = linear(self, x)
        if self.training and torch.is_grad_enabled():
            seen.add(y.dtype)
        return y

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    config = tiny_run.config(
        model,
        data["sft"],
        kind=kind,
        train__gradient_checkpointing=True,
        train__lr=5e-3,
        output__save_steps=3,
        samples__prompts=("Basket",),
        samples__max_new_tokens=2,
        data__eval_rows=2,
    )
    done = run.run(config, work_dir=tmp_path / "run")
    losses = [line["loss"] for line in _metrics(done.run_dir) if "loss" in line]
    assert losses[-1] < 0.97 * losses[0]
    assert seen == {torch.bfloat16}
    (file,) = done.artifact.glob("*.safetensors")
    weights = load_file(file)
    assert {value.dtype for value in weights.values()} == {torch.float32}
    broken = tmp_path / "broken"
    shutil.copytree(done.run_dir, broken)
    shutil.rmtree(broken / "checkpoint-6")
    shutil.rmtree(broken / done.artifact.name)
    resumed = run.run(config, work_dir=broken, resume="auto")
    others = load_file(resumed.artifact / file.name)
    assert all(torch.equal(others[name], value) for name, value in weights.items())


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_a_full_model_is_written_in_the_dtype_of_its_base(
    stored: str, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import load_file

    base = tiny_run.write_model(tmp_path / "base", dtype=stored)
    done = run.run(tiny_run.config(base, data["sft"], kind="full", train__max_steps=2), work_dir=tmp_path / "run")
    exact = load_file(done.run_dir / "checkpoint-2" / "model.safetensors")
    written = load_file(done.artifact / "model.safetensors")
    assert exact.keys() == written.keys()
    for name, value in exact.items():
        assert value.dtype == torch.float32
        assert torch.equal(written[name], value.to(getattr(torch, stored))), name
    assert json.loads((done.artifact / "config.json").read_text())["dtype"] == stored
    assert f"written in {stored}, as the base is" in capsys.readouterr().err


def test_a_weight_too_large_for_the_base_keeps_fp32(
    data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    base = tiny_run.write_model(tmp_path / "base", dtype="float16")
    config = tiny_run.config(base, data["sft"], kind="full", train__max_steps=1, train__lr=1e5, train__warmup_ratio=0.0)
    done = run.run(config, work_dir=tmp_path / "run")
    assert {str(value.dtype) for value in load_file(done.artifact / "model.safetensors").values()} == {"torch.float32"}
    assert "too large for the base's float16; kept as fp32" in capsys.readouterr().err


def test_the_record_of_a_quantized_base(model: Path, data: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_run.config(
        model,
        data["sft"],
        kind="qlora",
        method__quantization={"type": "fp4", "double_quant": False},
        train__max_steps=1,
    )
    done = run.run(config, work_dir=tmp_path / "run")
    record = json.loads((done.run_dir / "fastft_training.json").read_text())
    assert record["quantization"] == {
        "type": "fp4",
        "double_quant": False,
        "blocksize": 64,
        "compute_dtype": "float32",
        "weights_dtype": "float32",
        "skip": ["lm_head"],
    }


def test_log_txt_holds_what_was_said(
    model: Path, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run.config(model, data["sft"], train__max_steps=1, samples__prompts=("Basket",))
    run.run(config, work_dir=tmp_path / "run")
    said = capsys.readouterr()
    assert said.out == ""
    assert (tmp_path / "run" / "log.txt").read_text() == said.err
    assert "answers before the training" in said.err
    assert "weights are trained" in said.err


def test_dry_run_trains_nothing_and_leaves_nothing(
    model: Path, data: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run.config(model, data["sft"], train__max_steps=None, train__epochs=2, train__batch_size=2)
    run.dry_run(config, work_dir=tmp_path / "run", processes=3)
    assert not (tmp_path / "run").exists()
    said = capsys.readouterr().err
    assert "first sample" in said
    assert re.search(r"first batch: 2 rows of \d+ tokens, \d+ of \d+ learned", said)
    # 12 rows are 6 batches, two for each process; twice.
    assert "dry run: 4 steps would be made" in said
    assert "by 3 processes" in said


def test_a_nan_stops_the_run_and_keeps_the_checkpoints(
    model: Path, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = FastftTrainer.compute_loss

    def spoiled(self: FastftTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    monkeypatch.setattr(FastftTrainer, "compute_loss", spoiled)
    pages: list[str] = []
    draw = refresh.draw

    def kept(run_dir: Path, *args: Any, **kwargs: Any) -> None:
        draw(run_dir, *args, **kwargs)
        pages.append((run_dir / "report.html").read_text().split("</h1>\n<p>")[1])

    monkeypatch.setattr(refresh, "draw", kept)
    config = tiny_run.config(model, data["sft"], output__save_steps=2)
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan.*checkpoint-2 is whole: --resume auto"):
        run.run(config, work_dir=tmp_path / "run")
    assert [found.step for found in checkpoint.find(tmp_path / "run")] == [2]
    # The page says that the run has ended, and why; with the checkpoint it said that it is running.
    assert pages[0].startswith("running, step 2 of 6")
    assert (
        "stopped: step 4: the loss is nan; the training stopped before"
        in (tmp_path / "run" / "report.html").read_text()
    )
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(
    number: signal.Signals,
    code: int,
    model: Path,
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = FastftTrainer.training_step

    def interrupted(self: FastftTrainer, *args: Any) -> Any:
        if self.state.global_step == 2:
            signal.raise_signal(number)
        return step(self, *args)

    monkeypatch.setattr(FastftTrainer, "training_step", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        run.run(tiny_run.config(model, data["sft"]), work_dir=tmp_path / "run")
    assert stopped.value.code == code
    assert signal.getsignal(number) is before
    assert [found.step for found in checkpoint.find(tmp_path / "run")] == [3]
    assert f"stopped by {signal.Signals(number).name}, step 3 of 6" in (tmp_path / "run" / "report.html").read_text()
    said = capsys.readouterr().err
    assert "stopped after step 3" in said
    assert "--resume auto" in said


def test_a_run_is_not_overwritten(model: Path, data: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_run.config(model, data["sft"], train__max_steps=1)
    run.run(config, work_dir=tmp_path / "run")
    with pytest.raises(FileError, match=r"holds a finished run \(adapter/\); --resume auto .*another --work-dir"):
        run.run(config, work_dir=tmp_path / "run")


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    import errno

    def fill(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        FileError, match=r"cannot write .*/checkpoint-7: No space left on device; make room .* are free there"
    ):
        checkpoint.save(tmp_path, 7, fill, {})
    assert not [f for f in tmp_path.iterdir() if f.name.startswith("checkpoint") or "partial" in f.name]


def test_older_checkpoints_go_when_the_newer_are_there(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, lambda folder: None, {})  # noqa: ARG005
    (tmp_path / "checkpoint-10" / checkpoint.MANIFEST).unlink()
    checkpoint.keep_newest(tmp_path, 1)
    # The broken one stays to be looked at and does not count as the one to keep.
    assert sorted(f.name for f in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-2"]


def test_the_order_of_refusals(model: Path, tmp_path: Path) -> None:
    """Path before config before data before weights."""
    missing = tmp_path / "missing.jsonl"
    (tmp_path / "file").write_text("")
    config = tiny_run.config(model, missing)
    with pytest.raises(FileError, match="this is a file; choose another --work-dir"):
        run.run(config, work_dir=tmp_path / "file")
    with pytest.raises((DataError, FileError), match=r"missing\.jsonl"):
        run.run(config, work_dir=tmp_path / "run")
    bare = tiny_run.write_model(tmp_path / "bare", chat_template=None)
    with pytest.raises(ConfigError, match="no chat template, so a dialogue has no form"):
        run.run(tiny_run.config(bare, tiny_run.write_dialogues(tmp_path / "d.jsonl")), work_dir=tmp_path / "run")
    # None of these refusals counts as a run that must not be overwritten.
    done = run.run(
        tiny_run.config(model, tiny_run.write_dialogues(tmp_path / "d.jsonl"), train__max_steps=1),
        work_dir=tmp_path / "run",
    )
    assert done.steps == 1


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_no_embedding_table_stays_behind(kind: str, model: Path, data: dict[str, Path], tmp_path: Path) -> None:
    """transformers gives all embeddings to a global list of bitsandbytes, which held the table of every finished run."""
    import gc

    from torch import nn

    def tables() -> int:
        gc.collect()
        return sum(type(found) is nn.Embedding for found in gc.get_objects())

    before = tables()
    config = tiny_run.config(model, data["sft"], kind=kind, train__optimizer="adamw_8bit", train__max_steps=1)
    run.run(config, work_dir=tmp_path / "run")
    assert tables() == before
