"""Merge a LoRA adapter into a checkpoint, from files to files, beside `cp` and, if asked for, PEFT.

The checkpoint has the shapes of Qwen2.5-1.5B or Llama-2-7B (or fewer layers of it) with random bf16 weights; the
adapter is on all linear layers. What is timed is the whole command, `fastft convert merge`, with its start and its checks.
All take turns in one run; each starts with the base out of the page cache (unless --warm) and ends when its output is on
the disk. The merged weights are checked against numpy before anything is timed.

    python benches/commands/bench_merge.py FOLDER [--shape 1.5b|7b] [--layers N] [--ranks 8 64] [--rounds 3] [--peft] [--warm]

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from fastft import _native

SHARD_BYTES = 2 * 10**9
SCALE = 2.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, and what config.json says of it."""

    hidden: int
    inner: int
    key_value: int
    vocabulary: int
    num_layers: int
    tied: bool
    biases: bool
    config: dict[str, object]

    def linear(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the linear layers of a block."""
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (self.key_value, self.hidden),
            "self_attn.v_proj": (self.key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }


SHAPES = {
    "1.5b": Shape(
        1536,
        8960,
        256,
        151936,
        28,
        tied=True,
        biases=True,
        config={
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
    ),
    "7b": Shape(
        4096,
        11008,
        4096,
        32000,
        32,
        tied=False,
        biases=False,
        config={
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
}


def main() -> None:
    arguments = parse()
    shape = SHAPES[arguments.shape]
    num_layers = arguments.layers or shape.num_layers
    folder: Path = arguments.folder / f"{arguments.shape}-{num_layers}"
    base, out = folder / "base", folder / "out"
    make_checkpoint(base, shape, num_layers)
    adapters = {rank: make_adapter(folder / f"adapter-{rank}", shape, num_layers, rank) for rank in arguments.ranks}
    for adapter in adapters.values():
        merge(base, adapter, out)
        check(base, adapter, out)

    work: dict[str, Callable[[], int]] = {"cp": lambda: copy(base, out)}
    for rank, adapter in adapters.items():
        work[f"fastft rank {rank}"] = lambda adapter=adapter: merge(base, adapter, out)
        if arguments.peft:
            work[f"PEFT rank {rank}"] = lambda adapter=adapter: peft(base, adapter, out)
    results = measure(work, base, out, arguments.rounds, warm=arguments.warm)
    report(describe(base, arguments.shape, num_layers, arguments.rounds, warm=arguments.warm), results, "cp")
    shutil.rmtree(out)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1.5b")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--warm", action="store_true")
    return parser.parse_args()


def random_bf16(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Bits of values between 2^-7 and 2^-5 in size, of either sign: about what weights are."""
    return random.integers(0, 1 << 16, shape, np.uint16) & 0x80FF | 0x3C00


def make_checkpoint(folder: Path, shape: Shape, num_layers: int) -> None:
    """Write shards, index and config; what is there already is kept."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for layer in range(num_layers):
        for name, sizes in shape.linear().items():
            shapes[f"model.layers.{layer}.{name}.weight"] = sizes
            if shape.biases and name[-6:-5] in "qkv" and "self_attn" in name:
                shapes[f"model.layers.{layer}.{name}.bias"] = sizes[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (shape.hidden,)
    shapes["model.norm.weight"] = (shape.hidden,)
    if not shape.tied:
        shapes["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    names = list(shapes)
    shards = _native.split_into_shards([2 * int(np.prod(shapes[name])) for name in names], SHARD_BYTES)
    random = np.random.default_rng(0)
    weight_map = {}
    for number, indices in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_bf16(folder / file, {names[index]: random_bf16(random, shapes[names[index]]) for index in indices})
        weight_map |= {names[index]: file for index in indices}
    index = {
        "metadata": {"total_size": sum(2 * int(np.prod(sizes)) for sizes in shapes.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        **shape.config,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "vocab_size": shape.vocabulary,
        "num_hidden_layers": num_layers,
        "tie_word_embeddings": shape.tied,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


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


def make_adapter(folder: Path, shape: Shape, num_layers: int, rank: int) -> Path:
    """A PEFT adapter on all linear layers, f32, of sizes that move the weights by some percent."""
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(rank)
    tensors = {}
    for layer in range(num_layers):
        for name, (outputs, inputs) in shape.linear().items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = random.standard_normal((rank, inputs), np.float32) * np.float32(0.02)
            tensors[f"{path}.lora_B.weight"] = random.standard_normal((outputs, rank), np.float32) * np.float32(0.01)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": SCALE * rank,
        "target_modules": [name.split(".")[1] for name in shape.linear()],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def tensors_of(folder: Path) -> dict[str, tuple[Path, _native.TensorInfo]]:
    """Where each tensor of a folder is."""
    return {
        tensor.name: (file, tensor)
        for file in sorted(folder.glob("*.safetensors"))
        for tensor in _native.read_header(file)
    }


def check(base: Path, adapter: Path, out: Path) -> None:
    """Compare with numpy: untouched tensors bit for bit; merged ones up to the order of summation (formats 2.2)."""
    factors, before, after = tensors_of(adapter), tensors_of(base), tensors_of(out)
    assert before.keys() == after.keys()
    for name in list(before)[::7]:
        old = before[name][1]
        assert (old.dtype, old.shape) == (after[name][1].dtype, after[name][1].shape), name
        weight, result = (read(*tensors[name]).view(np.uint16) for tensors in (before, after))
        path = "base_model.model." + name.removesuffix(".weight")
        if f"{path}.lora_A.weight" not in factors:
            assert np.array_equal(weight, result), name
            continue
        A, B = (read(*factors[f"{path}.lora_{letter}.weight"]).view(np.float32) for letter in "AB")
        outputs, inputs = old.shape
        product = (B.reshape(outputs, -1) @ A.reshape(-1, inputs)).ravel() * np.float32(SCALE)
        bits = ((weight.astype(np.uint32) << 16).view(np.float32) + product).view(np.uint32)
        expected = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        steps = np.abs(expected.astype(np.int64) - result)
        assert np.mean(steps != 0) < 1e-4, (name, np.mean(steps != 0))
        assert not np.array_equal(weight, result), name


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


def command(*words: str | Path) -> int:
    """Run a command of fastft as it is typed; its peak memory in bytes."""
    code = (
        "from fastft.__main__ import main\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
    )
    # What the command itself prints goes to stderr, so that stdout holds the peak alone.
    code = f"import contextlib\nwith contextlib.redirect_stdout(sys.stderr):\n    exec({code!r})"
    return run([sys.executable, "-c", MEASURED.format(code), *map(str, words)])


def merge(base: Path, adapter: Path, out: Path) -> int:
    shutil.rmtree(out, ignore_errors=True)
    return command("convert", "merge", base, adapter, out)


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


def describe(base: Path, shape: str, num_layers: int, rounds: int, *, warm: bool) -> str:
    """What was measured, where, and with which commit."""
    num_bytes = sum(file.stat().st_size for file in base.iterdir())
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return (
        f"{shape}: {num_bytes / 1e9:.2f} GB bf16, {num_layers} layers, {'warm' if warm else 'cold'} cache, {rounds} rounds in"
        f" turn\n{model}, {os.cpu_count()} cores, level {_native.build_info()['level']}, commit"
        f" {done.stdout.strip() or 'unknown'}, load {os.getloadavg()[0]:.1f}\n"
    )


def report(title: str, results: dict[str, list[tuple[float, float, int]]], limit: str) -> None:
    """Print the table; ratios are to `limit`, within each round."""
    print(title)
    print(f"| who | min / median / max s | x {limit} (median of the rounds' ratios) | CPU s | peak RSS MiB |")
    print("|---|---|---|---|---|")
    for name, rounds in results.items():
        walls = sorted(wall for wall, _, _ in rounds)
        ratio = statistics.median(own[0] / other[0] for own, other in zip(rounds, results[limit], strict=True))
        cpu_s = statistics.median(cpu for _, cpu, _ in rounds)
        peak = max(peak for _, _, peak in rounds) // 2**20 or "-"
        times = f"{walls[0]:.2f} / {statistics.median(walls):.2f} / {walls[-1]:.2f}"
        print(f"| {name} | {times} | {ratio:.2f} | {cpu_s:.2f} | {peak} |")


if __name__ == "__main__":
    main()
