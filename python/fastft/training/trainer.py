"""transformers' Trainer, narrowed to what fastft needs and made exact.

Ours: the order of rows, token-weighted eval loss that draws no random number, a stop at the first loss that is not
finite, checkpoints that are whole or absent and hold no pickle. The loop, gradient accumulation, optimizer,
schedule and the multi-process side are the Trainer's.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from fastft import console
from fastft.config import schema
from fastft.errors import TrainingError
from fastft.model import adapter, folder_check, memory, speed, vision
from fastft.training import checkpoint, deepspeed, groups, loss, sharding, state
from fastft.training.batches import EpochBatches, EpochLoader
from fastft.training.host_checkpoints import HostCheckpoints
from fastft.training.resume import ADAPTER_WEIGHTS

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def total_steps(train: schema.Train, num_rows: int, processes: int = 1) -> int:
    """Optimizer steps of the whole run; the last one of an epoch may sum fewer batches."""
    batches = math.ceil(math.ceil(num_rows / train.batch_size) / processes)
    per_epoch = math.ceil(batches / train.grad_accumulation)
    return train.max_steps or math.ceil(train.epochs * per_epoch)


def arguments(
    config: schema.Config,
    run_dir: Path,
    steps: int,
    products: torch.dtype | None,
    on: torch.device,
    *,
    fast: speed.Speed | None = None,
    some_without_images: bool = True,
) -> Any:
    """TrainingArguments for a config; the names of today's transformers meet ours only here.

    Args:
        config: the run's config.
        run_dir: the run folder.
        steps: optimizer steps of the whole run.
        products: from `load.Loaded`.
        on: where the training runs.
        fast: what is used to be faster; None: torch's defaults.
        some_without_images: whether a batch may be text alone, so that a projector and a tower get no gradient.
    """
    train = config.train
    if on.type == "cpu" and train.optimizer == "paged_adamw_8bit":
        console.note("optimizer: paged_adamw_8bit pages between GPU and RAM; on a CPU it is adamw_8bit")
    optimizer = "adamw_8bit" if on.type == "cpu" and train.optimizer == "paged_adamw_8bit" else train.optimizer
    made = TrainingArguments(
        output_dir=str(run_dir),
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        gradient_accumulation_steps=train.grad_accumulation,
        max_steps=steps,
        learning_rate=train.lr,
        lr_scheduler_type=_SCHEDULES[train.schedule],
        warmup_steps=min(math.ceil(train.warmup_ratio * steps), steps),
        optim="adamw_torch" if optimizer == "adamw" and fast and not fast.fused_optimizer else _OPTIMIZERS[optimizer],
        tf32=None if fast is None else fast.tf32,
        weight_decay=train.weight_decay,
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        max_grad_norm=train.max_grad_norm,
        neftune_noise_alpha=train.neftune_alpha,
        logging_strategy="steps",
        logging_steps=train.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=config.output.save_steps or steps,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=train.seed,
        use_cpu=on.type == "cpu",
        # Both are autocast; fp16's gradients need their loss scaled, which comes with it.
        bf16=products == torch.bfloat16,
        fp16=products == torch.float16,
        dataloader_num_workers=0,
        dataloader_pin_memory=on.type in {"cuda", "xpu"},
        remove_unused_columns=False,
        label_names=["labels"],
        # Costs a walk through the graph in each step, and torch warns where it finds nothing.
        ddp_find_unused_parameters=some_without_images
        and config.vision is not None
        and vision.trains_vision(config.vision.learn),
        deepspeed=deepspeed.settings(config) if config.distributed.deepspeed is not None else None,
    )
    if made.n_gpu > 1:
        console.note(f"{made.n_gpu} GPUs are here and one is used; NPROC_PER_NODE={made.n_gpu} uses all")
        made._n_gpu = 1  # noqa: SLF001 - the only way to keep Trainer from nn.DataParallel
    return made


def shares_weights(config: schema.Config) -> bool:
    """Whether each process holds only a part of each weight, so that all must take part in using them."""
    wanted = config.distributed
    return wanted.fsdp or (wanted.deepspeed is not None and deepspeed.stage(wanted.deepspeed) == 3)


class FastftTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped for mypy
    """A Trainer for causal language models with fastft's samples.

    Args:
        config: the run's config.
        model: from `model.load`; its loss is replaced by the chunked one.
        args: from `arguments`.
        collate: list of samples -> tensors.
        train_rows: samples to learn from.
        eval_rows: samples to measure the loss on, or None.
        tokenizer: saved with every checkpoint.
        callbacks: Trainer callbacks.
        record: plain data for each checkpoint's manifest.
        extra_files: writes further files into each checkpoint.
    """

    def __init__(
        self,
        *,
        config: schema.Config,
        model: Any,
        args: Any,
        collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
        train_rows: Sequence[Any],
        eval_rows: Sequence[Any] | None,
        tokenizer: Any,
        callbacks: Sequence[Any],
        record: Mapping[str, Any],
        extra_files: Callable[[Path], None],
    ) -> None:
        from transformers import PrinterCallback

        self.config = config
        self.rows = train_rows
        self.eval_rows = eval_rows
        self.record = dict(record)
        self.extra_files = extra_files
        self.last_loss = math.nan
        self.tokens_seen = 0
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        # Packed documents are told apart only without a cache (spec training.md 2).
        causal_lm.config.use_cache = False
        _set_checkpointing(causal_lm, memory.checkpoints(config, args.device))
        self.install_loss(causal_lm)
        if config.accelerate.compile is True:
            speed.compile_layers(model)
        if config.distributed.fsdp:
            sharding.shard(model, args.device)
        self.seen_in_force = False
        # Trainer gets no tokenizer: it would write the tokenizer's special tokens into the model's config.
        self.tokenizer = tokenizer
        super().__init__(model=model, args=args, data_collator=collate, callbacks=list(callbacks))
        self.remove_callback(PrinterCallback)
        # Ours divides the sum of the losses by the learned tokens of the whole accumulated batch.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.config.distributed.fsdp:
            # The model is sharded already: autocast is wanted, DDP around it is not.
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def install_loss(self, causal_lm: Any) -> None:
        """Replace the model's loss by the chunked one, where that gives the same."""
        self.has_chunked_loss = loss.install(causal_lm)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            super().create_optimizer(model)
            groups.split(self.optimizer, self.model, self.config.train)
            if self.args.optim in {_OPTIMIZERS["adamw_8bit"], _OPTIMIZERS["paged_adamw_8bit"]}:
                _forget_frozen_embeddings()
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        args = self.args
        batches = EpochBatches(
            len(self.rows),
            args.train_batch_size,
            shuffle=self.config.data.shuffle,
            seed=args.seed,
            rank=args.process_index,
            world=args.world_size,
        )
        return EpochLoader(self.rows, batches, self.data_collator, pin=args.dataloader_pin_memory)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """As Trainer's; nothing once all steps are made: a run resumed from its last checkpoint would make one more."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def floating_point_ops(self, inputs: Any) -> int:  # noqa: ARG002 - the Trainer's name
        """Not counted: walking over all modules at each step costs more than a small model's forward."""
        return 0

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if not self.seen_in_force:
            sharding.require_in_force(self.config, model, self.accelerator.distributed_type.value)
            self.seen_in_force = True
        step_loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(step_loss):
            raise TrainingError(self._not_finite("loss", step_loss.item()))
        self.last_loss = step_loss.item()
        self.tokens_seen += inputs["input_ids"].numel() * self.args.world_size
        return step_loss

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.config.distributed.fsdp:
            norm: Any = sharding.clip(model, self.args.max_grad_norm)
        else:
            norm = super()._clip_grad_norm(model)
        if norm is None:  # DeepSpeed clips in the optimizer's step
            return norm
        # Under loss scaling (fp16) a norm that is not finite is normal: the scaler skips that step.
        if not self.args.fp16 and not torch.isfinite(torch.as_tensor(norm)):
            raise TrainingError(self._not_finite("gradient norm", float(norm)))
        return norm

    def _not_finite(self, what: str, value: float) -> str:
        kept = next((found.path.name for found in checkpoint.find(Path(self.args.output_dir)) if not found.fault), None)
        go_on = f"{kept} is whole: --resume auto goes on from it" if kept else "no checkpoint was written yet"
        return (
            f"step {self.state.global_step + 1}: the {what} is {value}; the training stopped before it spoiled the "
            f"weights. {go_on}. Try a lower train.lr (now {self.config.train.lr:g}), more train.warmup_ratio, or "
            "model.dtype: fp32"
        )

    @torch.no_grad()
    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Mean loss per learned token of the eval rows, in nats; nothing of the training's state is touched."""
        assert self.eval_rows is not None
        training = self.model.training
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        size, world = self.args.eval_batch_size, self.args.world_size
        for first in range(0, len(self.eval_rows), size * world):
            # Shared weights are gathered together: a process whose rows have run out repeats the first, uncounted.
            start = first + self.args.process_index * size
            rows = range(start, min(start + size, len(self.eval_rows)))
            inputs = self._prepare_inputs(self.data_collator([self.eval_rows[i] for i in rows or (0,)]))
            if not rows:
                inputs["labels"] = torch.full_like(inputs["labels"], loss._IGNORED)  # noqa: SLF001
            count = int((inputs["labels"][:, 1:] != loss._IGNORED).sum())  # noqa: SLF001
            outputs = self.model(**inputs, num_items_in_batch=1)
            total += torch.tensor([float(outputs.loss), count], dtype=torch.float64)
        self.model.train(training)
        if world > 1:
            # float32: not every backend sums float64 on every device; 24 bits are enough for a mean of losses.
            shared = total.to(device=self.args.device, dtype=torch.float32)
            torch.distributed.all_reduce(shared)
            total = shared.cpu().double()
        metrics = {"eval_loss": (total[0] / total[1].clamp(min=1)).item()}
        self.log(dict(metrics))
        # Tells the loop that it is done; at the end of an epoch it would be asked for again.
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ARG002 - the Trainer's names
        """Write a whole checkpoint or none; only the main process writes, the others send what is theirs."""
        states = self._states()
        run_dir, step = Path(self.args.output_dir), self.state.global_step
        if self.config.distributed.deepspeed is not None:
            self._save_deepspeed(run_dir, step, states)
        else:
            weights = self.gathered_weights()
            optimizer = sharding.gathered_optimizer(self.optimizer) if self.config.distributed.fsdp else None

            def fill(folder: Path) -> None:
                parts = {"optimizer": optimizer or self.optimizer.state_dict()}
                self._fill(folder, {**parts, "scheduler": self.lr_scheduler.state_dict(), "processes": states}, weights)

            if self.args.should_save:
                checkpoint.save(run_dir, step, fill, self.record)
        if self.args.should_save:
            checkpoint.keep_newest(run_dir, self.config.output.keep)
        if self.args.world_size > 1:
            torch.distributed.barrier()

    def _save_deepspeed(self, run_dir: Path, step: int, states: Sequence[Any]) -> None:
        """The same, where every process writes its part of the optimizer into the folder that the first one made."""

        def write_part(folder: str) -> Any:
            self._save_optimizer_and_scheduler(folder)
            weights = self.gathered_weights()
            if self.args.world_size > 1:
                torch.distributed.barrier()
            return weights

        def fill(folder: Path) -> None:
            if self.args.world_size > 1:
                torch.distributed.broadcast_object_list([str(folder)])
            self._fill(folder, {"processes": states}, write_part(str(folder)))

        if self.args.should_save:
            checkpoint.save(run_dir, step, fill, self.record)
        else:
            place: list[Any] = [None]
            torch.distributed.broadcast_object_list(place)
            write_part(place[0])

    def gathered_weights(self) -> dict[str, torch.Tensor] | None:
        """The state dict to write, in the first process, if the processes share the weights; else None."""
        if self.config.distributed.fsdp:
            return sharding.gathered_weights(self.model)
        if shares_weights(self.config):
            weights: dict[str, torch.Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
            return weights if self.args.should_save else None
        return None

    def _fill(self, folder: Path, states: Mapping[str, Any], weights: Mapping[str, torch.Tensor] | None) -> None:
        save_model(self.model, self.tokenizer, folder, weights, own_names=True)
        scaler = getattr(self.accelerator, "scaler", None)
        state.write(folder, {**states, "scaler": scaler.state_dict()} if scaler is not None else states)
        self.state.save_to_json(str(folder / "trainer_state.json"))
        self.extra_files(folder)

    def _states(self) -> list[dict[str, Any]]:
        """What each process alone knows and a resumed run needs; all take part.

        Random numbers of Python, numpy, the CPU and this process's device; the sum of the losses since the last line
        of metrics.jsonl.
        """
        import random

        import numpy as np

        numpy_state: Any = np.random.get_state()  # noqa: NPY002 - the global state is what libraries draw from
        name, keys, *rest = numpy_state
        own: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": (name, keys.tolist(), *rest),
            "cpu": torch.random.get_rng_state(),
            "loss_sum": self._tr_loss.item(),
            "logged": self._globalstep_last_logged,
        }
        if self.args.device.type != "cpu":
            own["device"] = torch.get_device_module(self.args.device).get_rng_state(self.args.device)
        if self.args.world_size == 1:
            return [own]
        gathered: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(gathered, own)
        return gathered

    def _own_state(self, folder: Path) -> dict[str, Any]:
        """This process's part of `_states` in a checkpoint."""
        found = state.read(folder, "processes")
        if len(found) != self.args.world_size:
            raise TrainingError(
                f"--resume {folder}: the checkpoint holds the random numbers of {len(found)} processes, not of "
                f"{self.args.world_size}"
            )
        own: dict[str, Any] = found[self.args.process_index]
        return own

    def _load_rng_state(self, checkpoint: str | None) -> None:
        import random

        import numpy as np

        if checkpoint is None:  # called before the first step of a session
            return
        own = self._own_state(Path(checkpoint))
        try:
            self._tr_loss = torch.tensor(float(own["loss_sum"]), device=self.args.device)
            self._globalstep_last_logged: int = int(own["logged"])
            random.setstate(own["python"])
            np.random.set_state(own["numpy"])  # noqa: NPY002
            torch.random.set_rng_state(own["cpu"])
            if self.args.device.type != "cpu":
                torch.get_device_module(self.args.device).set_rng_state(own["device"], self.args.device)
        except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as cause:
            raise TrainingError(
                f"--resume {checkpoint}: the random numbers of process {self.args.process_index} cannot be set: "
                f"{type(cause).__name__}: {cause}"
            ) from cause

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Tied weights stand in a file once; anything else that is missing would be lost in silence."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or self.model._tied_weights_keys or ())  # noqa: SLF001
        lost = sorted({*load_result.missing_keys} - tied) + sorted(load_result.unexpected_keys)
        if lost:
            raise TrainingError(f"--resume: the checkpoint's weights do not fit the model: {', '.join(lost[:5])}")

    def train(self, resume_from_checkpoint: str | None = None, **settings: Any) -> Any:
        """As Trainer's; `resume_from_checkpoint` is a folder that `resume.choose` has looked through."""
        if resume_from_checkpoint is not None and state.is_old(Path(resume_from_checkpoint)):
            console.note(
                f"{Path(resume_from_checkpoint).name}: its states are pickles of an earlier version; they are read as data, "
                "and nothing in them is run"
            )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **settings)

    def _load_callback_state(self) -> None:
        """As Trainer's; of the intervals in a checkpoint and those of the config the latter count."""
        super()._load_callback_state()
        self.state.compute_steps(self.args, self.args.max_steps)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self.config.distributed.fsdp:
            self._load_shared_weights(folder)
        else:
            with folder_check.library_errors(f"--resume {folder}: the weights do not fit the model"):
                if hasattr(self.model, "get_base_model"):
                    check_adapter(self.model, folder)
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, weight in self.model.named_parameters():
            if weight.requires_grad and not bool(torch.isfinite(sharding.local(weight)).all()):
                raise TrainingError(f"--resume {folder}: the weight {name} holds a number that is not finite")

    def _load_shared_weights(self, folder: Path) -> None:
        lacks, unknown = sharding.load_weights(self.model, folder, lambda weights: names_in_files(self.model, weights))
        self._issue_warnings_after_load(SimpleNamespace(missing_keys=lacks, unexpected_keys=unknown))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.config.distributed.deepspeed is not None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        found = state.fitting_optimizer(state.read(folder, "optimizer"), self.optimizer, f"--resume {folder}")
        if self.config.distributed.fsdp:
            sharding.load_optimizer(self.optimizer, found)
        else:
            self.optimizer.load_state_dict(found)
        scheduler = state.read(folder, "scheduler")
        self.lr_scheduler.load_state_dict(
            state.fitting(
                scheduler, self.lr_scheduler.state_dict(), ("last_epoch",), f"--resume {folder}: the schedule"
            )
        )

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is None or scaler is None:
            return
        found = state.read(Path(checkpoint), "scaler")
        if found is not None:
            wanted = scaler.state_dict()
            scaler.load_state_dict(
                state.fitting(found, wanted, tuple(wanted), f"--resume {checkpoint}: the loss scaler")
            )


def _forget_frozen_embeddings() -> None:
    """Let go of the embeddings that Trainer gives to bitsandbytes' manager of optimizers, a global list.

    It holds them for 32-bit states as long as the process lives, also those that have no gradient and so no states: the
    table of a model that is long gone, 1.02 GiB of the card with Qwen2.5-7B.
    """
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    manager.module_weight_config_triple[:] = [
        entry for entry in manager.module_weight_config_triple if getattr(entry[0], entry[1]).requires_grad
    ]


def names_in_files(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict under the names that `save_model` gives them."""
    if not hasattr(model, "get_base_model"):
        return weights
    from peft import get_peft_model_state_dict

    named: dict[str, torch.Tensor] = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    return named


def check_adapter(model: Any, folder: Path) -> None:
    """See that the adapter in a checkpoint is that of a PeftModel, tensor by tensor; only its header is read.

    Raises:
        TrainingError: a tensor is missing, or there is one more, or one has another shape.
    """
    from peft import get_peft_model_state_dict

    from fastft.convert.folder import read_safetensors

    found = {name: tuple(source.shape) for name, source in read_safetensors(folder / ADAPTER_WEIGHTS).items()}
    wanted = {
        name: tuple(value.shape)
        for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            there, here = (f"{shapes[name]}" if name in shapes else "nothing" for shapes in (found, wanted))
            raise TrainingError(
                f"--resume {folder}: the checkpoint's weights do not fit the model: {name} is {there} there and {here} here"
            )


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    weights: Mapping[str, torch.Tensor] | None = None,
    *,
    own_names: bool = False,
) -> None:
    """Write an adapter or a whole model with its tokenizer and chat template into an existing folder.

    Args:
        model: what is written.
        tokenizer: goes with it.
        folder: exists and is empty.
        weights: the state dict, if the model holds only a part of each weight; else None.
        own_names: keep the names that weights have in the model, by which a resumed run finds them, where the hub's files
            have others (LLaVA, Mixtral, ...).
    """
    given: dict[str, Any] = {} if weights is None else {"state_dict": dict(weights)}
    config = model.get_base_model().config if hasattr(model, "get_base_model") else model.config
    use_cache, config.use_cache = config.use_cache, True  # off in training only
    try:
        if hasattr(model, "get_base_model"):
            # peft would otherwise ask the hub for the base's config, to see whether embeddings were resized.
            model.save_pretrained(folder, save_embedding_layers=False, **given)
        else:
            model.save_pretrained(folder, save_original_format=not own_names, **given)
    finally:
        config.use_cache = use_cache
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    tokenizer.save_pretrained(folder)


def describe_weights(model: Any) -> str:
    """`1.3 M of 8.0 M weights are trained (16 %)`."""
    trained, total = adapter.count_weights(model)
    return f"{_millions(trained)} of {_millions(total)} weights are trained ({trained / max(total, 1):.2%})"


def _millions(number: int) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _set_checkpointing(causal_lm: Any, where: str) -> None:
    """Recompute layers; `where` their inputs wait is none, device or host."""
    if where == "none":
        return
    kwargs = {"use_reentrant": False}
    if hasattr(causal_lm, "activation_checkpointing_enable"):  # transformers >= 5.23 renamed it
        causal_lm.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    if where == "host":
        keeper = HostCheckpoints()
        for module in causal_lm.modules():
            if hasattr(module, "_gradient_checkpointing_func"):
                module._gradient_checkpointing_func = keeper  # noqa: SLF001 - transformers' own place for it
