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
from typing import Any

from fastft.config import recipes, xtuner_names, xtuner_vision
from fastft.config.python_text import Call, Symbol, Value, read
from fastft.errors import ConfigError


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
    names = _as_runner(read(text, place))
    if "_base_" in names:
        raise ConfigError(f"{place}: builds on another config (_base_); give one whole file")
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
        self._wholly: set[str] = set()

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

    def take_whole(self, *path: str | int) -> Value:
        """The same, with everything in it."""
        self._wholly.add(".".join(map(str, path)))
        return self.take(*path)

    def left(self) -> Iterator[tuple[str, Value]]:
        """Settings that nobody asked for and that would do something."""
        for root in xtuner_names.ROOTS:
            if root in self._values:
                yield from self._left(root, self._values[root])

    def _left(self, path: str, value: Value) -> Iterator[tuple[str, Value]]:
        if path in self._wholly or (path in self._taken and not isinstance(value, (dict, list))):
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
        self._template_name: str | None = None
        self._sample_steps: int | None = None
        self._sees = False
        self._parallel = _whole(names.get("sequence_parallel_size")) or 1
        self._accumulation = self._accumulated(
            _whole(self._settings.take("optim_wrapper", "accumulative_counts"))
            or _whole(self._settings.take("training_args", "gradient_accumulation_steps"))
            or 1
        )

    def run(self) -> Imported:
        self._sees = _last(self._settings.take("model", "type")) in xtuner_vision.TYPES
        model = self._model()
        data, formats = self._data()
        if measured := self._measured():
            data["eval"] = measured
        task = self._task(formats)
        method = self._method()
        if self._template_name is not None and task != "pretrain":
            model.setdefault("chat_template", self._template_name)
        values: dict[str, Any] = {
            "task": task,
            "model": model,
            "method": method,
            "data": data,
            "vision": self._vision(method),
            "train": self._train() | self._eval_steps(measured),
            "preference": self._preference(task),
            "samples": self._samples(),
            "output": self._output(),
        }
        if task == "reward" and values["samples"]:
            self._note("custom_hooks: EvaluateChatHook: a reward model gives no answers; left out")
            values["samples"] = {}
        elif self._sample_steps is not None:
            values["train"]["sample_steps"] = self._sample_steps
        for path, value in self._settings.left():
            self._note(f"{path} = {_shown(value)}: no counterpart; left out")
        return Imported({key: part for key, part in values.items() if part}, tuple(self._notes))

    def _note(self, text: str) -> None:
        """Say once what has no counterpart."""
        if text not in self._notes:
            self._notes.append(text)

    def _accumulated(self, counts: int) -> int:
        """XTuner's accumulation without the factor that makes up for sequence parallelism, which is not built here."""
        if self._parallel == 1:
            return counts
        self._note(
            f"sequence_parallel_size = {self._parallel}: no counterpart; every device holds whole rows (the memory"
            " switches of docs/memory.md make room), and gradients are summed over as many tokens as before"
        )
        return max(1, counts // self._parallel)

    def _refuse(self, reason: str) -> ConfigError:
        return ConfigError(f"{self._place}: {reason}")

    def _task(self, formats: Sequence[str]) -> str:
        kind = _last(self._settings.take("model", "type"))
        task = xtuner_names.TASKS.get(kind)
        if task is None:
            raise self._refuse(f"model.type {kind}: not built; {', '.join(xtuner_names.TASKS)} are")
        return "pretrain" if formats and set(formats) == {"text"} else task

    def _preference(self, task: str) -> dict[str, Any]:
        take = self._settings.take
        kind = take("model", "loss_type")
        if task == "dpo" and kind not in (None, "sigmoid"):
            hint = "; task: kto takes pairs as judged answers" if kind == "kto_pair" else ""
            raise self._refuse(f"model.loss_type {kind!r}: only DPO's own loss, sigmoid, is built{hint}")
        if task == "reward":
            penalty = take("model", "penalty_type")
            if kind == "focal" or penalty not in (None, "none"):
                self._note(
                    f"model.loss_type = {kind!r}, penalty_type = {penalty!r}: the loss here is that of ranking"
                    " (Bradley-Terry), without a penalty"
                )
            return {}
        wanted = {"dpo": ("beta", "label_smoothing"), "orpo": ("beta",)}.get(task, ())
        return {key: value for key in wanted if (value := take("model", key)) is not None}

    def _model(self) -> dict[str, Any]:
        take = self._settings.take
        if self._sees:
            name = xtuner_vision.base(self._settings, self._note)
        else:
            name = take("model", "llm", "pretrained_model_name_or_path")
        if not isinstance(name, str):
            raise self._refuse("model.llm.pretrained_model_name_or_path: the base model's folder or id is missing")
        model: dict[str, Any] = {"name": name, **recipes.model_settings(name)}
        if take("model", "llm", "trust_remote_code") and "trust_remote_code" not in model:
            self._note(
                "model.llm.trust_remote_code = True: not taken over; add model.trust_remote_code=true if the model"
                " needs its own code and you trust it"
            )
        dtype = _last(take("model", "llm", "torch_dtype"))
        if dtype in ("bfloat16", "float32"):
            model["dtype"] = {"bfloat16": "bf16", "float32": "fp32"}[dtype]
        elif dtype == "float16":
            self._note("model.llm.torch_dtype = float16: the checkpoint's own dtype is used (model.dtype: auto)")
        attention = take("model", "llm", "attn_implementation")
        if attention in ("sdpa", "eager", "flash_attention_2"):
            model["attention"] = attention
        return model

    def _method(self) -> dict[str, Any]:
        take = self._settings.take
        if self._sees:
            return self._vision_method()
        lora = take("model", "lora")
        quantization = take("model", "llm", "quantization_config")
        if take("model", "llm", "load_in_8bit"):
            raise self._refuse("model.llm.load_in_8bit: 8-bit bases are not built; use 4 bit (method.kind: qlora)")
        if quantization is not None and take("model", "llm", "quantization_config", "load_in_8bit"):
            raise self._refuse("model.llm.quantization_config.load_in_8bit: 8-bit bases are not built; use 4 bit")
        if lora is None:
            if quantization is not None:
                raise self._refuse("model: a quantized base without `lora`: there is nothing to train")
            return {"kind": "full"}
        method: dict[str, Any] = {"kind": "lora" if quantization is None else "qlora", "lora": self._lora("lora")}
        if quantization is not None:
            method["quantization"] = self._quantization()
        return method

    def _vision_method(self) -> dict[str, Any]:
        """How the language model is trained; a frozen one in 4 bits is qlora with `vision.learn.llm: frozen`."""
        take = self._settings.take
        quantized = take("model", "llm", "quantization_config") is not None
        settings = self._quantization() if quantized else None
        if xtuner_vision.quantized_internvl(self._settings, self._note):
            settings = {"type": "nf4", "double_quant": True}
        adapters = take("model", "llm_lora") is not None
        if not adapters and settings is None:
            return {"kind": "full"}
        if not adapters and not take("model", "freeze_llm"):
            raise self._refuse("model: a quantized language model without `llm_lora` must be frozen (freeze_llm=True)")
        method: dict[str, Any] = {"kind": "lora" if settings is None else "qlora"}
        if adapters:
            method["lora"] = self._lora("llm_lora")
        if settings is not None:
            method["quantization"] = settings
        return method

    def _vision(self, method: dict[str, Any]) -> dict[str, Any]:
        return xtuner_vision.section(self._settings, self._place, method.get("lora"), self._note) if self._sees else {}

    def _lora(self, key: str) -> dict[str, Any]:
        take = self._settings.take
        pairs = {
            "r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets",
            "modules_to_save": "modules_to_save", "use_rslora": "rslora",
        }  # fmt: skip
        found = {ours: take("model", key, theirs) for theirs, ours in pairs.items()}
        bias = take("model", key, "bias")
        if bias not in (None, "none"):
            self._note(f"model.{key}.bias = {bias!r}: no counterpart; biases stay as they are")
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
        parts = self._parts()
        sources = [source for part in parts for source in self._sources(part)]
        data: dict[str, Any] = {"train": sources, "on_bad_row": "skip"}
        lengths = {self._settings.take(*part, "max_length") for part in parts} - {None}
        if len(lengths) > 1:
            self._note(f"max_length differs between the data sets ({sorted(lengths)}); the largest is used")
        if lengths:
            data["max_length"] = max(lengths)
        packed = {self._is_packed(part) for part in parts}
        data["packing"] = True in packed
        if len(packed) > 1:
            self._note("pack_to_max_length differs between the data sets; all of them are packed")
        shuffle = self._settings.take("train_dataloader", "sampler", "shuffle")
        if shuffle is False:
            data["shuffle"] = False
        return data, [source.get("format", "auto") for source in sources]

    def _measured(self) -> list[dict[str, Any]]:
        """The data sets of `val_dataloader`, on which the loss is measured; what cannot be read there is said."""
        take_whole = self._settings.take_whole
        if take_whole("test_dataloader") is not None:
            self._note("test_dataloader: no counterpart; data.eval is measured on, from val_dataloader")
        if take_whole("val_dataloader") is None:
            return []
        try:
            sources = [source for part in self._parts("val_dataloader") for source in self._sources(part)]
        except ConfigError as error:
            self._note(f"{str(error).removeprefix(f'{self._place}: ')}; left out; set data.eval yourself")
            return []
        evaluators = self._settings.take_whole("val_evaluator")
        for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
            if isinstance(evaluator, dict) and (kind := _last(evaluator.get("type"))):
                self._note(f"val_evaluator {kind}: no counterpart; on data.eval the loss is measured")
        return sources

    def _eval_steps(self, measured: Sequence[object]) -> dict[str, int]:
        """Steps between two measurements; mmengine makes one every 1000 iterations if nothing is said."""
        interval = self._settings.take("train_cfg", "val_interval")
        return {"eval_steps": self._steps(_whole(interval) or 1000)} if measured else {}

    def _parts(self, loader: str = "train_dataloader") -> list[tuple[str | int, ...]]:
        """Where the data sets stand: one, or those that a ConcatDataset joins (in a dict in XTuner 0.1.0)."""
        at = (loader, "dataset")
        top = self._settings.take(*at)
        if not isinstance(top, dict):
            raise self._refuse(f"{loader}.dataset: the data set is missing")
        for key in ("datasets", "datasets_cfg"):
            joined = top.get(key)
            if isinstance(joined, dict):
                return [(*at, key, name) for name in joined]
            if isinstance(joined, (list, tuple)):
                return [(*at, key, index) for index in range(len(joined))]
        if "datasets_kwargs" in top:
            raise self._refuse(f"{loader}.dataset.datasets_kwargs: not read; write the data sets out")
        return [at]

    def _is_packed(self, part: tuple[str | int, ...]) -> bool:
        """Preference data is packed where attention is kept within a sample (`use_varlen_attn`)."""
        take = self._settings.take
        if _last(take(*part, "type")) == "build_preference_dataset":
            return False
        return bool(take(*part, "pack_to_max_length"))

    def _sources(self, at: tuple[str | int, ...]) -> list[dict[str, Any]]:
        take = self._settings.take
        kind = _last(take(*at, "type"))
        if kind in xtuner_vision.DATA_TYPES:
            self._template(take(*at, "template_map_fn", "template") or take(*at, "template"))
            return xtuner_vision.sources(self._settings, at, self._note, self._refuse)
        if kind not in ("process_hf_dataset", "process_ms_dataset", "build_preference_dataset", "build_openai_dataset"):
            why = xtuner_names.REFUSED_DATA.get(kind)
            raise self._refuse(
                f"{_joined(at)}: data sets of {kind or 'an unnamed kind'} are not read{f': {why}' if why else ''}"
            )
        inner = (*at, "dataset")
        # Which part of a data set is taken, said of the rows or of the file that they come from.
        split = take(*at, "split")
        names = self._names(inner, split if isinstance(split, str) else "train")
        mapping = take(*at, "dataset_map_fn")
        mapping = take(*at, "dataset_map_fn", "function") if isinstance(mapping, dict) else mapping
        self._template(take(*at, "template_map_fn", "template"))
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
        if isinstance(split, str) and split != "train" and take(*inner, "data_files") is None:
            settings.setdefault("split", split)
        rows = take(*at, "max_dataset_length")
        if isinstance(rows, int):
            settings["max_rows"] = rows
        return [{"source": name, **self._format(name, mapping), **settings} for name in names]

    def _names(self, inner: tuple[str | int, ...], split: str) -> list[str]:
        """The files, the folder or the id that a data set is loaded from."""
        take = self._settings.take
        loader = _last(take(*inner, "type"))
        if loader == "load_from_disk":
            raise self._refuse(
                f"{_joined(inner)}: load_from_disk reads folders of `datasets`; save the rows as jsonl or parquet"
            )
        path = take(*inner, "path") or take(*inner, "dataset_name")
        if loader in xtuner_names.FILE_READERS or path in xtuner_names.FILE_LOADERS:
            return self._files(inner, split)
        if not isinstance(path, str):
            raise self._refuse(f"{_joined(inner)}.path: the data set's path or id is missing")
        return [path]

    def _files(self, inner: tuple[str | int, ...], split: str) -> list[str]:
        folder = self._settings.take(*inner, "data_dir")
        files = self._settings.take_whole(*inner, "data_files")
        if files is None and isinstance(folder, str):
            return [f"{folder.rstrip('/')}/"]
        if isinstance(files, dict):
            files = files.get(split)
        listed = [files] if isinstance(files, str) else files
        if not isinstance(listed, (list, tuple)) or not all(isinstance(name, str) for name in listed) or not listed:
            raise self._refuse(f"{_joined(inner)}.data_files: the names of the {split} files are missing")
        return list(listed)

    def _format(self, name: str, mapping: Value) -> dict[str, Any]:
        """How its rows are read: as our own part for that data set says, else by the mapping function."""
        if (known := recipes.source_settings(name)) is not None:
            return known
        function = _last(mapping)
        if function in xtuner_names.FORMATS:
            return dict(xtuner_names.FORMATS[function])
        if function in xtuner_names.PARTS:
            part, _, index = xtuner_names.PARTS[function].partition(".")
            settings = recipes.part_sources(part)[int(index or 0)]
            found = {key: value for key, value in settings.items() if key not in ("source", "subset", "split")}
            if function in xtuner_names.COLUMNS:
                found["columns"] = dict(xtuner_names.COLUMNS[function])
            return found
        if function:
            self._note(f"dataset_map_fn {function} of {name}: not run; the format is found from the columns")
        return {}

    def _template(self, template: Value) -> None:
        """Remember which of our chat templates a prompt template is; it counts where the tokenizer has none."""
        if isinstance(template, dict):
            self._note(
                "template_map_fn.template: a form of its own; the tokenizer's chat template is used, or a .jinja file"
                " that says the same as model.chat_template"
            )
            return
        name = _last(template)
        if not name:
            return
        ours = xtuner_names.TEMPLATES.get(name)
        if ours is None:
            self._note(
                f"template {name}: the tokenizer's own chat template is used; where it has none, set"
                " model.chat_template to a .jinja file"
            )
        elif self._template_name not in (None, ours):
            self._note(f"template {name}: a second form; one run has one template: {self._template_name}")
        else:
            self._template_name = ours

    def _train(self) -> dict[str, Any]:
        take = self._settings.take
        train: dict[str, Any] = {"grad_accumulation": self._accumulation}
        if isinstance(take("training_args"), dict):
            return train | self._training_args()
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
        if optimizer in xtuner_names.OPTIMIZERS:
            train["optimizer"] = xtuner_names.OPTIMIZERS[optimizer]
        elif optimizer:
            self._note(f"optim_wrapper.optimizer.type = {optimizer}: no counterpart; adamw is used")
        if (checkpointing := take("model", "use_activation_checkpointing")) is not None:
            train["gradient_checkpointing"] = checkpointing
        if (interval := take("default_hooks", "logger", "interval")) is not None:
            train["log_steps"] = self._steps(interval)
        train |= self._schedule(train.get("epochs"))
        return train

    def _training_args(self) -> dict[str, Any]:
        """What transformers' TrainingArguments say (framework = 'huggingface'); it counts in optimizer steps, as we do."""

        def take(key: str) -> Value:
            return self._settings.take("training_args", key)

        pairs = {
            "lr": "learning_rate", "weight_decay": "weight_decay", "batch_size": "per_device_train_batch_size",
            "epochs": "num_train_epochs", "log_steps": "logging_steps", "max_grad_norm": "max_grad_norm", "seed": "seed",
            "gradient_checkpointing": "gradient_checkpointing", "warmup_ratio": "warmup_ratio",
        }  # fmt: skip
        train = {ours: value for ours, theirs in pairs.items() if (value := take(theirs)) is not None}
        betas = (take("adam_beta1"), take("adam_beta2"))
        if betas != (None, None):
            train["betas"] = [betas[0] or 0.9, betas[1] or 0.999]
        if isinstance(steps := take("max_steps"), int) and steps > 0:
            train["max_steps"] = steps
        if isinstance(warmup := take("warmup_steps"), int) and warmup > 0:
            if "max_steps" in train:
                train["warmup_ratio"] = min(1.0, warmup / train["max_steps"])
            else:
                self._note(
                    f"training_args.warmup_steps = {warmup}: set train.warmup_ratio, a part of all steps, yourself"
                )
        train.setdefault("warmup_ratio", 0.0)
        schedule = take("lr_scheduler_type")
        if schedule is None or schedule in xtuner_names.SCHEDULES:
            train["schedule"] = xtuner_names.SCHEDULES.get(schedule or "linear", "linear")
        else:
            self._note(f"training_args.lr_scheduler_type = {schedule!r}: no counterpart; cosine is used")
        optimizer = take("optim")
        if optimizer in xtuner_names.HUGGINGFACE_OPTIMIZERS:
            train["optimizer"] = xtuner_names.HUGGINGFACE_OPTIMIZERS[optimizer]
        elif optimizer:
            self._note(f"training_args.optim = {optimizer!r}: no counterpart; adamw is used")
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
                    self._note(f"param_scheduler: eta_min = {scheduler['eta_min']}: the rate falls to 0 here")
            elif kind in ("ConstantLR", "LinearLR"):
                found["schedule"] = {"ConstantLR": "constant", "LinearLR": "linear"}[kind]
            else:
                self._note(f"param_scheduler {kind or _shown(scheduler)}: no counterpart; left out")
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
                if self._sees and (images := xtuner_vision.sample_images(hook.get("evaluation_images"), self._note)):
                    samples["images"] = images
                elif self._sees:
                    samples["prompts"] = []
                if isinstance(hook.get("max_new_tokens"), int):
                    samples["max_new_tokens"] = hook["max_new_tokens"]
                if isinstance(hook.get("system"), str) and hook["system"]:
                    samples["system"] = hook["system"]
                elif isinstance(hook.get("system"), Symbol):
                    samples |= self._system(hook["system"].last)
            elif kind not in xtuner_names.IDLE_HOOKS | {""}:
                self._note(f"custom_hooks: {kind}: no counterpart; left out")
        return samples

    def _system(self, name: str) -> dict[str, str]:
        """The system message of the sample prompts, in the words of our part for the same data."""
        if name in xtuner_names.SYSTEMS:
            return {"system": recipes.part_sources(xtuner_names.SYSTEMS[name])[0]["system"]}
        if name == "alpaca":
            self._note("custom_hooks: system = SYSTEM_TEMPLATE.alpaca: left out; no dialogue of the data set has it")
        else:
            self._note(f"custom_hooks: system = SYSTEM_TEMPLATE.{name}: set samples.system yourself")
        return {}

    def _output(self) -> dict[str, Any]:
        take = self._settings.take
        output: dict[str, Any] = {}
        if isinstance(take("training_args"), dict):
            pairs = {"save_steps": "save_steps", "keep": "save_total_limit", "dir": "output_dir"}
            return {ours: value for ours, theirs in pairs.items() if (value := take("training_args", theirs))}
        interval = take("default_hooks", "checkpoint", "interval")
        if isinstance(interval, int) and interval > 0:
            if take("default_hooks", "checkpoint", "by_epoch"):
                self._note("default_hooks.checkpoint.by_epoch: checkpoints are counted in steps here")
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


def _as_runner(names: Mapping[str, Value]) -> Mapping[str, Value]:
    """A config for the Hugging Face Trainer (framework = 'huggingface') with model, adapter and data where mmengine's are."""
    if "training_args" not in names or "train_dataset" not in names:
        return names
    model = {"type": Symbol("xtuner.model.SupervisedFinetune"), "llm": names.get("model"), "lora": names.get("lora")}
    return {**names, "model": model, "train_dataloader": {"dataset": names["train_dataset"]}}


def _joined(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def _whole(value: Value) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _is_harmless(path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in xtuner_names.HARMLESS)


def _shown(value: Value) -> str:
    text = (
        value.name
        if isinstance(value, Symbol)
        else f"{value.function.name}(...)"
        if isinstance(value, Call)
        else repr(value)
    )
    return text if len(text) <= 60 else f"{text[:60]}..."
