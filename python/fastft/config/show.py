"""A config as text: in short for the start of a run, in full with origins, as the file `copy-cfg` writes, as schema.

Takes what `load` gives; the texts go to the terminal, to the user's file and to the run folder. The comments are the
descriptions of the schema. A user and password inside a URL are masked everywhere.
"""

import json
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from pydantic.fields import FieldInfo

from fastft.config import fields
from fastft.config.load import Loaded
from fastft.config.mask import masked
from fastft.config.schema import Config, Lora, Section, Source
from fastft.config.tree import scalar

SHORT_WIDTH = 80
SHORT_LINES = 12
FILE_WIDTH = 120

# Text that needs no quotes: no sign that means something to any YAML reader, and no number or date.
_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+-]*")
# What YAML 1.1 readers (PyYAML) take for a boolean.
_OLD_BOOLEANS = frozenset({"y", "n", "yes", "no", "on", "off"})

Comment = Callable[[str], str]  # the comment for a dotted key, or ""


def short(config: Config) -> str:
    """What a run is, in at most 12 lines of 80 columns."""
    data, train, output = config.data, config.train, config.output
    length = f"{train.max_steps} steps" if train.max_steps else f"{_count(train.epochs, 'epoch')}"
    answered = f"every {train.sample_steps} steps" if train.sample_steps else "before and after"
    saved = f"every {output.save_steps} steps" if output.save_steps else "at the end"
    packed = "packed" if data.packing else "one sample a row"
    rows = [
        ("run", f"{config.name} (task {config.task})"),
        ("model", _model(config)),
        ("method", _method(config)),
        ("data", f"{', '.join(_source(source) for source in data.train)}; rows of {data.max_length} tokens, {packed}"),
        ("eval", ", ".join(_source(source) for source in data.eval) or f"{data.eval_rows} rows held back"),
        (
            "train",
            f"{length}, batch {train.batch_size} x {train.grad_accumulation} steps, {_rate(config)}, seed {train.seed}",
        ),
        ("samples", f"{_count(len(config.samples.prompts), 'prompt')}, answered {answered}"),
        ("output", f"{output.dir}, checkpoint {saved}, newest {output.keep} kept"),
    ]
    if not data.eval and not data.eval_rows:
        rows = [row for row in rows if row[0] != "eval"]
    if not config.samples.prompts:
        rows = [row for row in rows if row[0] != "samples"]
    lines = [line for head, text in rows for line in _wrapped(head, masked(text))]
    return "\n".join(lines)


def full(loaded: Loaded) -> str:
    """The whole config as YAML; each value has its origin behind it."""
    return "\n".join(_section(loaded.config, "", lambda key: " ".join(loaded.origin.get(key, "").split()))) + "\n"


def flat_yaml(config: Config) -> str:
    """The whole config as one commented YAML file; reading it gives an equal config (but for masked passwords)."""
    head = [
        "# Everything that the run is made of. Edit it, then: fastft train THIS_FILE",
        "# Any value can also be set on the command line: fastft train THIS_FILE train.lr=1e-5",
        "",
    ]
    return "\n".join([*head, *_section(config, "", _description)]) + "\n"


def json_schema() -> str:
    """The JSON schema of a config, for editors."""
    return json.dumps(Config.model_json_schema(), indent=2, ensure_ascii=False)


def reference_markdown() -> str:
    """The page docs/config.md: every key with what is allowed, its default and its meaning."""
    lines = [
        "# Config reference",
        "",
        "Made from `python/fastft/config/schema.py` by `fastft.config.show.reference_markdown()`; do not edit by hand.",
        "",
        "A config is a YAML 1.2 file. Unknown keys are errors. Lists of mappings are numbered from 0 in overrides:",
        "`fastft train NAME data.train.0.source=my.json train.lr=1e-5`.",
        "",
        *_table(Config, ""),
    ]
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    """A number in the shortest form that YAML 1.1 and 1.2 readers both take for this number."""
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return str(int(value))
    mantissa, exponent_mark, exponent = repr(value).partition("e")
    if not exponent_mark:
        # 0.0002 reads better as 2.0e-4, 0.03 as it stands.
        return mantissa if abs(value) >= 0.001 else number_with_exponent(value)
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+d}"


def number_with_exponent(value: float) -> str:
    """A number as mantissa and exponent, 2.0e-4, exactly."""
    digits = repr(value).replace("-", "").replace(".", "").lstrip("0")
    fraction = repr(value).partition(".")[2]
    exponent = -(len(fraction) - len(fraction.lstrip("0")) + 1)
    return f"{'-' if value < 0 else ''}{digits[0]}.{digits[1:] or '0'}e{exponent}"


def quoted(text: str) -> str:
    """Text as a YAML scalar that any reader takes for exactly this text."""
    if _PLAIN.fullmatch(text) and isinstance(scalar(text), str) and text.lower() not in _OLD_BOOLEANS:
        return text
    return '"' + "".join(_escaped(sign) for sign in text) + '"'


def _escaped(sign: str) -> str:
    known = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}
    if sign in known:
        return known[sign]
    if sign.isprintable():
        return sign
    code = ord(sign)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    return quoted(masked(value))


def _section(section: Section, prefix: str, comment: Comment) -> Iterator[str]:
    for name in type(section).model_fields:
        key, value = f"{prefix}{name}", getattr(section, name)
        indent = "  " * _depth(prefix)
        if isinstance(value, Section):
            if not prefix:
                yield ""
            yield from _line(f"{indent}{name}:", comment(key))
            yield from _section(value, f"{key}.", comment)
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            yield from _line(f"{indent}{name}:", comment(key))
            for index, item in enumerate(value):
                # The schema's words once; origins for every item.
                said = _none if index > 0 and comment is _description else comment
                inner = list(_section(item, f"{key}.{index}.", said))
                yield from _as_item(inner, len(indent) + 2)
        elif isinstance(value, tuple) and value and len(f"{indent}{name}: {_value(value)}") > SHORT_WIDTH:
            yield from _line(f"{indent}{name}:", comment(key))
            yield from (f"{indent}  - {_value(item)}" for item in value)
        else:
            yield from _line(f"{indent}{name}: {_value(value)}", comment(key))


def _as_item(lines: list[str], indent: int) -> Iterator[str]:
    """Lines of a mapping, indented two levels deeper than their list, as an item of it: `- ` before the first key."""
    marked = False
    for line in lines:
        if not marked and not line.lstrip().startswith("#"):
            yield f"{line[:indent]}- {line[indent + 2 :]}"
            marked = True
        else:
            yield line


def _depth(prefix: str) -> int:
    """How deep a key stands in the file; an item's index adds the depth of its dash."""
    return prefix.count(".")


def _line(text: str, comment: str) -> Iterator[str]:
    """The line with its comment behind it, or above it where that gets too long."""
    if not comment:
        yield text
    elif len(text) + len(comment) + 4 <= FILE_WIDTH:
        yield f"{text}  # {comment}"
    else:
        indent = text[: len(text) - len(text.lstrip())]
        for line in textwrap.wrap(comment, FILE_WIDTH - len(indent) - 2):
            yield f"{indent}# {line}"
        yield text


def _description(key: str) -> str:
    known = fields.find(key.split("."))
    return " ".join((known.info.description or "").split()) if known and known.info else ""


def _none(_key: str) -> str:
    return ""


def _wrapped(head: str, text: str) -> list[str]:
    """`head    text`, at most two lines of it."""
    lines = textwrap.wrap(text, SHORT_WIDTH - 9, max_lines=2, placeholder=" ...", break_on_hyphens=False)
    return [f"{head if index == 0 else '':8} {line}" for index, line in enumerate(lines)]


def _model(config: Config) -> str:
    model = config.model
    notes = [f"revision {model.revision}"] if model.revision else []
    notes += ["new random weights"] if model.init == "random" else []
    notes += [f"dtype {model.dtype}"] if model.dtype != "auto" else []
    notes += ["runs remote code"] if model.trust_remote_code else []
    return ", ".join([model.name, *notes])


def _method(config: Config) -> str:
    method = config.method
    if method.kind == "freeze":
        return f"freeze: the last {method.trained_layers} layers are trained"
    if method.lora is None:
        return "full: every weight is trained"
    return f"{method.kind}: {_lora(method.lora)}" + (
        f"; base in {method.quantization.type}" if method.quantization is not None else ""
    )


def _lora(lora: Lora) -> str:
    targets = lora.targets if isinstance(lora.targets, str) else " ".join(lora.targets)
    scale = "".join(f", {name}" for name in ("rslora", "dora") if getattr(lora, name))
    scale += f", starts from {lora.init}" if lora.init != "default" else ""
    return f"r {lora.r}, alpha {number(lora.alpha)}, dropout {number(lora.dropout)}{scale} on {targets}"


def _rate(config: Config) -> str:
    train = config.train
    return f"lr {number(train.lr)} {train.schedule}, warm-up {number(train.warmup_ratio)}, {train.optimizer}"


def _count(amount: float, noun: str) -> str:
    return f"{number(amount)} {noun}" + ("" if amount == 1 else "s")


def _source(source: Source) -> str:
    rows = f", first {source.max_rows} rows" if source.max_rows else ""
    return f"{source.source} ({source.format}{rows})"


def _table(section: type[Section], prefix: str) -> Iterator[str]:
    """The table of a section's plain fields, then the tables of the sections inside it."""
    inner: list[tuple[str, type[Section], str]] = []
    rows = []
    for name, info in section.model_fields.items():
        known = fields.of(section, name)
        assert known is not None
        item = fields.item_of(known.annotation)
        nested = fields.section_of(known.annotation) or (fields.section_of(item) if item else None)
        if nested is not None:
            key = f"{prefix}{name}." if fields.section_of(known.annotation) else f"{prefix}{name}.0."
            inner.append((key, nested, _cell(info.description or "")))
        if nested is None or fields.section_of(known.annotation) is None or not info.is_required():
            allowed = "see below" if nested is not None else _cell(fields.allowed(known.annotation))
            rows.append(f"| `{prefix}{name}` | {allowed} | {_default(info)} | {_cell(info.description or '')} |")
    if rows:
        yield from ("| key | allowed | default | meaning |", "|---|---|---|---|", *rows, "")
    seen: dict[type[Section], str] = {}
    for key, nested, meaning in inner:
        yield from (f"## `{key.rstrip('.')}`", "", f"{meaning[:1].upper()}{meaning[1:]}.", "")
        if nested in seen:
            yield from (f"The same keys as `{seen[nested].rstrip('.')}`.", "")
            continue
        seen[nested] = key
        yield from _table(nested, key)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "(must be given)"
    if info.default_factory is not None:
        return "see below"
    return f"`{_value(info.default)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
