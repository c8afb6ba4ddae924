"""Broken and hostile weights: safetensors headers and files, indices, whole folders, the tensors in them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tiny_llama
from hostile.case import DEQUANTIZE, MERGE, QUANTIZE, SPLIT, VERIFY, Case, control
from hostile.place import Place, changed, entry, safetensors

WEIGHTS = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _good() -> bytes:
    return safetensors({"a": entry()}, b"\0" * 4)


def _deep(depth: int) -> str:
    return '{"a":' + "[" * depth + "]" * depth + "}"


# What stands in a file that should be safetensors, and what the error says about it.
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "0 bytes"),
    "three_bytes": (lambda: b"abc", "3 bytes"),
    "only_a_length": (lambda: b"\x10\0\0\0\0\0\0\0", "cut off"),
    "length_zero": (lambda: safetensors(b"", b"", 0), "header"),
    "length_one": (lambda: safetensors(b"{", b"", 1), "header"),
    "length_huge": (lambda: safetensors(b"{}", b"", 2**63), "header"),
    "length_all_ones": (lambda: safetensors(b"{}", b"", 2**64 - 1), "header"),
    "length_100_mb": (lambda: safetensors(b"{}", b"", 100_000_000), "header"),
    "length_past_the_end": (lambda: safetensors(b"{}", b"", 3), "cut off"),
    "cut_in_the_header": (lambda: _good()[:20], "cut off"),
    "cut_in_the_data": (lambda: _good()[:-1], "cut off"),
    "bytes_behind_the_data": (lambda: _good() + b"x", "belong to nothing"),
    "not_json": (lambda: safetensors(b"{hello there}"), "header is broken"),
    "json_of_zeros": (lambda: safetensors(b"\0" * 64), "header"),
    "a_list": (lambda: safetensors(b"[1,2,3]"), "no JSON object"),
    "not_utf8": (lambda: safetensors(b'{"\xff\xfe":{}}'), "header is broken"),
    "utf16": (lambda: safetensors('{"a":1}'.encode("utf-16")), "header"),
    "byte_order_mark": (lambda: safetensors(b"\xef\xbb\xbf{}"), "no JSON object"),
    "leading_blank": (lambda: safetensors(b"  {}"), "no JSON object"),
    "deep": (lambda: safetensors(_deep(100_000)), "header is broken"),
    "deep_metadata": (lambda: safetensors('{"__metadata__":' + '{"a":' * 10_000 + "1" + "}" * 10_001), "header is broken"),
    "tensor_twice": (
        lambda: safetensors('{"a":%s,"a":%s}' % ((json.dumps(entry()),) * 2), b"\0" * 4),
        "stands twice",
    ),
    "metadata_twice": (lambda: safetensors('{"__metadata__":{"x":"1","x":"2"}}'), "stands twice"),
    "metadata_a_number": (lambda: safetensors('{"__metadata__":{"x":1}}'), "expected a string"),
    "metadata_a_list": (lambda: safetensors('{"__metadata__":[]}'), "header is broken"),
    "two_documents": (lambda: safetensors("{} {}"), "header is broken"),
    "overlap": (lambda: safetensors({"a": entry(), "b": entry(start=2, end=6)}, b"\0" * 6), "overlaps"),
    "same_place": (lambda: safetensors({"a": entry(), "b": entry()}, b"\0" * 4), "overlaps"),
    "hole": (lambda: safetensors({"a": entry(start=8, end=12)}, b"\0" * 12), "a hole of 8 bytes"),
    "out_of_range": (lambda: safetensors({"a": entry(shape=[1000], end=4000)}, b"\0" * 4), "cut off"),
    "end_before_start": (lambda: safetensors({"a": entry(start=4, end=0)}, b"\0" * 4), "does not fit"),
    "offsets_overflow": (
        lambda: safetensors({"a": entry("U8", start=2**64 - 2, end=2**64 - 1)}, b"\0" * 4),
        "starts at byte",
    ),
    "offset_too_large_for_64_bits": (lambda: safetensors({"a": entry(start=2**70, end=2**71)}), "header is broken"),
    "shape_overflows": (lambda: safetensors({"a": entry(shape=[2**32, 2**32])}, b"\0" * 4), "does not fit"),
    "shape_negative": (lambda: safetensors({"a": entry(shape=[-1])}, b"\0" * 4), "'a'"),
    "shape_a_fraction": (lambda: safetensors({"a": entry(shape=[1.5])}, b"\0" * 4), "'a'"),
    "shape_text": (lambda: safetensors({"a": entry(shape=["1"])}, b"\0" * 4), "'a'"),
    "shape_too_small": (lambda: safetensors({"a": entry(shape=[2])}, b"\0" * 4), "does not fit"),
    "nine_dimensions": (lambda: safetensors({"a": entry(shape=[1] * 9)}, b"\0" * 4), "9 dimensions"),
    "a_thousand_dimensions": (lambda: safetensors({"a": entry(shape=[1] * 1000)}, b"\0" * 4), "1000 dimensions"),
    "dtype_unknown": (lambda: safetensors({"a": entry("F33")}, b"\0" * 4), "F33"),
    "dtype_lower_case": (lambda: safetensors({"a": entry("f32")}, b"\0" * 4), "f32"),
    "dtype_null": (lambda: safetensors({"a": entry() | {"dtype": None}}, b"\0" * 4), "'a'"),
    "no_offsets": (lambda: safetensors({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4), "missing field"),
    "three_offsets": (lambda: safetensors({"a": entry() | {"data_offsets": [0, 2, 4]}}, b"\0" * 4), "'a'"),
    "unknown_field": (lambda: safetensors({"a": entry() | {"file": "/etc/passwd"}}, b"\0" * 4), "unknown field"),
    "name_empty": (lambda: safetensors({"": entry()}, b"\0" * 4), "may not be empty"),
    "name_with_newline": (lambda: safetensors({"a\nb": entry()}, b"\0" * 4), "control characters"),
    "name_with_escape_codes": (lambda: safetensors({"\x1b[2J\x1b]0;x\x07": entry()}, b"\0" * 4), "control characters"),
    "name_with_nul": (lambda: safetensors({"a\0b": entry()}, b"\0" * 4), "control characters"),
    "name_of_a_million": (lambda: safetensors({"x" * 1_000_000: entry()}, b"\0" * 4), "1000000 characters"),
    "name_a_lone_surrogate": (lambda: safetensors('{"\\ud800":' + json.dumps(entry()) + "}", b"\0" * 4), "header is broken"),
    "lfs_pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "LFS"),
    "html": (lambda: b"<!DOCTYPE html><html><body>Not found</body></html>", "HTML"),
    "html_upper_case": (lambda: b"<HTML><HEAD><TITLE>404</TITLE></HEAD></HTML>", "HTML"),
    "json_error_page": (lambda: b'{"error":"Repository not found"}', "JSON"),
    "xml": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
    "pickle": (lambda: b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94.", "pickle"),
    "pickle_5": (lambda: b"\x80\x05\x95\x10\0\0\0\0\0\0\0}\x94.", "pickle"),
    "zip": (lambda: b"PK\x03\x04" + b"\0" * 60, "zip"),
    "gguf": (lambda: b"GGUF\x03\0\0\0" + b"\0" * 60, "GGUF"),
    "gzip": (lambda: b"\x1f\x8b\x08" + b"\0" * 60, "gzip"),
    "text": (lambda: b"hello, these are my weights, please read them\n", "no safetensors file"),
}  # fmt: skip


def _in_base(make: Callable[[], bytes]) -> Callable[[Place], object]:
    def lay(place: Place) -> None:
        place.base()
        place.adapter()
        place.write(f"base/{WEIGHTS}", make())

    return lay


def _in_adapter(make: Callable[[], bytes]) -> Callable[[Place], object]:
    def lay(place: Place) -> None:
        place.base()
        place.adapter()
        place.write(f"adapter/{ADAPTER}", make())

    return lay


def _in_shard(make: Callable[[], bytes]) -> Callable[[Place], object]:
    def lay(place: Place) -> None:
        place.base(shards=3)
        place.adapter()
        place.write("base/model-00002-of-00003.safetensors", make())

    return lay


def _in_merged(make: Callable[[], bytes]) -> Callable[[Place], object]:
    def lay(place: Place) -> None:
        place.base()
        place.adapter()
        place.base("merged")
        place.write(f"merged/{WEIGHTS}", make())

    return lay


def _quoted(says: str) -> str:
    return says.replace("'", "")


def file_cases() -> list[Case]:
    """Each wrong file as a base, as an adapter, and in turn as a shard or a merged model under another command."""
    cases = []
    for number, (name, (make, says)) in enumerate(FILES.items()):
        said = _quoted(says)
        cases.append(Case(f"base_{name}", _in_base(make), MERGE, (WEIGHTS, said)))
        cases.append(Case(f"adapter_{name}", _in_adapter(make), MERGE, (ADAPTER, said)))
        words, lay, file = (
            (QUANTIZE, _in_shard, "model-00002-of-00003.safetensors"),
            (SPLIT, _in_base, WEIGHTS),
            (VERIFY, _in_merged, WEIGHTS),
            (DEQUANTIZE, _in_base, WEIGHTS),
        )[number % 4]
        cases.append(Case(f"{words[1]}_{name}", lay(make), words, (file, said)))
    return cases


def _base(change: Callable[[Place], object]) -> Callable[[Place], object]:
    """A good base and adapter, then a change."""

    def lay(place: Place) -> None:
        place.base()
        place.adapter()
        change(place)

    return lay


def _shards(change: Callable[[Place], object]) -> Callable[[Place], object]:
    def lay(place: Place) -> None:
        place.base(shards=3)
        place.adapter()
        change(place)

    return lay


INDEX = "model.safetensors.index.json"


def _mapped(place: Place, **changes: Any) -> None:
    """Change where the index says that tensors lie."""
    path = place / f"base/{INDEX}"
    index = json.loads(path.read_text())
    for key, file in changes.items():
        name = key.replace("__", ".")
        if file is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = file
    path.write_text(json.dumps(index))


def _q(file: Any) -> Callable[[Place], object]:
    return _shards(lambda place: _mapped(place, **{Q_PROJ.replace(".", "__"): file}))


SHARD = "model-00002-of-00003.safetensors"


def _index_text(text: bytes | str) -> Callable[[Place], object]:
    return _shards(lambda place: place.write(f"base/{INDEX}", text))


def index_cases() -> list[Case]:
    """The index of a sharded model."""
    far = "x" * 5000
    return [
        Case("index_climbs_out", _q("../secret.safetensors"), MERGE, (INDEX, Q_PROJ, "../secret")),
        Case("index_absolute", _q("/etc/passwd"), MERGE, (INDEX, Q_PROJ, "/etc/passwd")),
        Case("index_into_a_folder", _q("sub/model.safetensors"), QUANTIZE, (INDEX, Q_PROJ, "sub/model")),
        Case("index_dot", _q("."), SPLIT, (INDEX, Q_PROJ)),
        Case("index_empty_name", _q(""), MERGE, (INDEX, Q_PROJ)),
        Case("index_number", _q(5), MERGE, (INDEX, Q_PROJ)),
        Case("index_null_file", _q([]), MERGE, (INDEX, Q_PROJ)),
        Case("index_nul_in_name", _q("a\0b.safetensors"), MERGE, (INDEX, Q_PROJ)),
        Case("index_newline_in_name", _q("a\nb.safetensors"), MERGE, (INDEX, Q_PROJ)),
        Case("index_escape_codes", _q("\x1b[31ma.safetensors"), MERGE, (INDEX, Q_PROJ)),
        Case("index_surrogate", _index_text('{"weight_map":{"a":"\\ud800.safetensors"}}'), MERGE, (INDEX,)),
        Case("index_name_too_long", _q(far), MERGE, (INDEX, Q_PROJ)),
        Case("index_names_config", _q("config.json"), MERGE, ("config.json",)),
        Case("index_names_itself", _q(INDEX), MERGE, (INDEX,)),
        Case("index_wrong_shard", _q("model-00003-of-00003.safetensors"), MERGE, (INDEX, Q_PROJ)),
        Case("index_unknown_shard", _q("model-00009-of-00003.safetensors"), MERGE, (INDEX, "model-00009")),
        Case("index_misses_a_tensor", _shards(lambda p: _mapped(p, **{Q_PROJ.replace(".", "__"): None})), SPLIT,
             (INDEX, Q_PROJ, "does not know")),
        Case("index_has_one_too_many", _shards(lambda p: _mapped(p, ghost=SHARD)), QUANTIZE, (INDEX, "ghost")),
        Case("index_shard_missing", _shards(lambda p: (p / f"base/{SHARD}").unlink()), MERGE, (INDEX, SHARD)),
        Case("index_shard_empty_folder", _shards(lambda p: ((p / f"base/{SHARD}").unlink(), (p / f"base/{SHARD}").mkdir())),
             MERGE, (SHARD, "regular")),
        Case("index_tensor_in_two_shards", _shards(lambda p: changed(p / f"base/{SHARD}", ghost=np.zeros(2, np.float32))
             or changed(p / "base/model-00001-of-00003.safetensors", ghost=np.zeros(2, np.float32))
             or _mapped(p, ghost=SHARD)), MERGE, ("ghost",)),
        Case("index_no_weight_map", _index_text("{}"), MERGE, (INDEX, "weight_map")),
        Case("index_weight_map_list", _index_text('{"weight_map":[]}'), MERGE, (INDEX, "weight_map")),
        Case("index_weight_map_empty", _index_text('{"weight_map":{}}'), MERGE, (INDEX, "weight_map")),
        Case("index_a_list", _index_text("[]"), MERGE, (INDEX, "object")),
        Case("index_a_number", _index_text("5"), SPLIT, (INDEX, "object")),
        Case("index_empty", _index_text(""), MERGE, (INDEX, "not JSON")),
        Case("index_not_json", _index_text("hello"), QUANTIZE, (INDEX, "not JSON")),
        Case("index_cut", _index_text('{"weight_map":{"a":"b'), MERGE, (INDEX, "not JSON")),
        Case("index_key_twice", _index_text('{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}'), MERGE,
             (INDEX, "'a'", "twice")),
        Case("index_deep", _index_text('{"weight_map":' + "[" * 100_000 + "]" * 100_000 + "}"), MERGE, (INDEX, "JSON")),
        Case("index_huge_number", _index_text('{"metadata":' + "9" * 100_000 + "}"), MERGE, (INDEX, "JSON")),
        Case("index_nan", _index_text('{"metadata":NaN}'), MERGE, (INDEX,)),
        Case("index_utf16", _index_text('{"weight_map":{}}'.encode("utf-16")), MERGE, (INDEX, "UTF-8")),
        Case("index_byte_order_mark", _index_text(b'\xef\xbb\xbf{"weight_map":{}}'), MERGE, (INDEX,)),
        Case("index_lfs_pointer", _index_text("version https://git-lfs.github.com/spec/v1\n"), MERGE, (INDEX, "LFS")),
        Case("index_html", _index_text("<!DOCTYPE html><html></html>"), MERGE, (INDEX,)),
        Case("index_of_100_mb", _shards(lambda p: p.sparse(f"base/{INDEX}", 100_000_000, b"{")), MERGE, (INDEX, "bytes")),
        Case("index_pipe", _shards(lambda p: p.pipe(f"base/{INDEX}")), MERGE, (INDEX, "regular")),
        Case("index_links_to_itself", _shards(lambda p: p.link(f"base/{INDEX}", INDEX)), MERGE, ("base",)),
        Case("index_device", _shards(lambda p: p.link(f"base/{INDEX}", "/dev/zero")), MERGE, (INDEX, "regular")),
        Case("index_and_single_file", _shards(lambda p: p.write(f"base/{WEIGHTS}", _good())), MERGE, (INDEX, WEIGHTS)),
        Case("index_case_twin", _q("MODEL-00002-OF-00003.safetensors"), MERGE, ("MODEL-00002",)),
    ]  # fmt: skip


def _weights(**changes: Any) -> Callable[[Place], object]:
    keys = {name.replace(".", "__"): value for name, value in changes.items()}
    return _base(lambda place: changed(place / f"base/{WEIGHTS}", **keys))


def _filled(value: float, dtype: type = np.float32) -> np.ndarray:
    array = np.zeros((24, 24), dtype)
    array[3, 3] = value
    return array


def tensor_cases() -> list[Case]:
    """What is in the tensors of a base."""
    raw = _base(
        lambda p: p.write(f"base/{WEIGHTS}", safetensors({Q_PROJ: entry("F8_E4M3", [24, 24], 0, 576)}, b"\x7f" * 576))
    )
    return [
        Case("base_nan", _weights(**{Q_PROJ: _filled(np.nan)}), MERGE, (Q_PROJ, "finite")),
        Case("base_infinite", _weights(**{Q_PROJ: _filled(np.inf)}), MERGE, (Q_PROJ, "finite")),
        Case("base_nan_untouched", _weights(**{"model.norm.weight": np.full(24, np.nan, np.float32)}), MERGE,
             ("model.norm.weight", "finite")),
        Case("base_nan_quantize", _weights(**{Q_PROJ: _filled(np.nan)}), QUANTIZE, (Q_PROJ, "finite")),
        Case("base_infinite_quantize", _weights(**{Q_PROJ: _filled(-np.inf)}), QUANTIZE, (Q_PROJ, "finite")),
        Case("base_overflows_fp16", _weights(**{Q_PROJ: _filled(1e20)}), (*MERGE, "--dtype", "fp16"), (Q_PROJ,)),
        Case("base_integers", _weights(**{Q_PROJ: np.zeros((24, 24), np.int64)}), MERGE, (Q_PROJ, "I64")),
        Case("base_bools", _weights(**{Q_PROJ: np.zeros((24, 24), np.bool_)}), MERGE, (Q_PROJ, "BOOL")),
        Case("base_f64", _weights(**{Q_PROJ: np.zeros((24, 24), np.float64)}), MERGE, (Q_PROJ, "F64")),
        Case("base_fp8", raw, MERGE, (Q_PROJ,)),
        Case("base_fp8_quantize", raw, QUANTIZE, (Q_PROJ,)),
        Case("base_missing_module", _weights(**{Q_PROJ: None}), MERGE, ("q_proj",)),
        Case("base_wrong_shape", _weights(**{Q_PROJ: np.zeros((24, 25), np.float32)}), MERGE, ("q_proj", "25")),
        Case("base_vector", _weights(**{Q_PROJ: np.zeros(576, np.float32)}), MERGE, ("q_proj",)),
        Case("base_empty_tensor", _weights(**{Q_PROJ: np.zeros((0, 24), np.float32)}), MERGE, ("q_proj",)),
        Case("base_no_tensors", _base(lambda p: p.write(f"base/{WEIGHTS}", safetensors("{}"))), MERGE, ("base",)),
        Case("quantize_no_tensors", _base(lambda p: p.write(f"base/{WEIGHTS}", safetensors("{}"))), QUANTIZE, ("base",)),
        Case("split_no_tensors", _base(lambda p: p.write(f"base/{WEIGHTS}", safetensors("{}"))), SPLIT, ("base",)),
        Case("other_model", _base(_other_model), MERGE, ("adapter",)),
    ]  # fmt: skip


def _other_model(place: Place) -> None:
    from safetensors.numpy import save_file

    save_file({"transformer.wte.weight": np.zeros((8, 8), np.float32)}, place / f"base/{WEIGHTS}")


def _special(kind: str, name: str) -> Callable[[Place], object]:
    """Something that is no file where a file is expected."""

    def lay(place: Place) -> None:
        place.base()
        place.adapter()
        path: Path = place / name
        if kind == "pipe":
            place.pipe(name)
        elif kind == "loop":
            place.link(name, path.name)
        elif kind == "device":
            place.link(name, "/dev/zero")
        elif kind == "random":
            place.link(name, "/dev/urandom")
        elif kind == "dangling":
            place.link(name, "nowhere")
        elif kind == "folder":
            path.unlink()
            path.mkdir()
        elif kind == "long":
            place.sparse(name, 1 << 40)
        elif kind == "socket":
            import os
            import socket

            path.unlink()
            before = Path.cwd()
            os.chdir(path.parent)
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(path.name)
            os.chdir(before)

    return lay


KINDS = ("pipe", "loop", "device", "random", "dangling", "folder", "long", "socket")


def special_cases() -> list[Case]:
    """Pipes, devices, loops of links, folders and endless files in every place that is read."""
    cases = []
    places = ("base/config.json", f"base/{WEIGHTS}", f"adapter/{ADAPTER}", "adapter/adapter_config.json")
    for kind in KINDS:
        cases += [
            Case(f"{kind}_{name.replace('/', '_')}", _special(kind, name), MERGE, (name.partition("/")[0],))
            for name in places
        ]
        lay = _special(kind, f"base/{WEIGHTS}")
        cases += [Case(f"{kind}_{words[1]}", lay, words, ("base",)) for words in (QUANTIZE, SPLIT)]
    return cases


def _side(name: str, do: Callable[[Place], object]) -> Case:
    return Case(f"side_{name}", _base(do), MERGE, ("base",))


def _loop_of_templates(place: Place) -> None:
    (place / "base/additional_chat_templates").mkdir()
    place.link("base/additional_chat_templates/again", "..")


def side_cases() -> list[Case]:
    """The small files beside the weights, which are copied."""
    return [
        _side("tokenizer_pipe", lambda p: p.pipe("base/tokenizer.json")),
        _side("tokenizer_device", lambda p: p.link("base/tokenizer.json", "/dev/zero")),
        _side("tokenizer_loop", lambda p: p.link("base/tokenizer.json", "tokenizer.json")),
        _side("tokenizer_dangling", lambda p: p.link("base/tokenizer.json", "nowhere")),
        _side("tokenizer_of_a_terabyte", lambda p: p.sparse("base/tokenizer.json", 1 << 40)),
        _side("tokenizer_a_folder", lambda p: (p / "base/tokenizer.json").mkdir()),
        _side("templates_loop", _loop_of_templates),
        _side("templates_pipe", lambda p: ((p / "base/additional_chat_templates").mkdir(),
              p.pipe("base/additional_chat_templates/a.jinja"))),
        Case("side_code_is_a_pipe", _base(lambda p: p.pipe("base/modeling_x.py")), MERGE, ("modeling_x.py",)),
        Case("side_adapter_tokenizer_config_deep", _base(lambda p: p.write("adapter/tokenizer_config.json",
              '{"a":' + "[" * 100_000)), MERGE, ("tokenizer_config.json",)),
        Case("side_adapter_tokenizer_config_pipe", _base(lambda p: p.pipe("adapter/tokenizer_config.json")), MERGE,
              ("tokenizer_config.json",)),
    ]  # fmt: skip


def _config_text(text: bytes | str) -> Callable[[Place], object]:
    return _base(lambda place: place.write("base/config.json", text))


def _config(**changes: Any) -> Callable[[Place], object]:
    return _base(lambda place: place.edit_json("base/config.json", **changes))


def config_cases() -> list[Case]:
    """config.json of the base."""
    name = "config.json"
    texts: dict[str, bytes | str] = {
        "empty": "",
        "not_json": "{hello}",
        "list": "[]",
        "null": "null",
        "cut": '{"model_type": "lla',
        "twice": '{"model_type":"llama","model_type":"gpt2"}',
        "deep": '{"a":' * 50_000 + "1" + "}" * 50_000,
        "deep_list": "[" * 1_000_000,
        "huge_number": '{"hidden_size":' + "1" * 10_000 + "}",
        "utf16": '{"model_type":"llama"}'.encode("utf-16"),
        "latin1": '{"author":"Jos\xe9"}'.encode("latin-1"),
        "nuls": b"\0" * 100,
        "html": "<html></html>",
        "lfs": "version https://git-lfs.github.com/spec/v1\n",
        "pickle": b"\x80\x04}.",
        "control_characters": '{"a":"\x01\x1b[2J"}',
    }
    cases = [Case(f"config_{kind}", _config_text(text), MERGE, (name,)) for kind, text in texts.items()]
    cases += [
        Case(f"config_{kind}_quantize", _config_text(text), QUANTIZE, (name,)) for kind, text in list(texts.items())[:8]
    ]
    cases += [
        Case("config_missing", _base(lambda p: (p / "base/config.json").unlink()), MERGE, (name,)),
        Case("config_of_gigabytes", _base(lambda p: p.sparse("base/config.json", 1 << 33, b"{")), MERGE, (name, "bytes")),
        Case("config_gptq", _config(quantization_config={"quant_method": "gptq"}), MERGE, ("base", "GPTQ")),
        Case("config_unknown_quantization", _config(quantization_config={"quant_method": "\x1b[31mx"}), MERGE, ("base",)),
        Case("config_quantization_a_list", _config(quantization_config=[1]), MERGE, ("base", "quantized")),
        Case("config_8_bit", _config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}), MERGE,
             ("base", "bitsandbytes")),
        Case("config_model_type_number", _config(model_type=5), ("convert", "quantize", "base", "out"), ("model_type",)),
        Case("config_model_type_dict", _config(model_type={"a": 1}), QUANTIZE, ("model_type",)),
        Case("config_model_type_list", _config(model_type=["llama"]), MERGE, ("model_type",)),
        Case("config_auto_map_payload", _base(_auto_map), ("convert", "merge", "base", "adapter2", "out"), ("adapter2",)),
        Case("config_tied_text", _config(tie_word_embeddings="yes"), MERGE, ("tie_word_embeddings",)),
        Case("config_text_config_text", _config(text_config="x"), MERGE, ("text_config",)),
        Case("config_dtype_number", _config(torch_dtype=7), MERGE, ("dtype",)),
        Case("config_layers_negative", _config(num_hidden_layers=-1), QUANTIZE, ("num_hidden_layers",)),
        Case("config_layers_text", _config(num_hidden_layers="many"), QUANTIZE, ("num_hidden_layers",)),
        Case("config_layers_huge", _config(num_hidden_layers=10**9), QUANTIZE, ("num_hidden_layers",)),
    ]  # fmt: skip
    return cases


def _auto_map(place: Place) -> None:
    """Remote code in the base, and an adapter whose names have to be looked up in the model's class."""
    place.edit_json(
        "base/config.json", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, model_type="evil"
    )
    place.write("base/evil.py", f"open({place.payload!r}, 'w').write('x')\n")
    tensors = {key.replace("model.model", "other"): value for key, value in tiny_llama.adapter_tensors().items()}
    place.adapter("adapter2", tensors=tensors)


def target_cases() -> list[Case]:
    """Where the result must not go."""
    good = _base(lambda _: None)
    force = (*MERGE[:4],)
    return [
        Case("target_a_file", _base(lambda p: p.write("out", "mine")), MERGE, ("out",)),
        Case("target_a_file_forced", _base(lambda p: p.write("out", "mine")), (*MERGE, "--force"), ("out",)),
        Case("target_not_empty", _base(lambda p: p.write("out/mine.txt", "mine")), MERGE, ("out",)),
        Case("target_foreign_forced", _base(lambda p: p.write("out/thesis.odt", "mine")), (*MERGE, "--force"),
             ("out", "thesis.odt")),
        Case("target_texts_forced", _base(lambda p: (p.write("out/notes.txt", "mine"), p.write("out/todo.md", "mine"))),
             (*MERGE, "--force"), ("out", "no model in it")),
        Case("target_scripts_forced", _base(lambda p: (p.write("out/work.py", "mine"), p.write("out/sub/config.json", "{}"))),
             (*QUANTIZE, "--force"), ("out", "no model in it")),
        Case("target_a_good_model", _base(lambda p: p.base("out")), MERGE, ("out", "--force")),
        Case("target_the_base", good, (*force, "base", "--force"), ("base",)),
        Case("target_the_adapter", good, (*force, "adapter", "--force"), ("adapter",)),
        Case("target_inside_the_base", good, (*force, "base/out"), ("base",)),
        Case("target_around_the_base", good, (*force, ".", "--force"), ("error",)),
        Case("target_root", good, (*force, "/", "--force"), ("/",)),
        Case("target_link_to_the_base", _base(lambda p: p.link("out", "base")), (*MERGE, "--force"), ("out",)),
        Case("target_dangling_link", _base(lambda p: p.link("out", "nowhere")), MERGE, ("out",)),
        Case("target_in_a_file", _base(lambda p: p.write("f", "x")), (*force, "f/out"), ("f",)),
        Case("target_empty", good, (*force, ""), ("error",), code=1),
        Case("target_nul", good, (*force, "a\0b"), ("NUL",), code=2),
        Case("target_name_too_long", good, (*force, "x" * 300), ("xxx",)),
        Case("target_in_dev", good, (*force, "/dev/null/out"), ("/dev/null",)),
        Case("target_proc", good, (*force, "/proc/out"), ("/proc",)),
        Case("quantize_onto_itself", good, ("convert", "quantize", "base", "base", "--force"), ("base",)),
        Case("split_onto_itself", good, ("convert", "split", "base", "base", "--force"), ("base",)),
    ]  # fmt: skip


def word_cases() -> list[Case]:
    """Words of the command line."""
    good = _base(lambda _: None)
    return [
        Case("size_zero", good, (*MERGE, "--max-shard-size", "0"), ("size",), code=2),
        Case("size_negative", good, (*MERGE, "--max-shard-size", "-5GB"), ("size",), code=2),
        Case("size_nan", good, (*MERGE, "--max-shard-size", "nan"), ("size",), code=2),
        Case("size_infinite", good, (*MERGE, "--max-shard-size", "1e999GB"), ("size",), code=2),
        Case("size_of_a_million_digits", good, (*MERGE, "--max-shard-size", "9" * 100_000), ("size",), code=2),
        Case("key_map_explodes", good, (*MERGE, "--key-map", "(a+)+$=b"), ("key",), code=2),
        Case("key_map_broken", good, (*MERGE, "--key-map", "(=b"), ("key",), code=2),
        Case("key_map_back_reference", good, (*MERGE, "--key-map", r"model=\9"), ("key",), code=2),
        Case("adapter_weight_nan", good, (*MERGE, "--adapter", "adapter:nan"), ("nan",), code=2),
        Case("adapter_weight_infinite", good, (*MERGE, "--adapter", "adapter:inf"), ("inf",), code=2),
        Case("blocksize_zero", good, (*QUANTIZE, "--blocksize", "0"), ("blocksize",), code=2),
        Case("blocksize_odd", good, (*QUANTIZE, "--blocksize", "48"), ("blocksize",), code=2),
        Case("skip_nothing_there", good, (*QUANTIZE, "--skip", "no_such_layer"), ("no_such_layer",), code=2),
        Case("base_path_with_escape_codes", good, ("convert", "merge", "\x1b[31mbase/x", "adapter", "out"), ("base",)),
        Case("base_path_with_newline", good, ("convert", "merge", "a\nb/c", "adapter", "out"), ("a",)),
        Case("unknown_option", good, (*MERGE, "--oops"), ("--oops",), code=2),
        Case("too_few_words", good, MERGE[:3], ("ADAPTER_PATH",), code=2),
    ]  # fmt: skip


def good_cases() -> list[Case]:
    """Controls: good inputs are accepted."""
    return [
        control("good_merge", _base(lambda _: None), MERGE, "out"),
        control("good_merge_shards", _shards(lambda _: None), MERGE, "out"),
        control("good_quantize", _shards(lambda _: None), QUANTIZE, "out"),
        control("good_split", _base(lambda _: None), (*SPLIT, "--max-shard-size", "10KB"), "out"),
        control("good_index_for_one_file", _base(lambda p: p.write(f"base/{INDEX}", json.dumps(
            {"weight_map": dict.fromkeys(tiny_llama.weights(), WEIGHTS)}))), MERGE, "out"),
        control("good_linked_files", _base(lambda p: ((p / f"base/{WEIGHTS}").rename(p / "blob"),
                p.link(f"base/{WEIGHTS}", "../blob"))), MERGE, "out"),
        control("good_unused_model_class", _base(lambda _: None), (*MERGE, "--model-class", "os.system"), "out"),
        control("good_replace", _base(lambda p: p.base("out")), (*MERGE, "--force"), "out"),
    ]  # fmt: skip


def cases() -> list[Case]:
    """All of them."""
    return [
        *file_cases(), *index_cases(), *tensor_cases(), *special_cases(), *side_cases(), *config_cases(),
        *target_cases(), *word_cases(), *good_cases(),
    ]  # fmt: skip
