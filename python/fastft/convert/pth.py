"""`fastft convert pth_to_hf`: a training's checkpoint becomes a folder that Hugging Face tools read.

Takes XTuner's and mmengine's .pth files, plain state dicts, DeepSpeed ZeRO-2 folders, and the checkpoint-N folders of
fastft and of transformers' Trainer. LoRA weights become a PEFT adapter, all weights become a model folder. The tensors
are streamed from where they lie; no model is built and nothing in a pickle is run.
"""

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastft import console, publish
from fastft.config import show
from fastft.config.schema import Config
from fastft.convert import internlm2, layout
from fastft.convert.adapter import CONFIG as ADAPTER_CONFIG
from fastft.convert.adapter import TRAINING, canonical_key, check_config, read_adapter, understood
from fastft.convert.adapter import WEIGHTS as ADAPTER_WEIGHTS
from fastft.convert.folder import Checkpoint, read_checkpoint, read_safetensors, read_weights
from fastft.convert.json_file import read_object, read_regular_file
from fastft.convert.merge import output_dtype
from fastft.convert.model_config import ConfigEdits, config_text, edited
from fastft.convert.names import join
from fastft.convert.plan import OutputTensor, Shard, into_shards, natural_order, taken_over
from fastft.convert.pth_reader import read_state_dict
from fastft.convert.sidefiles import copy_side_files, side_files
from fastft.convert.size import DEFAULT_MAX_SHARD_SIZE_BYTES, readable
from fastft.convert.source import Fingerprint, Source, check_unchanged, fingerprint
from fastft.convert.stream import write_shards
from fastft.convert.target import check_target
from fastft.convert.tied import find_tied
from fastft.errors import CheckpointError, FileError, PlanError, UsageError

COPIED_CONFIG = "fastft_config.yaml"
_LORA = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")
_DEEPSPEED_STATES = "mp_rank_00_model_states.pt"
# Parts of XTuner's models that are not the language model.
_OTHER_PARTS = ("visual_encoder.", "projector.", "ref_llm.", "v_head.")


@dataclass(frozen=True)
class PthPlan:
    """Everything that the conversion will do.

    Attributes:
        kind: a PEFT adapter, or a whole model.
        shards: the files of weights.
        texts: name to content of the small files that are made.
        side_files: name to the file to copy.
        notes: what the user should know, a sentence each.
        sources: what is read, for the rules of the target.
        fingerprints: of the files that are read.
    """

    kind: Literal["adapter", "model"]
    shards: tuple[Shard, ...]
    texts: Mapping[str, bytes]
    side_files: Mapping[str, Path]
    notes: tuple[str, ...]
    sources: tuple[Path, ...]
    fingerprints: tuple[Fingerprint, ...] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)


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


@dataclass(frozen=True)
class _Trained:
    """The weights of a checkpoint, whatever it was."""

    tensors: Mapping[str, Source]
    files: tuple[Path, ...]
    # The folder whose config.json, tokenizer and adapter_config.json belong to the weights, where there is one.
    folder: Path | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Job:
    """What both kinds of plans are made from: the weights by their plain names, and what they are held against."""

    config: Config
    pth: Path
    trained: _Trained
    names: Mapping[str, Source]
    base: Checkpoint | None
    dtype: str | None


def plan(
    config: Config,
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
        dtype: fp16 (XTuner's habit), bf16, fp32, or auto (as trained).
        max_shard_size_bytes: greedy limit of a file of a whole model.
        save_format: xtuner or huggingface; the same for language models.

    Raises:
        FileError, CheckpointError, PlanError: what is missing, broken, or not understood.
        HubError: the base of a whole model cannot be fetched.
    """
    if save_format not in ("xtuner", "huggingface"):
        raise UsageError(f"--save-format {save_format!r} is not allowed; use xtuner or huggingface")
    wanted = output_dtype(dtype)
    trained = _read(pth)
    names = {_plain_name(name): source for name, source in trained.tensors.items()}
    if len(names) != len(trained.tensors):
        raise CheckpointError(f"{pth}: two of its tensors have one name once prefixes are stripped")
    others = sorted({part for name in names for part in _OTHER_PARTS if name.startswith(part)})
    if others:
        raise PlanError(
            f"{pth}: holds {', '.join(part.removesuffix('.') for part in others)} beside the language model;"
            " only language models can be converted here"
        )
    is_adapter = any(map(_LORA.search, names))
    base = _base(config, needed=not is_adapter and trained.folder is None)
    job = _Job(config, pth, trained, names, None if base is None else read_checkpoint(base), wanted)
    made = _adapter_plan(job) if is_adapter else _model_plan(job, max_shard_size_bytes)
    texts = {**made.texts, COPIED_CONFIG: show.flat_yaml(config).encode()}
    return replace(made, texts=texts)


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
    single = ADAPTER_WEIGHTS if plan.kind == "adapter" else "model.safetensors"
    with publish.staged(save_path, force=force) as stage:
        streamed = write_shards(plan.shards, stage, "converting", single=single, finite=True)
        copy_side_files(dict(plan.side_files), stage)
        for name, content in plan.texts.items():
            (stage / name).write_bytes(content)
        check_unchanged(plan.fingerprints)
    return PthReport(save_path, plan.kind, plan.num_bytes, streamed.num_tensors, time.monotonic() - started)


def _base(config: Config, *, needed: bool) -> Path | None:
    """Find the base model's folder; it is fetched from a hub only where it is needed."""
    from fastft.hub import locate

    name = config.model.name
    if needed or name == "demo" or Path(name).expanduser().is_dir():
        return locate.model(config.model)
    return None


def _read(pth: Path) -> _Trained:
    """Find the weights of a checkpoint by what is there."""
    if not pth.exists():
        raise FileError(f"{pth}: not there; give a .pth file or a checkpoint folder")
    if pth.is_dir():
        return _read_folder(pth.resolve())
    if pth.suffix == ".safetensors":
        return _Trained(read_safetensors(pth), (pth,), None)
    state = read_state_dict(pth)
    notes = (f"{len(state.skipped)} entries of {pth.name} hold no tensor and are left out",) if state.skipped else ()
    return _Trained(state.tensors, (state.path,), None, notes)


def _read_folder(folder: Path) -> _Trained:
    """Read a checkpoint-N folder, or DeepSpeed's."""
    states = sorted(folder.glob("*model_states.pt"))
    if states:
        if [path.name for path in states] != [_DEEPSPEED_STATES]:
            raise PlanError(
                f"{folder}: a DeepSpeed checkpoint in pieces (ZeRO-3 or tensor parallel: {states[0].name}, ...);"
                " put it together with DeepSpeed's zero_to_fp32.py and give the file that it writes"
            )
        return _Trained(read_state_dict(states[0]).tensors, (states[0],), None)
    if (folder / ".metadata").exists():
        raise PlanError(
            f"{folder}: a sharded FSDP checkpoint; merge it with `accelerate merge-weights` and give what it writes"
        )
    if (folder / ADAPTER_CONFIG).exists():
        weights = folder / ADAPTER_WEIGHTS
        if not weights.exists():
            raise FileError(f"{folder}: {ADAPTER_CONFIG} is there, but no {ADAPTER_WEIGHTS}")
        return _Trained(read_safetensors(weights), (folder / ADAPTER_CONFIG, weights), folder)
    if (folder / "config.json").exists():
        tensors, files = read_weights(folder)
        return _Trained(tensors, (folder / "config.json", *files), folder)
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name.startswith("checkpoint-"))
    hint = f"; did you mean {folder / inside[-1]}?" if inside else ""
    raise FileError(f"{folder}: no checkpoint there: neither {ADAPTER_CONFIG} nor config.json{hint}")


def _plain_name(name: str) -> str:
    """Strip what training frameworks put before and into the names of the language model's tensors."""
    name = canonical_key(name)
    name = canonical_key(name.removeprefix("llm."))
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".").removesuffix(".default")


def _adapter_plan(job: _Job) -> PthPlan:
    """Plan a PEFT adapter folder."""
    names = {name: source for name, source in job.names.items() if ".original_module." not in name}
    settings, texts, chosen = _adapter_settings(job, names)
    adapter = understood(names, settings, job.trained.files[-1])
    notes = [*job.trained.notes]
    if job.base is None:
        notes.append("the base model is not on this machine, so the names are not checked against it")
    else:
        join(adapter, job.base, find_tied(job.base.config, job.base.tensors))
    if len(names) != len(job.names):
        notes.append(f"{len(job.names) - len(names)} untrained originals of modules_to_save are left out")
    tensors = [
        taken_over(f"base_model.model.{name}", source, job.dtype)
        for name, source in sorted(names.items(), key=lambda item: natural_order(item[0]))
    ]
    shards = (Shard(ADAPTER_WEIGHTS, tuple(tensors)),)
    return PthPlan("adapter", shards, texts, chosen, tuple(notes), (job.pth,), _fingerprints(job))


def _adapter_settings(
    job: _Job, names: Mapping[str, Source]
) -> tuple[dict[str, Any], dict[str, bytes], dict[str, Path]]:
    """Give the adapter's settings, the files made from them and the files copied: its own, or the run's."""
    folder = job.trained.folder
    if folder is not None:
        chosen = side_files(folder)
        if (folder / TRAINING).is_file():
            chosen[TRAINING] = folder / TRAINING
        content = read_regular_file(folder / ADAPTER_CONFIG)
        return dict(read_adapter(folder).config), {ADAPTER_CONFIG: content}, chosen
    lora = job.config.method.lora
    if lora is None:
        raise PlanError(
            f"{job.pth}: holds LoRA weights, but the config {job.config.name} says method.kind:"
            f" {job.config.method.kind}; give the config of the run that made it"
        )
    targets = sorted({_leaf(name) for name in names if _LORA.search(name)})
    saved = sorted({_leaf(name) for name in names if not _LORA.search(name) and not name.endswith(".bias")})
    biases = [name for name in names if name.endswith(".bias") and not _LORA.search(name)]
    settings: dict[str, Any] = {
        "base_model_name_or_path": job.config.model.name,
        "bias": ("lora_only" if all(".base_layer." in name for name in biases) else "all") if biases else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": lora.r,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": any("lora_magnitude_vector" in name for name in names),
        "use_rslora": lora.rslora,
    }
    check_config(settings, job.pth)
    return settings, {ADAPTER_CONFIG: (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()}, {}


def _leaf(name: str) -> str:
    """Give the last part of the path of the module that a tensor belongs to."""
    match = _LORA.search(name)
    path = name[: match.start()] if match is not None else name.rpartition(".")[0]
    return path.rpartition(".")[2]


def _model_plan(job: _Job, max_shard_size_bytes: int) -> PthPlan:
    """Plan a model folder."""
    texts: dict[str, bytes] = {}
    if job.trained.folder is not None:
        model_config: Mapping[str, Any] = read_object(job.trained.folder / "config.json")
        chosen = side_files(job.trained.folder)
    else:
        assert job.base is not None
        model_config, chosen, texts = _base_parts(job.pth, job.names, job.base)
    tensors = [taken_over(name, source, job.dtype) for name, source in job.names.items()]
    tensors.sort(key=lambda tensor: natural_order(tensor.name))
    texts["config.json"] = config_text(edited(model_config, ConfigEdits(dtype=job.dtype))).encode()
    return PthPlan(
        "model",
        into_shards(_without_tied_head(tensors, model_config, job.names), max_shard_size_bytes),
        texts,
        chosen,
        job.trained.notes,
        (job.pth, *(() if job.base is None else (job.base.folder,))),
        _fingerprints(job),
    )


def _base_parts(
    pth: Path, names: Mapping[str, Source], checkpoint: Checkpoint
) -> tuple[Mapping[str, Any], dict[str, Path], dict[str, bytes]]:
    """Give config.json and side files of the base, once the names and shapes of the weights agree with its files."""
    if internlm2.is_internlm2(checkpoint.config) and "model.embed_tokens.weight" in names:
        laid_out = layout.plan(checkpoint)
        _check_names(
            pth, names, {tensor.name: tensor.shape for tensor in laid_out.tensors}, checkpoint, laid_out.config
        )
        return laid_out.config, dict(laid_out.side_files), dict(laid_out.texts)
    shapes = {name: source.shape for name, source in checkpoint.tensors.items()}
    _check_names(pth, names, shapes, checkpoint, checkpoint.config)
    return checkpoint.config, side_files(checkpoint.folder), {}


def _check_names(
    pth: Path,
    names: Mapping[str, Source],
    shapes: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
) -> None:
    """Refuse weights that are not those of the base's architecture."""
    tied = find_tied(config, names)
    free = {tied.head} if tied is not None else set()
    missing = sorted(name for name in shapes if name not in names and name not in free and "rotary_emb" not in name)
    extra = sorted(name for name in names if name not in shapes and name not in free)
    if missing or extra:
        parts = [
            f"{len(found)} {what} (for example {', '.join(found[:3])})"
            for what, found in (("missing", missing), ("not in the base", extra))
            if found
        ]
        raise PlanError(f"{pth}: its tensors are not those of the base {checkpoint.folder}: {'; '.join(parts)}")
    for name, source in names.items():
        if name in shapes and shapes[name] != source.shape:
            raise PlanError(f"{pth}: {name!r} has shape {source.shape}, that of the base is {shapes[name]}")


def _without_tied_head(
    tensors: Sequence[OutputTensor], config: Mapping[str, Any], names: Mapping[str, Source]
) -> list[OutputTensor]:
    """Leave out the head where it is the embedding once more (state dicts hold tied tensors twice)."""
    tied = find_tied(config, names)
    return [tensor for tensor in tensors if tied is None or tensor.name != tied.head]


def _fingerprints(job: _Job) -> tuple[Fingerprint, ...]:
    own = tuple(fingerprint(path) for path in job.trained.files)
    return own if job.base is None else (*own, *job.base.fingerprints)
