"""A run on a GPU by the code of `fastft train`: it learns, resumes exactly, and leaves what a CPU can use."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny_run
from fastft.config import show
from fastft.config.schema import Config
from fastft.errors import TrainingError
from fastft.model import load
from fastft.training import checkpoint, run

pytestmark = pytest.mark.gpu

KINDS = ("full", "lora", "qlora")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linear layers of 64 by 64 and more: their adapters and they themselves are large enough for 8-bit states."""
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    return tiny_run.write_model(tmp_path_factory.mktemp("model"), dtype="bfloat16", **sizes)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_dialogues(tmp_path_factory.mktemp("data") / "rows.jsonl")


def _command(words: Sequence[str | Path], *, sees_gpu: bool) -> subprocess.CompletedProcess[str]:
    """Run `fastft WORDS` as a user does, with or without the GPU."""
    environ = dict(os.environ)
    if not sees_gpu:
        environ["CUDA_VISIBLE_DEVICES"] = ""
    line = [sys.executable, "-m", "fastft", *map(str, words)]
    done = subprocess.run(line, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    return done


def _lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def _without_times(run_dir: Path) -> list[str]:
    return [json.dumps({**line, "tokens_per_s": None, "memory_gib": None}) for line in _lines(run_dir)]


def _losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in _lines(run_dir) if "loss" in line]


def _weights(done: run.RunResult) -> "dict[str, Any]":
    from safetensors.torch import load_file

    # The result of a full training is rounded to the base's dtype; the last checkpoint is not.
    (file,) = (done.run_dir / f"checkpoint-{done.steps}").glob("*.safetensors")
    return load_file(file)


def _same(one: run.RunResult, other: run.RunResult) -> None:
    import torch

    expected, weights = _weights(one), _weights(other)
    assert expected.keys() == weights.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(kind: str, packing: bool, device: str, model: Path, data: Path, tmp_path: Path) -> None:
    import torch

    before = torch.cuda.memory_stats().get("allocation.all.allocated", 0) if device == "cuda" else 0
    config = tiny_run.config(model, data, kind=kind, data__packing=packing, train__max_steps=8)
    done = run.run(config, work_dir=tmp_path / "run")
    losses = _losses(done.run_dir)
    assert len(losses) == 8
    assert losses[-1] < 0.95 * losses[0]
    if device == "cuda":
        assert torch.cuda.memory_stats()["allocation.all.allocated"] > before  # it was the GPU that worked
        record = json.loads((done.artifact / "fastft_training.json").read_text())
        if kind == "qlora":
            quantization = record["quantization"]
            assert (quantization["compute_dtype"], quantization["weights_dtype"]) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_gpu_gives_the_losses_of_a_cpu(kind: str, model: Path, data: Path, tmp_path: Path) -> None:
    """By the command, in fp32; the CPU is this machine's own."""
    config = tmp_path / "config.yaml"
    config.write_text(show.flat_yaml(tiny_run.config(model, data, kind=kind, model__dtype="fp32", train__lr=1e-3)))
    for name in ("gpu", "cpu"):
        _command(["train", config, "--work-dir", tmp_path / name], sees_gpu=name == "gpu")
    # fp32 sums in another order drift apart by some 2^-24 per operation and step; 1e-3 is far above that in 6 steps and
    # far below what a product in TF32 or bf16 would do to the gradients (2^-11, 2^-8 each).
    for key, bound in (("loss", 1e-4), ("grad_norm", 1e-3)):
        ours, theirs = ([line[key] for line in _lines(tmp_path / name) if key in line] for name in ("gpu", "cpu"))
        assert len(ours) == 6
        assert ours == pytest.approx(theirs, rel=bound)


@pytest.mark.parametrize(
    ("kind", "optimizer", "dtype"),
    [
        ("full", "adamw", "auto"),
        ("lora", "adamw", "auto"),
        ("qlora", "adamw", "auto"),
        ("qlora", "adamw_8bit", "auto"),
        ("qlora", "paged_adamw_8bit", "auto"),
        ("lora", "adamw", "fp16"),
    ],
)
@pytest.mark.usefixtures("deterministic")
def test_resumed_equals_unbroken(
    kind: str, optimizer: str, dtype: str, device: str, model: Path, data: Path, tmp_path: Path
) -> None:
    """Dropout, accumulation, packing and eval included; stopped after step 4 of 8 in the second epoch."""
    if dtype == "fp16" and device == "cpu":
        pytest.skip("fp16 is for GPUs")
    changes: dict[str, Any] = {} if kind == "full" else {"method__lora": {"r": 64, "alpha": 64, "dropout": 0.2}}
    config = tiny_run.config(
        model,
        data,
        kind=kind,
        model__dtype=dtype,
        data__packing=True,
        data__eval_rows=2,
        train__optimizer=optimizer,
        train__batch_size=1,
        train__grad_accumulation=2,
        train__max_steps=8,
        train__eval_steps=3,
        train__lr=1e-3,
        output__save_steps=4,
        **changes,
    )
    unbroken = run.run(config, work_dir=tmp_path / "unbroken")
    resumed = _resumed(unbroken, config, broken := tmp_path / "broken")
    _same(unbroken, resumed)
    # As text: fp16's loss scaling tries too large a scale first, and a NaN is not equal to itself.
    assert _without_times(broken) == _without_times(unbroken.run_dir)
    assert [found.fault for found in checkpoint.find(broken)] == [None, None]


def _resumed(unbroken: run.RunResult, config: Config, broken: Path) -> run.RunResult:
    """Go on from step 4 in a copy of the run folder."""
    shutil.copytree(unbroken.run_dir, broken)
    shutil.rmtree(broken / "checkpoint-8")
    shutil.rmtree(broken / unbroken.artifact.name)
    return run.run(config, work_dir=broken, resume="auto")


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_by_torchs_fastest_algorithms(kind: str, model: Path, tmp_path: Path) -> None:
    """By default torch may sum in another order each time; then the losses are those of the same training all the same."""
    import torch

    data = tiny_run.write_texts(tmp_path / "texts.jsonl", 24)
    config = tiny_run.config(
        model,
        data,
        task="pretrain",
        kind=kind,
        data__packing=True,
        data__max_length=512,
        train__max_steps=8,
        train__lr=1e-3,
        output__save_steps=4,
    )
    unbroken = run.run(config, work_dir=tmp_path / "unbroken")
    resumed = _resumed(unbroken, config, tmp_path / "broken")
    weights = _weights(resumed)
    equal = all(torch.equal(weights[name], value) for name, value in _weights(unbroken).items())
    print(f"{kind}: weights after resuming are {'equal' if equal else 'not equal'} bit for bit")
    # Noise of the order of summation is at most that of a bf16 rounding, 2^-9, and 4 steps follow.
    assert _losses(resumed.run_dir) == pytest.approx(_losses(unbroken.run_dir), rel=2**-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("deterministic")
def test_checkpointing_changes_nothing(kind: str, model: Path, data: Path, tmp_path: Path) -> None:
    """What is computed twice comes out the same twice, dropout included."""
    lora = {} if kind == "full" else {"method__lora": {"r": 4, "alpha": 8, "dropout": 0.2}}
    on, off = (
        run.run(
            tiny_run.config(model, data, kind=kind, train__gradient_checkpointing=wanted, train__lr=1e-3, **lora),
            work_dir=tmp_path / str(wanted),
        )
        for wanted in (True, False)
    )
    _same(on, off)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("deterministic")
def test_eval_and_answers_change_nothing(kind: str, model: Path, data: Path, tmp_path: Path) -> None:
    lora = {} if kind == "full" else {"method__lora": {"r": 4, "alpha": 8, "dropout": 0.2}}
    config = tiny_run.config(model, data, kind=kind, data__eval_rows=2, train__lr=1e-3, **lora)
    quiet = run.run(config, work_dir=tmp_path / "quiet")
    samples = {"prompts": ("How many?",), "max_new_tokens": 3}
    busy = run.run(
        config.model_copy(
            update={
                "train": config.train.model_copy(update={"eval_steps": 1, "sample_steps": 2}),
                "samples": config.samples.model_copy(update=samples),
            }
        ),
        work_dir=tmp_path / "busy",
    )
    _same(quiet, busy)
    assert [line["step"] for line in _lines(busy.run_dir, "samples.jsonl")] == [0, 2, 4, 6]


@pytest.mark.usefixtures("deterministic")
def test_accumulation_equals_a_big_batch(model: Path, data: Path, tmp_path: Path) -> None:
    one, two = (
        run.run(
            tiny_run.config(
                model,
                data,
                kind="full",
                model__dtype="fp32",
                train__batch_size=batch,
                train__grad_accumulation=4 // batch,
                train__lr=1e-3,
            ),
            work_dir=tmp_path / str(batch),
        )
        for batch in (4, 1)
    )
    # fp32 noise of sums in another order, as on a CPU (tests/invariants/test_accumulation.py).
    assert _losses(one.run_dir) == pytest.approx(_losses(two.run_dir), rel=1e-4)


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_a_cpu_merges_and_verifies_the_adapter(kind: str, model: Path, data: Path, tmp_path: Path) -> None:
    done = run.run(tiny_run.config(model, data, kind=kind), work_dir=tmp_path / "run")
    assert any("lora_B" in name and value.any() for name, value in _weights(done).items())
    onto = ["--dequantized-base", "none"]
    merged = tmp_path / "merged"
    _command(["convert", "merge", model, done.artifact, merged, *onto], sees_gpu=False)
    words = ["convert", "verify", merged, "--base", model, "--adapter", done.artifact, *onto]
    assert "right: it is base + adapter" in _command(words, sees_gpu=False).stdout
    _merged_is_pefts_own(model, done.artifact, merged)


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_cpu_merges_onto_what_the_gpu_saw(double_quant: bool, model: Path, data: Path, tmp_path: Path) -> None:
    """The default for QLoRA; expected is what bitsandbytes unpacks on this device, plus the update in fp32."""
    import bitsandbytes
    from safetensors.torch import load_file

    quantization = {"type": "nf4", "double_quant": double_quant}
    # The weights beside the 4-bit ones in bf16: what a GPU does by itself with this base, a CPU only so.
    config = tiny_run.config(model, data, kind="qlora", method__quantization=quantization, model__dtype="bf16")
    done = run.run(config, work_dir=tmp_path / "run")
    _command(["convert", "merge", model, done.artifact, tmp_path / "merged"], sees_gpu=False)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    adapter = _weights(done)
    loaded = load.load(config)
    equal = total = 0
    for place, module in loaded.model.get_base_model().named_modules():
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            continue
        name = place.removesuffix(".base_layer")
        unpacked = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).cpu().float()
        A_RI, B_OR = (adapter[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        expected = (unpacked + 2.0 * (B_OR @ A_RI)).bfloat16()
        equal += int((merged[f"{name}.weight"] == expected).sum())
        total += expected.numel()
    print(f"{total - equal} of {total} merged weights are not those that the GPU saw (double_quant {double_quant})")
    # A code at a border may fall to the other side on a GPU, some in a million, and one 8-bit scale in a thousand is the
    # neighbour (tests/gpu/test_nf4.py): 64 weights of 64,000 each time. The sum B A may end in another last bit.
    assert total - equal <= total * (0.01 if double_quant else 0.001)
    assert total > 60_000


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_base_quantized_on_a_cpu_trains_on_the_gpu(
    double_quant: bool, model: Path, data: Path, tmp_path: Path
) -> None:
    words = ["convert", "quantize", model, tmp_path / "quantized", *(["--double-quant"] if double_quant else [])]
    _command(words, sees_gpu=False)
    quantization = {"type": "nf4", "double_quant": double_quant}
    losses = {}
    for folder in (model, tmp_path / "quantized"):
        config = tiny_run.config(
            folder, data, kind="qlora", method__quantization=quantization, model__dtype="bf16", train__lr=1e-3
        )
        losses[folder.name] = _losses(run.run(config, work_dir=tmp_path / f"run-{folder.name}").run_dir)
    # A few codes of a few million differ; their effect is far below one bf16 rounding of the products, 2^-9.
    assert losses["quantized"] == pytest.approx(losses[model.name], rel=2**-9)


def _merged_is_pefts_own(model: Path, adapter: Path, merged: Path) -> None:
    """Weight by weight what PEFT's merge in bf16 gives (DESIGN 6)."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    expected = PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    weights = load_file(merged / "model.safetensors")
    assert weights
    for name, value in weights.items():
        assert torch.equal(value, expected[name]), name


def test_it_learns_its_answers_and_chat_gives_them(device: str, model: Path, data: Path, tmp_path: Path) -> None:
    """The answer after the training is the one that the rows teach, and chat with the adapter says it too."""
    from fastft.chat import session

    prompt = tiny_run.QUESTIONS[3]
    config = tiny_run.config(
        model,
        data,
        kind="lora",
        method__lora={"r": 16, "alpha": 32},
        data__packing=True,
        data__max_length=256,
        train__batch_size=1,
        train__max_steps=80,
        train__lr=1e-2,
        train__log_steps=20,
        samples__prompts=(prompt,),
        samples__max_new_tokens=24,
    )
    done = run.run(config, work_dir=tmp_path / "run")
    before, after = _lines(done.run_dir, "samples.jsonl")
    assert before["answer"] != after["answer"]
    assert set(after["answer"].split()) == {"apple"}
    talk = session.load(str(done.artifact))
    assert talk.model.device.type == device
    assert session.answer(talk, prompt, session.Sampling(max_new_tokens=24, temperature=0)) == after["answer"]


@pytest.fixture
def little_memory(needs_cuda: None) -> Iterator[None]:  # noqa: ARG001 - asked for its effect
    """64 MiB of GPU memory beside what this process has already."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.mark.usefixtures("little_memory")
def test_weights_that_do_not_fit_are_one_clear_line(data: Path, tmp_path: Path) -> None:
    # 63 M weights in fp32: 252 MB.
    wide = tiny_run.write_model(tmp_path / "wide", hidden_size=1024, intermediate_size=4096, num_hidden_layers=4)
    with pytest.raises(TrainingError, match=r"reading the weights: the GPU's memory is full; .* or use method lora"):
        run.run(tiny_run.config(wide, data, kind="full"), work_dir=tmp_path / "run")


@pytest.mark.usefixtures("little_memory")
def test_a_row_that_does_not_fit_is_one_clear_line(model: Path, tmp_path: Path) -> None:
    # Attention scores of one layer: 4 heads, 8192 tokens squared, in fp32: 1 GB.
    (tmp_path / "long.txt").write_text("apple " * 20000)
    config = tiny_run.config(
        model,
        tmp_path / "long.txt",
        task="pretrain",
        kind="lora",
        model__attention="eager",
        data__packing=True,
        data__max_length=8192,
    )
    with pytest.raises(TrainingError, match=r"step 1: the GPU's memory is full; lower train.batch_size"):
        run.run(config, work_dir=tmp_path / "run")
