"""A PEFT adapter folder, read strictly: every setting understood, every tensor used exactly once, or refused.

Reads adapter_config.json and the header of adapter_model.safetensors (spec/formats.md section 1). What it gives is
joined with the tensors of a base by `names`. LoRA is understood here; the tensors of other kinds are passed on for
PEFT's own classes (`peft_modules`), which check them.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from fastft import spelling
from fastft.convert import peft_kinds
from fastft.convert.folder import existing_folder, read_safetensors
from fastft.convert.json_file import read_object
from fastft.convert.source import FLOATS, Fingerprint, Source, as_seen, looked_at
from fastft.errors import CheckpointError, FileError, PlanError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE_WEIGHTS = "adapter_model.bin"
TRAINING = "fastft_training.json"

_MAX_RANK = 65536
# PEFT's default is 8, and some use 10,000; beyond this there is no float32 result.
_MAX_ALPHA = 1e9
# A pattern for each module is the most that there is use for.
_MAX_PATTERNS = 2000
# Settings that say where or how the adapter was trained, not what it adds.
_IGNORED = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
        "lora_dropout", "lora_ga_config", "megatron_core", "monteclora_config", "peft_type", "peft_version",
        "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type", "velora_config",
    }
)  # fmt: skip
_READ = frozenset(
    {
        "alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "lora_bias", "modules_to_save",
        "r", "rank_pattern", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
    }
)  # fmt: skip
_PEFT_FALLBACK = "merge it with PEFT's merge_and_unload instead"
# Settings that change the arithmetic in a way that is not built, with the way out.
_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens and has no merged form",
    "arrow_config": "Arrow routes between adapters for each token and has no merged form",
    "kasa_config": "KaSA changes the base by an SVD at the start; save the merged model from the training",
    "layer_replication": "the model has repeated layers; save the merged model from the training",
    "megatron_config": "Megatron's parallel layers are not read; save the adapter from the training without them",
    "use_bdlora": f"block-diagonal LoRA is not built; {_PEFT_FALLBACK}",
    "use_qalora": "QA-LoRA belongs to GPTQ weights; merge it there",
}
# Dtypes of the places that SHiRA, VB-LoRA and their like keep beside their values.
_INDICES = ("I64", "I32", "I16", "U8")
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.", "module.")
_PREFIX = "base_model.model."
_LOW_RANK = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.(?P<what>weight|bias)")
_LOW_RANK_PLAIN = re.compile(
    r"(?P<path>.+)\.(?P<what>lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
)
_TOKENS = re.compile(r"(?P<path>.+)\.token_adapter(?:\.[^.]+)?\.trainable_tokens_delta(?:\.[^.]+)?")
_NORM = re.compile(r"(?P<path>.+)\.ln_tuning_layers\.(?P<what>weight|bias)")
_TOKENS_ALONE = re.compile(r"(?P<path>.+)\.trainable_tokens_delta")
_SAVED = re.compile(r"(?P<path>.+?)\.modules_to_save\.[^.]+\.(?P<rest>.+)")


@dataclass(frozen=True)
class LowRank:
    """A pair of matrices that adds scale * B A to one module.

    Attributes:
        path: the module's path in the model that was trained.
        a: (rank, in); of a convolution (rank, in, *kernel).
        b: (out, rank); of a convolution (out, rank, 1, ...).
        scale: alpha/rank, or alpha/sqrt(rank) with rsLoRA.
        magnitude: (out,), DoRA's trained norm of each row, of a convolution (1, out, 1, ...); None without DoRA.
        bias: (out,), the bias of lora_B; None without.
        embedding: the module is an embedding, whose weight is (vocabulary, hidden): the transposed product is added.
        b_columns: (first, step): only these columns of `b` belong to it; None: all.
    """

    path: str
    a: Source
    b: Source
    scale: float
    magnitude: Source | None = None
    bias: Source | None = None
    embedding: bool = False
    b_columns: tuple[int, int] | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class ParameterPair:
    """The matrices of a bare parameter (`target_parameters`); which one only the model's class says.

    Attributes:
        path: the module's path in the model that was trained, with a `.base_layer` for each wrapper further out.
        a: (experts * rank, in), expert by expert.
        b: (out, rank * experts), the expert fastest.
    """

    path: str
    a: Source
    b: Source


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to a model.

    Attributes:
        folder: absolute path.
        config: adapter_config.json.
        low_rank: module path to its update.
        parameters: module path, with its `.base_layer`s, to the update of one of its bare parameters.
        replaced: tensor name to the tensor that stands for the base's: modules_to_save and trained biases.
        token_rows: module path to new rows of its embedding.
        training: fastft_training.json, where it is there.
        fingerprints: the files that were read.
        peft_tensors: tensors of a kind that only PEFT's classes understand, by their names without wrappers.
        renamings: (expression, replacement) done one after the other on the module paths in `peft_tensors`.
    """

    folder: Path
    config: Mapping[str, Any]
    low_rank: Mapping[str, LowRank]
    replaced: Mapping[str, Source]
    token_rows: Mapping[str, Source]
    training: Mapping[str, Any] | None
    fingerprints: tuple[Fingerprint, ...] = field(repr=False)
    parameters: Mapping[str, ParameterPair] = field(default_factory=dict)
    peft_tensors: Mapping[str, Source] = field(default_factory=dict)
    renamings: tuple[tuple[re.Pattern[str], str], ...] = ()

    @property
    def kind(self) -> str:
        """PEFT's name of the kind of adapter, `LORA` for most."""
        return str(self.config["peft_type"])

    @property
    def token_indices(self) -> object:
        """Which rows of an embedding the new rows stand for, as the settings say it."""
        return self.config.get("token_indices" if self.kind == "TRAINABLE_TOKENS" else "trainable_token_indices")

    @property
    def fan_in_fan_out(self) -> bool:
        return bool(self.config.get("fan_in_fan_out"))

    @property
    def target_parameters(self) -> list[str]:
        return list(self.config.get("target_parameters") or [])


def read_adapter(folder: Path, *, base_is_residual: bool = False) -> Adapter:
    """Read an adapter folder.

    Args:
        folder: the adapter's.
        base_is_residual: the base is what the start of the training left of it (PiSSA, OLoRA, ...), so that base +
            adapter is the trained model.

    Raises:
        FileError: the folder, its config or its weights are missing.
        CheckpointError: the file is broken, or holds a tensor that is not understood or not paired.
        PlanError: a setting that has no right merge here; the message says what to do instead.
    """
    folder = existing_folder(folder, "the adapter")
    seen = looked_at(folder)
    config_path, weights_path = folder / CONFIG, folder / WEIGHTS
    if not config_path.exists():
        raise FileError(f"{folder}: no {CONFIG} there; give the folder of a PEFT adapter{_nearby(folder)}")
    config = read_object(config_path)
    check_config(config, config_path)
    if not base_is_residual:
        _check_start(config, config_path)
    if weights_path.exists():
        tensors = read_safetensors(weights_path)
    elif (folder / PICKLE_WEIGHTS).exists():
        from fastft.convert.pth_reader import read_state_dict

        weights_path = folder / PICKLE_WEIGHTS
        tensors = dict(read_state_dict(weights_path).tensors)
    else:
        raise FileError(f"{folder}: no {WEIGHTS} there")
    training_path = folder / TRAINING
    training = read_object(training_path) if training_path.exists() else None
    files = (config_path, weights_path, *(() if training is None else (training_path,)))
    adapter = understood(tensors, config, weights_path, fingerprints=as_seen(seen, files), training=training)
    if adapter.kind == "LORA":
        _check_complete(adapter, weights_path)
    return adapter


def understood(
    tensors: Mapping[str, Source],
    config: Mapping[str, Any],
    path: Path,
    *,
    fingerprints: tuple[Fingerprint, ...] = (),
    training: Mapping[str, Any] | None = None,
) -> Adapter:
    """Give each tensor of an adapter its meaning.

    Args:
        tensors: by their names in the file, with or without the prefixes of PEFT, FSDP, compile and DDP.
        config: the settings of adapter_config.json, checked by `check_config`.
        path: the file that they are in, for the error texts.
        fingerprints: of the files that were read.
        training: fastft_training.json.

    Raises:
        CheckpointError: a tensor is not understood, or A and B do not belong together.
        PlanError: a kind that has no right merge here.
    """
    if not tensors:
        raise CheckpointError(f"{path}: no tensors in it; the adapter is empty")
    if config["peft_type"] != "LORA":
        replaced, token_rows, rest = _sort_other_tensors(tensors, str(config["peft_type"]), path)
        return Adapter(path.parent, config, {}, replaced, token_rows, training, fingerprints, peft_tensors=rest)
    low_rank, replaced, token_rows, parameters = _sort_tensors(tensors, config, path)
    return Adapter(path.parent, config, low_rank, replaced, token_rows, training, fingerprints, parameters)


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse settings that are unknown, out of range, or have no right merge.

    Raises:
        PlanError: the setting is known, but cannot be merged here.
        CheckpointError: it is not known, or its value is not allowed.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        _check_other_kind(config, kind, path)
        return
    for key, value in config.items():
        if key in _REFUSED and value not in (None, False, {}, [], ""):
            raise PlanError(f"{path}: {key} is set: {_REFUSED[key]}")
    _refuse_unknown(config, _READ | _IGNORED | _REFUSED.keys(), path)
    _positive_number(config.get("r"), "r", path, whole=True)
    _positive_number(config.get("lora_alpha"), "lora_alpha", path)
    for pattern in ("rank_pattern", "alpha_pattern"):
        values = config.get(pattern) or {}
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: {pattern} must map module names to numbers, it is {values!r}")
        if len(values) > _MAX_PATTERNS:
            raise CheckpointError(f"{path}: {pattern} has {len(values)} entries; at most {_MAX_PATTERNS} are read")
        for key, value in values.items():
            _positive_number(value, f"{pattern}[{key!r}]", path, whole=pattern == "rank_pattern")
            _compiled(key, path)
    for key in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"):
        if config.get(key) not in (None, True, False):
            raise CheckpointError(f"{path}: {key} must be true or false, it is {config[key]!r}")
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        raise CheckpointError(f"{path}: bias must be none, all or lora_only, it is {config['bias']!r}")
    named = config.get("target_parameters") or []
    if not isinstance(named, list) or not all(isinstance(name, str) and name for name in named):
        raise CheckpointError(f"{path}: target_parameters must list names of parameters, it is {named!r}")


def _check_start(config: Mapping[str, Any], path: Path) -> None:
    """Refuse starts that change the base: the base in the folder is not what was trained on (spec/formats.md 1.4)."""
    start = config.get("init_lora_weights", True)
    if config.get("peft_type") == "LORA" and start not in _PLAIN_STARTS:
        raise PlanError(
            f"{path}: init_lora_weights {start!r} changed the base before the training, so base + adapter is not"
            " the trained model; save the adapter again in the training with PEFT's save_pretrained("
            "path_initial_model_for_weight_conversion=...), which makes it a plain LoRA; or, if the base that you give is"
            " the changed one, say --base-is-residual"
        )


def _check_other_kind(config: Mapping[str, Any], kind: object, path: Path) -> None:
    """Refuse kinds that have no merged form; the settings of the others are PEFT's to check (`peft_layers`)."""
    if not isinstance(kind, str) or kind not in {*peft_kinds.KINDS, *peft_kinds.REPLACING}:
        why = peft_kinds.REFUSED.get(kind) if isinstance(kind, str) else None
        if why is not None:
            raise PlanError(f"{path}: an adapter of peft_type {kind} {why}")
        known = ", ".join(sorted({"LORA", *peft_kinds.KINDS, *peft_kinds.REPLACING}))
        raise PlanError(f"{path}: peft_type {kind!r} is not known here; {_PEFT_FALLBACK}. Known are {known}")
    if kind in peft_kinds.REPLACING:
        _refuse_unknown(config, peft_kinds.WHERE | {"init_weights", "token_indices"}, path)
    elif peft_kinds.KINDS[kind].needs_projection and config.get("save_projection") is not True:
        raise PlanError(
            f"{path}: {kind} with save_projection: {config.get('save_projection')}: its projection is drawn from torch's"
            " random numbers anew; save the adapter from the training with save_projection=True"
        )
    if config.get("sample_at_inference"):
        raise PlanError(f"{path}: sample_at_inference is set: the layers draw from a distribution; there is no merge")


def _refuse_unknown(config: Mapping[str, Any], known: frozenset[str], path: Path) -> None:
    """Refuse settings that are not known, where they say something.

    Raises:
        CheckpointError: naming the setting, and the nearest known one.
    """
    for key, value in config.items():
        if key not in known and value not in (None, False, {}, [], ""):
            near = spelling.nearest(key, sorted(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise CheckpointError(
                f"{path}: the setting {key!r} = {value!r} is not known here and may change the result{hint}"
            )


def _positive_number(value: object, name: str, path: Path, *, whole: bool = False) -> None:
    """Check type and range of a rank or an alpha."""
    largest = _MAX_RANK if whole else _MAX_ALPHA
    allowed = f"a whole number from 1 to {largest}" if whole else f"a number above zero, at most {largest:g}"
    right_type = isinstance(value, int) if whole else isinstance(value, int | float)
    if not right_type or isinstance(value, bool):
        raise CheckpointError(f"{path}: {name} must be {allowed}, it is {value!r}")
    assert isinstance(value, int | float)
    if not 0 < value <= largest:  # also of a NaN
        raise CheckpointError(f"{path}: {name} must be {allowed}, it is {value!r}")


# Letters, dots, classes and simple repeats: what people write in rank_pattern; nested repeats can take for ever.
_HARMLESS = re.compile(r"[\w.\\|()\[\]^$*+?-]{1,1000}", re.ASCII)
_NESTED_REPEAT = re.compile(r"[*+}]\s*\)[*+{?]|\([^)]*\|[^)]*\)[*+{]")
# Each repeat without end multiplies the time by the length of the name, each `?` by two.
_MAX_REPEATS, _MAX_OPTIONAL = 3, 8


@cache
def _compiled(key: str, path: Path) -> re.Pattern[str]:
    """Compile a key of rank_pattern or alpha_pattern the way PEFT matches it."""
    repeats = key.count("*") + key.count("+")
    slow = _NESTED_REPEAT.search(key) or repeats > _MAX_REPEATS or key.count("?") > _MAX_OPTIONAL
    if not _HARMLESS.fullmatch(key) or slow:
        raise CheckpointError(f"{path}: the pattern {key!r} is not a simple regular expression; it is not tried")
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise CheckpointError(f"{path}: the pattern {key!r} is no regular expression: {error}") from error


def _by_pattern(patterns: Mapping[str, float], module: str, default: float, path: Path) -> float:
    """Give the value of the first pattern that matches the module's path, else the default (PEFT's rule)."""
    for key, value in patterns.items():
        if _compiled(key, path).match(module):
            return value
    return default


def canonical_key(key: str) -> str:
    """Strip what wrappers add to the name of an adapter's tensor: the PEFT prefix, FSDP, compile, DDP."""
    for wrapper in _WRAPPERS:
        key = key.replace(f".{wrapper}", ".").removeprefix(wrapper)
    return key.removeprefix(_PREFIX)


def _sort_tensors(
    tensors: Mapping[str, Source], config: Mapping[str, Any], path: Path
) -> tuple[dict[str, LowRank], dict[str, Source], dict[str, Source], dict[str, ParameterPair]]:
    """Give each tensor of the file its meaning; pair A with B."""
    sides: dict[str, dict[str, Source]] = {}
    replaced: dict[str, Source] = {}
    token_rows: dict[str, Source] = {}
    for key, source in tensors.items():
        if source.dtype not in FLOATS:
            raise CheckpointError(f"{path}: {key!r} is {source.dtype}; adapters are {', '.join(FLOATS)}")
        name = canonical_key(key)
        if (match := _LOW_RANK.fullmatch(name)) is not None:
            slot = match["side"] if match["what"] == "weight" else "bias"
            _put(sides.setdefault(match["path"], {}), slot, source, key, path)
        elif (match := _LOW_RANK_PLAIN.fullmatch(name)) is not None:
            _put(sides.setdefault(match["path"], {}), match["what"], source, key, path)
        elif (match := _TOKENS.fullmatch(name)) is not None:
            _put(token_rows, match["path"], source, key, path)
        elif "original_module." in name:
            continue
        else:
            _put(replaced, _replaced_name(name, key, path), source, key, path)
    parameters = {
        module: _parameter_pair(module, found, path)
        for module, found in sides.items()
        if _has_targeted_parameter(module, config, path)
    }
    low_rank = {
        module: _pair(module, found, config, path) for module, found in sides.items() if module not in parameters
    }
    return low_rank, replaced, token_rows, parameters


def _check_complete(adapter: Adapter, path: Path) -> None:
    """Hold what the settings name against what the file has: neither more nor less.

    What of the base they name is `names`' to check.
    """
    config = adapter.config
    targets = config.get("target_modules")
    if isinstance(targets, list):
        # What lies under a module that is named belongs to it (torch's attention).
        plain = {module: module.partition(".base_layer.")[0] for module in adapter.low_rank}
        other = [module for module, owner in plain.items() if not _is_target_module(owner, config, path)]
        if other and not config.get("target_parameters"):
            raise CheckpointError(
                f"{path}: it has matrices for {other[0]}, but target_modules of {CONFIG} does not name it"
                f" ({', '.join(map(str, targets[:8]))})"
            )
    if config.get("trainable_token_indices") and not adapter.token_rows:
        raise CheckpointError(f"{path}: {CONFIG} says trainable_token_indices, but the file has no new rows")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise CheckpointError(f"{path}: modules_to_save of {CONFIG} must list names of modules, it is {saved!r}")
    absent = [name for name in saved if not any(f".{name}." in f".{tensor}" for tensor in adapter.replaced)]
    # For these tasks PEFT lists two names of heads, of which a model has one.
    heads = config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") and {"classifier", "score"} >= set(absent)
    if absent and not (heads and len(absent) < len(saved)):
        raise CheckpointError(f"{path}: {CONFIG} says modules_to_save {absent[0]!r}, but the file has no tensor of it")


def _sort_other_tensors(
    tensors: Mapping[str, Source], kind: str, path: Path
) -> tuple[dict[str, Source], dict[str, Source], dict[str, Source]]:
    """Split the tensors of a kind beside LoRA: those that replace the base's, new rows, and the rest for PEFT."""
    replaced: dict[str, Source] = {}
    token_rows: dict[str, Source] = {}
    rest: dict[str, Source] = {}
    for key, source in tensors.items():
        name = canonical_key(key).removesuffix(".default").replace(".default.", ".")
        if source.dtype not in (*FLOATS, *_INDICES):
            raise CheckpointError(f"{path}: {key!r} is {source.dtype}; adapters are {', '.join((*FLOATS, *_INDICES))}")
        if "original_module." in name:
            continue
        if (match := _SAVED.fullmatch(name)) is not None:
            _put(replaced, f"{match['path']}.{match['rest']}", source, key, path)
        elif kind == "LN_TUNING":
            match = _NORM.fullmatch(name)
            _put(replaced, name if match is None else f"{match['path']}.{match['what']}", source, key, path)
        elif kind == "TRAINABLE_TOKENS" and (match := _TOKENS_ALONE.fullmatch(name)) is not None:
            _put(token_rows, match["path"], source, key, path)
        else:
            _put(replaced if kind == "TRAINABLE_TOKENS" else rest, name, source, key, path)
    return replaced, token_rows, rest


def _has_targeted_parameter(module: str, config: Mapping[str, Any], path: Path) -> bool:
    """Tell whether the matrices of a module belong to a bare parameter of it."""
    targets = config.get("target_parameters") or []
    if module.endswith(".base_layer"):
        return True
    owners = {target.rpartition(".")[0] for target in targets}
    if any(owner and f".{module}".endswith(f".{owner}") for owner in owners):
        return True
    # A target without its module (`down_proj`) can be anywhere; a module is wrapped whole or for a parameter, not both.
    return "" in owners and not _is_target_module(module, config, path)


def _is_target_module(module: str, config: Mapping[str, Any], path: Path) -> bool:
    """Tell whether target_modules names a module (PEFT's rule: a list of ends, or one regular expression)."""
    stated = config.get("target_modules")
    if isinstance(stated, str):
        return _compiled(stated, path).match(module) is not None
    return any(f".{module}".endswith(f".{end}") for end in stated or [] if isinstance(end, str))


def _parameter_pair(module: str, found: Mapping[str, Source], path: Path) -> ParameterPair:
    """Check what can be known of the matrices without the model."""
    a, b = found.get("A"), found.get("B")
    if a is None or b is None or len(found) != 2:
        raise CheckpointError(f"{path}: {module} has {', '.join(sorted(found))}; one A and one B are allowed")
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise CheckpointError(f"{path}: {module}: A is {a.shape} and B is {b.shape}; two dimensions each are allowed")
    return ParameterPair(module, a, b)


def _put(slots: dict[str, Source], slot: str, source: Source, key: str, path: Path) -> None:
    if slot in slots:
        raise CheckpointError(f"{path}: {key!r} comes twice once wrappers are stripped; the file holds two adapters?")
    slots[slot] = source


def _replaced_name(name: str, key: str, path: Path) -> str:
    """Name of the base's tensor that a tensor without low-rank part stands for."""
    if re.search(r"(^|\.)(lora_|hada_|lokr_|ia3_|oft_|vera_|boft_)|\.lora_[ab]$", name) or name.startswith("lora_unet"):
        raise CheckpointError(f"{path}: the tensor {key!r} is not one of PEFT's LoRA; {_PEFT_FALLBACK}")
    if (match := _SAVED.fullmatch(name)) is not None:
        return f"{match['path']}.{match['rest']}"
    # The base's own bias or (resized) embedding under a LoRA layer; more than one hop is a mixture of experts.
    if name.count(".base_layer.") > 1 or (
        ".base_layer." in name and not name.endswith((".base_layer.bias", ".base_layer.weight"))
    ):
        raise PlanError(f"{path}: {key!r}: nested base layers are not built; {_PEFT_FALLBACK}")
    return name.replace(".base_layer.", ".")


def _pair(module: str, found: Mapping[str, Source], config: Mapping[str, Any], path: Path) -> LowRank:
    """Check the matrices of one module and compute its scale."""
    embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
    a, b = (found.get(f"lora_embedding_{side}" if embedding else side) for side in "AB")
    magnitude, bias = found.get("lora_magnitude_vector"), found.get("bias")
    num_known = sum(side is not None for side in (a, b, magnitude, bias))
    if a is None or b is None or len(found) != num_known:
        raise CheckpointError(f"{path}: {module} has {', '.join(sorted(found))} only; A and B belong together")
    for key, vector, what in (("use_dora", magnitude, "lora_magnitude_vector"), ("lora_bias", bias, "lora_B.bias")):
        if bool(config.get(key)) != (vector is not None):
            there = "is there" if vector is not None else "is missing"
            raise CheckpointError(f"{path}: {module}: {what} {there}, but {CONFIG} says {key}: {config.get(key)}")
        if vector is not None and vector.numel != b.shape[0]:
            raise CheckpointError(f"{path}: {module}: {what} has {vector.numel} numbers for {b.shape[0]} rows")
    rank = _shared_rank(a, b, module, path)
    scale = checked_scale(config, module, rank, path)
    return LowRank(module, a, b, scale, magnitude, bias, embedding)


def _shared_rank(a: Source, b: Source, module: str, path: Path) -> int:
    """Check that A and B are two matrices, or the two kernels of a convolution, and give their rank."""
    matrices = len(a.shape) == 2 and len(b.shape) == 2
    kernels = 3 <= len(a.shape) <= 5 and len(b.shape) == len(a.shape) and set(b.shape[2:]) == {1}
    if not matrices and not kernels:
        hint = "; saved by ZeRO-3 or FSDP in pieces?" if len(a.shape) < 2 else ""
        raise CheckpointError(
            f"{path}: {module}: A is {a.shape} and B is {b.shape}; two matrices are allowed, or the kernels of a"
            f" convolution (rank, in, ...) and (out, rank, 1, ...){hint}"
        )
    rank, columns = a.shape[0], b.shape[1]
    if kernels and 0 < columns < rank and rank % columns == 0:
        raise PlanError(
            f"{path}: {module}: a LoRA on a convolution of {rank // columns} groups has no merged form in PEFT either;"
            " train without that module, or keep the adapter apart"
        )
    if rank == 0 or columns != rank:
        raise CheckpointError(f"{path}: {module}: A {a.shape} and B {b.shape} do not share a rank")
    return rank


def checked_scale(config: Mapping[str, Any], name: str, rank: int, path: Path) -> float:
    """Compute what the product of a module or parameter is multiplied by.

    Args:
        config: adapter_config.json.
        name: of the module, or `module.parameter`, as the adapter's file calls it.
        rank: of its matrices.
        path: of the adapter, for the error text.

    Raises:
        CheckpointError: the settings say another rank.
    """
    stated = _by_pattern(config.get("rank_pattern") or {}, name, config["r"], path)
    if stated != rank:
        raise CheckpointError(f"{path}: {name} has rank {rank}, but {CONFIG} says {stated:g}")
    alpha = _by_pattern(config.get("alpha_pattern") or {}, name, config["lora_alpha"], path)
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _nearby(folder: Path) -> str:
    """Name a folder below that looks like the adapter meant."""
    found = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    return f"; did you mean {folder / found[-1]}?" if found else ""
