"""Broken and hostile data sets."""

import gzip
import io
import json
from collections.abc import Callable
from typing import Any

from hostile.case import CHECK, TRAIN, Case, control
from hostile.place import Place

GOOD = '{"instruction": "How many?", "output": "three"}\n'


def _file(name: str, content: bytes | str | Callable[[], bytes], **changes: Any) -> Callable[[Place], object]:
    def lay(place: Place) -> None:
        place.chatty()
        place.write(name, content() if callable(content) else content)
        place.config(data__train=[{"source": name}], **changes)

    return lay


def _gzip(content: bytes) -> bytes:
    return gzip.compress(content, 1)


def _bomb(start: bytes, filling: bytes = b"a") -> bytes:
    """400 MB in 400 KB: members of a gzip file may follow one another."""
    return _gzip(start) + _gzip(filling * 10_000_000) * 40


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def _good_parquet() -> bytes:
    return _parquet([{"instruction": "How many?", "output": "three"}] * 3)


def _spoiled_parquet(start: int, count: int) -> bytes:
    raw = bytearray(_good_parquet())
    raw[start : start + count or None] = b"\xff" * count
    return bytes(raw)


_DIALOGUE = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


def _called(arguments: str) -> dict[str, Any]:
    """A turn that calls a tool; the arguments are text that must be JSON."""
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


def _jsonl_cases() -> list[Case]:
    rows: dict[str, tuple[bytes | str, tuple[str, ...]]] = {
        "empty": ("", ()),
        "blank": ("\n\n\n", ()),
        "not_json": (GOOD + "hello\n", ("rows.jsonl:2", "JSON")),
        "cut": (GOOD + '{"instruction": "x', ("rows.jsonl:2", "JSON")),
        "number": (GOOD + "5\n", ("rows.jsonl",)),
        "text": (GOOD + '"abc"\n', ("rows.jsonl",)),
        "null": (GOOD + "null\n", ("rows.jsonl",)),
        "deep": (GOOD + "[" * 100_000 + "]" * 100_000 + "\n", ("rows.jsonl:2", "deep")),
        "deep_maps": (GOOD + '{"a":' * 100_000 + "1" + "}" * 100_000 + "\n", ("rows.jsonl:2", "deep")),
        "deep_unclosed": ("[" * 1_000_000, ("rows.jsonl",)),
        "huge_number": (GOOD + '{"instruction":' + "9" * 10_000 + "}\n", ("rows.jsonl",)),
        "latin1": (GOOD.encode() + b'{"instruction":"\xe9"}\n', ("rows.jsonl:2", "UTF-8")),
        "utf16": (GOOD.encode("utf-16"), ("rows.jsonl", "UTF-8")),
        "nuls": (b"\0" * 1000, ("rows.jsonl",)),
        "html": ("<!DOCTYPE html><html></html>", ("rows.jsonl",)),
        "lfs": ("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", ("rows.jsonl",)),
        "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94.", ("rows.jsonl",)),
        "surrogate": (GOOD + '{"instruction":"\\ud800","output":"x"}\n', ("rows.jsonl",)),
        "surrogate_key": (GOOD + '{"\\udfff":"x"}\n', ("rows.jsonl",)),
        "unknown_columns": ('{"foo":"a","bar":"b"}\n', ("rows.jsonl",)),
        "instruction_number": ('{"instruction":5,"output":"x"}\n', ("rows.jsonl",)),
        "output_list": ('{"instruction":"a","output":["x"]}\n', ("rows.jsonl",)),
        "output_missing": ('{"instruction":"a"}\n', ("rows.jsonl",)),
        "messages_text": ('{"messages":"x"}\n', ("rows.jsonl",)),
        "messages_empty": ('{"messages":[]}\n', ("rows.jsonl",)),
        "messages_numbers": ('{"messages":[1,2]}\n', ("rows.jsonl",)),
        "message_no_role": ('{"messages":[{"content":"x"}]}\n', ("rows.jsonl",)),
        "message_role_unknown": ('{"messages":[{"role":"root\\u001b[31m","content":"x"}]}\n', ("rows.jsonl",)),
        "message_role_dict": ('{"messages":[{"role":{},"content":"x"}]}\n', ("rows.jsonl",)),
        "message_content_number": ('{"messages":[{"role":"user","content":7},{"role":"assistant","content":"x"}]}\n', ("rows.jsonl",)),
        "message_tool_calls_text": ('{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"","tool_calls":"x"}]}\n',
                                    ("rows.jsonl",)),
        "tools_broken": ('{"tools":"{","messages":[{"role":"user","content":"x"},{"role":"assistant","content":"y"}]}\n',
                         ("rows.jsonl",)),
        "tools_deep": (json.dumps({"tools": "[" * 100_000, "messages": _DIALOGUE}) + "\n", ("rows.jsonl", "nested too deep")),
        "tools_huge_number": (json.dumps({"tools": "9" * 10_000, "messages": _DIALOGUE}) + "\n", ("rows.jsonl", "digits")),
        "arguments_deep": (json.dumps({"messages": [*_DIALOGUE, _called("[" * 100_000)]}) + "\n",
                           ("rows.jsonl", "nested too deep")),
        "arguments_huge_number": (json.dumps({"messages": [*_DIALOGUE, _called("9" * 10_000)]}) + "\n", ("rows.jsonl", "digits")),
        "function_call_deep": (json.dumps({"conversations": [{"from": "human", "value": "x"},
                               {"from": "function_call", "value": '{"a":' * 50_000}]}) + "\n", ("rows.jsonl", "nested too deep")),
        "only_user": ('{"messages":[{"role":"user","content":"x"}]}\n', ("",)),
        "private_characters": ('{"instruction":"\\ue0f0","output":"\\ue0f1"}\n', ("rows.jsonl",)),
        "instruction_nul_and_codes": ('{"instruction":"\\u0000\\u001b[2J"}\n', ("rows.jsonl",)),
        "byte_order_mark_in_the_middle": (GOOD + "\ufeff" + GOOD, ("rows.jsonl:2",)),
    }  # fmt: skip
    return [
        Case(f"jsonl_{name}", _file("rows.jsonl", text), CHECK, says, is_result=True)
        for name, (text, says) in rows.items()
    ]


def _json_cases() -> list[Case]:
    texts: dict[str, bytes | str] = {
        "empty": "",
        "unclosed": "[" + GOOD,
        "no_comma": "[" + GOOD + GOOD + "]",
        "extra": "[" + GOOD + "] hello",
        "object_of_two_lists": '{"a":[],"b":[]}',
        "object_of_nothing": "{}",
        "number": "5",
        "deep": "[" * 100_000,
        "deep_element": "[" + GOOD + "," + "[" * 100_000 + "]",
        "nan": "NaN",
        "nuls": "\0" * 100,
        "huge_number": "[" + "9" * 10_000 + "]",
        "empty_list": "[]",
    }
    return [
        Case(
            f"json_{name}",
            _file("rows.json", text),
            CHECK,
            ("rows.json" if name != "empty_list" else "",),
            is_result=True,
        )
        for name, text in texts.items()
    ]


def _csv_cases() -> list[Case]:
    texts: dict[str, bytes | str] = {
        "empty": "",
        "only_a_header": "instruction,output\n",
        "nul": b"instruction,output\na\0b,c\n",
        "nul_in_the_header": b"instr\0uction,output\na,c\n",
        "ragged": "instruction,output\na\n",
        "too_many_cells": "instruction,output\na,b,c\n",
        "unclosed_quote": 'instruction,output\n"a,b\n',
        "quote_in_the_middle": 'instruction,output\na"b"c,"d"e\n',
        "latin1": b"instruction,output\n\xe9,x\n",
        "columns_twice": "instruction,instruction\na,b\n",
        "no_names": ",\na,b\n",
        "binary": bytes(range(256)),
        "carriage_returns": b"instruction,output\ra,b\r",
    }
    return [Case(f"csv_{name}", _file("rows.csv", text), CHECK, ("",), is_result=True) for name, text in texts.items()]


def _packed_cases() -> list[Case]:
    return [
        Case("gzip_not", _file("rows.jsonl.gz", GOOD), CHECK, ("rows.jsonl.gz", "gzip"), is_result=True),
        Case("gzip_cut", _file("rows.jsonl.gz", _gzip(GOOD.encode() * 1000)[:-20]), CHECK, ("rows.jsonl.gz", "gzip"),
             is_result=True),
        Case("gzip_wrong_sum", _file("rows.jsonl.gz", _gzip(GOOD.encode())[:-8] + b"\0" * 8), CHECK, ("rows.jsonl.gz", "gzip"),
             is_result=True),
        Case("gzip_empty", _file("rows.jsonl.gz", b""), CHECK, ("",), is_result=True),
        Case("gzip_in_gzip", _file("rows.jsonl.gz", _gzip(_gzip(GOOD.encode()))), CHECK, ("rows.jsonl.gz",), is_result=True),
        Case("gzip_bomb_blanks", _file("rows.jsonl.gz", lambda: _bomb(b"", b" ")), CHECK, ("rows.jsonl.gz",), is_result=True),
        Case("gzip_bomb_line", _file("rows.jsonl.gz", lambda: _bomb(b'{"instruction":"')), CHECK, ("rows.jsonl.gz",), is_result=True),
        Case("gzip_bomb_json", _file("rows.json.gz", lambda: _bomb(b'{"instruction":"')), CHECK, ("rows.json.gz",), is_result=True),
        Case("gzip_bomb_csv", _file("rows.csv.gz", lambda: _bomb(b'a,b\n"')), CHECK, ("rows.csv.gz",), is_result=True),
        Case("gzip_bomb_txt", _file("rows.txt.gz", lambda: _bomb(b""), task="pretrain"), CHECK, ("rows.txt.gz",),
             is_result=True),
        Case("parquet_empty", _file("rows.parquet", b""), CHECK, ("rows.parquet",), is_result=True),
        Case("parquet_text", _file("rows.parquet", "hello"), CHECK, ("rows.parquet",), is_result=True),
        Case("parquet_cut", _file("rows.parquet", lambda: _good_parquet()[:-50]), CHECK, ("rows.parquet",), is_result=True),
        Case("parquet_head_only", _file("rows.parquet", lambda: b"PAR1" + b"\0" * 50 + b"PAR1"), CHECK, ("rows.parquet",),
             is_result=True),
        Case("parquet_long_footer", _file("rows.parquet", lambda: b"PAR1" + b"\0" * 50 + b"\xff\xff\xff\x7fPAR1"), CHECK,
             ("rows.parquet",), is_result=True),
        Case("parquet_spoiled_data", _file("rows.parquet", lambda: _spoiled_parquet(4, 60)), CHECK, ("rows.parquet",),
             is_result=True),
        Case("parquet_spoiled_footer", _file("rows.parquet", lambda: _spoiled_parquet(-120, 60)), CHECK, ("rows.parquet",),
             is_result=True),
        Case("parquet_no_rows", _file("rows.parquet", _empty_parquet), CHECK, ("",), is_result=True),
        Case("parquet_other_columns", _file("rows.parquet", lambda: _parquet([{"x": 1}])), CHECK, ("rows.parquet",),
             is_result=True),
        Case("parquet_nulls", _file("rows.parquet", lambda: _parquet([{"instruction": None, "output": None}])), CHECK,
             ("rows.parquet",), is_result=True),
        Case("parquet_bytes", _file("rows.parquet", lambda: _parquet([{"instruction": b"\xff", "output": b"\xfe"}])), CHECK,
             ("rows.parquet",), is_result=True),
        Case("parquet_bomb", _file("rows.parquet", _parquet_bomb), CHECK, ("rows.parquet",), is_result=True),
    ]  # fmt: skip


def _empty_parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table({"instruction": pa.array([], pa.string()), "output": pa.array([], pa.string())}), out)
    return out.getvalue()


def _parquet_bomb() -> bytes:
    """A cell of 100 MB, eight times, in a file of some KB."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    text = "a" * 100_000_000
    cells = pa.DictionaryArray.from_arrays([0] * 8, pa.array([text]))  # so that it is here but once
    table = pa.table({"instruction": cells, "output": pa.array(["x"] * 8)})
    pq.write_table(table, out, compression="zstd", store_schema=False)
    return out.getvalue()


def _special_cases() -> list[Case]:
    def one(
        name: str, do: Callable[[Place], object], *says: str, source: str = "rows.jsonl", words: tuple[str, ...] = CHECK
    ) -> Case:
        def lay(place: Place) -> None:
            place.chatty()
            place.rows()
            place.config(data__train=[{"source": source}])
            do(place)

        return Case(
            f"data_{name}", lay, words, says, is_result=words == CHECK, outputs=("work",) if words == TRAIN else ()
        )

    return [
        one("missing", lambda p: (p / "rows.jsonl").unlink(), "rows.jsonl"),
        one("pipe", lambda p: p.pipe("rows.jsonl"), "rows.jsonl"),
        one("device", lambda p: p.link("rows.jsonl", "/dev/zero"), "rows.jsonl"),
        one("loop", lambda p: p.link("rows.jsonl", "rows.jsonl"), "rows.jsonl"),
        one("dangling", lambda p: p.link("rows.jsonl", "nowhere"), "rows.jsonl"),
        one("sparse_jsonl", lambda p: p.sparse("rows.jsonl", 1 << 33, b'{"instruction":"'), "rows.jsonl"),
        one("sparse_nuls", lambda p: p.sparse("rows.jsonl", 1 << 40), "rows.jsonl"),
        one("sparse_json", lambda p: p.sparse("rows.json", 1 << 33, b'[{"instruction":"'), "rows.json", source="rows.json"),
        one("sparse_json_object", lambda p: p.sparse("rows.json", 1 << 33, b'{"a":'), "rows.json", source="rows.json"),
        one("sparse_csv", lambda p: p.sparse("rows.csv", 1 << 33, b'instruction,output\n"'), "rows.csv", source="rows.csv"),
        one("sparse_txt", lambda p: p.sparse("rows.txt", 1 << 33, b"hello"), "rows.txt", source="rows.txt"),
        one("sparse_parquet", lambda p: p.sparse("rows.parquet", 1 << 33, b"PAR1"), "rows.parquet", source="rows.parquet"),
        one("folder_empty", lambda p: (p / "d").mkdir(), "no file of rows", source="d"),
        one("folder_loop", lambda p: ((p / "d").mkdir(), p.link("d/d", ".")), "no file of rows", source="d"),
        one("folder_of_pipes", lambda p: ((p / "d").mkdir(), p.pipe("d/a.jsonl")), "d", source="d"),
        one("kind_unknown", lambda p: p.write("rows.exe", b"MZ"), "rows.exe", source="rows.exe"),
        one("source_climbs", lambda _: None, "passwd", source="../../../../../../etc/passwd"),
        one("source_nul", lambda _: None, "a", source="a\0b.jsonl"),
        one("source_codes", lambda _: None, "x", source="./\x1b[31mx.jsonl"),
        one("source_long", lambda _: None, "xxx", source="x" * 5000 + ".jsonl"),
        one("pipe_train", lambda p: p.pipe("rows.jsonl"), "rows.jsonl", words=TRAIN),
        one("broken_train", lambda p: p.write("rows.jsonl", GOOD + "hello\n"), "rows.jsonl:2", words=TRAIN),
        one("all_too_long_train", lambda p: p.write("rows.jsonl", ""), "rows", words=TRAIN),
    ]  # fmt: skip


def cases() -> list[Case]:
    """All of them."""
    good = json.dumps([{"instruction": "How many?", "output": "three"}] * 3)
    return [
        *_jsonl_cases(), *_json_cases(), *_csv_cases(), *_packed_cases(), *_special_cases(),
        control("good_jsonl", _file("rows.jsonl", GOOD * 3), CHECK),
        control("good_json", _file("rows.json", good), CHECK),
        control("good_csv", _file("rows.csv", "instruction,output\nHow many?,three\nWho?,me\n"), CHECK),
        control("good_gzip", _file("rows.jsonl.gz", _gzip(GOOD.encode() * 3)), CHECK),
        control("good_parquet", _file("rows.parquet", _good_parquet), CHECK),
    ]  # fmt: skip
