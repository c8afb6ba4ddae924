"""YAML text to tree: what plain scalars mean in YAML 1.2, and what is refused."""

import pytest

from fastft.config import tree
from fastft.errors import ConfigError


def read(text):
    return tree.plain(tree.parse(text, lambda line: f"f.yaml:{line}"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        # The examples of YAML 1.2.2, section 10.3.2, and what PyYAML (1.1) gets wrong.
        ("1e-5", 1e-5),
        ("2.5e-4", 2.5e-4),
        ("12e03", 12000.0),
        ("-2E+05", -200000.0),
        ("0.", 0.0),
        (".5", 0.5),
        ("-0", 0),
        ("0o7", 7),
        ("0x3A", 58),
        ("-19", -19),
        ("0123", 123),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("on", "on"),
        ("yes", "yes"),
        ("12:30:45", "12:30:45"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("tRue", "tRue"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_a_scalar_means_what_yaml_1_2_says(text, value):
    got = read(f"a: {text}")["a"]
    assert got == value
    assert type(got) is type(value)


def test_infinity_and_nan_are_read_as_such():
    assert read("[.inf, -.INF]") == [float("inf"), float("-inf")]
    assert read("a: .nan")["a"] != read("a: .nan")["a"]


def test_every_value_knows_its_line_and_its_text():
    parsed = tree.parse("a:\n  b: 0x10\nc:\n  - 1\n  - x: 2.50\n", lambda line: f"f.yaml:{line}")
    found = {path: (leaf.text, leaf.origin) for path, leaf in tree.leaves(parsed)}
    assert found == {
        ("a", "b"): ("0x10", "f.yaml:2"),
        ("c", "0"): ("1", "f.yaml:4"),
        ("c", "1", "x"): ("2.50", "f.yaml:5"),
    }


def test_aliases_unfold():
    assert read("a: &x {k: [1, 2]}\nb: *x\n") == {"a": {"k": [1, 2]}, "b": {"k": [1, 2]}}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a: a second time; the first is at f.yaml:1"),
        ("a: !!python/object/apply:os.system [ls]", 1, "the tag"),
        ("a: 1\nb: !!str 5", 2, "the tag"),
        ("!x\na: 1", 1, "the tag"),
        ("%YAML 1.1\n---\na: 1\n", 2, "directives"),
        ("a: 1\n---\nb: 2\n", 2, "a second YAML document"),
        ("a: &x [*x]", 1, "stands for nothing"),
        ("? [a, b]\n: 1\n", 1, "a key must be a plain word"),
        ("a: 1\n b: 2\n", 2, "not YAML"),
        ("a:\n\t- 1\n", 2, "not YAML"),
        ("a: [1, 2\n", 2, "not YAML"),
        ("a: \x07\n", 1, "not YAML"),
        ("[" * 40 + "]" * 40, 1, "deeper than 32"),
        ("a: " + "x" * 1_000_001, 1, "too large"),
    ],
)
def test_what_is_no_plain_document_is_refused_with_its_line(text, line, words):
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert str(caught.value).startswith(f"f.yaml:{line}: ")
    assert words in str(caught.value)


def test_an_alias_bomb_is_refused_before_it_unfolds():
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(ConfigError, match="unfolds to more than 10000 values"):
        read("\n".join(layers))


def test_merging_joins_mappings_and_replaces_the_rest():
    low = tree.parse("a: {x: 1, y: 2}\nl: [1, 2]\n", lambda line: f"low:{line}")
    high = tree.parse("a: {y: 3, z: 4}\nl: [5]\n", lambda line: f"high:{line}")
    merged = tree.merge(low, high)
    assert tree.plain(merged) == {"a": {"x": 1, "y": 3, "z": 4}, "l": [5]}
    assert {path: leaf.origin for path, leaf in tree.leaves(merged)} == {
        ("a", "x"): "low:1",
        ("a", "y"): "high:1",
        ("a", "z"): "high:1",
        ("l", "0"): "high:2",
    }
