"""Which files of a model's repository are fetched: what loading needs, and the weights once.

Repositories hold the same weights several times (safetensors, pickles, Mistral's consolidated files, Meta's originals,
ONNX); fetching all would double or triple the download.
"""

from pathlib import Path

from fastft.errors import FastftError, HubError

SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.md", "LICENSE*", "*.spm")
SAFETENSORS = ("*.safetensors",)
PICKLES = ("pytorch_model*.bin", "*.bin.index.json")  # taken only where there are no safetensors
# `*` in these patterns matches `/` too: weights in folders are other forms of the same model.
IGNORED = (
    "*/*.safetensors",
    "*/*.bin",
    "consolidated*",
    "original/*",
    "onnx/*",
    "training_args.bin",
    "*.pth",
    "*.gguf",
    "*.msgpack",
    "*.h5",
)


def require_whole(what: str, folder: Path) -> None:
    """Refuse a folder with a broken file of weights, or without one that its index names; only headers are read.

    Pickles are looked at where they are read.

    Raises:
        HubError: a file is missing or is no whole file of weights.
    """
    from fastft.convert.folder import INDEX, read_index, read_safetensors

    try:
        named = set(read_index(folder / INDEX).values()) if (folder / INDEX).is_file() else set()
        missing = sorted(name for name in named if not (folder / name).is_file())
        for file in sorted(folder.glob("*.safetensors")):
            read_safetensors(file)
    except FastftError as error:
        raise HubError(f"{what}: not a whole model: {error}") from error
    if missing:
        more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise HubError(f"{what}: the repository lacks {missing[0]}{more} that its index names; it is incomplete.")
