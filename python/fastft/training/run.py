"""A training run in order: folder, data, model, steps, result.

What can be refused is refused in that order, cheapest first, so that nobody waits for gigabytes of weights to hear of
a wrong path. `run` is the door for `fastft train`; `dry_run` does everything up to the weights.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft import console, publish, stop
from fastft.config import schema, show
from fastft.errors import DataError, FileError, TrainingError
from fastft.model import adapter, device, lora_start, quiet, tokenizer
from fastft.model import load as model_load
from fastft.training import folder, launch, resume, words
from fastft.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    from fastft.plan import for_run

# Bytes per trained weight in a checkpoint: fp32 weight and two moments.
_STATE_BYTES = 12
# Bytes per trained weight that the result has at least.
_RESULT_BYTES = 2


@dataclass(frozen=True)
class RunResult:
    """What a finished run left behind.

    Attributes:
        run_dir: the run folder.
        artifact: adapter/ or model/ in it.
        loss: mean training loss of the last line of metrics.jsonl, nats per learned token.
        steps: optimizer steps of the whole run.
        seconds: of this session, wall clock.
    """

    run_dir: Path
    artifact: Path
    loss: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class Prepared:
    """All that is known before the weights are read."""

    base: model_load.Base
    words: words.Words
    data: Any


def dry_run(config: schema.Config, *, work_dir: Path, processes: int = 1) -> None:
    """Check folder, config and data of a run and show a sample; no weights are read and no step is made.

    Args:
        config: the whole run.
        work_dir: the run folder; not made.
        processes: that would train together.

    Raises:
        FastftError: whatever would stop the run before its first step.
    """
    _check_choices(config, processes)
    folder.prepare(work_dir, resume=True)
    if not any(work_dir.iterdir()):
        work_dir.rmdir()
    console.note(show.short(config))
    prepared = _prepare(config)
    from fastft.training import trainer

    if config.task in ("pretrain", "sft"):
        console.note(_first_batch(config, prepared))
    steps = trainer.total_steps(config.train, _num_rows(config, prepared.data), processes)
    by = f" by {processes} processes" if processes > 1 else ""
    console.note(f"dry run: {steps} steps would be made in {work_dir}{by}; nothing was trained")


def _first_batch(config: schema.Config, prepared: Prepared) -> str:
    """What the first process would see first: rows, their length, how many of the tokens are learned."""
    from fastft.data.samples import NOT_LEARNED
    from fastft.training.batches import EpochBatches

    rows, train = prepared.data.train, config.train
    order = EpochBatches(len(rows), train.batch_size, shuffle=config.data.shuffle, seed=train.seed)
    batch = _collator(prepared.words, packed=prepared.data.report.packing)([rows[index] for index in next(iter(order))])
    count, length = batch["input_ids"].shape
    learned = int((batch["labels"] != NOT_LEARNED).sum())
    shapes = [f"{key} {list(value.shape)}" for key, value in batch.items() if value.shape[:2] != (count, length)]
    images = f"; images: {', '.join(shapes)}" if shapes else ""
    return f"first batch: {count} rows of {length} tokens, {learned} of {count * length} learned{images}"


def run(config: schema.Config, *, work_dir: Path, resume: str | None = None) -> RunResult:
    """Train as the config says.

    Args:
        config: the whole run.
        work_dir: the run folder; made if it is not there.
        resume: `auto`, the path of a checkpoint, or None for a new run.

    Returns:
        where the result lies, and how it went.

    Raises:
        FastftError: anything that the user can mend.
        SystemExit: 130 or 143 after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    started = time.monotonic()
    _check_choices(config, launch.num_processes())
    writes = launch.rank() == 0
    with _disk_named(work_dir), ExitStack() as stack:
        if writes:
            stack.enter_context(folder.held(work_dir, resume=resume is not None))
            stack.enter_context(console.copied_to(work_dir / "log.txt"))
        else:
            stack.enter_context(console.silenced())
        return _run(config, work_dir, resume, writes=writes, started=started)


def _run(config: schema.Config, work_dir: Path, wanted: str | None, *, writes: bool, started: float) -> RunResult:
    console.note(show.short(config))
    found = None if wanted is None else resume.choose(work_dir, wanted)
    prepared = _prepare(config)
    if writes:
        publish.write_text(work_dir / "config.yaml", show.flat_yaml(config))

    from fastft.training import metrics, page, record, refresh, trainer

    processes = launch.num_processes()
    rows = _num_rows(config, prepared.data)
    steps = trainer.total_steps(config.train, rows, processes)
    counts = {"rows": rows, "tokens": prepared.data.train.num_tokens, "processes": processes}
    if found is not None:
        resume.check_same_run(found, config, counts)
        console.note(f"going on from {found.path} (step {found.step} of {steps})")
    if writes:
        publish.remove_leftovers(work_dir)
        for name in ("metrics.jsonl", "samples.jsonl"):
            metrics.drop_after(work_dir / name, found.step if found else -1, steps)

    from transformers import set_seed

    choice = _planned(config, prepared.base)
    set_seed(config.train.seed)  # adapters and new weights are drawn while loading
    with _fits_on_gpu(config, lambda: "reading the weights"):
        loaded = choice.told(model_load.load_weights(choice.config, prepared.base, prepared.words.tokenizer))
    if found is not None:
        lora_start.check(found.path, loaded.model)
    about = record.describe(config, loaded, counts, steps)
    console.note(f"model: {trainer.describe_weights(loaded.model)}, base {about['base']['dtype']}{_held(loaded)}")
    if config.vision is not None:
        from fastft.model import vision

        console.note(f"trained: {vision.describe(config.vision.learn, config.method.kind)}")
    if config.memory != schema.Memory() or device.choose().type != "cpu":
        console.note(f"memory: {loaded.memory.line()}")
    console.note(f"speed: {'; '.join(loaded.speed.parts())}")
    if writes:
        _require_space(work_dir, loaded.model, config)
    on_page = page.About(config, steps, prepared.data.report.lines(), about)
    artifact = work_dir / _artifact_name(config)
    with _failure_on_page(work_dir, on_page, writes=writes):
        loss, weights = _train(
            config, work_dir, loaded, prepared, on_page, planned=choice.config, found=found, writes=writes
        )
        if writes:
            files = _processor_files(config, prepared)
            _write_result(config, artifact, loaded, about, weights, processor_files=files)
    if writes:
        lines = metrics.read(work_dir / "metrics.jsonl")
        refresh.draw(work_dir, on_page, state="finished")
        loss = next((line["loss"] for line in reversed(lines) if "loss" in line), loss)
    seconds = time.monotonic() - started
    console.note(f"done: {steps} steps in {seconds:.0f} s, loss {loss:.4f}")
    console.note(f"result: {artifact}\nplot:   {work_dir / 'loss.png'}\nreport: {work_dir / page.FILE_NAME}")
    return RunResult(work_dir, artifact, loss, steps, seconds)


def _artifact_name(config: schema.Config) -> str:
    """What the folder of the result is called in the run folder."""
    if config.vision is not None and config.vision.tower is not None:
        return "llava"
    return "adapter" if config.method.has_adapter else "model"


def _check_choices(config: schema.Config, processes: int) -> None:
    from fastft.training import loggers

    loggers.check(config)
    wanted = config.distributed
    if wanted.deepspeed is not None:
        from fastft.training import deepspeed

        deepspeed.settings(config)
    if wanted.fsdp:
        from fastft.training import sharding

        sharding.check(config, processes)


def _prepare(config: schema.Config) -> Prepared:
    """Tokenizer and data; the weights are not touched."""
    quiet.prepare_libraries()
    from fastft.chat import session
    from fastft.data import check, formats, preview
    from fastft.data import prepare as data_prepare

    base = model_load.locate(config.model)
    read = words.read(config, base)
    if read.seer is not None:
        for path in config.samples.images:
            read.seer.size(session.image(path))
    data = data_prepare.prepare(
        config.data,
        config.task,
        read.tokenizer,
        config.train.seed,
        batch_size=config.train.batch_size,
        seer=read.seer,
    )
    for line in data.report.lines():
        console.note(line)
    check.require(data.report, config.data)
    if len(data.train) == 0:
        raise DataError("data.train: no sample is left to learn from; `fastft log-dataset` shows what was read")
    console.note("the first sample; what is learned is marked:")
    console.show(preview.opening(data.train[0], read.tokenizer, colour=console.stderr().is_terminal))
    if config.task in formats.PAIR_TASKS:
        console.note("and the answer that lost:")
        console.show(preview.opening(data.train[1], read.tokenizer, colour=console.stderr().is_terminal))
    return Prepared(base, read, data)


def _processor_files(config: schema.Config, prepared: Prepared) -> Callable[[Path], None]:
    """What puts a vision model's processor beside its weights; nothing for a model that reads text only."""
    read = prepared.words

    def write(place: Path) -> None:
        if read.processor is None:
            return
        if config.vision is not None and config.vision.tower is not None:
            read.processor.save_pretrained(place)
        else:
            from fastft.model import processor

            processor.save(read.processor, place, prepared.base.weights_folder, config.vision)

    return write


def _planned(config: schema.Config, base: model_load.Base) -> "for_run.Choice":
    """The memory switches that the plan for this card asks for."""
    from fastft.plan import card, for_run

    return for_run.choose(config, base, card.here(), launch.num_processes(), has_bf16=card.has_bf16())


def _train(
    config: schema.Config,
    work_dir: Path,
    loaded: model_load.Loaded,
    prepared: Prepared,
    on_page: Any,
    *,
    planned: schema.Config,
    found: Checkpoint | None,
    writes: bool,
) -> tuple[float, Any]:
    """Make the steps; `planned` is the config with the plan's memory switches.

    Returns:
        the loss of the last one; and the state dict to write, in the first process of a sharded run, else None.
    """
    import torch

    from fastft.chat import session
    from fastft.training import loggers, record, refresh, trainer
    from fastft.training.interrupt import Interrupt
    from fastft.training.metrics import Metrics
    from fastft.training.periodic import Periodic
    from fastft.training.samples import SampleAnswers

    about, steps, step = on_page.record, on_page.steps, found.step if found else 0
    listeners = loggers.start(config, resume.flat(config), work_dir, step) if writes else []
    pages = [refresh.Refresh(work_dir, on_page)] if writes else []
    flatten = loaded.speed.attention == "flash_attention_2"
    learning = _learning(config, prepared, flatten=flatten)
    processor_files = _processor_files(config, prepared)
    arguments = trainer.arguments(
        config,
        work_dir,
        steps,
        loaded.products,
        device.choose(),
        fast=loaded.speed,
        some_without_images=config.vision is None or not prepared.data.train.collection.all_have_images,
    )

    def beside(place: Path) -> None:
        record.write(place, about)
        lora_start.write(place, loaded.model)
        processor_files(place)

    interrupt = Interrupt()
    talk = session.Talk(loaded.model, loaded.tokenizer, continues=config.task == "pretrain", seer=prepared.words.seer)
    with console.progress("training", steps, "steps", start=step) as advance:
        status = Status()
        metrics = Metrics(work_dir / "metrics.jsonl", advance if writes else None, status.read, listeners)
        answers = SampleAnswers(
            work_dir / "samples.jsonl",
            talk,
            config.samples,
            config.train.sample_steps,
            speaks=writes,
            together=trainer.shares_weights(config),
        )
        has_eval = learning.eval_rows is not None and len(learning.eval_rows) > 0
        with _fits_on_gpu(config, status.where):
            work = learning.trainer(
                config=planned,
                model=loaded.model,
                args=arguments,
                collate=learning.collate,
                train_rows=learning.train_rows,
                eval_rows=learning.eval_rows if has_eval else None,
                tokenizer=loaded.tokenizer,
                callbacks=[
                    *(metrics, answers, Periodic(config.train.eval_steps if has_eval else None), interrupt),
                    *pages,
                ],
                record={"config": resume.flat(config), "data": about["data"]},
                extra_files=beside,
            )
            status.trainer = work
            with interrupt.listening():
                output = work.train(resume_from_checkpoint=str(found.path) if found else None)
            if has_eval and interrupt.received is None:
                work.evaluate()
    if interrupt.received is not None:
        if writes:
            refresh.draw(work_dir, on_page, state=f"stopped by {signal.Signals(interrupt.received).name}")
        _say_how_to_go_on(work_dir, work.state.global_step)
        raise SystemExit(interrupt.exit_code)
    if not torch.isfinite(torch.tensor(float(output.training_loss))):
        raise TrainingError(f"the training ended with a loss of {output.training_loss}")
    if (
        about["method"] in {"full", "freeze"} and config.distributed.deepspeed is None
    ):  # whose weights are 16-bit already
        _in_dtype_of_base(loaded)
    return float(output.training_loss), work.gathered_weights()


@dataclass(frozen=True)
class Learning:
    """What a task learns from, and by which trainer."""

    trainer: Any
    collate: Any
    train_rows: Any
    eval_rows: Any


def _collator(read: words.Words, *, packed: bool, flatten: bool = False) -> Any:
    """What makes batches of samples; `flatten` lays rows into one, which flash attention needs to tell them apart."""
    from fastft.data.collate import Collator
    from fastft.data.vision import VisionCollator

    pad_id = tokenizer.pad_id(read.tokenizer)
    if read.seer is not None:
        return VisionCollator(read.seer, pad_id, packed=packed, flatten=flatten)
    return Collator(pad_id, flatten=flatten)


def _learning(config: schema.Config, prepared: Prepared, *, flatten: bool) -> Learning:
    """What is learned from."""
    from fastft.data.preference_rows import RowCollator, Rows
    from fastft.training import trainer

    data, pad_id = prepared.data, tokenizer.pad_id(prepared.words.tokenizer)
    if config.task in ("pretrain", "sft"):
        collate = _collator(prepared.words, packed=data.report.packing, flatten=flatten)
        return Learning(trainer.FastftTrainer, collate, data.train, data.eval)
    from fastft.training.preferences import PreferenceTrainer

    train, evaluation = (
        None if part is None else Rows(part, config.task, max_length=config.data.max_length, seed=config.train.seed)
        for part in (data.train, data.eval)
    )
    return Learning(PreferenceTrainer, RowCollator(pad_id), train, evaluation)


def _num_rows(config: schema.Config, data: Any) -> int:
    """Rows to learn from; a pair of answers is one."""
    from fastft.data import formats, preference_rows

    return preference_rows.num_rows(data.train, pairs=config.task in formats.PAIR_TASKS)


class Status:
    """What the status line reads from a trainer that is made after it."""

    def __init__(self) -> None:
        self.trainer: Any = None

    def read(self) -> tuple[float, int]:
        """Loss of the last micro-batch, and tokens seen in this session."""
        return self.trainer.last_loss, self.trainer.tokens_seen

    def where(self) -> str:
        """Which step is made: `step 3`."""
        return f"step {1 if self.trainer is None else self.trainer.state.global_step + 1}"


@contextmanager
def _fits_on_gpu(config: schema.Config, where: Callable[[], str]) -> Iterator[None]:
    """A full GPU is the user's to mend: say what would help with this method."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as cause:
        smaller = {
            "freeze": "train fewer layers (method.trained_layers), or use method lora or qlora",
            "full": "set model.dtype: bf16 and train.optimizer: adamw_8bit, or use method lora or qlora",
            "lora": "use method qlora",
            "qlora": "choose a smaller model",
        }[config.method.kind]
        raise TrainingError(
            f"{where()}: the GPU's memory is full; lower train.batch_size (and raise grad_accumulation) or "
            f"data.max_length, or {smaller}"
        ) from cause


@contextmanager
def _disk_named(work_dir: Path) -> Iterator[None]:
    """An error of the disk names the run folder: metrics and log are written without a word of their own."""
    try:
        yield
    except OSError as cause:
        if (clear := publish.told(cause, work_dir)) is cause:
            raise
        raise FileError(f"{clear}; checkpoints that are there are whole") from cause


@contextmanager
def _failure_on_page(work_dir: Path, on_page: Any, *, writes: bool) -> Iterator[None]:
    """What stops a training stands on report.html too, which would say for ever that it is running."""
    from fastft.training import refresh

    try:
        with stop.held():
            yield
    except (Exception, KeyboardInterrupt) as error:
        if writes:
            why = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else str(error) or type(error).__name__
            try:
                refresh.draw(work_dir, on_page, state=f"stopped: {why}")
            except FileError as other:
                console.warn(f"the report is not renewed: {other}")
        raise


def _write_result(
    config: schema.Config,
    artifact: Path,
    loaded: model_load.Loaded,
    about: dict[str, Any],
    weights: Any,
    *,
    processor_files: Callable[[Path], None],
) -> None:
    from fastft.training import llava_result, record, trainer

    try:
        num_bytes = adapter.count_weights(loaded.model)[0] * _RESULT_BYTES
        with publish.staged(artifact, force=True, num_bytes=num_bytes) as staging:
            if artifact.name == llava_result.NAME:
                llava_result.write(config, loaded, staging, about, weights)
            else:
                trainer.save_model(loaded.model, loaded.tokenizer, staging, weights)
                lora_start.convert(staging, loaded.model)
            record.write(staging, about)
            processor_files(staging)
        record.write(artifact.parent, about)
    except FileError as cause:
        raise FileError(f"result: {cause}; the last checkpoint is whole: run again with --resume auto") from cause


def _in_dtype_of_base(loaded: model_load.Loaded) -> None:
    """Round a model that was trained in fp32 to the dtype of the checkpoint it came from, as a merge does.

    The training is over; its checkpoints hold the fp32 weights. All processes of a sharded run take part.
    """
    import torch

    from fastft.model import vision
    from fastft.training import sharding

    dtype = model_load.checkpoint_dtype(loaded.base)
    if loaded.model.dtype == dtype or not dtype.is_floating_point:
        return
    largest = max(float(sharding.whole(p.detach().abs().max())) for p in loaded.model.parameters() if p.numel())
    if largest > torch.finfo(dtype).max:
        console.warn(
            f"result: a weight is {largest:g}, too large for the base's {device.short_name(dtype)}; kept as fp32"
        )
        return
    adapters = {name: p.detach().clone() for name, p in loaded.model.named_parameters() if vision.is_adapter(name)}
    loaded.model.to(dtype)
    for name, parameter in loaded.model.named_parameters():
        if name in adapters:  # fp32, as every adapter
            parameter.data = adapters[name]
    console.note(f"result: written in {device.short_name(dtype)}, as the base is; the last checkpoint holds fp32")


def _require_space(work_dir: Path, model: Any, config: schema.Config) -> None:
    folder.require_space(work_dir, adapter.count_weights(model)[0] * _STATE_BYTES, config.output.keep)


def _held(loaded: model_load.Loaded) -> str:
    quantized = loaded.quantized
    if quantized is None:
        return "" if loaded.products is None else f", products in {device.short_name(loaded.products)}"
    double = " double-quantized" if quantized.double_quant else ""
    return f", held in {quantized.type}{double}, products in {quantized.compute_dtype}"


def _say_how_to_go_on(work_dir: Path, step: int) -> None:
    console.note(f"stopped after step {step}; the checkpoint is {work_dir / f'checkpoint-{step}'}")
    console.note(f"the same command with --work-dir {work_dir} --resume auto goes on from there")
