"""Which files of a model's repository are fetched: what loading needs, and the weights once.

Repositories hold the same weights several times (safetensors, pickles, Mistral's consolidated files, Meta's originals,
ONNX); fetching all would double or triple the download.
"""

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
