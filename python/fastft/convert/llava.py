"""One LLaVA folder that transformers loads, out of its parts: a language model, a CLIP tower, a projector, adapters.

XTuner's LLaVA is trained and kept in parts (spec/formats.md 7.3). `plan_llava` puts them under the names that
`LlavaForConditionalGeneration` has on the hub and adds the adapters' updates on the way; nothing is loaded. `execute`
streams the plan and writes the processor beside it. `verify` holds such a folder against its parts.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastft import console, publish, stop
from fastft.convert import clip, merge, offsets, peft_layers, plan_table
from fastft.convert.adapter import Adapter
from fastft.convert.arithmetic import BLOCK_ELEMENTS, Arithmetic
from fastft.convert.folder import Checkpoint, existing_folder, read_checkpoint, read_weights
from fastft.convert.four_bit import FourBit
from fastft.convert.json_file import read_object
from fastft.convert.matching import NameOptions
from fastft.convert.model_config import config_text
from fastft.convert.plan import (
    Cast,
    Copy,
    OutputTensor,
    Part,
    Rows,
    into_shards,
    natural_order,
    taken_over,
)
from fastft.convert.rewrite import RewriteReport, peak_memory_bytes
from fastft.convert.sidefiles import copy_side_files, side_files
from fastft.convert.size import DEFAULT_MAX_SHARD_SIZE_BYTES, readable
from fastft.convert.source import CONFIG_DTYPES, Fingerprint, Source, check_unchanged, fingerprint
from fastft.convert.stream import write_shards
from fastft.convert.target import check_target
from fastft.convert.tied import find_tied
from fastft.errors import CheckpointError, FileError, PlanError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fastft.convert.verify import VerifyReport

IMAGE_TOKEN = "<image>"  # noqa: S105 - the mark that stands for an image, no password
# Folders of a result, as XTuner's pth_to_hf names them.
LLM_ADAPTER = "llm_adapter"
TOWER_ADAPTER = "visual_encoder_adapter"
TOWER = "visual_encoder"
PROJECTOR = "projector"

# A table that is made longer gets a multiple of so many rows, as XTuner does it.
ROWS_MULTIPLE = 64
_PROJECTOR_TYPE = "projector"
# The layers of a projector with two linear layers: XTuner's names, and those of transformers.
PROJECTOR_LAYERS = {"model.0": "linear_1", "model.2": "linear_2"}
# What transformers' LLaVA would leave out of a language model: what these do to the logits.
_ON_THE_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "dim_model_base")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_NEW_ROWS = "new rows"
_SCRATCH = "new rows.scratch"


@dataclass(frozen=True)
class Projector:
    """What turns features of the tower into embeddings of the language model.

    Attributes:
        config: its config.json, `model_type: projector`.
        tensors: `model.0.weight` (hidden of the language model, hidden of the tower), `model.2.weight`, and the biases.
        fingerprints: the files that were read.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Source]
    fingerprints: tuple[Fingerprint, ...] = ()

    @property
    def has_bias(self) -> bool:
        return any(name.endswith(".bias") for name in self.tensors)


@dataclass(frozen=True)
class LlavaParts:
    """What a LLaVA is put together from.

    Attributes:
        llm: the language model, with the names of its class in transformers (InternLM2 laid out as Llama).
        llm_adapter: trained on it; None: nothing, or the weights of `llm` are the trained ones.
        tower: a whole CLIP or its vision tower.
        tower_adapter: trained on it.
        projector: between the two.
        image_token_id: which token stands for an image.
        select_layer: the layer of the tower whose features are taken, counted from the end.
    """

    llm: Checkpoint
    tower: Checkpoint
    projector: Projector
    image_token_id: int
    llm_adapter: Adapter | None = None
    tower_adapter: Adapter | None = None
    select_layer: int = -2

    @property
    def fingerprints(self) -> tuple[Fingerprint, ...]:
        adapters = [adapter for adapter in (self.llm_adapter, self.tower_adapter) if adapter is not None]
        return (
            *self.llm.fingerprints,
            *self.tower.fingerprints,
            *self.projector.fingerprints,
            *(print_ for adapter in adapters for print_ in adapter.fingerprints),
        )

    @property
    def sources(self) -> tuple[Path, ...]:
        adapters = [adapter.folder for adapter in (self.llm_adapter, self.tower_adapter) if adapter is not None]
        return (self.llm.folder, self.tower.folder, *adapters)


@dataclass(frozen=True)
class LlavaPlan:
    """A plan.

    Attributes:
        parts: what it is made from.
        tensors: those of the result, in natural order; `Rows` that need new rows at the end name no source for them yet.
        config: the new config.json.
        num_rows: rows of the embedding and the head in the result.
        max_shard_size_bytes: greedy limit of a file.
        changed: names of the tensors that an adapter changes, or that are new rows.
        notes: what the user should know.
    """

    parts: LlavaParts
    tensors: tuple[OutputTensor, ...]
    config: Mapping[str, Any]
    num_rows: int
    max_shard_size_bytes: int
    changed: frozenset[str]
    notes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def is_result(folder: Path) -> bool:
    """Tell whether a folder is what the training of a LLaVA leaves: there is a projector in it."""
    return (folder / PROJECTOR / "config.json").is_file()


def read_projector(folder: Path) -> Projector:
    """Read a projector folder, as XTuner's tool and fastft's training write it.

    Raises:
        FileError: something is missing.
        CheckpointError: config.json and the tensors do not say the same.
        PlanError: it is none that transformers' LLaVA can hold.
    """
    folder = existing_folder(folder, "the projector")
    path = folder / "config.json"
    if not path.is_file():
        inside = folder / PROJECTOR
        hint = f"; did you mean {inside}?" if (inside / "config.json").is_file() else ""
        raise FileError(f"{folder}: no config.json there; give the folder of a projector{hint}")
    config = read_object(path)
    tensors, files = read_weights(folder)
    projector = Projector(config, tensors, tuple(fingerprint(file) for file in (path, *files)))
    check_projector(projector, str(folder))
    return projector


def check_projector(projector: Projector, where: str) -> None:
    """Hold a projector's tensors against its config.json.

    Raises:
        CheckpointError: they do not say the same.
        PlanError: it is none of two linear layers.
    """
    config, tensors = projector.config, projector.tensors
    if config.get("model_type") != _PROJECTOR_TYPE:
        raise CheckpointError(
            f"{where}: model_type is {config.get('model_type')!r}, that of a projector is 'projector'"
        )
    if config.get("depth", 2) != 2:
        raise PlanError(
            f"{where}: a projector of {config.get('depth')} layers; transformers' LLaVA has one of 2 (vision.projector)"
        )
    seen, hidden = config.get("visual_hidden_size"), config.get("llm_hidden_size")
    expected: dict[str, tuple[Any, ...]] = {"model.0.weight": (hidden, seen), "model.2.weight": (hidden, hidden)}
    if config.get("bias", True):
        expected |= {"model.0.bias": (hidden,), "model.2.bias": (hidden,)}
    found = {name: source.shape for name, source in tensors.items()}
    if found != expected:
        raise CheckpointError(
            f"{where}: its tensors are {_named_shapes(found)}; its config.json means {_named_shapes(expected)}"
        )


def projector_config(visual_hidden_size: int, llm_hidden_size: int, hidden_act: str, *, bias: bool) -> dict[str, Any]:
    """Make the config.json of a projector of two layers."""
    return {
        "architectures": ["ProjectorModel"],
        "bias": bias,
        "depth": 2,
        "hidden_act": hidden_act,
        "llm_hidden_size": llm_hidden_size,
        "model_type": _PROJECTOR_TYPE,
        "visual_hidden_size": visual_hidden_size,
    }


def llava_config(
    llm_config: Mapping[str, Any],
    tower_config: Mapping[str, Any],
    projector_config: Mapping[str, Any],
    *,
    image_token_id: int,
    select_layer: int,
    num_rows: int,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Make the config.json of a LLaVA from those of its parts.

    Args:
        llm_config: config.json of the language model.
        tower_config: of the tower alone (`clip.vision_config`).
        projector_config: of the projector.
        image_token_id: which token stands for an image.
        select_layer: the layer of the tower whose features are taken.
        num_rows: rows of the embedding.
        dtype: of the weights, as config.json calls it; None: not said.

    Raises:
        PlanError: transformers' LLaVA would not compute what the language model computes, or sizes do not fit.
    """
    for key in _ON_THE_LOGITS:
        if llm_config.get(key) not in (None, 1, 1.0):
            raise PlanError(
                f"a language model of type {llm_config.get('model_type')} changes its logits ({key}), which transformers'"
                " LLaVA does not do; choose another language model"
            )
    hidden = (projector_config.get("visual_hidden_size"), projector_config.get("llm_hidden_size"))
    needed = (tower_config.get("hidden_size"), llm_config.get("hidden_size"))
    if hidden != needed:
        raise PlanError(
            f"the projector goes from {hidden[0]} to {hidden[1]}; the tower has a width of {needed[0]}, the language model"
            f" of {needed[1]}: it was trained between other models"
        )
    layers = tower_config.get("num_hidden_layers")
    if not isinstance(layers, int) or not -layers - 1 <= select_layer <= layers:
        raise PlanError(f"vision.select_layer: {select_layer} is not allowed; the tower has {layers} layers")
    side = tower_config["image_size"] // tower_config["patch_size"]
    dropped = ("auto_map", "_name_or_path", "quantization_config", "transformers_version", *_DTYPE_KEYS)
    said = {} if dtype is None else {"dtype": dtype}
    text = {key: value for key, value in llm_config.items() if key not in dropped}
    vision = {key: value for key, value in tower_config.items() if key not in dropped}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        **said,
        "image_seq_length": side * side,
        "image_token_index": image_token_id,
        "multimodal_projector_bias": bool(projector_config.get("bias", True)),
        "projector_hidden_act": projector_config.get("hidden_act", "gelu"),
        "text_config": {**text, **said, "vocab_size": num_rows},
        "tie_word_embeddings": bool(llm_config.get("tie_word_embeddings", False)),
        "vision_config": {**vision, **said},
        "vision_feature_layer": select_layer,
        "vision_feature_select_strategy": "default",
    }


def rows_needed(num_rows: int, image_token_id: int, num_tokens: int) -> int:
    """Count the rows of the embedding that a tokenizer with `<image>` needs: as before where there is room.

    Args:
        num_rows: of the language model's embedding.
        image_token_id: of `<image>`.
        num_tokens: of the tokenizer, `<image>` included.
    """
    wanted = max(image_token_id + 1, num_tokens)
    return num_rows if wanted <= num_rows else -(-wanted // ROWS_MULTIPLE) * ROWS_MULTIPLE


def read_llm(folder: Path) -> Checkpoint:
    """Read a language model with the names of its class in transformers; InternLM2 is laid out as Llama first."""
    from fastft.convert import internlm2, layout

    checkpoint = read_checkpoint(folder)
    if internlm2.is_internlm2(checkpoint.config):
        return read_checkpoint(layout.without_remote_code(folder))
    return checkpoint


def plan_llava(
    parts: LlavaParts,
    *,
    num_tokens: int = 0,
    dtype: str = "auto",
    max_shard_size_bytes: int = DEFAULT_MAX_SHARD_SIZE_BYTES,
    four_bit: FourBit | Literal["auto"] | None = "auto",
) -> LlavaPlan:
    """Plan one folder out of the parts of a LLaVA; reads headers only.

    Args:
        parts: by `read_llm`, `read_checkpoint`, `read_adapter`, `read_projector`, or made from other files' tensors.
        num_tokens: of the tokenizer, `<image>` included; 0: no more than `image_token_id` says.
        dtype: auto (all parts get that of the language model), bf16, fp16 or fp32.
        max_shard_size_bytes: greedy limit of a file.
        four_bit: as in a merge of the language model.

    Raises:
        PlanError, CheckpointError: what does not fit together.
    """
    check_projector(parts.projector, "the projector")
    wanted = merge.output_dtype(dtype) or _dtype_of(parts.llm)
    tower = clip.vision_tower(parts.tower)
    kept = None if dtype == "auto" else wanted
    language = _planned(parts.llm, parts.llm_adapter, kept, four_bit, None)
    seeing = _planned(tower, parts.tower_adapter, wanted, "auto", NameOptions(is_clip=True))
    tied = find_tied(parts.llm.config, parts.llm.tensors)
    untied = tied is not None and any(tensor.name == tied.head for tensor in language)
    llm_config = {**parts.llm.config, **({"tie_word_embeddings": False} if untied else {})}
    before = _num_rows(parts.llm)
    now = max((tensor.shape[0] for tensor in language if _is_table(tensor.name)), default=before)
    num_rows = rows_needed(now, parts.image_token_id, num_tokens)
    adapters = [] if parts.llm_adapter is None else [(parts.llm_adapter, 1.0)]
    seen = merge.as_trained(parts.llm, adapters) if four_bit == "auto" else four_bit
    notes = merge.base_notes(parts.llm, adapters, seen, None, asked=four_bit != "auto")
    notes += [] if num_rows == before else [new_rows_note(before, num_rows)]
    tensors = [_longer(tensor, num_rows) if _is_table(tensor.name) else tensor for tensor in language]
    tensors = [replace(tensor, name=_language_name(tensor.name, parts.llm)) for tensor in tensors]
    tensors += [replace(tensor, name=_tower_name(tensor.name)) for tensor in seeing]
    for name, source in parts.projector.tensors.items():
        layer, _, kind = name.rpartition(".")
        tensors.append(taken_over(f"multi_modal_projector.{PROJECTOR_LAYERS[layer]}.{kind}", source, wanted))
    config = llava_config(
        llm_config,
        clip.vision_config(parts.tower.config),
        parts.projector.config,
        image_token_id=parts.image_token_id,
        select_layer=parts.select_layer,
        num_rows=num_rows,
        dtype=CONFIG_DTYPES[wanted],
    )
    peft_layers.check(tensors)
    return LlavaPlan(
        parts,
        tuple(sorted(tensors, key=lambda tensor: natural_order(tensor.name))),
        config,
        num_rows,
        max_shard_size_bytes,
        frozenset(tensor.name for tensor in tensors if not isinstance(tensor.operation, Copy | Cast)),
        tuple(notes),
    )


def new_rows_note(before: int, after: int) -> str:
    """Say what a longer embedding is."""
    return (
        f"{IMAGE_TOKEN} needs a row of its own: embedding and head grow from {before} to {after} rows (a multiple of"
        f" {ROWS_MULTIPLE}); the new rows are the mean of the others, and no answer is made of them"
    )


def _planned(
    base: Checkpoint,
    adapter: Adapter | None,
    dtype: str | None,
    four_bit: FourBit | Literal["auto"] | None,
    names: NameOptions | None,
) -> list[OutputTensor]:
    adapters = [] if adapter is None else [(adapter, 1.0)]
    planned = merge.planned_tensors(base, adapters, dtype, names, four_bit)
    # Saved by old versions: numbers that follow from the config.
    return [tensor for tensor in planned if not tensor.name.endswith("rotary_emb.inv_freq")]


def _dtype_of(llm: Checkpoint) -> str:
    return next((source.dtype for name, source in llm.tensors.items() if name.endswith("q_proj.weight")), None) or next(
        source.dtype for source in llm.tensors.values()
    )


def _num_rows(llm: Checkpoint) -> int:
    """Count the rows of the embedding.

    Raises:
        PlanError: there is none with the name of Llama's kin.
    """
    source = llm.tensors.get("model.embed_tokens.weight")
    if source is None:
        raise PlanError(
            f"{llm.folder}: a language model of type {llm.config.get('model_type')} has no model.embed_tokens; transformers'"
            " LLaVA takes models that are named as Llama is"
        )
    return source.shape[0]


def _is_table(name: str) -> bool:
    return name in ("model.embed_tokens.weight", "lm_head.weight")


def _language_name(name: str, llm: Checkpoint) -> str:
    if not name.startswith("model.") and name != "lm_head.weight":
        raise PlanError(
            f"{llm.folder}: transformers' LLaVA has no place for its tensor {name!r}; choose another language model"
        )
    return f"language_model.{name}"


def _tower_name(name: str) -> str:
    return f"vision_tower.{name if name.startswith(clip.PREFIX) else f'{clip.PREFIX}{name}'}"


def _longer(tensor: OutputTensor, num_rows: int) -> OutputTensor:
    """Give an embedding or a head more rows, the mean of those that it has; `with_new_rows` finds them."""
    missing = num_rows - tensor.shape[0]
    if missing <= 0:
        return tensor
    operation = tensor.operation
    if not isinstance(operation, Copy | Cast):
        raise PlanError(
            f"{tensor.name!r} gets an update and {missing} new rows for {IMAGE_TOKEN} at once, which is not built; merge"
            " the language model's adapter first (convert merge), and take the result as the language model"
        )
    source = operation.source
    new = Source(Path(_NEW_ROWS), 0, "F32", (missing, *tensor.shape[1:]))
    rows = Rows((Part(source, 0, tensor.shape[0]), Part(new, 0, missing)))
    return replace(tensor, shape=(num_rows, *tensor.shape[1:]), operation=rows)


def with_new_rows(tensors: Sequence[OutputTensor], folder: Path) -> tuple[OutputTensor, ...]:
    """Compute the new rows of longer tables and write them into `folder`; gives the plan that reads them there.

    The mean is summed in f64, in order, and kept in f32.
    """
    made = []
    for tensor in tensors:
        operation = tensor.operation
        if isinstance(operation, Rows) and operation.parts[-1].source.file == Path(_NEW_ROWS):
            table, new = operation.parts
            path = folder / f"new rows of {tensor.name}"
            source = _write_rows(path, _mean(table.source), new.count)
            operation = Rows((table, replace(new, source=source)))
            tensor = replace(tensor, operation=operation)  # noqa: PLW2901 - the same tensor, its rows known
        made.append(tensor)
    return tuple(made)


def _mean(table: Source) -> "NDArray[np.float32]":
    """Give the mean of the rows of a table, (hidden,) in f32."""
    import numpy as np

    num_rows, width = table.shape
    total: NDArray[np.float64] = np.zeros(width, np.float64)
    step = max(1, BLOCK_ELEMENTS // width)
    arithmetic = Arithmetic(Copy(table), table.dtype)
    for start in range(0, num_rows, step):
        total += arithmetic.rows(start, min(step, num_rows - start)).astype(np.float64).sum(axis=0)
    mean: NDArray[np.float32] = (total / num_rows).astype(np.float32)
    return mean


def _write_rows(path: Path, row: "NDArray[np.float32]", count: int) -> Source:
    """Write a row `count` times as raw f32."""
    import numpy as np

    path.write_bytes(np.broadcast_to(row, (count, row.shape[0])).astype("<f4").tobytes())
    return Source(path, 0, "F32", (count, row.shape[0]))


def execute(
    plan: LlavaPlan, save_path: Path, write_processor: Callable[[Path], None], *, force: bool = False
) -> RewriteReport:
    """Run a plan: `save_path` holds the whole LLaVA afterwards, or is as it was before.

    Args:
        plan: from `plan_llava`.
        save_path: folder to be made.
        write_processor: puts tokenizer, image processor and chat template into a folder.
        force: replace it where it exists.

    Raises:
        PlanError, FileError: the target is not allowed, or there is no room.
        CheckpointError: a value overflows or is not finite, an input changed, or the check of the result failed.
    """
    from fastft.convert.verify import check_sample

    started = time.monotonic()
    num_bytes = plan.num_bytes + peft_layers.scratch_bytes(plan.tensors)
    check_target(save_path, plan.parts.sources, num_bytes, force=force)
    for note in plan.notes:
        console.note(note)
    with publish.staged(save_path, force=force, num_bytes=num_bytes) as stage:
        scratch = stage / _SCRATCH
        scratch.mkdir()
        tensors = with_new_rows(offsets.found(peft_layers.materialized(plan.tensors, stage)), scratch)
        write_shards(into_shards(tensors, plan.max_shard_size_bytes), stage, "putting together")
        num_checked = check_sample(tensors, stage)
        peft_layers.remove_scratch(stage)
        shutil.rmtree(scratch)
        copy_side_files(side_files_of(plan.parts), stage)
        (stage / "config.json").write_text(config_text(plan.config), encoding="utf-8")
        write_processor(stage)
        check_unchanged(plan.parts.fingerprints)
    return RewriteReport(
        "put together",
        save_path,
        plan.num_bytes,
        time.monotonic() - started,
        len(plan.tensors),
        len(plan.changed),
        num_checked,
        peak_memory_bytes(),
    )


def side_files_of(parts: LlavaParts) -> dict[str, Path]:
    """Choose what is carried as it is: the language model's generation settings and licence."""
    found = side_files(parts.llm.folder)
    return {
        name: path
        for name, path in found.items()
        if name == "generation_config.json" or name.startswith(("LICENSE", "NOTICE", "USE_POLICY"))
    }


def as_table(plan: LlavaPlan) -> str:
    """Write a plan as text: a line per tensor, then what should be known."""
    parts = plan.parts
    lines = [f"language model  {parts.llm.folder}", f"vision tower    {parts.tower.folder}"]
    lines += [
        f"adapter         {adapter.folder}"
        for adapter in (parts.llm_adapter, parts.tower_adapter)
        if adapter is not None
    ]
    shards = into_shards(plan.tensors, plan.max_shard_size_bytes)
    lines += ["", *plan_table.tensor_lines(shards)]
    lines.append(
        f"{len(plan.tensors)} tensors, {len(plan.changed)} changed, {readable(plan.num_bytes)} in {len(shards)}"
        f" file{'s' if len(shards) > 1 else ''}"
    )
    lines.append("with it: config.json, tokenizer, processor, chat template")
    return "\n".join([*lines, *(f"note: {note}" for note in plan.notes)])


def verify(plan: LlavaPlan, merged: Path) -> "VerifyReport":
    """Compute every tensor of a LLaVA folder again from its parts, and compare.

    Raises:
        FileError, CheckpointError: the folder cannot be read.
    """
    from fastft.convert.verify import compare

    with stop.held(), tempfile.TemporaryDirectory() as folder:
        return compare(merged, offsets.found(with_new_rows(plan.tensors, Path(folder))))


def _named_shapes(shapes: Mapping[str, tuple[Any, ...]]) -> str:
    return ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in sorted(shapes.items())) or "none"
