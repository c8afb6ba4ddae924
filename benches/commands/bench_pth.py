"""Turn a DeepSpeed ZeRO-2 folder of a 7B model into a Hugging Face folder, beside `cp` of its weights.

The folder is laid out by torch.save itself, with the shapes of Llama-2-7B and the names that XTuner gives them; the 16-bit
weights are full of random bf16 values (a pattern of 1 MiB, begun elsewhere in each tensor). With --masters there are also
the fp32 masters of 8 processes, which are zeros but for the ends of each weight, and --fp32 is timed too. What is timed is
the whole command, `fastft convert pth_to_hf`, with its start and its checks, until its output is on the disk; all take turns
in one run and each starts with the folder out of the page cache (unless --warm). Every byte of the results is compared
before anything is timed, and the peak memory of the command must stay under 1 GiB.

    python benches/commands/bench_pth.py FOLDER [--scale 1.0] [--rounds 3] [--masters] [--warm]

FOLDER decides which disk is measured; it holds 27 GB times the scale (68 GB with --masters) and is emptied at the end.
--scale is the share of the 32 layers that there are.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from bench_merge import SHAPES, command, describe, measure, random_bf16, read, report, run, tensors_of

from fastft.convert import torch_file
from fastft.convert.source import Source
from fastft.convert.torch_file import mapping

NUM_PROCESSES = 8
MOST_BYTES = 1 << 30
PATTERN = random_bf16(np.random.default_rng(0), (1 << 19,))
# Masters at either end of a weight that are not zero.
NUM_ENDS = 1000
BLOCK = 1 << 22


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--masters", action="store_true")
    parser.add_argument("--warm", action="store_true")
    arguments = parser.parse_args()
    num_layers = max(1, round(SHAPES["7b"].num_layers * arguments.scale))
    folder: Path = arguments.folder / f"pth-{num_layers}"
    base, checkpoint, out = folder / "base", folder / "iter_500.pth", folder / "out"
    try:
        shapes = weights_of(num_layers)
        make_base(base, shapes, num_layers)
        make_checkpoint(checkpoint, shapes, masters=arguments.masters)
        values = {"model": {"name": str(base)}, "method": {"kind": "full"}, "data": {"train": [{"source": "x"}]}}
        (folder / "run.yaml").write_text(json.dumps(values))
        kinds = {"bf16 as it is": ("--dtype", "auto"), "fp16, the default": ()}
        if arguments.masters:
            kinds["fp32 masters"] = ("--fp32",)
        work: dict[str, Callable[[], int]] = {"cp": lambda: copy(checkpoint, out)}
        for name, options in kinds.items():
            peak_bytes = convert(folder, out, *options)
            check(out, shapes, name)
            assert peak_bytes < MOST_BYTES, f"{name}: {peak_bytes / 2**20:.0f} MiB at the peak"
            work[f"fastft {name}"] = lambda options=options: convert(folder, out, *options)
        results = measure(work, base, out, arguments.rounds, warm=arguments.warm)
        title = describe(checkpoint, "ZeRO-2 folder of 7b", num_layers, arguments.rounds, warm=arguments.warm)
        report(title, results, "cp")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def weights_of(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes as Llama has them."""
    shape = SHAPES["7b"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for layer in range(num_layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{name}.weight": sizes for name, sizes in shape.linear().items()}
        shapes |= {f"{at}.{norm}.weight": (shape.hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return {**shapes, "model.norm.weight": (shape.hidden,), "lm_head.weight": (shape.vocabulary, shape.hidden)}


def make_base(folder: Path, shapes: dict[str, tuple[int, ...]], num_layers: int) -> None:
    """The model that was trained, of zeros that take no room on the disk: only its names and shapes matter."""
    folder.mkdir(parents=True)
    shape = SHAPES["7b"]
    config = {
        **shape.config,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "vocab_size": shape.vocabulary,
        "num_hidden_layers": num_layers,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, object] = {}
    end = 0
    for name, sizes in shapes.items():
        start, end = end, end + 2 * math.prod(sizes)
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def make_checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]], *, masters: bool) -> None:
    """torch.save lays the files out with room for the numbers, which are filled in afterwards."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    folder.mkdir(parents=True)
    names = {f"llm.{name}": torch.Size(sizes) for name, sizes in shapes.items()}
    whole = folder / "mp_rank_00_model_states.pt"
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        module = {name: torch.empty(sizes, dtype=torch.bfloat16) for name, sizes in names.items()}
        torch.save({"module": module, "param_shapes": [names], "shared_params": {}, "ds_version": "0.16.2"}, whole)
        if masters:
            length = sum(math.prod(sizes) for sizes in names.values()) // NUM_PROCESSES
            for rank in range(NUM_PROCESSES):
                group = torch.empty(length, dtype=torch.float32)
                state = {
                    "zero_stage": 2,
                    "partition_count": NUM_PROCESSES,
                    "single_partition_of_fp32_groups": [group],
                    "base_optimizer_state": {"exp_avg": torch.empty(8)},
                }
                path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
                torch.save({"optimizer_state_dict": state}, path)
    fill_weights(whole, shapes)
    if masters:
        fill_masters(folder, shapes)


def pattern(index: int, count: int, start: int = 0) -> np.ndarray:
    """`count` bf16 bits of the weight with this number, from its value `start` on."""
    first = (index * 7919 + start) % PATTERN.size
    return np.resize(np.roll(PATTERN, -first), count)


def blocks(numel: int) -> Iterator[tuple[int, int]]:
    for start in range(0, numel, BLOCK):
        yield start, min(BLOCK, numel - start)


def tensors_in(path: Path, key: str) -> dict[str, Source]:
    file = torch_file.read(path)
    items = mapping(file.value)[key]  # type: ignore[index]
    return {name: file.tensor(name, item) for name, item in items.items()}


def fill_weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    places = tensors_in(path, "module")
    with path.open("r+b") as file:
        for index, (name, sizes) in enumerate(shapes.items()):
            file.seek(places[f"llm.{name}"].offset)
            for start, count in blocks(math.prod(sizes)):
                file.write(pattern(index, count, start).tobytes())


def ends(index: int) -> np.ndarray:
    """The masters at the start of a weight; those at its end are the same."""
    return np.random.default_rng(index).standard_normal(NUM_ENDS).astype(np.float32)


def fill_masters(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    files = []
    for rank in range(NUM_PROCESSES):
        path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        read = torch_file.read(path)
        group = mapping(mapping(read.value)["optimizer_state_dict"])["single_partition_of_fp32_groups"][0]  # type: ignore[index]
        files.append((path, read.tensor("group", group)))
    at = 0
    for index, sizes in enumerate(shapes.values()):
        numel = math.prod(sizes)
        for first in (at, at + numel - NUM_ENDS):
            write_flat(files, first, ends(index))
        at += numel


def write_flat(files: list[tuple[Path, Source]], first: int, values: np.ndarray) -> None:
    """Write values into the flat group that the processes share out equally."""
    length = files[0][1].numel
    while values.size:
        path, source = files[first // length]
        count = min(values.size, length - first % length)
        with path.open("r+b") as file:
            file.seek(source.offset + 4 * (first % length))
            file.write(values[:count].tobytes())
        values, first = values[count:], first + count


def convert(folder: Path, out: Path, *options: str) -> int:
    shutil.rmtree(out, ignore_errors=True)
    return command("convert", "pth_to_hf", folder / "run.yaml", folder / "iter_500.pth", out, *options)


def copy(checkpoint: Path, out: Path) -> int:
    out.mkdir()
    return run(["sh", "-c", 'cp "$0" "$1" && sync "$1"/*', str(checkpoint / "mp_rank_00_model_states.pt"), str(out)])


def check(out: Path, shapes: dict[str, tuple[int, ...]], kind: str) -> None:
    """Hold every byte of the result against what was written."""
    found = tensors_of(out)
    assert found.keys() == shapes.keys()
    for index, (name, sizes) in enumerate(shapes.items()):
        path, tensor = found[name]
        numel = math.prod(sizes)
        assert tuple(tensor.shape) == sizes, name
        values = read(path, tensor)
        if kind == "fp32 masters":
            got = values.view(np.float32)
            assert np.array_equal(got[:NUM_ENDS], ends(index)), name
            assert np.array_equal(got[-NUM_ENDS:], ends(index)), name
            assert not got[NUM_ENDS:-NUM_ENDS].any(), name
            continue
        for start, count in blocks(numel):
            bits = pattern(index, count, start)
            if kind.startswith("fp16"):
                bits = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float16).view(np.uint16)
            assert np.array_equal(values.view(np.uint16)[start : start + count], bits), name
    print(f"{kind}: right, {len(found)} tensors", file=sys.stderr)


if __name__ == "__main__":
    main()
