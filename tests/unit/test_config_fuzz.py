"""Whatever stands in a file or on the command line: a config or an error for the user, never another exception."""

import contextlib

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastft.config import fields, recipes
from fastft.config.load import load
from fastft.errors import FastftError

KEYS = st.sampled_from(fields.dotted_keys())
MARKS = st.sampled_from(
    [
        "&a",
        "*a",
        "[",
        "]",
        "{",
        "}",
        ": ",
        "- ",
        "\n",
        "\n  ",
        "'",
        '"',
        "|",
        "|-\n  x",
        ">",
        "!!str ",
        "?",
        "%",
        "#",
        ", ",
    ]
)
VALUES = st.text(max_size=8) | st.sampled_from(
    ["null", "[1, 2]", "{a: 1}", "1e5", "true", "[]", "{}", "&a [*a]", "- x", '"', "a: b", "[{source: x}]", "qlora"]
)
INSIDE = st.tuples(KEYS, st.sampled_from(["", ".0", ".1", ".x"])).map("".join)
quick = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@quick
@given(st.lists(st.text(max_size=8) | MARKS | KEYS | VALUES, max_size=14).map("".join))
def test_any_file(tmp_path, text):
    path = tmp_path / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="replace", newline="")
    with contextlib.suppress(FastftError):
        load(str(path))


@quick
@given(st.lists(st.tuples(INSIDE | st.text(max_size=6), VALUES).map("=".join), max_size=4))
def test_any_overrides(words):
    with contextlib.suppress(FastftError):
        load("demo", words)


@settings(quick, max_examples=30)
@given(st.text(max_size=30))
def test_any_name(name):
    recipes.search(name)
    with contextlib.suppress(FastftError):
        load(name)
