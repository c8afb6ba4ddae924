"""The card of a model: what it was made from and how, as README.md with the front matter that hubs read.

Everything in it comes from files that the run has left (config.yaml, metrics.jsonl, fastft_training.json,
adapter_config.json) and from the base's folder; what they do not say is said to be unknown, above all the licence.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastft.errors import ConfigError, FileError

if TYPE_CHECKING:
    from fastft.config.schema import Config

Kind = Literal["adapter", "model"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FRONT_MATTER = re.compile(r"\A\s*---\n(?P<yaml>.*?)\n---", re.DOTALL)
_MAX_CARD_BYTES = 1_000_000
_METHODS = {"lora": "LoRA", "qlora": "QLoRA", "dora": "DoRA"}
_TASKS = {
    "sft": "instruction tuning (SFT)",
    "pretrain": "continued pre-training",
    "dpo": "preference tuning (DPO)",
    "orpo": "preference tuning (ORPO)",
    "kto": "preference tuning (KTO)",
    "reward": "reward modelling",
}


@dataclass(frozen=True)
class About:
    """What is known of a result.

    Attributes:
        title: the repository's name.
        repository: OWNER/NAME.
        kind: adapter or model.
        base_name: the base's id on the hub, or the last part of its folder's name where no id is known.
        base_id: the id, or None.
        licence: the base's, as its own card says; None where nobody says.
        config: of the run; None without one.
        record: fastft_training.json; empty without one.
        adapter: adapter_config.json; empty for a model.
        metrics: lines of metrics.jsonl.
        has_plot: whether loss.png goes along.
        notes: what the person who uploads should know.
    """

    title: str
    repository: str
    kind: Kind
    base_name: str
    base_id: str | None
    licence: str | None
    config: "Config | None"
    record: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    has_plot: bool = False
    notes: tuple[str, ...] = ()


def read_about(result: Path, run: Path | None, kind: Kind, repository: str, base: str | None) -> About:
    """Collect what the folders say.

    Args:
        result: the adapter's or model's folder.
        run: the run folder around it, if there is one.
        kind: what `result` is.
        repository: OWNER/NAME.
        base: the base's id, given by hand.

    Raises:
        FileError: a file of the run is broken.
    """
    record = _json(result / "fastft_training.json")
    adapter = _json(result / "adapter_config.json") if kind == "adapter" else {}
    config = _config(run)
    notes: list[str] = []
    told = str(record.get("base", {}).get("name") or adapter.get("base_model_name_or_path") or "")
    if config is not None and _ID.fullmatch(config.model.name) and not Path(told).is_absolute():
        told = config.model.name
    found = base or (told if _is_id(told) else None)
    name = found or _last_part(config.model.name if config is not None else told) or "unknown"
    if found is None and kind == "adapter":
        notes.append(f"the base is known only as `{name}`; say with --base OWNER/NAME which model others need")
    folder = record.get("base", {}).get("folder")
    licence = _licence(Path(folder)) if folder else None
    if licence is None:
        notes.append("the base's licence is not known; the card says so")
    metrics = _metrics(run)
    has_plot = ((run or result) / "loss.png").is_file()
    return About(
        title=repository.rpartition("/")[2],
        repository=repository,
        kind=kind,
        base_name=name,
        base_id=found,
        licence=licence,
        config=config,
        record=record,
        adapter=adapter,
        metrics=metrics,
        has_plot=has_plot,
        notes=tuple(notes),
    )


def text(about: About, *, hub: str = "huggingface") -> str:
    """The card."""
    parts = [
        _front_matter(about, hub),
        f"# {about.title}\n",
        _opening(about),
        _use(about, hub),
        _data(about),
        _settings(about),
        _result(about),
        _licence_words(about),
    ]
    return "\n".join(part for part in parts if part).rstrip("\n") + "\n"


def _front_matter(about: About, hub: str) -> str:
    task, method = _task(about), _method(about)
    values: dict[str, Any] = {}
    if about.base_id is not None:
        values["base_model"] = about.base_id
        if about.kind == "model":
            values["base_model_relation"] = "finetune"
    values["library_name"] = "peft" if about.kind == "adapter" else "transformers"
    values["pipeline_tag"] = "text-classification" if task == "reward" else "text-generation"
    if hub == "modelscope":
        values |= {"frameworks": ["Pytorch"], "tasks": [values["pipeline_tag"]]}
    if about.licence is not None:
        values["license"] = about.licence
    values["tags"] = ["fastft", *(word for word in (method, task) if word)]
    if ids := _data_ids(about):
        values["datasets"] = ids
    # JSON is YAML: no text can break out of its place.
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(["---", *lines, "---", ""])


def _opening(about: About) -> str:
    base = f"[{about.base_id}](https://huggingface.co/{about.base_id})" if about.base_id else f"`{about.base_name}`"
    task = _TASKS.get(_task(about) or "", "fine-tuning")
    version = about.record.get("fastft")
    made = f"fastft {version}" if version else "fastft"
    if about.kind == "adapter":
        method = _method(about) or "lora"
        how = f"A {_METHODS.get(method, method)} adapter for {base}"
    else:
        how = f"A model fine-tuned from {base}" if about.base_name != "unknown" else "A fine-tuned model"
    return f"{how}: {task}, made with {made}.\n"


def _use(about: About, hub: str) -> str:
    library = "modelscope" if hub == "modelscope" else "transformers"
    if about.kind == "adapter":
        base = about.base_id or "BASE_MODEL"
        code = [
            "from peft import PeftModel",
            f"from {library} import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}, dtype="auto")',
            f"model = PeftModel.from_pretrained(base, {json.dumps(about.repository)})",
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(about.repository)})",
        ]
        if _task(about) == "reward":
            code = [line.replace("AutoModelForCausalLM", "AutoModelForSequenceClassification") for line in code]
        after = (
            f"Or merge it into the base: `fastft download {about.repository} --to adapter`, then"
            f" `fastft convert merge {base} adapter merged`.\n"
        )
        return "\n".join(["## Use", "", "```python", *code, "```", "", after])
    loader = "AutoModelForSequenceClassification" if _task(about) == "reward" else "AutoModelForCausalLM"
    code = [
        f"from {library} import {loader}, AutoTokenizer",
        "",
        f'model = {loader}.from_pretrained({json.dumps(about.repository)}, dtype="auto")',
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(about.repository)})",
    ]
    return "\n".join(["## Use", "", "```python", *code, "```", ""])


def _data(about: About) -> str:
    if about.config is None:
        return ""
    lines = ["## Data", ""]
    for source in about.config.data.train:
        name = _source_name(source.source)
        details = [f"subset {source.subset}"] if source.subset else []
        details += [f"split {source.split}"] if _is_id(source.source) else []
        details += [f"revision {source.revision}"] if source.revision else []
        details += [f"the first {source.max_rows:,} rows"] if source.max_rows else []
        details += [f"weight {source.weight:g}"] if source.weight != 1 else []
        lines.append(f"- {name} ({', '.join(details)})" if details else f"- {name}")
    counts = about.record.get("data") or {}
    if counts.get("rows"):
        tokens = f", {counts['tokens']:,} tokens" if counts.get("tokens") else ""
        packed = " packed" if about.config.data.packing else ""
        lines += ["", f"{counts['rows']:,}{packed} rows of at most {about.config.data.max_length:,} tokens{tokens}."]
    return "\n".join([*lines, ""])


def _settings(about: About) -> str:
    rows: list[tuple[str, object]] = []
    config, adapter = about.config, about.adapter
    if adapter:
        rows += [
            ("rank", adapter.get("r")),
            ("alpha", adapter.get("lora_alpha")),
            ("dropout", adapter.get("lora_dropout")),
        ]
        rows += [("DoRA", "yes")] if adapter.get("use_dora") else []
        rows += [("rsLoRA", "yes")] if adapter.get("use_rslora") else []
        targets = adapter.get("target_modules")
        # Whole names, one a layer, where a model's layers differ or its files were read in another layout.
        rows += [
            (
                "modules",
                ", ".join(sorted({t.rpartition(".")[2] for t in targets})) if isinstance(targets, list) else targets,
            )
        ]
    held = about.record.get("quantization")
    if isinstance(held, dict):
        rows.append(("base held in", f"4 bit ({held.get('type') or held.get('quant_type') or 'nf4'})"))
    if config is not None:
        train = config.train
        processes = (about.record.get("data") or {}).get("processes") or 1
        rows += [
            ("epochs", f"{train.epochs:g}" if train.max_steps is None else f"up to step {train.max_steps:,}"),
            ("rows per step", train.batch_size * train.grad_accumulation * processes),
            ("learning rate", f"{train.lr:g}, {train.schedule}, warm-up {train.warmup_ratio:g}"),
            ("optimizer", f"{train.optimizer}, weight decay {train.weight_decay:g}"),
            ("longest sample", f"{config.data.max_length:,} tokens"),
            ("seed", train.seed),
        ]
    versions = about.record.get("versions") or {}
    if versions:
        rows.append(("versions", ", ".join(f"{name} {value}" for name, value in versions.items() if value)))
    rows = [(name, value) for name, value in rows if value is not None]
    if not rows:
        return ""
    return "\n".join(["## Settings", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""])


def _result(about: About) -> str:
    losses = [line for line in about.metrics if isinstance(line.get("loss"), (int, float))]
    held_out = [line for line in about.metrics if isinstance(line.get("eval_loss"), (int, float))]
    lines = []
    if losses:
        lines.append(
            f"Loss per learned token: {losses[0]['loss']:.3f} at step {losses[0]['step']:,},"
            f" {losses[-1]['loss']:.3f} at step {losses[-1]['step']:,}."
        )
    if held_out:
        lines.append(f"Loss on held-back data: {held_out[-1]['eval_loss']:.3f} at step {held_out[-1]['step']:,}.")
    if about.has_plot:
        lines += ["", "![loss](loss.png)"]
    return "\n".join(["## Result", "", *lines, ""]) if lines else ""


def _licence_words(about: About) -> str:
    if about.licence is not None:
        words = f"The base model's licence is `{about.licence}`; what it demands holds for this {about.kind} too."
    else:
        words = (
            f"The licence of the base model (`{about.base_name}`) was not found by the program that wrote this card. Read it"
            f" at the base model's own page: what it demands holds for this {about.kind} too."
        )
    return f"## Licence\n\n{words} The licences of the data are the data sets' own.\n"


def _task(about: About) -> str | None:
    task = about.config.task if about.config is not None else about.record.get("task")
    if task is None and about.adapter.get("task_type") == "SEQ_CLS":
        return "reward"
    return task


def _method(about: About) -> str | None:
    if about.adapter.get("use_dora"):
        return "dora"
    method = about.config.method.kind if about.config is not None else about.record.get("method")
    if method is None and about.adapter:
        return str(about.adapter.get("peft_type") or "lora").lower()
    return method


def _data_ids(about: About) -> list[str]:
    sources = () if about.config is None else about.config.data.train
    return list(dict.fromkeys(source.source for source in sources if _is_id(source.source)))


def _source_name(source: str) -> str:
    """How a data set is called in public: an id by its name, a file of this machine not by its place."""
    if source.startswith("demo/"):
        return f"`{source}`, which comes with fastft"
    if _is_id(source):
        return f"[{source}](https://huggingface.co/datasets/{source})"
    return "a data set of the author's, not published"


def _is_id(name: str) -> bool:
    """Whether a name is an id on a hub, and no file or folder of this machine."""
    return _ID.fullmatch(name) is not None and not Path(name).exists() and not name.startswith("demo/")


def _last_part(name: str) -> str:
    return Path(name).name or name


def _config(run: Path | None) -> "Config | None":
    if run is None or not (run / "config.yaml").is_file():
        return None
    from fastft.config import load

    try:
        return load.load(str(run / "config.yaml")).config
    except ConfigError as error:
        why = str(error).splitlines()[0]
        raise FileError(f"upload: {run / 'config.yaml'} of the run cannot be read: {why}") from error


def _json(path: Path) -> dict[str, Any]:
    from fastft.convert.json_file import read_object

    return read_object(path) if path.is_file() else {}


def _metrics(run: Path | None) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl" if run is not None else None
    if path is None or not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise FileError(f"upload: {path} of the run is broken: {error}") from error
    return [line for line in lines if isinstance(line, dict)]


def _licence(base: Path) -> str | None:
    """What the front matter of the base's own card says, as far as it lies here."""
    path = base / "README.md"
    if not path.is_file() or path.stat().st_size > _MAX_CARD_BYTES:
        return None
    match = _FRONT_MATTER.match(path.read_text(encoding="utf-8", errors="replace"))
    if match is None:
        return None
    found = re.search(r"^license:\s*['\"]?([\w.+-]+)['\"]?\s*$", match["yaml"], flags=re.MULTILINE)
    return found.group(1) if found else None
