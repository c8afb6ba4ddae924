"""fastft.data.sources: every kind of file gives the same rows, and a broken file says where it is broken."""

import csv
import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastft.data import sources
from fastft.errors import DataError, FileError

ROWS = [
    {"instruction": "Say hi", "output": 'Hi,\n"you"'},
    {"instruction": "\u8bf4\u4f60\u597d", "output": "\u4f60\u597d\u2028\uff01"},
]


def written(folder: Path, name: str) -> Path:
    """A file holding ROWS, of the kind that its name says."""
    path = folder / name
    kind = sources.kind(path)
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
        return path
    if kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, ["instruction", "output"])
            writer.writeheader()
            writer.writerows(ROWS)
        raw = path.read_bytes()
    elif kind == "jsonl":
        raw = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    else:
        raw = json.dumps(ROWS, ensure_ascii=False, indent=1).encode()
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return path


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.json.gz", "a.jsonl.gz", "a.csv.gz", "A.JSON"]
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = list(sources.rows(written(tmp_path, name)))
    assert [row.value for row in rows] == ROWS
    assert rows[-1].share == 1.0


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, name: str, mark: bytes) -> None:
    path = written(tmp_path, name)
    path.write_bytes(mark + path.read_bytes())
    assert [row.value for row in sources.rows(path)] == ROWS


def test_rows_know_their_line_or_number(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "a"}\n\n{"text": "b"}\n', encoding="utf-8")
    assert [str(row.where) for row in sources.rows(lines)] == [f"{lines}:1", f"{lines}:3"]
    array = tmp_path / "a.json"
    array.write_text('[{"text": "a"}, {"text": "b"}]', encoding="utf-8")
    assert [str(row.where) for row in sources.rows(array)] == [f"{array}, row 1", f"{array}, row 2"]
    table = tmp_path / "a.csv"
    table.write_text('text\n"one\ntwo"\nthree\n', encoding="utf-8")
    assert [str(row.where) for row in sources.rows(table)] == [f"{table}:3", f"{table}:4"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}', [{"text": "a"}, {"text": "b"}]),
        (
            '{"conversations": [{"from": "human", "value": "a"}]}',
            [{"conversations": [{"from": "human", "value": "a"}]}],
        ),
        ('[[{"role": "user"}], [{"role": "user"}]]', [[{"role": "user"}], [{"role": "user"}]]),
        ('{"text": "a"}\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
        ("[]", []),
    ],
)
def test_shapes_of_json(tmp_path: Path, text: str, values: list[object]) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    assert [row.value for row in sources.rows(path)] == values


ARRAYS = st.lists(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=8,
)


@given(values=ARRAYS, indent=st.sampled_from([None, 0, 2]), ascii_only=st.booleans(), chunk=st.integers(1, 64))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_array_read_in_pieces_is_the_array(
    tmp_path: Path, values: list[object], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    """Whatever the size of the pieces: a value, a number, a character may lie across their border."""
    path = tmp_path / "a.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    path.write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "CHUNK_CHARACTERS", chunk)
        rows = list(sources.rows(path))
    assert [row.value for row in rows] == values
    assert [row.where.number for row in rows] == list(range(1, len(values) + 1))


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    "text",
    ['[{"a": 1},\n {"b": 2}\n {"c": 3}]', '[{"a": 1},\n {"b": }]', '[{"a": 1}', "[1, 2", "[1]\n\n  x", "[1,]", "[,1]"],
)
def test_a_broken_array_is_told_where_json_loads_tells_it(
    tmp_path: Path, text: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sources, "CHUNK_CHARACTERS", chunk)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(DataError) as caught:
        list(sources.rows(path))
    assert f"a.json:{expected.value.lineno}: broken JSON" in str(caught.value)
    assert f"at column {expected.value.colno}" in str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.jsonl"])
def test_a_large_file_is_not_held_in_memory(tmp_path: Path, name: str) -> None:
    import tracemalloc

    path = tmp_path / name
    row = {"text": "x" * 1000}
    lines = {"a.json": json.dumps([row] * 30_000), "a.jsonl": (json.dumps(row) + "\n") * 30_000}
    path.write_text(lines.get(name, "text\n" + ("x" * 1000 + "\n") * 30_000), encoding="utf-8")
    tracemalloc.start()
    try:
        assert sum(len(found.value["text"]) for found in sources.rows(path)) == 30_000_000
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10_000_000  # of 30 MB; pieces of 1 MB, their copies, and one row


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    assert [row.value for row in sources.rows(path)] == [{"text": "one\n\ntwo\n"}]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.json", b'[{"text": "a"},\n {"text": b}]', r"a\.json:2: broken JSON, Expecting value at column 11"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: broken JSON"),
        ("a.json", b'{"text": "a"}\n{"text": \n', r"a\.json:2: broken JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl:2: byte 0xff is not UTF-8"),
        ("a.txt", b"one\ntwo\nth\xe9\n", r"a\.txt:3: byte 0xe9 is not UTF-8"),
        ("a.json", b'{"one": [1], "two": [2]}', r"2 lists \('one', 'two'\)"),
        ("a.json", b"7", "holds a int"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"a\.csv:3: 3 cells, but the header names 2"),
        ("a.csv", b'a,b\n"1"x,2\n', r"a\.csv:2: broken csv"),
        ("a.csv", b"", "the file is empty"),
        ("a.json.gz", b"no gzip", "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-20], "not a whole gzip file"),
        ("a.parquet", b"no parquet at all", "broken parquet"),
    ],
)
def test_a_broken_file_says_where(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        list(sources.rows(tmp_path / name))


def test_a_folder_is_read_in_order_and_below(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/c.json", "a/b.txt.gz", "README.md", ".hidden.json", ".git/a.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(file.relative_to(tmp_path)) for file in sources.files(tmp_path)] == [
        "a/b.txt.gz",
        "a/c.json",
        "b.jsonl",
    ]


def test_what_is_not_there_or_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="no such file or folder"):
        sources.files(tmp_path / "a.json")
    with pytest.raises(DataError, match="no file of rows in this folder"):
        sources.files(tmp_path)
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(DataError, match=r"unknown kind of file; known are json, jsonl, parquet, csv, txt"):
        sources.files(tmp_path / "a.xlsx")


@dataclass(frozen=True)
class HubPlace:
    id: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of datasets and what it imports
def test_a_hub_data_set_is_read_through_datasets(tmp_path: Path) -> None:
    """A folder is a data set for `load_dataset` too: the same road, without a hub."""
    written(tmp_path, "train.jsonl")
    place = HubPlace(str(tmp_path))
    rows = list(sources.table_rows(sources.hub_table(place), sources.hub_name(place)))
    assert [row.value for row in rows] == ROWS
    assert str(rows[1].where).endswith("/train, row 2")
