"""`fastft convert pth_to_hf`: a training's checkpoint becomes a folder that Hugging Face tools read.

`trained` finds the weights, whoever wrote them; `recorded` says what is known of the run. LoRA weights become a PEFT
adapter, all weights a model folder, XTuner's LLaVA models the folders of their parts or one folder (`pth_llava`). The
tensors are streamed from where they lie; no model is built with weights and nothing in a pickle is run.
"""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastft import console, publish
from fastft.config import show
from fastft.config.schema import Config
from fastft.convert import recorded, trained
from fastft.convert.adapter import canonical_key
from fastft.convert.folder import Checkpoint
from fastft.convert.merge import output_dtype
from fastft.convert.pth_parts import (
    Job,
    Part,
    adapter_part,
    base_of,
    model_part,
    own_names,
    plain_names,
    reward_part,
    with_model_prefix,
)
from fastft.convert.recorded import Run
from fastft.convert.sidefiles import copy_side_files
from fastft.convert.size import DEFAULT_MAX_SHARD_SIZE_BYTES, readable
from fastft.convert.source import Fingerprint, Source, as_seen, check_unchanged, looked_at
from fastft.convert.stream import write_shards
from fastft.convert.target import check_target
from fastft.convert.trained import LORA
from fastft.errors import CheckpointError, HubError, PlanError, UsageError

if TYPE_CHECKING:
    from fastft.convert.pth_llava import OneFolder

COPIED_CONFIG = "fastft_config.yaml"
SAVE_FORMATS = ("xtuner", "huggingface")
# Parts of XTuner's models that are not the language model.
_VISION = ("visual_encoder.", "projector.")
_REFERENCE = "ref_llm."
_REWARD = "v_head."
_NARROWED = "the weights are bf16 and are written as fp16, XTuner's habit; --dtype auto keeps them"


@dataclass(frozen=True)
class PthPlan:
    """Everything that the conversion will do.

    Attributes:
        kind: a PEFT adapter, a whole model, or a LLaVA model.
        parts: the folders of the result, the first of them often the result itself; none where `llava` is all of it.
        notes: what the user should know, a sentence each.
        sources: what is read, for the rules of the target.
        fingerprints: of the files that are read.
        llava: the one folder of a whole LLaVA model.
        texts: name to content of small files beside it.
    """

    kind: Literal["adapter", "model", "llava"]
    parts: tuple[Part, ...]
    notes: tuple[str, ...]
    sources: tuple[Path, ...]
    fingerprints: tuple[Fingerprint, ...] = field(repr=False)
    llava: "OneFolder | None" = None
    texts: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        if self.llava is not None:
            return self.llava.plan.num_bytes
        return sum(tensor.nbytes for part in self.parts for shard in part.shards for tensor in shard.tensors)


@dataclass(frozen=True, slots=True)
class PthReport:
    """How a conversion went."""

    folder: Path
    kind: str
    num_bytes: int
    num_tensors: int
    duration_s: float

    def line(self) -> str:
        """Say it in one line."""
        rate = self.num_bytes / max(self.duration_s, 1e-3)
        return (
            f"{self.kind} written to {self.folder}: {self.num_tensors} tensors, {readable(self.num_bytes)} in"
            f" {self.duration_s:.1f} s ({readable(rate)}/s)"
        )


def plan(
    config: Config | Run,
    pth: Path,
    *,
    dtype: str = "fp16",
    max_shard_size_bytes: int = DEFAULT_MAX_SHARD_SIZE_BYTES,
    save_format: str = "xtuner",
) -> PthPlan:
    """Plan the conversion; reads headers and pickled names only, writes nothing.

    Where the config's base model is a folder on this machine, all names and shapes are checked against it. For an
    adapter it is not fetched otherwise; a whole model takes its config.json and tokenizer from it.

    Args:
        config: of the run that made the checkpoint: the rank and alpha of its adapters, the name of its base.
        pth: a .pth file, or a checkpoint folder.
        dtype: fp16 (XTuner's habit), bf16, fp32 (DeepSpeed's masters, where there are some), or auto (as trained).
        max_shard_size_bytes: greedy limit of a file of a whole model.
        save_format: xtuner (a LLaVA's parts) or huggingface (one folder); the same for language models.

    Raises:
        FileError, CheckpointError, PlanError: what is missing, broken, or not understood.
        HubError: the base of a whole model cannot be fetched.
    """
    if save_format not in SAVE_FORMATS:
        way_out = (
            "; `official` needs the llava package: take huggingface, which it reads too"
            if save_format == "official"
            else ""
        )
        raise UsageError(f"--save-format {save_format!r} is not allowed; use {' or '.join(SAVE_FORMATS)}{way_out}")
    wanted = output_dtype(dtype)
    seen = looked_at(pth)
    found = trained.read(pth, masters=wanted == "F32")
    given = config if isinstance(config, Run) else recorded.of_config(config)
    run, said = recorded.joined(given, found.meta, pth)
    job = Job(run, pth, found, wanted, max_shard_size_bytes)
    bf16_note = wanted == "F16" and any(source.dtype == "BF16" for source in found.tensors.values())
    narrowed = (_NARROWED,) if bf16_note else ()
    if save_format == "huggingface" and _is_llava(_names(job)):
        from fastft.convert import pth_llava

        whole = pth_llava.one_folder(job)
        notes = (*found.notes, *said, *whole.notes, *narrowed)
        made_of = whole.plan.parts
        return PthPlan(
            "llava", (), notes, (pth, *made_of.sources), made_of.fingerprints, llava=whole, texts=_copied(given)
        )
    kind, parts, bases, notes = _planned(job)
    parts = (replace(parts[0], texts={**parts[0].texts, **_copied(given)}), *parts[1:])
    return PthPlan(
        kind,
        parts,
        (*found.notes, *said, *notes, *narrowed, *(note for part in parts for note in part.notes)),
        (pth, *(base.folder for base in bases)),
        (*as_seen(seen, found.files), *(mark for base in bases for mark in base.fingerprints)),
    )


def execute(plan: PthPlan, save_path: Path, *, force: bool = False) -> PthReport:
    """Run a plan: `save_path` holds the whole result afterwards, or is as it was before.

    Raises:
        PlanError, FileError: the target is not allowed, or there is no room.
        CheckpointError: a value overflows the new dtype, or an input changed.
    """
    started = time.monotonic()
    check_target(save_path, plan.sources, plan.num_bytes, force=force)
    for note in plan.notes:
        console.note(note)
    if plan.llava is not None:
        return _execute_llava(plan, plan.llava, save_path, force=force)
    num_tensors = 0
    with publish.staged(save_path, force=force, num_bytes=plan.num_bytes) as stage:
        for part in plan.parts:
            folder = stage / part.folder
            folder.mkdir(exist_ok=True)
            if any(shard.tensors for shard in part.shards):
                num_tensors += write_shards(
                    part.shards, folder, "converting", single=part.single, finite=True
                ).num_tensors
            copy_side_files(dict(part.side_files), folder)
            for name, content in part.texts.items():
                (folder / name).write_bytes(content)
        check_unchanged(plan.fingerprints)
    return PthReport(save_path, plan.kind, plan.num_bytes, num_tensors, time.monotonic() - started)


def _execute_llava(plan: PthPlan, whole: "OneFolder", save_path: Path, *, force: bool) -> PthReport:
    """Write a LLaVA as one folder."""
    from fastft.convert import llava

    def write(place: Path) -> None:
        whole.write_processor(place)
        for name, content in plan.texts.items():
            (place / name).write_bytes(content)

    report = llava.execute(whole.plan, save_path, write, force=force)
    return PthReport(save_path, plan.kind, report.num_bytes, report.num_tensors, report.duration_s)


def _copied(given: Run) -> dict[str, bytes]:
    """The config that the user gave, for the result."""
    if given.text is not None:
        return {recorded.XTUNER_COPY: given.text}
    return {} if given.config is None else {COPIED_CONFIG: show.flat_yaml(given.config).encode()}


Planned = tuple[Literal["adapter", "model", "llava"], tuple[Part, ...], list[Checkpoint], tuple[str, ...]]


def _is_llava(names: Iterable[str]) -> bool:
    return any(name.startswith(_VISION) for name in names)


def _names(job: Job) -> dict[str, tuple[str, Source]]:
    """Give each tensor, and its own name, by the name without wrappers.

    Raises:
        CheckpointError: two names become one.
        PlanError: the tensors have lost their shapes.
    """
    names = {canonical_key(name): (name, source) for name, source in job.trained.tensors.items()}
    if len(names) != len(job.trained.tensors):
        raise CheckpointError(f"{job.pth}: two of its tensors have one name once prefixes are stripped")
    flat = next((name for name in names if name.endswith("flat_param")), None)
    if flat is not None:
        raise PlanError(
            f"{job.pth}: holds flat parameters of FSDP ({flat}), each process's own and without their shapes; save again"
            " with StateDictType.FULL_STATE_DICT or SHARDED_STATE_DICT"
        )
    return names


def _refuse_llava_in_training(job: Job, names: Iterable[str]) -> None:
    """Refuse a checkpoint of our training of a LLaVA made of parts.

    Raises:
        PlanError: saying how its result is written.
    """
    inside = next((name for name in names if "multi_modal_projector." in name or "vision_tower." in name), None)
    if inside is not None and job.run.visual_encoder is not None:
        raise PlanError(
            f"{job.pth}: a checkpoint in the midst of the training of a LLaVA ({inside}); go on with `fastft train` and --resume"
            " auto, whose end writes the parts into llava/"
        )


def _planned(job: Job) -> Planned:
    """Plan by what the checkpoint holds."""
    names = _names(job)
    _refuse_llava_in_training(job, names)
    if _is_llava(names):
        from fastft.convert import pth_llava

        parts, bases, said = pth_llava.parts(job)
        return "llava", parts, bases, said
    llm = {own: source for name, (own, source) in names.items() if not name.startswith((_REFERENCE, _REWARD))}
    head = [(name, source) for name, (_, source) in names.items() if name.startswith(_REWARD)]
    notes: list[str] = []
    num_reference = sum(name.startswith(_REFERENCE) for name in names)
    if num_reference:
        notes.append(f"{num_reference} tensors of the reference model (ref_llm) are left out: it was not trained")
    kind, part, base = _language_model(job, llm, head, notes)
    return kind, (part,), [] if base is None else [base], tuple(notes)


def _language_model(
    job: Job, names: Mapping[str, Source], head: list[tuple[str, Source]], notes: list[str]
) -> tuple[Literal["adapter", "model"], Part, Checkpoint | None]:
    """Plan the folder of a language model or its adapter."""
    if not names:
        raise CheckpointError(f"{job.pth}: holds no tensor of the language model")
    if head and [(name, len(source.shape), source.shape[:1]) for name, source in head] != [("v_head.weight", 2, (1,))]:
        raise PlanError(f"{job.pth}: its v_head is not one number for each sequence (1, hidden); it cannot be kept")
    kept, num_frozen = own_names(names, job.trained.trained, "none" if job.run.lora is None else job.run.lora.bias)
    if num_frozen:
        notes.append(f"{num_frozen} tensors of the frozen base beside the adapter are left out")
    plain = plain_names(kept, job.pth, "llm.")
    is_adapter = any(map(LORA.search, plain))
    has_config = job.trained.folder is not None and (job.trained.folder / trained.CONFIG_JSON).exists()
    folder = base_folder(job.run, needed=not is_adapter and not has_config)
    base, said = (None, ()) if folder is None else base_of(folder)
    notes += said
    if is_adapter:
        if head:
            plain = with_model_prefix(plain)
        part = adapter_part(
            job,
            plain,
            job.run.lora,
            base,
            base_name=job.run.model.name,
            task_type="SEQ_CLS" if head else "CAUSAL_LM",
            reward_head=head[0][1] if head else None,
        )
        return "adapter", part, base
    if job.run.lora is not None:
        notes.append(f"{job.run.place} says method.kind: {job.run.method}, but the checkpoint holds whole weights")
    if head:
        assert folder is not None
        return "model", reward_part(job, with_model_prefix(plain), head[0][1], base, folder), base
    return "model", model_part(job, plain, base, folder), base


def base_folder(run: Run, *, needed: bool) -> Path | None:
    """Find the base model's folder; it is fetched from a hub only where it is needed, and then without its weights.

    Raises:
        HubError: it is needed and cannot be fetched.
    """
    from fastft.hub import locate

    name = run.model.name
    if name == "demo" or Path(name).expanduser().is_dir():
        return locate.model(run.model)
    if not needed:
        return None
    try:
        return locate.model(run.model.model_copy(update={"init": "random"}))
    except HubError as error:
        raise HubError(
            f"{error}; or give its folder on this machine: model.name={os.sep}path{os.sep}to{os.sep}it"
        ) from error
