"""Merge a LoRA adapter into a checkpoint, from files to files, beside `cp` and, if asked for, PEFT.

The checkpoint has the shapes of Qwen2.5-1.5B (or fewer layers of it) with random bf16 weights; the adapter is on all
linear layers. All take turns in one run; each starts with the base out of the page cache (unless --warm) and ends
when its output is on the disk. The merged weights are checked against numpy before anything is timed.

    python benches/commands/bench_merge.py FOLDER [--layers 28] [--ranks 8 64] [--rounds 3] [--peft] [--warm]

FOLDER holds the data (about 2.2 times the checkpoint) and decides which disk is measured; it is left in place.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fastft import _native

HIDDEN, INNER, KEY_VALUE, VOCABULARY = 1536, 8960, 256, 151936
SHARD_BYTES = 2 * 10**9
SCALE = 2.0

# (outputs, inputs) of the linear layers of a block
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def main() -> None:
    arguments = parse()
    folder: Path = arguments.folder / f"layers-{arguments.layers}"
    base = folder / "base"
    make_checkpoint(base, arguments.layers)
    adapters = {rank: make_adapter(folder / f"adapter-{rank}", arguments.layers, rank) for rank in arguments.ranks}
    num_bytes = sum(file.stat().st_size for file in base.iterdir())
    for adapter in adapters.values():
        merge(base, adapter, folder / "out", arguments.threads)
        check(base, adapter, folder / "out")

    work: dict[str, Callable[[], int]] = {"cp": lambda: copy(base, folder / "out")}
    for rank, adapter in adapters.items():
        work[f"fastft rank {rank}"] = lambda adapter=adapter: merge(base, adapter, folder / "out", arguments.threads)
        if arguments.peft:
            work[f"PEFT rank {rank}"] = lambda adapter=adapter: peft(base, adapter, folder / "out")
    report(arguments, num_bytes, measure(work, base, folder / "out", arguments.rounds, warm=arguments.warm))
    shutil.rmtree(folder / "out")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--warm", action="store_true")
    return parser.parse_args()


def random_bf16(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Bits of values between 2^-7 and 2^-5 in size, of either sign: about what weights are."""
    return random.integers(0, 1 << 16, shape, np.uint16) & 0x80FF | 0x3C00


def make_checkpoint(folder: Path, num_layers: int) -> None:
    """Write shards, index and config; what is there already is kept."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(num_layers):
        for name, shape in LINEAR.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if name[-6:-5] in "qkv" and "self_attn" in name:
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (HIDDEN,)
    shapes["model.norm.weight"] = (HIDDEN,)
    names = list(shapes)
    shards = _native.split_into_shards([2 * int(np.prod(shapes[name])) for name in names], SHARD_BYTES)
    random = np.random.default_rng(0)
    weight_map = {}
    for number, indices in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_bf16(folder / file, {names[index]: random_bf16(random, shapes[names[index]]) for index in indices})
        weight_map |= {names[index]: file for index in indices}
    index = {
        "metadata": {"total_size": sum(2 * int(np.prod(shape)) for shape in shapes.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": num_layers}))


def write_bf16(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A safetensors file of bf16 tensors: numpy has no such dtype, so the bits are saved by hand."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(arrays):
        start, end = end, end + arrays[name].nbytes
        header[name] = {"dtype": "BF16", "shape": arrays[name].shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(arrays):
            file.write(arrays[name].tobytes())


def make_adapter(folder: Path, num_layers: int, rank: int) -> Path:
    """A PEFT adapter on all linear layers, f32, of sizes that move the weights by some percent."""
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(rank)
    tensors = {}
    for layer in range(num_layers):
        for name, (outputs, inputs) in LINEAR.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = random.standard_normal((rank, inputs), np.float32) * np.float32(0.02)
            tensors[f"{path}.lora_B.weight"] = random.standard_normal((outputs, rank), np.float32) * np.float32(0.01)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": SCALE * rank,
        "target_modules": [name.split(".")[1] for name in LINEAR],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def make_plan(base: Path, adapter: Path, out: Path) -> str:
    """The plan of the merge: one output file per input file."""
    shards = sorted(base.glob("*.safetensors"))
    files = [adapter / "adapter_model.safetensors", *shards]
    factors = {tensor.name: source(0, tensor) for tensor in _native.read_header(files[0])}
    plan = []
    for number, shard in enumerate(shards, start=1):
        tensors = []
        for tensor in _native.read_header(shard):
            op: dict[str, object] = {"kind": "copy", "source": source(number, tensor)}
            path = "base_model.model." + tensor.name.removesuffix(".weight")
            if f"{path}.lora_A.weight" in factors:
                delta = {"a": factors[f"{path}.lora_A.weight"], "b": factors[f"{path}.lora_B.weight"], "scale": SCALE}
                op = {"kind": "merge", "source": source(number, tensor), "deltas": [delta]}
            tensors.append({"name": tensor.name, "dtype": tensor.dtype, "shape": tensor.shape, "op": op})
        plan.append({"path": str(out / shard.name), "metadata": {"format": "pt"}, "tensors": tensors})
    return json.dumps({"files": [str(file) for file in files], "shards": plan})


def source(file: int, tensor: _native.TensorInfo) -> dict[str, object]:
    return {"file": file, "offset": tensor.offset, "dtype": tensor.dtype, "shape": tensor.shape}


def check(base: Path, adapter: Path, out: Path) -> None:
    """Compare with numpy: untouched tensors bit for bit; merged ones up to the order of summation (formats 2.2)."""
    factors = {tensor.name: tensor for tensor in _native.read_header(adapter / "adapter_model.safetensors")}
    for shard in sorted(base.glob("*.safetensors")):
        for old, new in list(zip(_native.read_header(shard), _native.read_header(out / shard.name), strict=True))[::7]:
            assert old == new, (old, new)
            weight = read(shard, old).view(np.uint16)
            result = read(out / shard.name, new).view(np.uint16)
            path = "base_model.model." + old.name.removesuffix(".weight")
            if f"{path}.lora_A.weight" not in factors:
                assert np.array_equal(weight, result), old
                continue
            A, B = (
                read(adapter / "adapter_model.safetensors", factors[f"{path}.lora_{letter}.weight"]).view(np.float32)
                for letter in "AB"
            )
            outputs, inputs = old.shape
            product = (B.reshape(outputs, -1) @ A.reshape(-1, inputs)).ravel() * np.float32(SCALE)
            bits = ((weight.astype(np.uint32) << 16).view(np.float32) + product).view(np.uint32)
            expected = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            steps = np.abs(expected.astype(np.int64) - result)
            assert np.mean(steps != 0) < 1e-4, (old, np.mean(steps != 0))
            assert not np.array_equal(weight, result), old


def read(path: Path, tensor: _native.TensorInfo) -> np.ndarray:
    return np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.offset)


# A child tells its own peak: what the system counts for it begins with the memory of its parent.
MEASURED = """
import sys
{}
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def run(command: list[str], stdin: Path | None = None) -> int:
    """Run a command; the number that it prints, if any: its peak memory in bytes."""
    with (stdin or Path(os.devnull)).open() as file:
        done = subprocess.run(command, check=True, stdin=file, stdout=subprocess.PIPE, text=True)
    return int(done.stdout or 0)


def copy(base: Path, out: Path) -> int:
    return run(["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(base), str(out)])


def merge(base: Path, adapter: Path, out: Path, threads: int | None) -> int:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    code = (
        "import sys; from fastft import _native; _native.run_plan(sys.stdin.read(), threads=int(sys.argv[1]) or None)"
    )
    plan = out.parent / "plan.json"
    plan.write_text(make_plan(base, adapter, out))
    return run([sys.executable, "-c", MEASURED.format(code), str(threads or 0)], stdin=plan)


def peft(base: Path, adapter: Path, out: Path) -> int:
    code = (
        "import torch; from transformers import AutoModelForCausalLM; from peft import PeftModel;"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16);"
        "PeftModel.from_pretrained(base, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])"
    )
    peak_bytes = run([sys.executable, "-c", MEASURED.format(code), str(base), str(adapter), str(out)])
    run(["sh", "-c", 'sync "$0"/*', str(out)])
    return peak_bytes


def forget(folder: Path) -> None:
    """Put the files of a folder out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def measure(
    work: dict[str, Callable[[], int]], base: Path, out: Path, rounds: int, *, warm: bool
) -> dict[str, list[tuple[float, float, int]]]:
    """(wall seconds, CPU seconds, peak bytes) of each contender, in turn."""
    results: dict[str, list[tuple[float, float, int]]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, do in work.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            if not warm:
                forget(base.parent)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            start = time.perf_counter()
            peak_bytes = do()
            wall_s = time.perf_counter() - start
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            results[name].append((wall_s, cpu_s, peak_bytes))
            print(
                f"{name}: {wall_s:.2f} s, CPU {cpu_s:.2f} s, peak {peak_bytes / 2**20:.0f} MiB",
                file=sys.stderr,
                flush=True,
            )
    return results


def report(arguments: argparse.Namespace, num_bytes: int, results: dict[str, list[tuple[float, float, int]]]) -> None:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(
        f"{num_bytes / 1e9:.2f} GB bf16, {arguments.layers} layers, {'warm' if arguments.warm else 'cold'} cache, {arguments.rounds} rounds in turn"
    )
    print(f"{model}, {os.cpu_count()} cores, level {_native.build_info()['level']}, commit {commit or 'unknown'}\n")
    print("| who | min / median / max s | x cp (median of the rounds' ratios) | CPU s | peak RSS MiB |")
    print("|---|---|---|---|---|")
    for name, rounds in results.items():
        walls = sorted(wall for wall, _, _ in rounds)
        ratio = statistics.median(own[0] / copied[0] for own, copied in zip(rounds, results["cp"], strict=True))
        cpu_s = statistics.median(cpu for _, cpu, _ in rounds)
        peak = max(peak for _, _, peak in rounds) // 2**20 or "-"
        times = f"{walls[0]:.2f} / {statistics.median(walls):.2f} / {walls[-1]:.2f}"
        print(f"| {name} | {times} | {ratio:.2f} | {cpu_s:.2f} | {peak} |")


if __name__ == "__main__":
    main()
