"""Python configs are read as data: what Python itself would give, and never by running them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.config.python_text import Call, Symbol, read
from fastft.errors import ConfigError


def complaint(text):
    with pytest.raises(ConfigError) as caught:
        read(text, "my.py")
    return str(caught.value)


# Every line is also run by Python, which is what the values are held against.
PLAIN = """
a = 1 + 2 * 3 ** 2 // 4 % 5 - 0.5 / 2
b = -a
c, (d, e) = 'x', (True, None)
f = [*range_like, 4] if a else []
g = dict(x=1, y=dict(z=[1, (2, 3)]), **{'w': 'u'})
g['x'] = g['y']['z'][1][0]
h = {'k': f'{c}-{a}', **g}
i = not (1 < 2 <= 2 != 3) or c in ('x', 'y') and 4 not in [1, 2]
if i:
    j = 'yes'
    if d and not e:
        j += '!' * 3
else:
    j = 'no'
k = int('7') + len([1, 2]) + float('0.5')
l = list((1, 2)) + [3]
m = dict([('p', 1), ('q', 2)])
n: int = 5
n *= 2
"""


def test_values_are_what_python_computes():
    text = "range_like = [1, 2, 3]\n" + PLAIN
    by_python = {}
    exec(text, by_python)
    del by_python["__builtins__"], by_python["__annotations__"]
    assert read(text, "my.py") == by_python


@given(st.recursive(st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text() | st.floats(allow_nan=False, allow_infinity=False), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20))  # fmt: skip
def test_every_literal_comes_back(value):
    assert read(f"x = {value!r}", "my.py") == {"x": value}


def test_what_is_imported_or_called_stays_a_symbol():
    names = read(
        "import torch\nimport torch.nn as nn\nfrom peft import LoraConfig as Lora\n"
        "x = torch.float16\ny = nn.Linear\nz = dict(type=Lora, device=torch.device('cpu', index=1))\n",
        "my.py",
    )
    assert names == {
        "x": Symbol("torch.float16"),
        "y": Symbol("torch.nn.Linear"),
        "z": {"type": Symbol("peft.LoraConfig"), "device": Call(Symbol("torch.device"), ("cpu",), {"index": 1})},
    }
    assert names["z"]["type"].last == "LoraConfig"


def test_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = read("import os\nx = os.system('touch ran')\ny = __file__\ndef f():\n    os.remove('/')\n", "my.py")
    assert names["x"] == Call(Symbol("os.system"), ("touch ran",))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ny = z", "my.py:2: the name z is not set before this line"),
        ("for i in [1]:\n    x = i", "my.py:1: a `for` statement; configs are read, not run: write the values out"),
        ("x = [i for i in [1]]", "my.py:1: a `list comprehension`; configs are read, not run: write the value out"),
        ("x = lambda: 1", "my.py:1: a `lambda`; configs are read, not run: write the value out"),
        ("from a import *", "my.py:1: `import *` says nothing about the names it brings; import them by name"),
        ("from m import read_base\nwith read_base():\n    from .b import x", "my.py:2: builds on another config"),
        ("import os\nif os.cpu_count() > 2:\n    x = 1", "my.py:2: a condition that depends on os.cpu_count(...)"),
        ("import torch\nx = torch.x + 1", "my.py:2: depends on torch.x, which is not run"),
        ("x = 'a' + 1", "my.py:1: `'a' + 1` cannot be computed:"),
        ("x = 1 / 0", "my.py:1: `1 / 0` cannot be computed: division by zero"),
        ("x = {'a': 1}['b']", "my.py:1: there is no part 'b'"),
        ("x = (", "my.py:1: not Python:"),
        ("x = 'a\x00b'", "my.py"),
        ("a, b = 1, 2, 3", "my.py:1: 2 names for a value that has not as many parts"),
        ("x = y = [1]\ny.z = 2", "my.py:2: sets an attribute; only names and parts of dicts can be set"),
        ("x = dict(**[1])", "my.py:1: `**` before something that is no dict"),
    ],
)  # fmt: skip
def test_what_cannot_be_known_is_refused_with_its_line(text, said):
    assert complaint(text).startswith(said)


@pytest.mark.parametrize(
    "text",
    [
        "x = 9 ** 9 ** 9",
        "x = 10 ** 30",
        "x = 'a' * 10 ** 9",
        "x = [0] * 10 ** 9",
        "x = 'abc'\n" + "x = x + x\n" * 40,
        "x = " + "(" * 5000 + ")" * 5000,
        "x = " + "-" * 50_000 + "1",
        "x = [1]\n" + "x = [x, x]\n" * 40,
        "x = [1]\nx[0] = x",
        "x = 1 #" + "a" * 2_000_000,
        "x = [" + "1," * 200_000 + "]",
    ],
)
def test_bombs_are_refused(text):
    assert complaint(text).startswith("my.py")
