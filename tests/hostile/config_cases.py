"""Hostile configs: YAML, XTuner's Python, overrides, templates; and what a config names."""

import json
from collections.abc import Callable

from hostile.case import CHECK, TRAIN, Case, control
from hostile.place import Place

SHOW = ("config", "show", "a.yaml")
GOOD = "model: {name: chatty}\nmethod: {kind: lora}\ndata: {train: [{source: rows.jsonl}]}\n"


def _yaml(text: bytes | str) -> Callable[[Place], object]:
    return lambda place: place.write("a.yaml", text)


def _bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join(lines)


def yaml_cases() -> list[Case]:
    """Texts that are no plain, bounded YAML."""

    def one(name: str, text: bytes | str, *says: str) -> Case:
        return Case(f"yaml_{name}", _yaml(text), SHOW, ("a.yaml", *says), many_lines=True)

    return [
        one("python_object", "name: !!python/object/apply:os.system ['touch PAYLOAD']\n", "tag"),
        one("python_name", "name: !!python/name:os.system\n", "tag"),
        one("python_module", "name: !!python/module:os\n", "tag"),
        one("python_tuple", "name: !!python/tuple [1]\n", "tag"),
        one("own_tag", "name: !include /etc/passwd\n", "tag"),
        one("binary", "name: !!binary aGVsbG8=\n", "tag"),
        one("set", "name: !!set {a, b}\n", "tag"),
        one("tag_directive", "%TAG ! tag:yaml.org,2002:python/\n---\nname: !name:os.system\n", "directive"),
        one("version_directive", "%YAML 1.1\n---\nname: x\n", "directive"),
        one("alias_bomb", _bomb(), "unfolds"),
        one("alias_to_itself", "a: &a [*a]\n", "*a"),
        one("alias_map_to_itself", "a: &a {b: *a}\n", "*a"),
        one("alias_unknown", "a: *nowhere\n", "nowhere"),
        one("merge_key", "a: &a {r: 1}\nmethod:\n  <<: *a\n", "<<"),
        one("key_twice", "name: a\nname: b\n", "a.yaml:2", "name"),
        one("inner_key_twice", "model:\n  name: a\n  name: b\n", "a.yaml:3", "name"),
        one("key_a_list", "[a, b]: c\n", "key"),
        one("key_a_map", "{a: b}: c\n", "key"),
        one("key_an_anchor", "&x a: c\n", "key"),
        one("unknown_key", GOOD + "trian: {}\n", "trian", "train"),
        one("unknown_inner_key", GOOD + "train: {lrr: 1}\n", "train.lrr"),
        one("key_with_escape_codes", GOOD + '"\\e[31mx\\n": 1\n'),
        one("key_long", GOOD + "x" * 1000 + ": 1\n"),
        one("key_very_long", GOOD + "? " + "x" * 100_000 + "\n: 1\n"),
        one("value_long", GOOD + "task: " + "x" * 100_000 + "\n", "task"),
        one("deep_lists", "a: " + "[" * 10_000 + "]" * 10_000, "nested"),
        one("deep_maps", "a: " + "{b: " * 10_000 + "}" * 10_000, "nested"),
        one("deep_block", "\n".join("  " * n + "a:" for n in range(500)), "nested"),
        one("deep_dashes", "- " * 5000 + "a"),
        one("deep_unclosed", "[" * 100_000),
        one("many_keys", "".join(f"k{n}: 1\n" for n in range(50_000)), "unfolds"),
        one("large", "a: 1\n" * 300_000, "too large"),
        one("one_long_line", "a: " + "x" * 2_000_000, "too large"),
        one("many_anchors", "".join(f"k{n}: &a{n} 1\n" for n in range(12_000)), "unfolds"),
        one("huge_integer", GOOD + "train: {max_steps: " + "9" * 100_000 + "}\n", "max_steps"),
        one("integer_beyond_64_bits", GOOD + "train: {max_steps: " + "9" * 30 + "}\n", "max_steps"),
        one("lr_infinite", GOOD + "train: {lr: .inf}\n", "train.lr"),
        one("lr_nan", GOOD + "train: {lr: .nan}\n", "train.lr"),
        one("lr_negative", GOOD + "train: {lr: -1}\n", "train.lr"),
        one("lr_text", GOOD + "train: {lr: fast}\n", "train.lr"),
        one("lr_1e999", GOOD + "train: {lr: 1e999}\n", "train.lr"),
        one("rank_zero", GOOD.replace("{kind: lora}", "{kind: lora, lora: {r: 0}}"), "lora.r"),
        one("rank_huge", GOOD.replace("{kind: lora}", "{kind: lora, lora: {r: 1000000000000}}"), "lora.r"),
        one("batch_huge", GOOD + "train: {batch_size: 99999999999999}\n", "batch_size"),
        one("length_zero", "model: {name: chatty}\nmethod: {kind: lora}\ndata: {train: [{source: rows.jsonl}], max_length: 0}\n", "max_length"),
        one("length_huge", "model: {name: chatty}\nmethod: {kind: lora}\ndata: {train: [{source: rows.jsonl}], max_length: 99999999999}\n", "max_length"),
        one("seed_negative", GOOD + "train: {seed: -1}\n", "seed"),
        one("seed_huge", GOOD + "train: {seed: 99999999999999999999}\n", "seed"),
        one("null_model", "model: null\ndata: {train: [{source: rows.jsonl}]}\n", "model"),
        one("model_a_list", "model: [a]\ndata: {train: [{source: rows.jsonl}]}\n", "model"),
        one("data_a_word", "model: {name: a}\ndata: x\n", "data"),
        one("empty", "", "model"),
        one("null", "null\n", "model"),
        one("a_number", "5\n", "mapping"),
        one("a_list", "[1, 2]\n", "mapping"),
        one("two_documents", "a: 1\n---\nb: 2\n", "second"),
        one("utf16", GOOD.encode("utf-16"), "UTF-8"),
        one("utf32", GOOD.encode("utf-32"), "UTF-8"),
        one("latin1", b"name: Jos\xe9\n", "UTF-8"),
        one("nul", b"name: a\0b\n"),
        one("only_nuls", b"\0" * 1000),
        one("bell", b"name: a\x07b\n"),
        one("tabs", "model:\n\tname: a\n"),
        one("unclosed_quote", 'name: "abc\n'),
        one("surrogate", 'name: "\\ud800"\n' + GOOD),
        one("binary_file", bytes(range(256)) * 10),
        one("pickle", b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94."),
        one("template_climbs", "model: {name: chatty, chat_template: ../../../etc/passwd}\nmethod: {kind: lora}\n"
            "data: {train: [{source: rows.jsonl}]}\n", "chat_template"),
        one("source_a_template", "model: {name: '{{7*7}}'}\ndata: {train: [{source: '{% for x in y %}'}]}\nlr: 1\n"),
        Case("yaml_pipe", lambda p: p.pipe("a.yaml"), SHOW, ("a.yaml",)),
        Case("yaml_device", lambda p: p.link("a.yaml", "/dev/zero"), SHOW, ("a.yaml",)),
        Case("yaml_loop", lambda p: p.link("a.yaml", "a.yaml"), SHOW, ("a.yaml",)),
        Case("yaml_folder", lambda p: (p / "a.yaml").mkdir(), SHOW, ("a.yaml", "folder")),
        Case("yaml_missing", lambda _: None, SHOW, ("a.yaml",)),
        Case("yaml_sparse", lambda p: p.sparse("a.yaml", 1 << 36), SHOW, ("a.yaml",)),
        Case("config_name_nul", lambda _: None, ("config", "show", "a\0b"), ("NUL",), code=2),
        Case("config_name_long", lambda _: None, ("config", "show", "x" * 5000), ("xxx",)),
        Case("config_name_empty", lambda _: None, ("config", "show", ""), ("config",)),
        Case("config_name_codes", lambda _: None, ("config", "show", "\x1b[2Jx"), ("config",)),
        control("good_yaml", _yaml(GOOD), SHOW),
        control("good_yaml_byte_order_mark", _yaml(b"\xef\xbb\xbf" + GOOD.encode()), SHOW),
        control("good_yaml_crlf", _yaml(GOOD.replace("\n", "\r\n")), SHOW),
        control("good_yaml_alias", _yaml("model: &m {name: chatty}\nmethod: {kind: lora}\ndata: {train: [{source: rows.jsonl}]}\n"), SHOW),
    ]  # fmt: skip


def override_cases() -> list[Case]:
    """Words key=value."""

    def one(name: str, word: str, *says: str) -> Case:
        return Case(f"override_{name}", _yaml(GOOD), (*SHOW, word), says, many_lines=True)

    return [
        one("tag", "train.lr=!!python/name:os.system", "train.lr"),
        one("unknown", "train.lrr=1", "train.lrr"),
        one("deep", "a" + ".a" * 10_000 + "=1", "a"),
        one("index_far", "data.train.999999999.source=x", "data.train"),
        one("index_negative", "data.train.-1.source=x", "data.train"),
        one("dunder", "__class__.__init__=1", "__class__"),
        one("value_deep", "train.lr=" + "[" * 10_000, "train.lr"),
        one("value_long", "task=" + "x" * 100_000, "task"),
        one("nan", "train.lr=nan", "train.lr"),
        one("empty_key", "=1"),
        one("dots", "...=1"),
    ]


IMPORT = ("config", "import", "a.py", "out.yaml")


def python_cases() -> list[Case]:
    """XTuner's Python configs, which are read and never run."""

    def one(name: str, text: bytes | str, *says: str) -> Case:
        return Case(f"python_{name}", lambda p: p.write("a.py", text), IMPORT, ("a.py", *says), many_lines=True)

    touch = "open('PAYLOAD', 'w').write('x')"
    return [
        one("open", f"{touch}\n"),
        one("in_an_argument", f"x = dict(a={touch})\n"),
        one("import_system", "import os\nos.system('touch PAYLOAD')\n"),
        one("dunder_import", "__import__('os').system('touch PAYLOAD')\n"),
        one("eval", "x = eval(\"open('PAYLOAD','w')\")\n"),
        one("lambda", "x = (lambda: 1)()\n"),
        one("comprehension", "x = [y for y in range(10**9)]\n"),
        one("decorator", "import os\n@os.system\ndef f(): pass\n"),
        one("class_body", f"class A:\n    {touch}\n"),
        one("while", "while True: pass\n"),
        one("f_string", 'x = f\'{open("PAYLOAD", "w")}\'\n'),
        one("power", "x = 9**9**9**9\n"),
        one("power_of_text", "x = 'a' * 10**12\n"),
        one("list_times", "x = [0] * 10**12\n"),
        one("doubling", "x = 'aa'\n" + "x = x + x\n" * 200),
        one("list_doubling", "x = [1]\n" + "x = [x, x]\n" * 200),
        one("format", "x = '%1000000000d' % 1\n"),
        one("shift", "x = 1 << 10**10\n"),
        one("deep", "x = " + "(" * 5000 + ")" * 5000 + "\n"),
        one("deep_minus", "x = " + "-" * 100_000 + "1\n"),
        one("deep_attribute", "import a\nx = a" + ".a" * 50_000 + "\n"),
        one("huge_integer", "x = " + "9" * 100_000 + "\n"),
        one("division_by_zero", "x = 1 / 0\n"),
        one("infinite", "max_epochs = 1e999\n"),
        one("nul", b"x = 'a\0b'\n"),
        one("latin1", b"x = '\xe9'\n"),
        one("utf16", "x = 1\n".encode("utf-16")),
        one("coding_rot13", "# -*- coding: rot13 -*-\nk = 1\nvzcbeg bf\n"),
        one("syntax", "x = = 1\n"),
        one("star_import", "from os import *\n"),
        one("read_base", "from mmengine.config import read_base\nwith read_base():\n    from .x import *\n"),
        one("self_reference", "x = {}\nx['x'] = x\nmodel = x\n"),
        one("large", "x = 1\n" * 400_000, "too large"),
        one("empty", ""),
        Case("python_pipe", lambda p: p.pipe("a.py"), IMPORT, ("a.py",)),
        Case("python_trained", lambda p: p.write("a.py", f"{touch}\n"), ("train", "a.py"), ("a.py",)),
    ]


def jinja_cases() -> list[Case]:
    """Chat templates as programs: in a file that the config names, and in the tokenizer of a model."""
    roads = {
        "attribute": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "globals": "{{ self.__init__.__globals__ }}",
        "cycler": "{{ cycler.__init__.__globals__.os.system('touch PAYLOAD') }}",
        "lipsum": "{{ lipsum.__globals__['os'].popen('touch PAYLOAD').read() }}",
        "namespace": "{{ namespace.__init__.__globals__.os.system('touch PAYLOAD') }}",
        "joiner": "{% set x = joiner %}{{ x.__init__.__globals__ }}",
        "strftime": "{{ strftime_now.__globals__ }}",
        "raise": "{{ raise_exception.__globals__ }}",
        "format": "{{ '{0.__class__.__init__.__globals__}'.format(self) }}",
        "format_map": "{{ '{a.__class__}'.format_map({'a': 1}).x.y }}",
        "attr_filter": "{{ messages|attr('__class__')|attr('__mro__')|attr('x') }}",
        "import": "{% import 'os' as os %}{{ os }}",
        "include": "{% include '/etc/passwd' %}",
        "extends": "{% extends '/etc/passwd' %}",
        "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "range": "{% for a in range(10**12) %}x{% endfor %}",
        "memory": "{% set ns = namespace(x='a') %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "multiply": "{{ 'a' * 10**11 }}",
        "center": "{{ 'a'|center(10**11) }}",
        "power": "{{ 9**9**9 }}",
        "lists": "{{ ([0] * 10**10)|length }}",
        "lipsum_long": "{{ lipsum(n=10**7) }}",
        "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "deep_if": "{% if 1 %}" * 2000 + "x" + "{% endif %}" * 2000,
        "syntax": "{% for x in %}",
        "unclosed": "{{ messages",
        "undefined": "{{ messages[99].content.x.y }}",
        "raises": "{{ raise_exception('no') }}",
        "empty_result": "{{ '' }}",
        "nothing_of_the_text": "hello",
        "changes_list": "{{ messages.append(1) }}{{ messages.clear() }}",
        "debug": "{% debug %}",
        "do": "{% do messages.append(1) %}",
    }

    def in_file(template: str) -> Callable[[Place], object]:
        def lay(place: Place) -> None:
            place.chatty()
            _without_template(place)
            place.rows()
            place.write("t.jinja", template)
            place.config(model__chat_template="t.jinja")

        return lay

    def in_model(template: str) -> Callable[[Place], object]:
        def lay(place: Place) -> None:
            place.chatty()
            _without_template(place)
            place.rows()
            place.write("chatty/chat_template.jinja", template)
            place.config()

        return lay

    cases = [Case(f"jinja_file_{name}", in_file(text), CHECK, ("template",)) for name, text in roads.items()]
    some = list(roads.items())
    cases += [
        Case(f"jinja_train_{name}", in_model(text), TRAIN, ("template",), outputs=("work",)) for name, text in some[::3]
    ]
    chat = ("chat", "chatty", "--prompt", "x", "--max-new-tokens", "1")
    cases += [Case(f"jinja_chat_{name}", in_model(text), chat, ("template",)) for name, text in some[::4]]
    cases += [
        Case("template_pipe", lambda p: (in_file("x")(p), p.pipe("t.jinja")), CHECK, ("t.jinja",), many_lines=True),
        Case("template_device", lambda p: (in_file("x")(p), p.link("t.jinja", "/dev/zero")), CHECK, ("t.jinja",),
             many_lines=True),
        Case("template_of_megabytes", in_file("x" * 5_000_000), CHECK, ("t.jinja",), many_lines=True),
        Case("template_not_utf8", lambda p: (in_file("x")(p), p.write("t.jinja", b"\xff\xfe")), CHECK, ("t.jinja",),
             many_lines=True),
        Case("template_missing", lambda p: (in_file("x")(p), (p / "t.jinja").unlink()), CHECK, ("t.jinja",), many_lines=True),
    ]  # fmt: skip
    return cases


def _without_template(place: Place) -> None:
    (place / "chatty/chat_template.jinja").unlink(missing_ok=True)
    path = place / "chatty/tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))


def cases() -> list[Case]:
    """All of them."""
    return [*yaml_cases(), *override_cases(), *python_cases(), *jinja_cases()]
