"""An XTuner v0.1 config becomes one of ours, and what has no counterpart is listed.

Comes from a `.py` file given where a config is expected, or from the text inside a .pth; `python_text` has read it
without running it. Settings are taken from the places where XTuner uses them (`model.llm`, `train_dataloader.dataset`,
`optim_wrapper`), so that a changed variable at the top of the file counts. The result goes to `load`, which checks it
like any other config. XTuner counts iterations (one batch each), we count optimizer steps: intervals are divided by
its `accumulative_counts`.
"""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from fastft.config import chat_templates, recipes
from fastft.config.python_text import Call, Symbol, Value, read
from fastft.config.schema import Config
from fastft.errors import ConfigError

# XTuner's model classes and the tasks that they are for.
_TASKS = {"SupervisedFinetune": "sft", "DPO": "dpo", "ORPO": "orpo", "RewardModel": "reward"}
_OPTIMIZERS = {"AdamW": "adamw", "AdamW8bit": "adamw_8bit", "PagedAdamW8bit": "paged_adamw_8bit"}
_FORMATS = {
    "alpaca_map_fn": "alpaca",
    "alpaca_zh_map_fn": "alpaca",
    "openai_map_fn": "messages",
    "oasst1_map_fn": "guanaco",
    "pretrain_map_fn": "text",
    "default_map_fn": "conversation",
}
_FILE_LOADERS = ("json", "csv", "parquet", "text")

# Settings without an effect of their own in our runs, or the same for all of them.
_HARMLESS = (
    "tokenizer.*", "*.tokenizer", "*.tokenizer.*", "*type", "model.llm.trust_remote_code", "model.use_varlen_attn",
    "model.llm.quantization_config.llm_int8_*", "*.task_type", "*.bias", "train_dataloader.num_workers",
    "train_dataloader.pin_memory", "train_dataloader.collate_fn.*", "train_dataloader.sampler.*",
    "*.remove_unused_columns", "*.shuffle_before_pack", "*.use_varlen_attn", "*.num_proc", "*.map_num_proc",
    "*.template_map_fn.*", "*.is_dpo", "*.is_reward", "*.reward_token_id", "*.max_packed_length",
    "optim_wrapper.loss_scale", "optim_wrapper.dtype", "optim_wrapper.clip_grad.error_if_nonfinite",
    "param_scheduler.*", "custom_hooks.*", "default_hooks.*", "randomness.deterministic",
)  # fmt: skip
_ROOTS = (
    "model", "tokenizer", "train_dataloader", "val_dataloader", "test_dataloader", "optim_wrapper", "param_scheduler",
    "train_cfg", "custom_hooks", "default_hooks", "randomness", "load_from", "resume", "visualizer", "work_dir",
)  # fmt: skip


@dataclass(frozen=True)
class Imported:
    """A translated config.

    Attributes:
        values: plain values for the keys of our schema.
        notes: what has no counterpart or became something else, a line each.
    """

    values: dict[str, Any]
    notes: tuple[str, ...]


def imported(text: str, place: str) -> Imported:
    """Translate an XTuner config.

    Args:
        text: the Python file, or the `cfg` text inside an mmengine checkpoint.
        place: its name, for complaints.

    Raises:
        ConfigError: it cannot be read without running it, or is for something that fastft does not train.
    """
    names = read(text, place)
    if not isinstance(names.get("model"), dict) or "train_dataloader" not in names:
        raise ConfigError(
            f"{place}: no XTuner config: it has no `model = dict(...)` and `train_dataloader = dict(...)`; a config"
            " is YAML (`fastft copy-cfg`) or a Python config of XTuner v0.1"
        )
    return _Import(names, place).run()


class _Settings:
    """The config's values by path; remembers which were asked for."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = values
        self._taken: set[str] = set()

    def take(self, *path: str | int) -> Value:
        """The value at a path, None where there is none."""
        value: Value = self._values
        for key in path:
            try:
                value = value[key] if isinstance(value, (dict, list, tuple)) else None  # type: ignore[index]
            except (KeyError, IndexError, TypeError):
                return None
        self._taken.add(".".join(map(str, path)))
        return value

    def left(self) -> Iterator[tuple[str, Value]]:
        """Settings that nobody asked for and that would do something."""
        for root in _ROOTS:
            if root in self._values:
                yield from self._left(root, self._values[root])

    def _left(self, path: str, value: Value) -> Iterator[tuple[str, Value]]:
        if path in self._taken and not isinstance(value, (dict, list)):
            return
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from self._left(f"{path}.{key}", inner)
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
            for index, inner in enumerate(value):
                yield from self._left(f"{path}.{index}", inner)
        elif path not in self._taken and value not in (None, False, [], {}, ()) and not _is_harmless(path):
            yield path, value


class _Import:
    """One translation; collects the notes on the way."""

    def __init__(self, names: Mapping[str, Value], place: str) -> None:
        self._settings = _Settings(names)
        self._place = place
        self._notes: list[str] = []
        self._sample_steps: int | None = None
        self._accumulation = _whole(self._settings.take("optim_wrapper", "accumulative_counts")) or 1

    def run(self) -> Imported:
        model = self._model()
        data, formats = self._data()
        values: dict[str, Any] = {
            "task": self._task(formats),
            "model": model,
            "method": self._method(),
            "data": data,
            "train": self._train(),
            "samples": self._samples(),
            "output": self._output(),
        }
        if self._sample_steps is not None:
            values["train"]["sample_steps"] = self._sample_steps
        for path, value in self._settings.left():
            self._notes.append(f"{path} = {_shown(value)}: no counterpart; left out")
        return Imported({key: part for key, part in values.items() if part}, tuple(self._notes))

    def _refuse(self, reason: str) -> ConfigError:
        return ConfigError(f"{self._place}: {reason}")

    def _task(self, formats: Sequence[str]) -> str:
        kind = _last(self._settings.take("model", "type"))
        task = _TASKS.get(kind)
        known = get_args(Config.model_fields["task"].annotation)
        if task is None or task not in known:
            raise self._refuse(f"model.type {kind}: not built; {', '.join(_TASKS)} configs for {', '.join(known)} are")
        return "pretrain" if formats and set(formats) == {"text"} else task

    def _model(self) -> dict[str, Any]:
        take = self._settings.take
        name = take("model", "llm", "pretrained_model_name_or_path")
        if not isinstance(name, str):
            raise self._refuse("model.llm.pretrained_model_name_or_path: the base model's folder or id is missing")
        model: dict[str, Any] = {"name": name, **recipes.model_settings(name)}
        if take("model", "llm", "trust_remote_code") and "trust_remote_code" not in model:
            self._notes.append(
                "model.llm.trust_remote_code = True: not taken over; add model.trust_remote_code=true if the model"
                " needs its own code and you trust it"
            )
        dtype = _last(take("model", "llm", "torch_dtype"))
        if dtype in ("bfloat16", "float32"):
            model["dtype"] = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
        elif dtype == "float16":
            self._notes.append(
                "model.llm.torch_dtype = float16: the checkpoint's own dtype is used (model.dtype: auto)"
            )
        attention = take("model", "llm", "attn_implementation")
        if attention in ("sdpa", "eager", "flash_attention_2"):
            model["attention"] = attention
        return model

    def _method(self) -> dict[str, Any]:
        take = self._settings.take
        lora = take("model", "lora")
        quantization = take("model", "llm", "quantization_config")
        if quantization is not None and take("model", "llm", "quantization_config", "load_in_8bit"):
            raise self._refuse("model.llm.quantization_config.load_in_8bit: 8-bit bases are not built; use 4 bit")
        if lora is None:
            if quantization is not None:
                raise self._refuse("model: a quantized base without `lora`: there is nothing to train")
            return {"kind": "full"}
        method: dict[str, Any] = {"kind": "lora" if quantization is None else "qlora", "lora": self._lora()}
        if quantization is not None:
            method["quantization"] = self._quantization()
        return method

    def _lora(self) -> dict[str, Any]:
        take = self._settings.take
        pairs = {
            "r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets",
            "modules_to_save": "modules_to_save", "use_rslora": "rslora",
        }  # fmt: skip
        found = {ours: take("model", "lora", theirs) for theirs, ours in pairs.items()}
        bias = take("model", "lora", "bias")
        if bias not in (None, "none"):
            self._notes.append(f"model.lora.bias = {bias!r}: no counterpart; biases stay as they are")
        return {"r": 8, "alpha": 8, **{key: value for key, value in found.items() if value is not None}}

    def _quantization(self) -> dict[str, Any]:
        at = ("model", "llm", "quantization_config")
        take = self._settings.take
        if not take(*at, "load_in_4bit"):
            raise self._refuse("model.llm.quantization_config: only load_in_4bit=True is built")
        compute = _last(take(*at, "bnb_4bit_compute_dtype"))
        if compute not in ("", "float16"):
            dtype = {"bfloat16": "bf16", "float32": "fp32"}.get(compute, "auto")
        else:
            dtype = "auto"
        return {
            "type": take(*at, "bnb_4bit_quant_type") or "fp4",
            "double_quant": bool(take(*at, "bnb_4bit_use_double_quant")),
            "compute_dtype": dtype,
        }

    def _data(self) -> tuple[dict[str, Any], list[str]]:
        top = self._settings.take("train_dataloader", "dataset")
        at: tuple[str | int, ...] = ("train_dataloader", "dataset")
        parts: list[tuple[str | int, ...]] = [at]
        if isinstance(top, dict) and "datasets" in top:
            cfg = "datasets_kwargs" in top
            if cfg:
                raise self._refuse("train_dataloader.dataset.datasets_kwargs: not read; write the data sets out")
            parts = [(*at, "datasets", index) for index in range(len(top["datasets"]))]
        sources = [source for part in parts for source in self._sources(part)]
        data: dict[str, Any] = {"train": sources, "on_bad_row": "skip"}
        lengths = {self._settings.take(*part, "max_length") for part in parts} - {None}
        if len(lengths) > 1:
            self._notes.append(f"max_length differs between the data sets ({sorted(lengths)}); the largest is used")
        if lengths:
            data["max_length"] = max(lengths)
        packed = {bool(self._settings.take(*part, "pack_to_max_length")) for part in parts}
        data["packing"] = True in packed
        if len(packed) > 1:
            self._notes.append("pack_to_max_length differs between the data sets; all of them are packed")
        shuffle = self._settings.take("train_dataloader", "sampler", "shuffle")
        if shuffle is False:
            data["shuffle"] = False
        return data, [source.get("format", "auto") for source in sources]

    def _sources(self, at: tuple[str | int, ...]) -> list[dict[str, Any]]:
        take = self._settings.take
        kind = _last(take(*at, "type"))
        if kind not in ("process_hf_dataset", "process_ms_dataset", "build_preference_dataset", "build_openai_dataset"):
            raise self._refuse(f"{'.'.join(map(str, at))}: data sets of {kind or 'an unnamed kind'} are not read")
        inner = (*at, "dataset")
        path = take(*inner, "path") or take(*inner, "dataset_name")
        if not isinstance(path, str):
            raise self._refuse(f"{'.'.join(map(str, inner))}.path: the data set's path or id is missing")
        names = self._files(inner) if path in _FILE_LOADERS else [path]
        mapping = take(*at, "dataset_map_fn")
        mapping = take(*at, "dataset_map_fn", "function") if isinstance(mapping, dict) else mapping
        template = _last(take(*at, "template_map_fn", "template"))
        self._template(template)
        settings: dict[str, Any] = {}
        if kind == "process_ms_dataset":
            settings["hub"] = "modelscope"
        for theirs, ours in (
            ("name", "subset"),
            ("subset_name", "subset"),
            ("split", "split"),
            ("revision", "revision"),
        ):
            if (value := take(*inner, theirs)) is not None:
                settings[ours] = value
        rows = take(*at, "max_dataset_length")
        if isinstance(rows, int):
            settings["max_rows"] = rows
        return [{"source": name, **self._format(name, mapping), **settings} for name in names]

    def _files(self, inner: tuple[str | int, ...]) -> list[str]:
        files = self._settings.take(*inner, "data_files")
        if isinstance(files, dict):
            files = files.get("train")
        listed = [files] if isinstance(files, str) else files
        if not isinstance(listed, (list, tuple)) or not all(isinstance(name, str) for name in listed) or not listed:
            raise self._refuse(f"{'.'.join(map(str, inner))}.data_files: the names of the training files are missing")
        return list(listed)

    def _format(self, name: str, mapping: Value) -> dict[str, Any]:
        """How its rows are read: as our own part for that data set says, else by the mapping function."""
        if (known := recipes.source_settings(name)) is not None:
            return known
        function = _last(mapping)
        if function in _FORMATS:
            return {"format": _FORMATS[function]}
        if function:
            self._notes.append(f"dataset_map_fn {function} of {name}: not run; the format is found from the columns")
        return {}

    def _template(self, name: str) -> None:
        if name in ("", "default") or name in chat_templates.names():
            return
        note = f"template {name}: the tokenizer's own chat template is used"
        if note not in self._notes:
            self._notes.append(note)

    def _train(self) -> dict[str, Any]:
        take = self._settings.take
        train: dict[str, Any] = {"grad_accumulation": self._accumulation}
        pairs = {
            "lr": ("optim_wrapper", "optimizer", "lr"),
            "weight_decay": ("optim_wrapper", "optimizer", "weight_decay"),
            "betas": ("optim_wrapper", "optimizer", "betas"),
            "max_grad_norm": ("optim_wrapper", "clip_grad", "max_norm"),
            "batch_size": ("train_dataloader", "batch_size"),
            "epochs": ("train_cfg", "max_epochs"),
            "seed": ("randomness", "seed"),
        }
        train |= {key: value for key, path in pairs.items() if (value := take(*path)) is not None}
        if (iterations := take("train_cfg", "max_iters")) is not None:
            train["max_steps"] = self._steps(iterations)
        optimizer = _last(take("optim_wrapper", "optimizer", "type"))
        if optimizer in _OPTIMIZERS:
            train["optimizer"] = _OPTIMIZERS[optimizer]
        elif optimizer:
            self._notes.append(f"optim_wrapper.optimizer.type = {optimizer}: no counterpart; adamw is used")
        if (checkpointing := take("model", "use_activation_checkpointing")) is not None:
            train["gradient_checkpointing"] = checkpointing
        if (interval := take("default_hooks", "logger", "interval")) is not None:
            train["log_steps"] = self._steps(interval)
        train |= self._schedule(train.get("epochs"))
        return train

    def _schedule(self, epochs: float | None) -> dict[str, Any]:
        take = self._settings.take
        listed = take("param_scheduler")
        schedulers = listed if isinstance(listed, (list, tuple)) else [] if listed is None else [listed]
        found: dict[str, Any] = {"warmup_ratio": 0.0}
        for scheduler in schedulers:
            kind = _last(scheduler.get("type")) if isinstance(scheduler, dict) else ""
            if kind == "LinearLR" and isinstance(scheduler.get("end"), (int, float)) and scheduler is schedulers[0]:
                whole = epochs if scheduler.get("by_epoch", True) else take("train_cfg", "max_iters")
                if whole:
                    found["warmup_ratio"] = min(1.0, scheduler["end"] / whole)
            elif kind == "CosineAnnealingLR":
                found["schedule"] = "cosine"
                if scheduler.get("eta_min"):
                    self._notes.append(f"param_scheduler: eta_min = {scheduler['eta_min']}: the rate falls to 0 here")
            elif kind in ("ConstantLR", "LinearLR"):
                found["schedule"] = {"ConstantLR": "constant", "LinearLR": "linear"}[kind]
            else:
                self._notes.append(f"param_scheduler {kind or _shown(scheduler)}: no counterpart; left out")
        return found if "schedule" in found or not schedulers else {**found, "schedule": "constant"}

    def _samples(self) -> dict[str, Any]:
        hooks = self._settings.take("custom_hooks")
        samples: dict[str, Any] = {}
        for hook in hooks if isinstance(hooks, (list, tuple)) else ():
            kind = _last(hook.get("type")) if isinstance(hook, dict) else ""
            if kind == "EvaluateChatHook":
                if isinstance(every := hook.get("every_n_iters"), int):
                    self._sample_steps = self._steps(every)
                samples["prompts"] = hook.get("evaluation_inputs") or []
                if isinstance(hook.get("max_new_tokens"), int):
                    samples["max_new_tokens"] = hook["max_new_tokens"]
                if isinstance(hook.get("system"), str) and hook["system"]:
                    samples["system"] = hook["system"]
                elif isinstance(hook.get("system"), Symbol):
                    self._notes.append(f"custom_hooks: system = {hook['system'].name}: set samples.system yourself")
            elif kind not in ("DatasetInfoHook", "VarlenAttnArgsToMessageHubHook", "ThroughputHook", ""):
                self._notes.append(f"custom_hooks: {kind}: no counterpart; left out")
        return samples

    def _output(self) -> dict[str, Any]:
        take = self._settings.take
        output: dict[str, Any] = {}
        interval = take("default_hooks", "checkpoint", "interval")
        if isinstance(interval, int) and interval > 0:
            if take("default_hooks", "checkpoint", "by_epoch"):
                self._notes.append("default_hooks.checkpoint.by_epoch: checkpoints are counted in steps here")
            else:
                output["save_steps"] = self._steps(interval)
        keep = take("default_hooks", "checkpoint", "max_keep_ckpts")
        if isinstance(keep, int) and keep > 0:
            output["keep"] = keep
        elif keep == -1:
            output["keep"] = 1_000_000
        if isinstance(folder := take("work_dir"), str):
            output["dir"] = folder
        return output

    def _steps(self, iterations: int) -> int:
        """Optimizer steps in so many of XTuner's iterations, at least one."""
        return max(1, round(iterations / self._accumulation))


def _last(value: Value) -> str:
    """The last part of a symbol's name, of a call's, or of a dotted text (`cfg` inside a .pth names types so)."""
    if isinstance(value, Call):
        value = value.function
    name = value.name if isinstance(value, Symbol) else value if isinstance(value, str) else ""
    return name.rpartition(".")[2]


def _whole(value: Value) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _is_harmless(path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in _HARMLESS)


def _shown(value: Value) -> str:
    text = (
        value.name
        if isinstance(value, Symbol)
        else f"{value.function.name}(...)"
        if isinstance(value, Call)
        else repr(value)
    )
    return text if len(text) <= 60 else f"{text[:60]}..."
