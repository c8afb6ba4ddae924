"""A LLaVA checkpoint of XTuner's becomes the folders that XTuner's tools read, or one that transformers loads.

The parts side by side: `llm_adapter/` or the language model in the folder itself, `visual_encoder_adapter/` or
`visual_encoder/`, and `projector/`. As in XTuner only the language model is cast; the other parts keep the dtype they were
trained in. One folder (`--save-format huggingface`) is planned as a merge of the parts is (`llava`), all in one dtype.
Source: xtuner/model/llava.py and xtuner/model/modules/projector, v0.1.23 (spec/formats.md 7.3).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastft.config.schema import Model
from fastft.convert import internlm2, layout, llava, llava_result
from fastft.convert.adapter import Adapter, canonical_key, understood
from fastft.convert.clip import vision_config, vision_tower
from fastft.convert.folder import Checkpoint, read_checkpoint
from fastft.convert.json_file import read_object
from fastft.convert.model_config import ConfigEdits, config_text, edited
from fastft.convert.plan import Copy, OutputTensor, Rows, Shard, natural_order, taken_over
from fastft.convert.pth_parts import (
    Job,
    Part,
    adapter_part,
    adapter_settings,
    base_of,
    model_part,
    one_dtype,
    own_names,
    plain_names,
    weights_of,
)
from fastft.convert.recorded import LoraSettings
from fastft.convert.sidefiles import side_files
from fastft.convert.source import CONFIG_DTYPES, DTYPES, Joined, Source, fingerprint, joined, rows_of
from fastft.convert.trained import CONFIG_JSON, LORA
from fastft.errors import PlanError

PROJECTOR = "projector"
_LAYER = re.compile(r"model\.(\d+)\.(weight|bias)")
_PARTS = {"llm.": "language model", "visual_encoder.": "vision tower", "projector.": "projector"}


@dataclass(frozen=True, slots=True)
class ProjectorShape:
    """What the tensors of a projector say: linear layers with a GELU between each two."""

    visual_hidden_size: int
    llm_hidden_size: int
    depth: int
    bias: bool


@dataclass(frozen=True)
class OneFolder:
    """A whole LLaVA to be written.

    Attributes:
        plan: of its tensors.
        write_processor: puts tokenizer, image processor and chat template into a folder.
        notes: what the user should know, a sentence each.
    """

    plan: llava.LlavaPlan
    write_processor: Callable[[Path], None]
    notes: tuple[str, ...]


def parts(job: Job) -> tuple[tuple[Part, ...], list[Checkpoint], tuple[str, ...]]:
    """Plan the folders of the parts.

    Returns:
        the folders, what they were held against, and notes.

    Raises:
        PlanError: a tensor belongs to no part, or a part cannot be converted.
    """
    groups, notes = _split(job)
    made: list[Part] = []
    bases: list[Checkpoint] = []
    if llm := groups["llm."]:
        part, base = _llm_part(job, llm)
        made.append(part)
        bases += [] if base is None else [base]
    vision_job = replace(job, dtype=None)
    if vision := groups["visual_encoder."]:
        part, base = _vision_part(vision_job, vision)
        made.append(part)
        bases += [] if base is None else [base]
    if projector := groups["projector."]:
        made.append(projector_part(vision_job, projector))
    if not made or made[0].folder:
        made.insert(0, Part("", "model.safetensors", (), {}, {}))
    if job.dtype is not None and len(made) > 1:
        notes.append("only the language model is cast, as in XTuner; projector and vision tower keep their dtype")
    return tuple(made), bases, tuple(notes)


def one_folder(job: Job) -> OneFolder:
    """Plan the whole LLaVA as one folder that transformers loads: what was trained, and the rest of its base models.

    Raises:
        PlanError: a part is missing or cannot be converted, or no transformers' LLaVA holds it.
        HubError: a base model is not on this machine and cannot be fetched.
    """
    groups, notes = _split(job)
    projector = _projector(job, groups["projector."])
    llm, llm_adapter, place = _language_model(job, groups["llm."])
    tower, tower_adapter = _tower(job, groups["visual_encoder."])
    words, image_token_id, write = llava_result.new_processor(place, tower.folder, job.run.model)
    layer = job.run.visual_select_layer
    parts = llava.LlavaParts(
        llm, tower, projector, image_token_id, llm_adapter, tower_adapter, -2 if layer is None else layer
    )
    plan = llava.plan_llava(
        parts,
        num_tokens=len(words),
        dtype=next((word for word, dtype in DTYPES.items() if dtype == job.dtype), "auto"),
        max_shard_size_bytes=job.max_shard_size_bytes,
    )
    return OneFolder(plan, write, tuple(notes))


def _projector(job: Job, names: Mapping[str, Source]) -> llava.Projector:
    if not names:
        raise PlanError(
            f"{job.pth}: holds no projector (projector.model.0.weight and so on), without which there is no whole LLaVA;"
            " leave --save-format, which writes the parts that are there"
        )
    config = _projector_config(projector_shape(names, job.pth))
    return llava.Projector(config, names, tuple(map(fingerprint, job.trained.files)))


def _language_model(job: Job, names: Mapping[str, Source]) -> tuple[Checkpoint, Adapter | None, Path]:
    """Give the language model, its adapter, and the folder of its tokenizer."""
    from fastft.convert.pth import base_folder
    from fastft.hub import locate

    if names and not is_adapter(names):
        folder = base_folder(job.run, needed=True)
        assert folder is not None
        return _whole_language_model(job, names, folder), None, folder
    folder = locate.model(job.run.model)
    llm = llava.read_llm(folder)
    if not names:
        return llm, None, folder
    adapter = _adapter(job, names, job.run.lora, job.run.model.name, "CAUSAL_LM")
    return llm, adapter, folder


def _whole_language_model(job: Job, names: Mapping[str, Source], folder: Path) -> Checkpoint:
    """The base with the trained weights in place of its own; InternLM2's in the layout of Llama."""
    base, _ = base_of(folder)
    if base is None:
        raise PlanError(f"{job.pth}: {folder} has no weights to hold its language model against; give the whole folder")
    if not internlm2.is_internlm2(base.config):
        return replace(base, tensors=weights_of(job.pth, names, base))
    as_llama = replace(base, config=layout.llama_config(base.config))
    if "model.embed_tokens.weight" in names:
        shapes = {tensor.name: tensor.shape for tensor in layout.llama_tensors(base)}
        return replace(as_llama, tensors=weights_of(job.pth, names, as_llama, shapes))
    trained = replace(base, tensors=weights_of(job.pth, names, base))
    return replace(as_llama, tensors={tensor.name: _source_of(tensor) for tensor in layout.llama_tensors(trained)})


def _source_of(tensor: OutputTensor) -> Source:
    """Where the numbers of a tensor lie that is taken over, or is made of rows of others."""
    operation = tensor.operation
    if isinstance(operation, Rows):
        rows = (rows_of(part.source, part.start, part.count) for part in operation.parts)
        return joined(list(rows), tensor.shape)
    assert isinstance(operation, Copy)
    return operation.source


def _tower(job: Job, names: Mapping[str, Source]) -> tuple[Checkpoint, Adapter | None]:
    if job.run.visual_encoder is None:
        raise PlanError(
            f"{job.pth}: one folder holds the vision tower too, but {job.run.place} does not say which one it was"
            " (visual_encoder, vision.tower); give the config of the run"
        )
    folder = vision_folder(job, needed=True)
    assert folder is not None
    base = read_checkpoint(folder)
    tower = replace(vision_tower(base), config=vision_config(base.config))
    if not names:
        return tower, None
    if not is_adapter(names):
        return replace(tower, tensors=weights_of(job.pth, names, tower)), None
    return tower, _adapter(job, names, _visual_lora(job), job.run.visual_encoder or "", None)


def _adapter(
    job: Job, names: Mapping[str, Source], lora: LoraSettings | None, base_name: str, task_type: str | None
) -> Adapter:
    """Give an adapter to compute with.

    Raises:
        PlanError: a tensor of it lies in pieces, as sharded trainings leave them.
    """
    kept, settings, _, _ = adapter_settings(job, names, lora, base_name, task_type)
    torn = next((name for name, source in kept.items() if isinstance(source.lens, Joined)), None)
    if torn is not None:
        raise PlanError(
            f"{job.pth}: its {torn!r} lies in pieces, which can be written but not computed with; leave --save-format, which"
            " writes the parts, and make one folder of them with `fastft convert merge`"
        )
    return replace(understood(kept, settings, job.trained.files[-1]), folder=job.pth)


def _split(job: Job) -> tuple[dict[str, dict[str, Source]], list[str]]:
    """Sort the tensors by part, by their plain names; what was not trained is left out."""
    groups: dict[str, dict[str, Source]] = {prefix: {} for prefix in _PARTS}
    for own, source in job.trained.tensors.items():
        name = canonical_key(own)
        prefix = next((prefix for prefix in _PARTS if name.startswith(prefix)), None)
        if prefix is None:
            raise PlanError(f"{job.pth}: {name!r} belongs to no part of a LLaVA model ({', '.join(_PARTS)})")
        groups[prefix][own] = source
    notes: list[str] = []
    found: dict[str, dict[str, Source]] = {}
    known = job.trained.trained
    biases = {"llm.": job.run.lora, "visual_encoder.": job.run.visual_lora}
    for prefix, names in groups.items():
        lora = biases.get(prefix)
        if names and known is not None and not any(name in known for name in names):
            notes.append(f"{len(names)} tensors of the {_PARTS[prefix]} are left out: it was not trained")
            found[prefix] = {}
            continue
        kept, num_frozen = own_names(names, known, "none" if lora is None else lora.bias)
        if num_frozen:
            notes.append(f"{num_frozen} tensors of the frozen {_PARTS[prefix]} beside its adapter are left out")
        found[prefix] = plain_names(kept, job.pth, prefix)
    return found, notes


def is_adapter(names: Mapping[str, Source]) -> bool:
    """Tell whether the tensors of a part are an adapter's."""
    return any(map(LORA.search, names))


def _llm_part(job: Job, names: Mapping[str, Source]) -> tuple[Part, Checkpoint | None]:
    from fastft.convert.pth import base_folder

    adapter = is_adapter(names)
    folder = base_folder(job.run, needed=not adapter)
    base, said = (None, ()) if folder is None else base_of(folder)
    if adapter:
        part = adapter_part(job, names, job.run.lora, base, folder="llm_adapter", base_name=job.run.model.name)
    else:
        part = model_part(job, names, base, folder)
    return replace(part, notes=(*said, *part.notes)), base


def _vision_part(job: Job, names: Mapping[str, Source]) -> tuple[Part, Checkpoint | None]:
    adapter = is_adapter(names)
    folder = vision_folder(job, needed=not adapter)
    tower = None if folder is None else vision_tower(read_checkpoint(folder))
    if adapter:
        part = adapter_part(
            job,
            names,
            _visual_lora(job),
            tower,
            folder="visual_encoder_adapter",
            base_name=job.run.visual_encoder or "",
            task_type=None,
        )
        return part, tower
    assert folder is not None
    assert tower is not None
    part = model_part(job, names, tower, folder, folder="visual_encoder")
    config = edited(vision_config(read_object(folder / CONFIG_JSON)), ConfigEdits(dtype=one_dtype(names)))
    chosen = side_files(folder, vision_only=True)
    return replace(part, texts={CONFIG_JSON: config_text(config).encode()}, side_files=chosen), tower


def _visual_lora(job: Job) -> LoraSettings:
    if job.run.visual_lora is None:
        raise PlanError(
            f"{job.pth}: holds an adapter of the vision tower, but {job.run.place} does not say its alpha"
            " (visual_encoder_lora); give the XTuner config of the run"
        )
    return job.run.visual_lora


def vision_folder(job: Job, *, needed: bool) -> Path | None:
    """Find the folder of the vision tower that the training began with.

    Raises:
        PlanError: it is needed, and nothing says which it is.
    """
    from fastft.hub import locate

    name = job.run.visual_encoder
    if name is None:
        if not needed:
            return None
        raise PlanError(
            f"{job.pth}: holds a vision tower, but {job.run.place} does not say which one it was (visual_encoder); give"
            " the XTuner config of the run"
        )
    if Path(name).expanduser().is_dir() or needed:
        return locate.model(Model.model_validate({"name": name}))
    return None


def projector_shape(names: Mapping[str, Source], pth: Path) -> ProjectorShape:
    """Read the shape of a projector off its tensors.

    Args:
        names: `model.0.weight` (llm, visual), `model.0.bias`, `model.2.weight` (llm, llm), ...
        pth: the checkpoint, for complaints.

    Raises:
        PlanError: it is another kind of projector.
    """
    layers = {int(match[1]) for name in names if (match := _LAYER.fullmatch(name)) is not None}
    weights = [names.get(f"model.{layer}.weight") for layer in sorted(layers)]
    has_bias = {f"model.{layer}.bias" in names for layer in layers}
    shapes = [weight.shape for weight in weights if weight is not None]
    if (
        sorted(layers) != list(range(0, 2 * len(layers), 2))
        or len(names) != len(shapes) * (2 if True in has_bias else 1)
        or len(has_bias) != 1
        or len(shapes) != len(layers)
        or any(len(shape) != 2 for shape in shapes)
        or any(shape != (shapes[0][0], shapes[0][0]) for shape in shapes[1:])
        or any(names[f"model.{n}.bias"].shape != shapes[0][:1] for n in layers if f"model.{n}.bias" in names)
    ):
        raise PlanError(
            f"{pth}: its projector is not XTuner's (linear layers model.0, model.2, ... with a GELU between): it holds"
            f" {', '.join(sorted(names)[:6])}"
        )
    return ProjectorShape(shapes[0][1], shapes[0][0], len(shapes), True in has_bias)


def projector_part(job: Job, names: Mapping[str, Source]) -> Part:
    """Plan the folder of the projector."""
    shape = projector_shape(names, job.pth)
    dtype = one_dtype(names)
    said = {} if dtype is None else {"torch_dtype": CONFIG_DTYPES[dtype]}
    config = dict(sorted({**_projector_config(shape), **said}.items()))
    tensors = [taken_over(name, names[name], job.dtype) for name in sorted(names, key=natural_order)]
    shards = (Shard("model.safetensors", tuple(tensors)),)
    texts = {CONFIG_JSON: (json.dumps(config, indent=2) + "\n").encode()}
    return Part(PROJECTOR, "model.safetensors", shards, texts, {})


def _projector_config(shape: ProjectorShape) -> dict[str, Any]:
    config = llava.projector_config(shape.visual_hidden_size, shape.llm_hidden_size, "gelu", bias=shape.bias)
    return {**config, "depth": shape.depth}
