"""The folders that a checkpoint becomes: a PEFT adapter, or the weights of a whole model with what belongs to them.

Comes from `trained` and `recorded`; `pth` and `pth_llava` put the folders together. Everything that does not fit the
base is refused here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastft.convert import internlm2, layout
from fastft.convert.adapter import CONFIG as ADAPTER_CONFIG
from fastft.convert.adapter import TRAINING, canonical_key, check_config, read_adapter, understood
from fastft.convert.adapter import WEIGHTS as ADAPTER_WEIGHTS
from fastft.convert.folder import Checkpoint, read_checkpoint, refuse_quantized
from fastft.convert.json_file import read_object, read_regular_file
from fastft.convert.model_config import ConfigEdits, config_text, edited
from fastft.convert.names import join
from fastft.convert.plan import OutputTensor, Shard, into_shards, natural_order, taken_over
from fastft.convert.recorded import LoraSettings, Run
from fastft.convert.sidefiles import side_files
from fastft.convert.source import CONFIG_DTYPES, Source, fingerprint, read_bytes
from fastft.convert.tied import find_tied, is_embedding
from fastft.convert.trained import CONFIG_JSON, LORA, Trained, has_weights
from fastft.errors import CheckpointError, PlanError

# Numbers that a module counts or computes for itself; some versions of transformers save them.
_COUNTERS = ("rotary_emb.inv_freq", "position_ids", ".attn.masked_bias", ".attn.bias")
_COMPARED_BYTES = 8 * 1024 * 1024
_SCORE = "score.weight"
# What an embedding is called in the bare model that XTuner's reward models hold.
_BARE = re.compile(r"(layers|h|blocks)\.\d+\.|(embed_tokens|tok_embeddings|norm|wte|ln_f)\.")


@dataclass(frozen=True)
class Part:
    """One folder of the result.

    Attributes:
        folder: its name inside the result; empty for the result itself.
        single: the name of the one file of weights, which an index is named after.
        shards: the files of weights.
        texts: name to content of the small files that are made.
        side_files: name to the file to copy.
        notes: what the user should know, a sentence each.
    """

    folder: str
    single: str
    shards: tuple[Shard, ...]
    texts: Mapping[str, bytes]
    side_files: Mapping[str, Path]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """What all folders are made from.

    Attributes:
        run: what is known of the training.
        pth: the checkpoint, as the user named it.
        trained: what was found there.
        dtype: of the result, as safetensors names it; None: as trained.
        max_shard_size_bytes: greedy limit of a file of a whole model.
    """

    run: Run
    pth: Path
    trained: Trained = field(repr=False)
    dtype: str | None
    max_shard_size_bytes: int


def base_of(folder: Path) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """Read the base that a checkpoint is held against.

    Where its folder has no weights, the names and shapes are those of the class that config.json names.

    Returns:
        the base, or None where neither its files nor its class give its names; and what to say then.

    Raises:
        FileError, CheckpointError, PlanError: its folder is broken, or holds quantized weights.
    """
    if has_weights(folder) or not (folder / CONFIG_JSON).exists():
        return read_checkpoint(folder), ()
    from fastft.convert.names_transformers import build_model

    config = read_object(folder / CONFIG_JSON)
    refuse_quantized(folder, config)
    try:
        state = build_model(config, None).state_dict()
    except PlanError as error:
        return None, (f"{folder} has no weights to check the names against, and {error}; they are not checked",)
    path = (folder / CONFIG_JSON).resolve()
    tensors = {name: Source(path, 0, "F32", tuple(tensor.shape)) for name, tensor in state.items()}
    return Checkpoint(folder.resolve(), config, tensors, (fingerprint(path),)), ()


def own_names(names: Mapping[str, Source], trained: frozenset[str] | None, bias: str) -> tuple[dict[str, Source], int]:
    """Leave out the frozen base that some trainers save beside an adapter.

    Args:
        names: of one model, by the trainer's names.
        trained: those that the optimizer has, where that is known.
        bias: which biases were trained: none, all or lora_only.

    Returns:
        what was trained, and how many tensors were left out.
    """
    if not any(map(LORA.search, names)):
        return dict(names), 0
    if trained is not None and any(name in trained for name in names):
        kept = {name: source for name, source in names.items() if name in trained}
        return kept, len(names) - len(kept)
    paths = {name[: match.start()] for name in names if (match := LORA.search(name)) is not None}
    if not all(f"{path}.base_layer.weight" in names for path in paths):
        return dict(names), 0

    def is_own(name: str) -> bool:
        if LORA.search(name) or ".modules_to_save." in name or ".token_adapter." in name or ".original_module." in name:
            return True
        return name.endswith(".bias") and (bias == "all" or (bias == "lora_only" and ".base_layer." in name))

    kept = {name: source for name, source in names.items() if is_own(name)}
    return kept, len(names) - len(kept)


def plain_names(names: Mapping[str, Source], pth: Path, prefix: str) -> dict[str, Source]:
    """Strip what training frameworks put before and into the names of a model's tensors.

    Raises:
        CheckpointError: two names become one.
    """
    plain = {_plain_name(name, prefix): source for name, source in names.items()}
    if len(plain) != len(names):
        raise CheckpointError(f"{pth}: two of its tensors have one name once prefixes are stripped")
    return plain


def _plain_name(name: str, prefix: str) -> str:
    name = canonical_key(name)
    name = canonical_key(name.removeprefix(prefix))
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".").removesuffix(".default")


def adapter_part(
    job: Job,
    names: Mapping[str, Source],
    lora: LoraSettings | None,
    base: Checkpoint | None,
    *,
    folder: str = "",
    base_name: str,
    task_type: str | None = "CAUSAL_LM",
    reward_head: Source | None = None,
) -> Part:
    """Plan a PEFT adapter folder.

    Args:
        job: what it is made from.
        names: its tensors by their plain names.
        lora: the training's settings.
        base: the model that it changes; None: it is not on this machine.
        folder: its name inside the result.
        base_name: the base's name, for adapter_config.json.
        task_type: of PEFT.
        reward_head: the head of a reward model, which goes along as `score`.
    """
    kept, settings, texts, chosen = adapter_settings(job, names, lora, base_name, task_type)
    adapter = understood(kept, settings, job.trained.files[-1])
    notes = []
    if base is None:
        notes.append(f"the base {base_name} is not on this machine, so the names are not checked against it")
    else:
        join(adapter, base, find_tied(base.config, base.tensors))
    if len(kept) != len(names):
        notes.append(f"{len(names) - len(kept)} untrained originals of modules_to_save are left out")
    if reward_head is not None:
        kept[_SCORE] = reward_head
    tensors = [
        taken_over(f"base_model.model.{name}", source, job.dtype)
        for name, source in sorted(kept.items(), key=lambda item: natural_order(item[0]))
    ]
    shards = (Shard(ADAPTER_WEIGHTS, tuple(tensors)),)
    return Part(folder, ADAPTER_WEIGHTS, shards, texts, chosen, tuple(notes))


def adapter_settings(
    job: Job, names: Mapping[str, Source], lora: LoraSettings | None, base_name: str, task_type: str | None
) -> tuple[dict[str, Source], dict[str, Any], dict[str, bytes], dict[str, Path]]:
    """Give an adapter's tensors and its settings, the checkpoint's own or those of the run.

    Returns:
        the tensors without untrained originals; the settings; the files made from them; the files to copy.

    Raises:
        PlanError: nobody says the settings, or they are those of another run.
    """
    kept = {name: source for name, source in names.items() if ".original_module." not in name}
    return kept, *_settings(job, kept, lora, base_name, task_type)


def _settings(
    job: Job, names: Mapping[str, Source], lora: LoraSettings | None, base_name: str, task_type: str | None
) -> tuple[dict[str, Any], dict[str, bytes], dict[str, Path]]:
    own = job.trained.folder
    if own is not None and (own / ADAPTER_CONFIG).exists():
        chosen = side_files(own)
        if (own / TRAINING).is_file():
            chosen[TRAINING] = own / TRAINING
        content = read_regular_file(own / ADAPTER_CONFIG)
        return dict(read_adapter_config(own)), {ADAPTER_CONFIG: content}, chosen
    if lora is None:
        raise PlanError(
            f"{job.pth}: holds LoRA weights, but {job.run.place} says method.kind: {job.run.method}; give the config of"
            " the run that made it"
        )
    _check_rank(job, names, lora)
    biases = [name for name in names if name.endswith(".bias") and not LORA.search(name)]
    saved = sorted({_leaf(name) for name in names if not LORA.search(name) and not name.endswith(".bias")})
    if task_type == "SEQ_CLS":
        saved = sorted({*saved, _SCORE.removesuffix(".weight")})
    settings: dict[str, Any] = {
        "base_model_name_or_path": base_name,
        "bias": ("lora_only" if all(".base_layer." in name for name in biases) else "all") if biases else "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": lora.r,
        "target_modules": sorted({_leaf(name) for name in names if LORA.search(name)}),
        "task_type": task_type,
        "use_dora": any("lora_magnitude_vector" in name for name in names),
        "use_rslora": lora.rslora,
    }
    check_config(settings, job.pth)
    return settings, {ADAPTER_CONFIG: (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()}, {}


def _check_rank(job: Job, names: Mapping[str, Source], lora: LoraSettings) -> None:
    """Say early, and in terms of the config, that the settings are those of another run."""
    ranks = {source.shape[0] for name, source in names.items() if ".lora_A." in name and source.shape}
    if ranks and ranks != {lora.r}:
        found = ", ".join(map(str, sorted(ranks)))
        raise PlanError(
            f"{job.pth}: its LoRA has rank {found}, but {job.run.place} says r {lora.r}; is it the config of another run?"
            " alpha must be that of the run too"
        )


def read_adapter_config(folder: Path) -> Mapping[str, Any]:
    """Read and check adapter_config.json of a checkpoint folder, whose weights may lie elsewhere."""
    if (folder / ADAPTER_WEIGHTS).exists():
        return read_adapter(folder).config
    config = read_object(folder / ADAPTER_CONFIG)
    check_config(config, folder / ADAPTER_CONFIG)
    return config


def _leaf(name: str) -> str:
    """Give the last part of the path of the module that a tensor belongs to."""
    match = LORA.search(name)
    path = name[: match.start()] if match is not None else name.rpartition(".")[0]
    return path.rpartition(".")[2]


def model_part(
    job: Job, names: Mapping[str, Source], base: Checkpoint | None, base_folder: Path | None, *, folder: str = ""
) -> Part:
    """Plan a folder with a whole model.

    Args:
        job: what it is made from.
        names: its tensors by their plain names.
        base: whose names and shapes they must have; None: not known.
        base_folder: whose config.json, tokenizer and code go along where the checkpoint has none.
        folder: its name inside the result.
    """
    texts: dict[str, bytes] = {}
    own = job.trained.folder
    notes: list[str] = []
    names, dropped = _without_counters(names, {} if base is None else base.tensors)
    if dropped:
        notes.append(
            f"{len(dropped)} tensors that the model computes for itself are left out (for example {dropped[0]})"
        )
    if own is not None and (own / CONFIG_JSON).exists():
        model_config: Mapping[str, Any] = read_object(own / CONFIG_JSON)
        refuse_quantized(own, model_config)
        if base is not None:
            _check_names(job.pth, names, {}, base, model_config)
        chosen = side_files(own) if base_folder is None else side_files(base_folder, [own])
    else:
        assert base_folder is not None
        model_config, chosen, texts = _base_parts(job.pth, names, base, base_folder)
    edits = ConfigEdits(dtype=job.dtype or one_dtype(names))
    texts[CONFIG_JSON] = config_text(edited(model_config, edits)).encode()
    tensors = _tensors(names, model_config, job.dtype)
    shards = into_shards(tensors, job.max_shard_size_bytes)
    return Part(folder, "model.safetensors", shards, texts, chosen, tuple(notes))


def reward_part(
    job: Job, names: Mapping[str, Source], head: Source, base: Checkpoint | None, base_folder: Path
) -> Part:
    """Plan a folder with a reward model, as the class of transformers that gives a sequence one number.

    Raises:
        PlanError: transformers has no such class for the base.
    """
    config = sequence_config(read_object(base_folder / CONFIG_JSON), base_folder)
    if base is not None:
        shapes = {name: source for name, source in base.tensors.items() if not name.startswith(("lm_head.", "output."))}
        names, _ = _without_counters(names, shapes)
        _check_names(job.pth, names, {n: s.shape for n, s in shapes.items()}, base, {"tie_word_embeddings": False})
    edits = ConfigEdits(dtype=job.dtype or one_dtype({**names, _SCORE: head}))
    texts = {CONFIG_JSON: config_text(edited(config, edits)).encode()}
    tensors = _tensors({**names, _SCORE: head}, config, job.dtype)
    shards = into_shards(tensors, job.max_shard_size_bytes)
    note = f"a reward model: its head is written as {_SCORE}, and the class is {config['architectures'][0]}"
    return Part("", "model.safetensors", shards, texts, side_files(base_folder), (note,))


def sequence_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Make the config.json of a reward model from that of its base.

    Raises:
        PlanError: transformers has no class that gives a sequence of this model one number.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    kind = config.get("model_type")
    name = CLASSES.get(kind) if isinstance(kind, str) else None
    if name is None:
        raise PlanError(
            f"{folder}: transformers has no class for reward models of model_type {kind!r}; v_head cannot be kept. Convert"
            " it with the code that trained it"
        )
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    return {**kept, "architectures": [name], "num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def one_dtype(names: Mapping[str, Source]) -> str | None:
    """The dtype of all floating tensors; None where they differ."""
    found = {source.dtype for source in names.values()} & set(CONFIG_DTYPES)
    return found.pop() if len(found) == 1 else None


def with_model_prefix(names: Mapping[str, Source]) -> dict[str, Source]:
    """Name the tensors of a bare model as they are called inside a class with a head."""
    return {f"model.{name}" if _BARE.match(name) else name: source for name, source in names.items()}


def _tensors(names: Mapping[str, Source], config: Mapping[str, Any], dtype: str | None) -> list[OutputTensor]:
    """Give the tensors in order; a tied head is left out, since it is the embedding once more.

    Raises:
        PlanError: it is not.
    """
    tied = find_tied(config, names)
    if tied is not None and tied.head in names and not _same_numbers(names[tied.head], names[tied.embedding]):
        raise PlanError(
            f"{tied.head} and {tied.embedding} differ, but the config.json says that they are tied"
            " (tie_word_embeddings); set it to false there if they were trained apart"
        )
    tensors = [taken_over(name, source, dtype) for name, source in names.items() if tied is None or name != tied.head]
    return sorted(tensors, key=lambda tensor: natural_order(tensor.name))


def weights_of(
    pth: Path, names: Mapping[str, Source], base: Checkpoint, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Source]:
    """Give the weights of a whole model once their names and shapes agree with its base; a tied head is left out.

    Args:
        pth: the checkpoint.
        names: its tensors by their plain names.
        base: what the training began with.
        shapes: those that the weights must have, where they are not those of the base's files.

    Raises:
        PlanError: they do not agree.
    """
    kept, _ = _without_counters(names, base.tensors)
    _check_names(pth, kept, shapes or {}, base, base.config)
    return {tensor.name: names[tensor.name] for tensor in _tensors(kept, base.config, None)}


def _same_numbers(one: Source, other: Source) -> bool:
    if one == other:
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(
        read_bytes(one, start, count) == read_bytes(other, start, count)
        for start in range(0, one.nbytes, _COMPARED_BYTES)
        for count in (min(_COMPARED_BYTES, one.nbytes - start),)
    )


def _without_counters(names: Mapping[str, Source], known: Mapping[str, Source]) -> tuple[dict[str, Source], list[str]]:
    dropped = [name for name in names if name.endswith(_COUNTERS) and name not in known]
    return {name: source for name, source in names.items() if name not in set(dropped)}, dropped


def _base_parts(
    pth: Path, names: Mapping[str, Source], base: Checkpoint | None, folder: Path
) -> tuple[Mapping[str, Any], dict[str, Path], dict[str, bytes]]:
    """Give config.json and side files of the base, once the names and shapes of the weights agree with its files."""
    if base is None:
        return read_object(folder / CONFIG_JSON), side_files(folder), {}
    if internlm2.is_internlm2(base.config) and "model.embed_tokens.weight" in names:
        laid_out = layout.plan(base)
        shapes = {tensor.name: tensor.shape for tensor in laid_out.tensors}
        _check_names(pth, names, shapes, base, laid_out.config)
        return laid_out.config, dict(laid_out.side_files), dict(laid_out.texts)
    _check_names(pth, names, {name: source.shape for name, source in base.tensors.items()}, base, base.config)
    return base.config, side_files(base.folder), {}


def _check_names(
    pth: Path,
    names: Mapping[str, Source],
    shapes: Mapping[str, tuple[int, ...]],
    base: Checkpoint,
    config: Mapping[str, Any],
) -> None:
    """Refuse weights that are not those of the base's architecture.

    Args:
        pth: the checkpoint.
        names: its tensors.
        shapes: that they must have; empty: those of the base, where the vocabulary may have grown.
        base: the base.
        config: config.json of the result.
    """
    grown = not shapes
    shapes = shapes or {name: source.shape for name, source in base.tensors.items()}
    tied = find_tied(config, names)
    free = {tied.head} if tied is not None else set()
    missing = sorted(name for name in shapes if name not in names and name not in free and not name.endswith(_COUNTERS))
    extra = sorted(name for name in names if name not in shapes and name not in free)
    if missing or extra:
        parts = [
            f"{len(found)} {what} (for example {', '.join(found[:3])})"
            for what, found in (("missing", missing), ("not in the base", extra))
            if found
        ]
        raise PlanError(f"{pth}: its tensors are not those of the base {base.folder}: {'; '.join(parts)}")
    for name, source in names.items():
        expected = shapes.get(name, source.shape)
        if grown and (is_embedding(name) or name.startswith(("lm_head.", "output."))):
            expected = (source.shape[0], *expected[1:]) if source.shape and expected else expected
        if expected != source.shape:
            raise PlanError(f"{pth}: {name!r} has shape {source.shape}, that of the base is {expected}")


def several(names: Sequence[str], limit: int = 5) -> str:
    """Write the first names of a list that may be long."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
