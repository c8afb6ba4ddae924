"""The commands that write, each with two results that replace each other, and what must be true after every fault."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import forks
import tiny_llama

Hashes = Mapping[str, str]
MODULES = (
    *("numpy", "ruamel.yaml", "fastft.config.load", "fastft.config.show", "fastft.hub.locate"),
    *("fastft.convert.merge", "fastft.convert.quantize", "fastft.convert.split", "fastft.convert.pth"),
    *("fastft.convert.verify", "fastft.convert.pth_reader", "fastft.cli.convert_merge", "fire"),
)


@dataclass(frozen=True)
class Sizes:
    """Of a Llama."""

    hidden: int
    inner: int
    layers: int
    vocab: int
    shard: str
    larger_shard: str


# 8 MB, of which a run spends most of its time writing; and one that is written in a few calls.
MEDIUM = Sizes(256, 704, 4, 2000, "3MB", "5MB")
TINY = Sizes(64, 96, 1, 100, "40KB", "60KB")


@dataclass(frozen=True)
class Sources:
    """What commands read: a base, two adapters, two 4-bit models, a checkpoint of each kind and their config.

    Attributes:
        folder: holds them all.
        sizes: of the model.
    """

    folder: Path
    sizes: Sizes

    def hashes(self) -> Hashes:
        return hashes_of(self.folder)

    def case(self, name: str) -> "Case":
        """A command with two ways to call it; see `CASES`."""
        places = [str(self.folder / place) for place in _PLACES]
        shards = {"small": self.sizes.shard, "large": self.sizes.larger_shard}
        first, second = ([word.format(*places, **shards) for word in way.split()] for way in CASES[name])
        return Case(name, first, second)


_PLACES = ("base", "one", "two", "nf4", "nested", "config.yaml", "model.pth", "adapter.pth", "lora.yaml")


# {0}: base, {1} {2}: adapters, {3} {4}: 4-bit models, {5}: config, {6} {7}: .pth files, {8}: config with LoRA.
CASES = {
    "merge, one file over one file": ("convert merge {0} {1} TARGET", "convert merge {0} {2} TARGET"),
    "merge, shards over one file": (
        "convert merge {0} {1} TARGET",
        "convert merge {0} {2} TARGET --max-shard-size {small}",
    ),
    "merge, shards over more shards": (
        "convert merge {0} {1} TARGET --max-shard-size {large}",
        "convert merge {0} {2} TARGET --max-shard-size {small}",
    ),
    "quantize": ("convert quantize {0} TARGET", "convert quantize {0} TARGET --double-quant --max-shard-size {small}"),
    "dequantize": ("convert dequantize {3} TARGET", "convert dequantize {4} TARGET --max-shard-size {small}"),
    "split": (
        "convert split {0} TARGET --max-shard-size {large}",
        "convert split {0} TARGET --max-shard-size {small}",
    ),
    "pth_to_hf": (
        "convert pth_to_hf {5} {6} TARGET",
        "convert pth_to_hf {5} {6} TARGET --dtype bf16 --max-shard-size {small}",
    ),
    "pth_to_hf, adapter": ("convert pth_to_hf {8} {7} TARGET", "convert pth_to_hf {8} {7} TARGET --fp32"),
    "copy-cfg": ("copy-cfg demo TARGET.yaml", "copy-cfg internlm2_chat_7b_qlora_alpaca_e3 TARGET.yaml"),
}
FOLDERS = tuple(name for name in CASES if name != "copy-cfg")


@dataclass(frozen=True)
class Case:
    """A command, and two ways to call it that give different results at one target."""

    name: str
    first: list[str]
    second: list[str]
    whole: dict[int, Hashes] = field(default_factory=dict)

    def words(self, way: int, target: Path) -> list[str]:
        """The command line that replaces what stands at `target`."""
        words = self.first if way == 0 else self.second
        return [word.replace("TARGET", str(target)) for word in words] + ["--force"]

    def learn(self, server: forks.Forks, target: Path) -> None:
        """Find out what the results are; the second one stands at the target afterwards."""
        for way in (0, 1):
            done = server.run(self.words(way, target))
            assert done.code == 0, done.err
            self.whole[way] = hashes_of(target.parent)
        assert self.whole[0] != self.whole[1]


def hashes_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder that is no staging file and no lock."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: str(path.relative_to(folder)) for path in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for path, name in names.items() if not name.startswith(".")
    }


def leftovers(folder: Path) -> list[str]:
    """Staging folders and files, locks and renamed old ones."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def staging(folder: Path) -> list[str]:
    """Those that hold data."""
    return [name for name in leftovers(folder) if not name.endswith(".lock")]


def write_sources(folder: Path, sizes: Sizes) -> Sources:
    """Make all that the commands of `CASES` read, from one seed."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, dtype=np.float32) * 0.05).astype(np.float16)

    hidden, inner = sizes.hidden, sizes.inner
    linears = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (hidden, hidden)),
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (hidden // 2, hidden)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (inner, hidden)),
        "mlp.down_proj": (hidden, inner),
    }
    modules = {
        f"model.layers.{layer}.{name}": shape for layer in range(sizes.layers) for name, shape in linears.items()
    }
    tensors = {f"{name}.weight": draw(*shape) for name, shape in modules.items()}
    tensors |= {name: draw(sizes.vocab, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    config = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": sizes.layers,
        "vocab_size": sizes.vocab,
        "torch_dtype": "float16",
    }
    tiny_llama.write_base(folder / "base", tensors, **config)
    for name in ("one", "two"):
        factors = {}
        for module, (num_out, num_in) in modules.items():
            at = f"base_model.model.{module}.lora_"
            factors[f"{at}A.weight"], factors[f"{at}B.weight"] = draw(8, num_in), draw(num_out, 8)
        tiny_llama.write_adapter(folder / name, factors, r=8, lora_alpha=16)
    torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, folder / "model.pth")
    factors = {f"{name.replace('.weight', '.default.weight')}": torch.from_numpy(a) for name, a in factors.items()}
    torch.save({"state_dict": factors}, folder / "adapter.pth")
    for name, method in (("config", {"kind": "full"}), ("lora", {"kind": "lora", "lora": {"r": 8, "alpha": 16}})):
        settings = {
            "name": name,
            "model": {"name": str(folder / "base")},
            "method": method,
            "data": {"train": [{"source": "demo/dialogues"}]},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(settings))
    return Sources(folder, sizes)


def with_four_bit(server: forks.Forks, sources: Sources) -> Sources:
    """Add the 4-bit models."""
    for name, option in (("nf4", []), ("nested", ["--double-quant"])):
        done = server.run(["convert", "quantize", sources.folder / "base", sources.folder / name, *option])
        assert done.code == 0, done.err
    return sources


class Place:
    """A target and what stands there, put back before each fault.

    Attributes:
        target: where a command writes.
        standing: the way (0 or 1) whose result stands there.
    """

    def __init__(self, folder: Path, case: Case, server: forks.Forks, sources: Sources) -> None:
        self.case, self.sources = case, sources
        self.folder = folder / "place"
        self.kept = folder / "kept"
        self.folder.mkdir()
        self.target = self.folder / "result"
        case.learn(server, self.target)
        self.standing = 1
        self.before = sources.hashes()
        shutil.copytree(self.folder, self.kept)

    def put_back(self) -> None:
        """The result of the second way, and nothing beside it."""
        shutil.rmtree(self.folder)
        shutil.copytree(self.kept, self.folder)
        self.standing = 1

    def words(self) -> list[str]:
        """The command that replaces what stands there by the other result."""
        return self.case.words(1 - self.standing, self.target)

    def look(self, what: str) -> bool:
        """Hold what is there against both results; whether the new one is in place."""
        found = hashes_of(self.folder)
        assert found in self.case.whole.values(), f"{what}: neither old nor new: {sorted(found)}"
        assert len(staging(self.folder)) <= 1, f"{what}: {leftovers(self.folder)}"
        is_new = found == self.case.whole[1 - self.standing]
        if is_new:
            self.standing = 1 - self.standing
        return is_new

    def finish(self, server: forks.Forks) -> None:
        """The next run ends well, leaves nothing beside its result, and no source has changed."""
        words, coming = self.words(), 1 - self.standing
        done = server.run(words)
        assert done.code == 0, done.err
        assert hashes_of(self.folder) == self.case.whole[coming]
        assert leftovers(self.folder) == []
        assert self.sources.hashes() == self.before
