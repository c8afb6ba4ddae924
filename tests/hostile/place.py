"""A folder in which one hostile case is laid out, with what most cases need: good models, adapters and data to break."""

import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import tiny_llama

# Hostile code in a case makes this file; nobody else does.
PAYLOAD = "PAYLOAD"


class Place:
    """The folder of a case.

    Args:
        root: an empty folder; commands run in it.
        stock: a folder with a small model that can be trained and talked to (`chatty`), shared by all cases.
    """

    def __init__(self, root: Path, stock: Path) -> None:
        self.root = root
        self.stock = stock

    @property
    def payload(self) -> str:
        """What hostile code would make."""
        return str(self.root / PAYLOAD)

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def base(self, name: str = "base", **more: Any) -> Path:
        """A good Llama folder for conversions."""
        return tiny_llama.write_base(self.root / name, **more)

    def adapter(self, name: str = "adapter", **more: Any) -> Path:
        """A good LoRA folder that fits it."""
        return tiny_llama.write_adapter(self.root / name, **more)

    def chatty(self, name: str = "chatty") -> Path:
        """A good model with its tokenizer, for training and chat."""
        return Path(shutil.copytree(self.stock / "chatty", self.root / name))

    def run_folder(self, name: str = "run") -> Path:
        """A good run folder with a checkpoint at step 2."""
        return Path(shutil.copytree(self.stock / "run", self.root / name))

    def rows(self, name: str = "rows.jsonl", count: int = 4) -> Path:
        """A good data set."""
        rows = [{"instruction": f"How many apples are in basket {n}?", "output": "apple " * n} for n in range(1, count)]
        path = self.root / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    def config(self, name: str = "a.yaml", **changes: Any) -> Path:
        """A good config of a run over `chatty` and `rows.jsonl`; `changes` are dotted keys with double underscores."""
        keys: dict[str, Any] = {
            "model.name": "chatty",
            "data.train": [{"source": "rows.jsonl"}],
            "data.max_length": 64,
            "data.packing": False,
            "data.cache": None,
            "method.kind": "lora",
            "method.lora.r": 2,
            "train.max_steps": 2,
            "train.batch_size": 1,
            "train.grad_accumulation": 1,
            "train.log_steps": 1,
            "output.save_steps": 2,
        }
        keys |= {key.replace("__", "."): value for key, value in changes.items()}
        tree: dict[str, Any] = {}
        for key, value in keys.items():
            *sections, last = key.split(".")
            at = tree
            for section in sections:
                at = at.setdefault(section, {})
            at[last] = value
        path = self.root / name
        path.write_text(json.dumps(tree), encoding="utf-8")
        return path

    def write(self, name: str, content: bytes | str) -> Path:
        """A file with any content; its folders are made."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    def edit_json(self, name: str, **changes: Any) -> Path:
        """Change keys of a JSON file; a value of `...` removes the key."""
        path = self.root / name
        value = json.loads(path.read_text(encoding="utf-8")) | changes
        path.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}), encoding="utf-8")
        return path

    def pipe(self, name: str) -> None:
        """A FIFO that nobody writes to, in the place of a file."""
        path = self.root / name
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    def link(self, name: str, to: str) -> None:
        """A symbolic link in the place of a file."""
        path = self.root / name
        path.unlink(missing_ok=True)
        path.symlink_to(to)

    def sparse(self, name: str, size: int, start: bytes = b"") -> None:
        """A file that is long and holds almost nothing."""
        with (self.root / name).open("wb") as file:
            file.write(start)
            file.truncate(size)


def safetensors(header: bytes | str | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file, however wrong."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: list[Any] | None = None, start: int = 0, end: int = 4) -> dict[str, Any]:
    """What stands under a tensor's name in a header."""
    return {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": [start, end]}


def changed(path: Path, **tensors: np.ndarray | None) -> None:
    """Write a safetensors file anew with some tensors changed, added or (None) left out; `__` stands for a dot."""
    from safetensors.numpy import load_file, save_file

    found = load_file(path)
    for key, value in tensors.items():
        name = key.replace("__", ".")
        if value is None:
            found.pop(name)
        else:
            found[name] = value
    save_file(found, path, metadata={"format": "pt"})
