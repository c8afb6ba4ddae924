"""Fuzzes one reader of outside text or bytes: `python tests/fuzz/reader.py NAME [libFuzzer options]`, see `READERS`.

Any input gives a value or an error for the user (`FastftError`), never another exception, a hang or a large memory.
Without atheris it says so and exits with 0; `python -m pip install atheris` brings it. `make fuzz` runs each for a minute.
"""

import contextlib
import importlib.util
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

FOLDER = "FASTFT_FUZZ_FOLDER"
ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
INDEX = {"metadata": {"total_size": 4}, "weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}
CONFIG = "model: {name: demo}\nmethod: {kind: lora, lora: {r: 8}}\ndata: {train: [{source: a.jsonl}]}\n"
PICKLE = (
    b"\x80\x02}(X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQK\x00K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtRu."
)


def main(words: list[str]) -> int:
    """Fuzz the reader that `words` name, in a process of its own; the rest goes to libFuzzer."""
    if not words or words[0] not in READERS:
        print(f"usage: {Path(__file__).name} {'|'.join(READERS)} [libFuzzer options]", file=sys.stderr)
        return 2
    if importlib.util.find_spec("atheris") is None:
        print(f"skipped: {words[0]}: atheris is not installed")
        return 0
    memory = Path("/dev/shm")
    # atheris ends its process without tidying up.
    with tempfile.TemporaryDirectory(prefix="fastft-fuzz-", dir=memory if memory.is_dir() else None) as folder:
        command = [sys.executable, __file__, *words]
        return subprocess.run(command, env={**os.environ, FOLDER: folder}, check=False).returncode


def fuzz(words: list[str], folder: Path) -> None:
    """Fuzz in this process, with files in `folder`; does not return."""
    import atheris

    with atheris.instrument_imports(include=["fastft"]):
        from fastft.errors import FastftError

        prepare, seed = READERS[words[0]]
        read = prepare()
    read(seed)

    def once(content: bytes) -> None:
        with contextlib.suppress(FastftError):
            read(content)

    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(seed)
    atheris.Setup([sys.argv[0], *words[1:], str(corpus)], once)
    atheris.Fuzz()


def _adapter() -> Callable[[bytes], object]:
    from fastft.convert import adapter, json_file

    def read(content: bytes) -> object:
        path = Path("adapter_config.json")
        config = json_file.parse_object(content, str(path))
        return adapter.check_config(config, path)

    return read


def _index() -> Callable[[bytes], object]:
    from fastft.convert import folder

    return _through_file(folder.read_index)


def _pickle() -> Callable[[bytes], object]:
    from fastft.convert import pickle_data

    return lambda content: pickle_data.read(content, "any.pth")


def _torch_file() -> Callable[[bytes], object]:
    from fastft.convert import torch_file

    def read(path: Path) -> None:
        found = torch_file.read(path)
        for name, value in (torch_file.mapping(found.value) or {}).items():
            if torch_file.is_tensor(value):
                source = found.tensor(str(name), value)
                assert 0 <= source.offset <= path.stat().st_size

    return _through_file(read)


def _yaml() -> Callable[[bytes], object]:
    from fastft.config import tree

    return lambda content: tree.plain(tree.parse(content.decode("utf-8", "replace"), lambda line: f"any.yaml:{line}"))


def _whole_config() -> Callable[[bytes], object]:
    from fastft.config import load

    return _through_file(lambda path: load.load(str(path)), "any.yaml")


def _through_file(read: Callable[[Path], object], name: str = "any") -> Callable[[bytes], object]:
    """A reader of a path as a reader of bytes."""
    path = Path(os.environ[FOLDER]) / name

    def once(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return once


def _archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a/data.pkl", PICKLE)
        file.writestr("a/data/0", struct.pack("<6f", *range(6)))
    return out.getvalue()


READERS: dict[str, tuple[Callable[[], Callable[[bytes], object]], bytes]] = {
    "adapter": (_adapter, json.dumps(ADAPTER).encode()),
    "index": (_index, json.dumps(INDEX).encode()),
    "pickle": (_pickle, PICKLE),
    "torch_file": (_torch_file, _archive()),
    "yaml": (_yaml, CONFIG.encode()),
    "config": (_whole_config, CONFIG.encode()),
}

if __name__ == "__main__":
    if FOLDER in os.environ:
        fuzz(sys.argv[1:], Path(os.environ[FOLDER]))
    raise SystemExit(main(sys.argv[1:]))
