"""QLoRA steps of a model of 7B shape on one GPU: fastft beside the popular recipe; tokens/s, MFU and peak memory.

    python benches/gpu/bench_train.py --shape llama2-7b --lengths 512 2048 4096 --folder /dev/shm --table out.md
    python benches/gpu/bench_train.py --shape llama3.1-8b --rank 32 --memory-gib 7 --longest 8gb --folder /dev/shm

The popular recipe is plain transformers with peft and bitsandbytes: `prepare_model_for_kbit_training` (16-bit weights
become fp32), bf16 autocast, logits of all tokens. Both train the same random weights (drawn here, written as a
checkpoint) on the same random tokens, each in a process of its own, with NF4 and double quantization, adapters on all
linear layers, batch 1, checkpointed layers, 8-bit AdamW. Before anything is printed their losses are compared.

Counted: tokens/s from the median time of a step, device synchronized; MFU from the arithmetic that must be done
(forward and backward through the frozen products, adapters with their weight gradients, causal attention; nothing that
is computed twice), over the rate of a large bf16 product measured in the same run; peaks are torch's allocator's, over
the training steps alone.

`--longest` looks for the longest row with which a variant makes two steps within `--memory-gib`, which counts all that
torch's allocator has taken, gaps included.

`--shape tiny --device cpu` runs everything in small, to see that it works; its times mean nothing.
"""

import argparse
import gc
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GIB = 2**30
SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "llama3.1-8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "internlm2-7b": {  # in the Llama layout, as fastft reads it
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 92544,
    },
    "tiny": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
    },
}
SAME_FOR_ALL = {
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "rms_norm_eps": 1e-5,
}
INITIALIZER_RANGE = 0.02
SHARD_BYTES = 2 * 10**9
# What the fastft process measures. `packed`: four documents in a row. `fp32 adapters`: as without autocast, to see what
# rounding the adapters' operands to bf16 brings. `fused`: plain but for fused adapters. `8gb`, `6gb`: all that the methods
# qlora_8gb and qlora_6gb switch on. `nf4 head`: 6gb with the head in NF4, which is not exact.
VARIANTS = ("plain", "packed", "fp32-adapters", "fused", "8gb", "6gb", "nf4-head")
PLAIN = {"checkpoints": "device", "embedding": "device", "head": "device", "mlp_tile_tokens": "whole", "lora": "plain"}
# Variants whose losses must agree with the popular recipe's and with each other.
EXACT = ("popular recipe", "fastft", "fastft, fused", "fastft, 8gb", "fastft, 6gb")
# Rows of `--longest` are multiples of it.
LONGEST_STEP = 1024


# --- the model ---


def parameter_shapes(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name in the checkpoint -> shape, for Llama and Qwen2."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape["vocab_size"], hidden)}
    for layer in range(shape["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, rows in (("q", hidden), ("k", kv), ("v", kv)):
            found[f"{at}self_attn.{name}_proj.weight"] = (rows, hidden)
            if shape["model_type"] == "qwen2":
                found[f"{at}self_attn.{name}_proj.bias"] = (rows,)
        found[f"{at}self_attn.o_proj.weight"] = (hidden, hidden)
        found[f"{at}mlp.gate_proj.weight"] = found[f"{at}mlp.up_proj.weight"] = (inner, hidden)
        found[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        found[f"{at}input_layernorm.weight"] = found[f"{at}post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    found["lm_head.weight"] = (shape["vocab_size"], hidden)
    return found


def write_model(folder: Path, shape: dict[str, Any], device: str) -> None:
    """Draw bf16 weights on the device and write them as a sharded checkpoint."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**shape, **SAME_FOR_ALL, "initializer_range": INITIALIZER_RANGE}))
    generator = torch.Generator(device).manual_seed(0)
    shard: dict[str, Any] = {}
    weight_map: dict[str, str] = {}
    number = size = 0

    def flush() -> None:
        nonlocal number, size
        number += 1
        name = f"model-{number:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
        size = 0

    for name, dims in parameter_shapes(shape).items():
        weight = torch.empty(dims, dtype=torch.bfloat16, device=device)
        if name.endswith("norm.weight"):
            weight.fill_(1.0)
        else:
            weight.normal_(0, INITIALIZER_RANGE, generator=generator)
        if size and size + weight.nbytes > SHARD_BYTES:
            flush()
        shard[name] = weight.cpu()
        size += weight.nbytes
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def flops_per_token(shape: dict[str, Any], rank: int, length: int) -> float:
    """Arithmetic of a training step that cannot be avoided, per token of a row of `length`."""
    linear = adapters = 0
    for name, dims in parameter_shapes(shape).items():
        if len(dims) < 2 or "embed_tokens" in name:
            continue
        linear += dims[0] * dims[1]
        if "lm_head" not in name:
            adapters += rank * (dims[0] + dims[1])
    # Scores and weighted sum see length / 2 keys on average; the backward pass of attention is two forward ones.
    attention = 3 * shape["num_hidden_layers"] * 2 * 2 * shape["hidden_size"] * length / 2
    return 4 * linear + 6 * adapters + attention


def product_rate(device: str) -> float:
    """FLOP/s of a large bf16 product on random data; the best of a few."""
    import torch

    size = 8192 if device == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = math.inf
    for _ in range(12):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    del a, b
    if device == "cuda":
        torch.cuda.empty_cache()
    return 2 * size**3 / best


def synchronize(device: str) -> None:
    """Wait for the device."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


# --- what both contenders share ---


def rows(length: int, steps: int, vocabulary: int, documents: int) -> list[dict[str, list[int]]]:
    """The same row of random tokens for each step, so that it can be learned; cut into documents of equal length."""
    import numpy as np

    ids = np.random.default_rng(length).integers(0, vocabulary, length).tolist()
    labels = list(ids)
    each = length // documents
    positions = [place % each if documents > 1 else place for place in range(length)]
    for start in range(0, length, each):
        labels[start] = -100
    return [{"input_ids": ids, "labels": labels, "position_ids": positions}] * steps


def watch(trainer: Any, device: str) -> dict[str, list[float]]:
    """Note the time of each step's end and each step's loss."""
    from transformers import TrainerCallback

    seen: dict[str, list[float]] = {"ends": [], "losses": []}

    class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped for mypy
        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            synchronize(device)
            seen["ends"].append(time.perf_counter())

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **_kwargs: Any) -> None:
            if "loss" in logs:
                seen["losses"].append(float(logs["loss"]))

    trainer.add_callback(Watch())
    return seen


def measure(trainer: Any, options: argparse.Namespace, length: int) -> dict[str, Any]:
    """Train, and say how long a step took, what was held, and the losses; or that the memory was not enough."""
    import torch

    cuda = options.device == "cuda"
    gc.collect()  # an earlier trainer and its optimizer
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seen = watch(trainer, options.device)
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        return {"length": length, "out_of_memory": True}
    durations = [after - before for before, after in zip(seen["ends"], seen["ends"][1:], strict=False)]
    timed = durations[options.warmup - 1 :] or durations
    return {
        "length": length,
        "out_of_memory": False,
        "step_s": [min(timed), statistics.median(timed), max(timed)],
        "losses": seen["losses"],
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
    }


def profile(trainer: Any, path: Path, options: argparse.Namespace) -> None:
    """Write where the time of a few steps goes, kernel by kernel."""
    import torch
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if options.device == "cuda" else [])]
    with torch.profiler.profile(activities=kinds) as profiler:
        trainer.train()
    order = "self_cuda_time_total" if options.device == "cuda" else "self_cpu_time_total"
    path.write_text(profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90))


def limit_memory(options: argparse.Namespace) -> None:
    """Let this process have no more than --memory-gib, as on a smaller card."""
    import torch

    if options.memory_gib is not None:
        torch.cuda.set_per_process_memory_fraction(
            options.memory_gib * GIB / torch.cuda.get_device_properties(0).total_memory
        )


# --- the contenders ---


def popular(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Plain transformers + peft + bitsandbytes."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PrinterCallback, Trainer, TrainingArguments

    cuda = options.device == "cuda"
    limit_memory(options)
    started = time.perf_counter()
    products = torch.bfloat16 if cuda else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map={"": 0 if cuda else "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=products,
        ),
    )
    synchronize(options.device)
    load_s = time.perf_counter() - started
    model.config.use_cache = False
    checkpointing = {"use_reentrant": False}
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=checkpointing)
    lora = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    results = []

    def trainer_for(length: int, steps: int) -> Any:
        made = TrainingArguments(
            output_dir=str(folder / "popular"),
            per_device_train_batch_size=1,
            max_steps=steps,
            learning_rate=options.lr,
            lr_scheduler_type="constant",
            bf16=cuda,
            gradient_checkpointing=cuda,
            gradient_checkpointing_kwargs=checkpointing,
            optim="adamw_bnb_8bit",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not cuda,
        )

        def collate(samples: list[dict[str, list[int]]]) -> dict[str, Any]:
            batch = {name: torch.tensor([s[name] for s in samples]) for name in ("input_ids", "labels")}
            return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

        data = rows(length, steps, options.vocabulary, 1)
        made_trainer = Trainer(model=model, args=made, train_dataset=data, data_collator=collate)
        made_trainer.remove_callback(PrinterCallback)
        return made_trainer

    for length in options.lengths:
        restart(model, length)
        result = measure(trainer_for(length, options.steps), options, length)
        results.append({"contender": "popular recipe", "load_s": load_s, **result})
    if options.profile is not None:
        profile(trainer_for(options.lengths[-1], 3), options.profile / "profile_popular.txt", options)
    return results


def restart(model: Any, seed: int) -> None:
    """Draw the adapters as peft does, in the same order in all processes, so that their losses are comparable."""
    import torch
    from transformers import set_seed

    set_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.grad = None
        if "lora_A" in name:
            torch.nn.init.kaiming_uniform_(parameter.data, a=math.sqrt(5))
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter.data)


def switches_of(variant: str) -> dict[str, Any]:
    """The config's `memory` section for a variant."""
    from fastft.config import recipes

    methods = {"8gb": "qlora_8gb", "6gb": "qlora_6gb", "nf4-head": "qlora_6gb"}
    if variant in methods:
        asked = dict(recipes.find(f"llama2_7b_{methods[variant]}_alpaca")["memory"])
        return {**asked, "head": "nf4"} if variant == "nf4-head" else asked
    return {**PLAIN, "lora": "fused"} if variant == "fused" else PLAIN


class Fastft:
    """fastft's own loading and trainer, for one variant."""

    def __init__(self, options: argparse.Namespace, folder: Path, variant: str) -> None:
        import torch

        from fastft.config.schema import Config
        from fastft.model import load

        self.options, self.folder, self.variant = options, folder, variant
        self.config = Config.model_validate(
            {
                "task": "pretrain",
                "model": {"name": str(folder)},
                "method": {"kind": "qlora", "lora": {"r": options.rank, "alpha": options.rank}},
                "data": {"train": [{"source": "rows are made here"}]},
                "memory": switches_of(variant),
                "train": {
                    "grad_accumulation": 1,
                    "lr": options.lr,
                    "schedule": "constant",
                    "warmup_ratio": 0,
                    "optimizer": "adamw_8bit",
                    "log_steps": 1,
                },
            }
        )
        gc.collect()  # an earlier variant's model
        if options.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        self.loaded = load.load_weights(self.config, load.locate(self.config.model), tokenizer())
        synchronize(options.device)
        self.load_s = time.perf_counter() - started
        self.load_peak_bytes = torch.cuda.max_memory_allocated() if options.device == "cuda" else None

    def trainer(self, length: int, steps: int) -> Any:
        """A trainer that makes `steps` steps on rows of `length` tokens."""
        from fastft.data.collate import Collator
        from fastft.model import device
        from fastft.training import trainer

        for module in (
            self.loaded.model.get_base_model(),
            self.loaded.model,
        ):  # what an earlier trainer put around them
            module.__dict__.pop("forward", None)
            module.__dict__.pop("_is_accelerate_prepared", None)
        restart(self.loaded.model, length)
        products = None if self.variant == "fp32-adapters" else self.loaded.products
        made = trainer.arguments(self.config, self.folder / "fastft", steps, products, device.choose())
        made.save_strategy = "no"
        return trainer.FastftTrainer(
            config=self.config,
            model=self.loaded.model,
            args=made,
            collate=Collator(0),
            train_rows=rows(length, steps, self.options.vocabulary, 4 if self.variant == "packed" else 1),
            eval_rows=None,
            tokenizer=self.loaded.tokenizer,
            callbacks=[],
            record={},
            extra_files=lambda _folder: None,
        )

    def measure(self, length: int, steps: int) -> dict[str, Any]:
        """One line of the table."""
        name = "fastft" if self.variant == "plain" else f"fastft, {self.variant.replace('-', ' ')}"
        result = measure(self.trainer(length, steps), self.options, length)
        return {"contender": name, "load_s": self.load_s, "load_peak_bytes": self.load_peak_bytes, **result}


def fastft(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """fastft, each variant with a model of its own."""
    from fastft.model import quiet

    quiet.prepare_libraries()
    limit_memory(options)
    results = []
    for variant in options.variants:
        work = Fastft(options, folder, variant)
        results += [work.measure(length, options.steps) for length in options.lengths]
        if options.profile is not None and variant in {"plain", "8gb"}:
            profile(work.trainer(options.lengths[-1], 3), options.profile / f"profile_fastft_{variant}.txt", options)
        del work
    return results


def longest(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The longest rows that fit, variant by variant: two steps, since the optimizer's states come with the first."""
    from fastft.model import quiet

    quiet.prepare_libraries()
    limit_memory(options)
    results = []
    for variant in options.longest:
        work = Fastft(options, folder, variant)
        tries: dict[int, dict[str, Any]] = {}

        def fits(length: int, work: Fastft = work, tries: dict[int, dict[str, Any]] = tries) -> bool:
            tries[length] = work.measure(length, 2)
            print(f"  {length} tokens: {'out of memory' if tries[length]['out_of_memory'] else 'fits'}", flush=True)
            return not tries[length]["out_of_memory"]

        best = bisect(fits, options.least, options.most)
        fallback = {
            "contender": f"fastft, {variant}",
            "length": options.least,
            "out_of_memory": True,
            "load_s": work.load_s,
        }
        results.append({**tries.get(best, fallback), "tries": sorted(tries)})
        del work, fits
    return results


def bisect(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest multiple of LONGEST_STEP from `least` to `most` that fits; 0 when not even the least does."""
    low, high = least // LONGEST_STEP, most // LONGEST_STEP
    if not fits(low * LONGEST_STEP):
        return 0
    if fits(high * LONGEST_STEP):
        return high * LONGEST_STEP
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * LONGEST_STEP) else (low, middle)
    return low * LONGEST_STEP


def tokenizer() -> Any:
    """A tokenizer of three words; nothing is tokenized here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="b", eos_token="c")


CONTENDERS = {"popular": popular, "fastft": fastft}
CHILDREN = {**CONTENDERS, "longest": longest}


# --- the comparison ---


def check_losses(results: list[dict[str, Any]], shape: dict[str, Any]) -> None:
    """Assert that all exact contenders compute the same thing.

    First step (adapters change nothing yet). The last hidden state is a sum of 2 L branches. In fastft each addition
    rounds it to bf16, 2^-9 of itself at most, and each branch is made from operands rounded so, in all: as independent
    errors sqrt(4 L) 2^-9 of its norm. A logit of the random head has standard deviation
    s = INITIALIZER_RANGE sqrt(D), so it is off by e = s sqrt(4 L) 2^-9. The mean over T tokens of (log-sum-exp minus the
    target's logit) is off by e sqrt(2 / T), of which four standard deviations are allowed, and by e^2 in one direction.

    Last step: all fall, and the falls agree within a quarter; AdamW's first steps are the signs of the gradients, and
    those entries change sign that are smaller than the same part of rounding.
    """
    error = INITIALIZER_RANGE * math.sqrt(shape["hidden_size"])
    error *= math.sqrt(4 * shape["num_hidden_layers"]) * 2**-9
    by_length: dict[int, dict[str, list[float]]] = {}
    for result in results:
        if not result["out_of_memory"] and result["contender"] in EXACT:
            by_length.setdefault(result["length"], {})[result["contender"]] = result["losses"]
    for length, losses in by_length.items():
        bound = 4 * error * math.sqrt(2 / length) + error**2
        firsts = [values[0] for values in losses.values()]
        assert max(firsts) - min(firsts) <= bound, (length, losses, bound)
        falls = [values[0] - values[-1] for values in losses.values()]
        assert min(falls) > 0, (length, losses)
        assert min(falls) >= 0.75 * max(falls), (length, losses)


def table(results: list[dict[str, Any]], options: argparse.Namespace, rate: float) -> str:
    """The results as Markdown."""
    lines = [
        "| contender | tokens | tokens/s | step: min / median / max ms | MFU | peak GiB | reserved GiB | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        start = f"| {result['contender']} | {result['length']} |"
        if result["out_of_memory"]:
            lines.append(f"{start} out of memory | | | | | |")
            continue
        least, median, most = result["step_s"]
        mfu = flops_per_token(SHAPES[options.shape], options.rank, result["length"]) * result["length"] / median / rate
        memory = ["-" if result[k] is None else f"{result[k] / GIB:.2f}" for k in ("peak_bytes", "reserved_bytes")]
        lines.append(
            f"{start} {result['length'] / median:,.0f} | {least * 1e3:.0f} / {median * 1e3:.0f} / {most * 1e3:.0f} | "
            f"{mfu:.1%} | {' | '.join(memory)} | {result['losses'][0]:.4f} to {result['losses'][-1]:.4f} |"
        )
    return "\n".join(lines) + "\n"


def describe_machine(device: str, rate: float, loads: dict[str, float]) -> str:
    """Card, versions, and what was measured beside the table."""
    import importlib.metadata as meta

    import torch

    card = torch.cuda.get_device_name(0) if device == "cuda" else "CPU"
    names = ("torch", "transformers", "peft", "bitsandbytes")
    versions = ", ".join(f"{name} {meta.version(name)}" for name in names)
    loaded = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in loads.items())
    return f"{card}; bf16 product {rate / 1e12:.0f} TFLOP/s; {versions}; weights read and quantized: {loaded}\n"


def expandable_segments() -> dict[str, str]:
    """The environment for an allocator that grows its segments, if this machine can: less is lost in gaps.

    Tried in a process of its own, as a driver without virtual memory ends the process.
    """
    setting = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    line = [sys.executable, "-c", "import torch; torch.zeros(2**22, device='cuda').sum().item()"]
    done = subprocess.run(line, check=False, env={**os.environ, **setting}, capture_output=True)
    print(f"expandable segments: {'used' if done.returncode == 0 else 'this machine has none'}", flush=True)
    return setting if done.returncode == 0 else {}


def one_by_one(name: str, options: argparse.Namespace) -> list[list[str]]:
    """Words that give each variant of fastft a process of its own, where no earlier one has left anything."""
    if name == "fastft":
        return [["--variants", variant] for variant in options.variants]
    if name == "longest":
        return [["--longest", variant] for variant in options.longest]
    return [[]]


def run_child(name: str, words: list[str], folder: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    """Measure one contender in a process of its own; its allocator and its patches are nobody else's."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        line = [sys.executable, __file__, *words, "--child", name, "--answer", answer.name, "--model", str(folder)]
        done = subprocess.run(line, check=False, env={**os.environ, **environment})
        if done.returncode != 0:
            raise SystemExit(f"error: contender {name} ended with {done.returncode}")
        results: list[dict[str, Any]] = json.loads(Path(answer.name).read_text())
    for result in results:
        seconds = "out of memory" if result["out_of_memory"] else f"{result['step_s'][1]:.3f} s a step"
        loading = result.get("load_peak_bytes")
        said = "" if loading is None else f", peak while loading {loading / GIB:.2f} GiB"
        print(f"  {result['contender']}, {result['length']} tokens: {seconds}{said}", flush=True)
    return results


@contextmanager
def weights(options: argparse.Namespace, shape: dict[str, Any]) -> Iterator[Path]:
    """The folder of the weights: as an earlier `--only-write` left it, or written now and removed at the end."""
    if options.weights is not None and not options.only_write:
        yield options.weights
        return
    needed = 2 * sum(math.prod(dims) for dims in parameter_shapes(shape).values())
    with tempfile.TemporaryDirectory(prefix="fastft-bench-", dir=options.folder) as place:
        folder = options.weights or Path(place) / "model"
        free = shutil.disk_usage(folder.parent).free
        if free < needed * 1.05:
            raise SystemExit(
                f"error: {folder.parent} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed; --folder"
            )
        started = time.perf_counter()
        write_model(folder, shape, options.device)
        print(f"{needed / 1e9:.1f} GB of weights written in {time.perf_counter() - started:.0f} s", flush=True)
        yield folder


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="tokens per row")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed, at least 1")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--memory-gib", type=float, help="let torch have no more than this, as on a smaller card")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="of fastft")
    parser.add_argument(
        "--longest", nargs="+", choices=VARIANTS, help="only look for the longest row, with --memory-gib"
    )
    parser.add_argument("--least", type=int, default=2048, help="tokens where --longest starts")
    parser.add_argument("--most", type=int, default=24576, help="tokens where --longest ends")
    parser.add_argument("--expandable", action="store_true", help="let torch's allocator grow its segments")
    parser.add_argument("--weights", type=Path, help="folder of weights that an earlier --only-write made")
    parser.add_argument("--only-write", action="store_true", help="write the weights to --weights and end")
    parser.add_argument("--folder", type=Path, help="where the weights are written (16 GB for 7B); default: temporary")
    parser.add_argument("--table", type=Path, help="file for the table")
    parser.add_argument(
        "--profile", type=Path, help="existing folder for a profile of each contender at the last length"
    )
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.vocabulary = SHAPES[options.shape]["vocab_size"]
    if options.warmup < 1 or options.steps < options.warmup + 2:
        parser.error("--warmup is at least 1, and --steps at least 2 more than it")
    if options.longest and options.memory_gib is None and options.device == "cuda":
        parser.error("--longest needs --memory-gib")
    if options.only_write and options.weights is None:
        parser.error("--only-write needs --weights")
    return options


def main(words: list[str]) -> None:
    """Write the model, run the contenders, compare, print."""
    options = parse(words)
    if options.child is not None:
        options.answer.write_text(json.dumps(CHILDREN[options.child](options, options.model)))
        return
    shape = SHAPES[options.shape]
    with weights(options, shape) as folder:
        if options.only_write:
            return
        environment = expandable_segments() if options.expandable and options.device == "cuda" else {}
        rate = product_rate(options.device)
        names = ["longest"] if options.longest else options.contenders
        results = [
            result
            for name in names
            for more in one_by_one(name, options)
            for result in run_child(name, [*words, *more], folder, environment)
        ]
    loads = {result["contender"]: result["load_s"] for result in results if "," not in result["contender"]}
    text = describe_machine(options.device, rate, loads) + "\n" + table(results, options, rate)
    print(text, flush=True)
    if options.table is not None:
        options.table.write_text(text)
    if not options.longest:
        check_losses(results, shape)
        print("the losses of the contenders agree")


if __name__ == "__main__":
    main(sys.argv[1:])
