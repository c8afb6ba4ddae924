"""Hostile .pth and .bin files: payloads, bombs, broken zips, tensors that reach outside their storage."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from hostile.case import MERGE, PTH, QUANTIZE, SPLIT, Case, control
from hostile.place import Place


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def _int(number: int) -> bytes:
    return b"I%d\n" % number


def archive(content: bytes, data: dict[str, bytes] | None = None, prefix: str = "a/", **options: Any) -> bytes:
    """A zip as torch.save writes it, around any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as file:
        file.writestr(f"{prefix}data.pkl", content)
        for name, raw in (data or {}).items():
            file.writestr(f"{prefix}{name}", raw)
    return out.getvalue()


def _storage(key: str = "0", kind: str = "FloatStorage", numel: int = 6) -> bytes:
    return b"(" + _text("storage") + _global("torch", kind) + _text(key) + _text("cpu") + _int(numel) + b"tQ"


def _tensor(
    offset: int = 0, shape: tuple[int, ...] = (2, 3), stride: tuple[int, ...] = (3, 1), storage: bytes | None = None
) -> bytes:
    sizes = [b"(" + b"".join(map(_int, values)) + b"t" for values in (shape, stride)]
    hooks = _call(_global("collections", "OrderedDict"))
    rebuilt = _global("torch._utils", "_rebuild_tensor_v2")
    return _call(rebuilt, storage or _storage(), _int(offset), *sizes, b"I00\n", hooks)


def _dict(**items: bytes) -> bytes:
    return b"}(" + b"".join(_text(key.replace("__", ".")) + value for key, value in items.items()) + b"u"


def _pickled(value: bytes, start: bytes = b"\x80\x02") -> bytes:
    return start + value + b"."


def _saved(value: bytes) -> bytes:
    return archive(_pickled(value), {"data/0": b"\0" * 24})


def payload_archive(target: str) -> bytes:
    """A .pth that would make `target` when it is unpickled."""
    return _saved(_dict(weight=_call(_global("os", "system"), _text(f"touch '{target}'"))))


def _payloads(target: str) -> dict[str, bytes]:
    """Pickles that make a file, each by another road."""
    touch = f"open({target!r}, 'w').write('x')"
    system = _call(_global("os", "system"), _text(f"touch '{target}'"))
    return {
        "system": _dict(a=_tensor(), b=system),
        "posix": _dict(a=_tensor(), b=_call(_global("posix", "system"), _text(f"touch '{target}'"))),
        "eval": _dict(a=_tensor(), b=_call(_global("builtins", "eval"), _text(touch))),
        "exec": _dict(a=_tensor(), b=_call(_global("builtins", "exec"), _text(touch))),
        "getattr": _dict(a=_tensor(), b=_call(_global("builtins", "getattr"), _global("os", "path"), _text("os"))),
        "runpy": _dict(a=_tensor(), b=_call(_global("runpy", "_run_code"), _text(touch), b"}")),
        "subprocess": _dict(a=_tensor(), b=_call(_global("subprocess", "Popen"), b"(" + _text("touch") + _text(target) + b"l")),
        "torch_load": _dict(a=_tensor(), b=_call(_global("torch", "load"), _text(target))),
        "torch_hub": _dict(a=_tensor(), b=_call(_global("torch.hub", "load"), _text(target))),
        "stack_global": _dict(a=_tensor(), b=_text("os") + _text("system") + b"\x93(" + _text(f"touch '{target}'") + b"tR"),
        "build": _dict(a=_tensor(), b=_global("os", "system") + b"(" + _text(f"touch '{target}'") + b"tb"),
        "inst": _dict(a=_tensor(), b=b"(" + _text(f"touch '{target}'") + b"ios\nsystem\n"),
        "obj": _dict(a=_tensor(), b=b"(" + _global("os", "system") + _text(f"touch '{target}'") + b"o"),
        "newobj": _dict(a=_tensor(), b=_global("os", "system") + b"(" + _text(f"touch '{target}'") + b"t\x81"),
        "in_a_tensor": _dict(a=_tensor(storage=system)),
        "in_a_size": _dict(a=_call(_global("torch._utils", "_rebuild_tensor_v2"), _storage(), _int(0), system, system, b"N", b"N")),
        "in_a_storage": _dict(a=_tensor(storage=b"(" + _text("storage") + system + _text("0") + _text("cpu") + _int(6) + b"tQ")),
        "as_a_key": b"}(" + system + _tensor() + b"u",
        "as_the_whole": system,
        "before_the_rest": system + b"0" + _dict(a=_tensor()),
        "extension": _dict(a=_tensor(), b=b"\x82\x01"),
    }  # fmt: skip


def _pth(make: Callable[[Place], bytes]) -> Callable[[Place], object]:
    def lay(place: Place) -> None:
        place.base("chatty")
        place.config()
        _clean(place)
        place.write("a.pth", make(place))

    return lay


def _clean(place: Place) -> None:
    """A config of full training, which takes the base's config.json."""
    import json

    tree = json.loads((place / "a.yaml").read_text())
    tree["method"] = {"kind": "full"}
    (place / "a.yaml").write_text(json.dumps(tree))


def payload_cases() -> list[Case]:
    """Pickles that would run something: nothing runs, and what cannot be understood is refused."""
    cases = []
    for name in _payloads(""):
        make = _pth(lambda place, name=name: _saved(_payloads(place.payload)[name]))  # type: ignore[misc]
        cases.append(Case(f"pth_payload_{name}", make, PTH, ("a.pth",)))

    def in_base(place: Place) -> None:
        place.base()
        place.adapter()
        (place / "base/model.safetensors").unlink()
        place.write("base/pytorch_model.bin", payload_archive(place.payload))

    cases += [
        Case(f"bin_payload_{words[1]}", in_base, words, ("pytorch_model.bin",)) for words in (MERGE, QUANTIZE, SPLIT)
    ]
    return cases


def _memo_bomb() -> bytes:
    """Lists of lists: 10 ** 100 elements when unfolded."""
    out = b"]q\x00"
    for level in range(100):
        out += b"](" + b"h" + bytes([level]) * 1 + (b"h" + bytes([level])) * 9 + b"eq" + bytes([level + 1])
    return out


def _deep_tuple(depth: int) -> bytes:
    return b"N" + b"\x85" * depth


def _bomb(compression: int) -> bytes:
    return archive(b"\x80\x02" + b"N0" * 20_000_000 + b"}.", {}, compression=compression)


def _cut(keep: float) -> bytes:
    whole = _saved(_dict(a=_tensor()))
    return whole[: int(len(whole) * keep)]


def _renamed(old: bytes, new: bytes) -> bytes:
    return _saved(_dict(a=_tensor())).replace(old, new)


def broken_cases() -> list[Case]:
    """Files that are broken, or describe tensors that are not there."""

    def one(name: str, make: Callable[[], bytes], *says: str) -> Case:
        return Case(f"pth_{name}", _pth(lambda _: make()), PTH, ("a.pth", *says))

    good = {"data/0": b"\0" * 24}
    return [
        one("empty", lambda: b"", "empty"),
        one("text", lambda: b"hello"),
        one("html", lambda: b"<!DOCTYPE html>", "text"),
        one("lfs", lambda: b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        one("old_format", lambda: b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "pickle"),
        one("plain_pickle", lambda: pickle.dumps({"a": 1}), "torch"),
        one("zip_of_nothing", lambda: b"PK\x05\x06" + b"\0" * 18),
        one("cut_early", lambda: _cut(0.3), "zip"),
        one("cut_late", lambda: _cut(0.9), "zip"),
        one("no_pickle", lambda: archive(b"", prefix="a/x"), "data.pkl"),
        one("two_pickles", lambda: archive(_pickled(_dict(a=_tensor())), {"b/data.pkl": b"x"})),
        one("empty_pickle", lambda: archive(b"", good), "pickle"),
        one("pickle_without_stop", lambda: archive(b"\x80\x02}", good), "STOP"),
        one("pickle_underflow", lambda: archive(b"\x80\x020.", good), "stack"),
        one("pickle_no_mark", lambda: archive(b"\x80\x02}u.", good)),
        one("pickle_wrong_memo", lambda: archive(b"\x80\x02h\x07.", good)),
        one("pickle_protocol_9", lambda: archive(b"\x80\x09}.", good)),
        one("pickle_long_text", lambda: archive(b"\x80\x02X\xff\xff\xff\xff.", good)),
        one("pickle_long_frame", lambda: archive(b"\x80\x04\x95" + b"\xff" * 8 + b"}.", good)),
        one("pickle_huge_integer", lambda: archive(_pickled(b"\x8b\xff\xff\xff\x7f"), good)),
        one("pickle_next_buffer", lambda: archive(b"\x80\x05\x97.", good)),
        one("pickle_deep", lambda: archive(_pickled(_deep_tuple(1_000_000)), good)),
        one("pickle_deep_key", lambda: archive(_pickled(b"}(" + _deep_tuple(100_000) + _tensor() + b"u"), good)),
        one("pickle_bomb_of_lists", lambda: archive(_pickled(_dict(a=_memo_bomb())), good)),
        one("pickle_holds_itself", lambda: archive(_pickled(b"}q\x00(" + _text("state_dict") + b"h\x00u"), good)),
        one("pickle_many_items", lambda: archive(_pickled(b"](" + b"N" * 1_000_000 + b"e"), good)),
        one("number", lambda: archive(_pickled(_int(5)), good), "dictionary"),
        one("list", lambda: archive(_pickled(b"](" + _tensor() + b"e"), good), "dictionary"),
        one("empty_dict", lambda: archive(_pickled(b"}"), good), "no tensors"),
        one("whole_model", lambda: archive(_pickled(_call(_global("my.module", "Net"))), good), "my.module.Net"),
        one("compressed", lambda: archive(_pickled(_dict(a=_tensor())), good, compression=zipfile.ZIP_DEFLATED), "compressed"),
        one("zip_bomb", lambda: _bomb(zipfile.ZIP_DEFLATED), "compressed"),
        one("big_endian", lambda: archive(_pickled(_dict(a=_tensor())), good | {"byteorder": b"big"}), "big-endian"),
        one("same_name_twice", _twice, "one name"),
        one("storage_missing", lambda: archive(_pickled(_dict(a=_tensor())), {}), "'a'", "data/0"),
        one("storage_short", lambda: archive(_pickled(_dict(a=_tensor())), {"data/0": b"\0" * 20}), "'a'"),
        one("storage_unknown", lambda: _saved(_dict(a=_tensor(storage=_storage(kind="EvilStorage")))), "'a'", "EvilStorage"),
        one("storage_climbs", lambda: _saved(_dict(a=_tensor(storage=_storage(key="../../etc/passwd")))), "'a'"),
        one("storage_numel_negative", lambda: _saved(_dict(a=_tensor(storage=_storage(numel=-1)))), "'a'"),
        one("offset_negative", lambda: _saved(_dict(a=_tensor(offset=-1))), "'a'"),
        one("offset_far", lambda: _saved(_dict(a=_tensor(offset=10**15))), "'a'"),
        one("offset_beyond_64_bits", lambda: _saved(_dict(a=_tensor(offset=10**30))), "'a'"),
        one("shape_huge", lambda: _saved(_dict(a=_tensor(shape=(2**40, 2**40), stride=(2**40, 1)))), "'a'"),
        one("shape_negative", lambda: _saved(_dict(a=_tensor(shape=(-2, 3)))), "'a'"),
        one("shape_and_stride", lambda: _saved(_dict(a=_tensor(stride=(1,)))), "'a'"),
        one("stride_zero", lambda: _saved(_dict(a=_tensor(stride=(0, 0)))), "'a'"),
        one("stride_overlaps", lambda: _saved(_dict(a=_tensor(shape=(6, 6), stride=(1, 1)))), "'a'"),
        one("nine_dimensions", lambda: _saved(_dict(a=_tensor(shape=(1,) * 9, stride=(1,) * 9))), "'a'"),
        one("name_with_newline", lambda: _saved(b"}(" + _text("a\nb\x1b[31m") + _tensor() + b"u")),
        one("name_long", lambda: _saved(b"}(" + _text("x" * 100_000) + _tensor() + b"u")),
        one("of_another_model", lambda: _saved(_dict(a=_tensor())), "a"),
        one("central_directory_lies", lambda: _renamed(b"\x18\0\0\0\x18\0\0\0", b"\xff\xff\0\0\xff\xff\0\0")),
        Case("pth_missing", lambda p: (_pth(lambda _: b"")(p), (p / "a.pth").unlink()), PTH, ("a.pth",)),
        Case("pth_pipe", lambda p: (_pth(lambda _: b"")(p), p.pipe("a.pth")), PTH, ("a.pth",)),
        Case("pth_device", lambda p: (_pth(lambda _: b"")(p), p.link("a.pth", "/dev/zero")), PTH, ("a.pth",)),
        Case("pth_empty_folder", lambda p: (_pth(lambda _: b"")(p), (p / "a.pth").unlink(), (p / "a.pth").mkdir()), PTH,
             ("a.pth",)),
        Case("pth_sparse", lambda p: (_pth(lambda _: b"")(p), p.sparse("a.pth", 1 << 36, b"PK\x03\x04")), PTH, ("a.pth",)),
        control("good_pth", _good, PTH, "out"),
    ]  # fmt: skip


def _twice() -> bytes:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as file:
            file.writestr("a/data.pkl", _pickled(_dict(a=_tensor())))
            file.writestr("a/data/0", b"\0" * 24)
            file.writestr("a/data/0", b"\1" * 24)
        return out.getvalue()


def _good(place: Place) -> None:
    import numpy as np
    import torch

    import tiny_llama

    place.base("chatty")
    place.config()
    _clean(place)
    torch.save({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in tiny_llama.weights().items()}, place / "a.pth")


def cases() -> list[Case]:
    """All of them."""
    return [*payload_cases(), *broken_cases()]
