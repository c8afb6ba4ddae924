"""Nothing in fastft unpickles: what could is found by name in the source and must stand in the list below."""

import ast
from pathlib import Path

import pytest

import fastft

SOURCE = Path(fastft.__file__).parent
# Modules whose import is a sign that something is unpickled.
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
# Attributes and functions by name, whatever they are called on, and by keyword.
CALLS = {
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "torch.package",
    "numpy.load",
    "np.load",
    "load_peft_weights",
    "load_sharded_checkpoint",
    "pandas.read_pickle",
    "read_pickle",
}
# (file, what): why it is no unpickling.
ALLOWED = {
    ("data/store.py", "np.load"): "allow_pickle=False stands beside it",
    ("chat/llava.py", "load_peft_weights"): "called only where adapter_model.safetensors is there, which peft prefers",
}


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def suspicious(source: str) -> set[str]:
    """Names in a module that may unpickle."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name.split(".")[0] in MODULES or name in CALLS}
        elif isinstance(node, ast.Call) and _name(node.func) in CALLS:
            found.add(_name(node.func))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and not _is(node.value, value=False):
            found.add("allow_pickle")
        elif isinstance(node, ast.keyword) and node.arg == "weights_only" and not _is(node.value, value=True):
            found.add("weights_only")
        elif isinstance(node, ast.keyword) and node.arg == "use_safetensors" and _is(node.value, value=False):
            found.add("use_safetensors")
    return found


def _is(node: ast.AST, *, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_the_source_holds_only_what_is_allowed() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 100
    found = {
        (str(path.relative_to(SOURCE)), name) for path in files for name in suspicious(path.read_text(encoding="utf-8"))
    }
    assert found == set(ALLOWED)


def test_each_numpy_load_says_that_it_takes_no_pickle() -> None:
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _name(node.func) in ("np.load", "numpy.load"):
                said = {word.arg: word.value for word in node.keywords}
                assert "allow_pickle" in said, f"{path}:{node.lineno}"
                assert _is(said["allow_pickle"], value=False), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as j",
        "import torch\ntorch.load('x', weights_only=True)",
        "import torch\ntorch.save({}, 'x')",
        "from torch import load",
        "f(allow_pickle=True)",
        "f(allow_pickle=wanted)",
        "f(weights_only=False)",
        "f(use_safetensors=False)",
    ],
)
def test_what_would_unpickle_is_found(line: str) -> None:
    """The search above would fail on each of these."""
    assert suspicious(line), line


def test_what_does_not_is_not() -> None:
    assert not suspicious("import json, pickletools\njson.load(x)\nf(allow_pickle=False)\ntorch.torch_load = 1")
