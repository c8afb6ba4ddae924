"""The memory of a training step, counted by running it on shapes alone.

Layers repeat, so the step is run with few of them and again with a few more. Each part of it (the forward pass of the
first and the last layer, the loss, the backward pass of the last and the first layer, the optimizer) takes a number of
bytes that grows evenly with the number of layers; what it takes with all of them follows from the two, and the largest
part is the peak. Layers in between lie between the first and the last.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastft.config import schema
from fastft.data.formats import PAIR_TASKS
from fastft.errors import ConfigError
from fastft.model import adapter, quiet
from fastft.plan import skeleton
from fastft.plan.tracker import Tracker, rounded

# What cuBLAS asks of torch's allocator: 8 MiB, and 32 MiB on Hopper.
WORKSPACE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Subject:
    """What is planned.

    Attributes:
        config: the run.
        model_config: transformers' config of the base.
        checkpoint: dtype of the base's files.
        stored_4bit: the quantization block of a 4-bit base, or None.
        on_gpu: whether the run will be on a GPU.
        has_bf16: whether that GPU multiplies bf16.
    """

    config: schema.Config
    model_config: Any
    checkpoint: torch.dtype
    stored_4bit: Mapping[str, Any] | None
    on_gpu: bool = True
    has_bf16: bool = True


@dataclass(frozen=True)
class Account:
    """Bytes on the card, at the moment of the peak.

    Attributes:
        layers: weights of the layers, 4-bit or not.
        embedding: the embedding table, and the head where it is the same.
        head: the head.
        trained: adapters and whatever else is trained.
        gradients: of all that is trained.
        optimizer: its states.
        working: all the rest of the peak: activations, logits, temporary weights.
        peak: of torch's allocator: the sum of these.
        ram: what waits in host RAM.
        trained_weights: how many numbers are trained.
        all_weights: how many the model has, adapters included.
        part: where in the step the peak is.
        line: the memory switches in use.
    """

    layers: int
    embedding: int
    head: int
    trained: int
    gradients: int
    optimizer: int
    working: int
    peak: int
    ram: int
    trained_weights: int
    all_weights: int
    part: str
    line: str


def account(subject: Subject, tokens: int, *, chunked_loss: bool = True) -> Account:
    """Count a step on rows of `tokens` tokens.

    Raises:
        ConfigError: the model's code needs numbers, not shapes alone.
    """
    quiet.prepare_libraries()
    length = skeleton.period(subject.model_config)
    total = int(subject.model_config.get_text_config().num_hidden_layers)
    # With freeze the last layers are trained; there must be others before them in both runs.
    ends = -(-(subject.config.method.trained_layers or 1) // length) * length
    few, more = length + ends, 2 * length + ends
    if total <= more:
        few = more = total
    try:
        small = _Run(subject, few, tokens, chunked_loss=chunked_loss)
        large = small if few == more else _Run(subject, more, tokens, chunked_loss=chunked_loss)
    except RuntimeError as cause:  # how torch says that an operation needs numbers
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise ConfigError(
            f"plan: a model of type {subject.model_config.model_type} cannot be counted on shapes alone: {reason}"
        ) from cause
    steps = 0.0 if few == more else (total - few) / (more - few)

    def grown(one: int, other: int) -> int:
        return round(one + (other - one) * steps)

    sizes = {name: grown(small.sizes[name], large.sizes[name]) for name in small.sizes}
    peaks: dict[str, int] = {}
    for name, one in small.named_peaks(length, ends).items():
        peaks[name] = grown(one, large.named_peaks(length, ends)[name])
    part = max(peaks, key=lambda name: peaks[name])
    peak = peaks[part] + (WORKSPACE_BYTES if subject.on_gpu else 0)
    counts = {name: sizes.pop(name) for name in ("ram", "trained_weights", "all_weights")}
    gradients = sizes["gradients"]
    working = peak - sum(sizes.values())
    if working < 0:  # the peak comes before the gradients are there
        gradients, working = 0, working + gradients
    return Account(
        **{**sizes, "gradients": gradients}, working=working, peak=peak, part=part, line=small.line, **counts
    )


class _Run:
    """One step with a few layers."""

    def __init__(self, subject: Subject, layers: int, tokens: int, *, chunked_loss: bool) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.layers = layers
        model_config = skeleton.with_layers(subject.model_config, layers)
        tracker = Tracker(inside=subject.on_gpu)
        with FakeTensorMode(), tracker, skeleton.stand_ins(tracker, on_gpu=subject.on_gpu):
            made = skeleton.build(
                subject.config,
                model_config,
                subject.checkpoint,
                subject.stored_4bit,
                tracker,
                on_gpu=subject.on_gpu,
                has_bf16=subject.has_bf16,
            )
            self.line = made.switches.line()
            samples = subject.config.train.batch_size * samples_of_row(subject.config.task)
            self.sizes = _sizes(made, tokens * samples, layers)
            _step(subject, made, tracker, tokens, chunked_loss=chunked_loss)
        self.peaks = dict(tracker.peaks)

    def named_peaks(self, length: int, ends: int) -> dict[str, int]:
        """The parts that a model of any depth has: `length` layers counted from the start, `ends` from the end."""
        named: dict[str, int] = {}
        for part, peak in self.peaks.items():
            if part == "start":
                continue
            if isinstance(part, str):
                named[part] = peak
                continue
            what, layer = part
            if layer < length:
                named[f"{what} of layer {layer + 1}"] = peak
            if layer >= self.layers - ends:
                back = self.layers - 1 - layer
                named[f"{what} of the last layer" + (f" but {back}" if back else "")] = peak
        return named


def _sizes(made: skeleton.Skeleton, tokens: int, layers: int) -> dict[str, int]:
    causal_lm = made.causal_lm
    embedding, head = causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()
    trained = [p for p in made.model.parameters() if p.requires_grad]
    known = {id(p) for p in trained}
    sizes = dict.fromkeys(("layers", "embedding", "head", "trained", "gradients", "optimizer", "ram"), 0)
    sizes["trained"] = sum(rounded(p.nbytes) for p in trained)
    sizes["gradients"] = sum(rounded(p.nbytes) for p in trained)
    sizes["trained_weights"], sizes["all_weights"] = adapter.count_weights(made.model)
    sizes["optimizer"] = sum(rounded(state.nbytes) for state in made.states)
    for name, module in (("embedding", embedding), ("head", head)):
        for tensor in skeleton.held(module) if isinstance(module, torch.nn.Module) else ():
            if id(tensor) not in known:
                known.add(id(tensor))
                sizes[name] += rounded(tensor.nbytes)
    for tensor in skeleton.held(made.model):
        if id(tensor) not in known:
            known.add(id(tensor))
            sizes["layers"] += rounded(tensor.nbytes)
    hidden = causal_lm.config.get_text_config().hidden_size
    width = made.dtype.itemsize
    switches = made.switches
    table = causal_lm.config.get_text_config().vocab_size * hidden * width
    sizes["ram"] = (switches.embedding == "host") * table + (switches.head == "host") * table
    if switches.checkpoints == "host":
        sizes["ram"] += layers * tokens * hidden * width
    return sizes


def _step(subject: Subject, made: skeleton.Skeleton, tracker: Tracker, tokens: int, *, chunked_loss: bool) -> None:
    """As the trainer makes it: micro-batches, then the optimizer."""
    from fastft.model import memory
    from fastft.training import loss, preferences, trainer

    train = subject.config.train
    causal_lm = made.causal_lm
    causal_lm.config.use_cache = False
    where = memory.checkpoints(subject.config, torch.device("cuda" if subject.on_gpu else "cpu"))
    trainer._set_checkpointing(causal_lm, where)  # noqa: SLF001 - the trainer's own way
    if subject.config.task == "reward":
        preferences.install_scores(causal_lm)
    elif chunked_loss:
        loss.install(causal_lm)
    made.model.train()
    follower = _Follower(causal_lm, tracker)
    for _ in range(min(train.grad_accumulation, 2)):
        with torch.autocast("cpu", dtype=made.products or torch.bfloat16, enabled=made.products is not None):
            total = _loss(subject, made, follower, tokens, chunked_loss=chunked_loss)
        total.backward()  # type: ignore[no-untyped-call]
        del total
    tracker.enter("the optimizer's step")


def samples_of_row(task: schema.Task) -> int:
    """How many samples of a row are learned from at once: both answers of a pair."""
    return 2 if task in PAIR_TASKS else 1


def _loss(
    subject: Subject, made: skeleton.Skeleton, follower: "_Follower", tokens: int, *, chunked_loss: bool
) -> torch.Tensor:
    """A micro-batch's forward passes, those without gradient first, as the trainers of the tasks make them."""
    config = subject.config
    shape = (config.train.batch_size * samples_of_row(config.task), tokens)
    ids, positions = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int64)
    if config.task in ("pretrain", "sft"):
        extra: dict[str, Any] = {}
        if config.data.packing or shape[0] > 1:
            extra["attention_mask"] = torch.empty(shape[0], 1, tokens, tokens, dtype=torch.bool)
            extra["position_ids"] = positions
        follower.forward()
        whole: torch.Tensor = made.model(input_ids=ids, labels=ids, **extra).loss
        return whole
    if config.task == "reward":
        follower.forward()
        last = torch.empty(shape[0], dtype=torch.int64)
        scores: torch.Tensor = made.model(input_ids=ids, position_ids=positions, last=last).logits
        return scores.sum()

    def log_probs(count: int) -> torch.Tensor:
        follower.forward()
        batch = {"input_ids": ids[:1].expand(count, -1), "position_ids": positions[:1].expand(count, -1)}
        if chunked_loss:
            sums: torch.Tensor = made.model(**batch, labels=batch["input_ids"], row_sums=True).loss
            return sums.sum()
        logits = made.model(**batch, use_cache=False).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:])

    lora = config.method.lora
    if config.task in ("dpo", "kto") and lora is not None and lora.init in ("default", "gaussian"):
        with torch.no_grad(), made.model.disable_adapter():
            log_probs(2 * config.train.batch_size)
    if config.task == "kto":
        with torch.no_grad():
            log_probs(config.train.batch_size)
    return log_probs(shape[0])


class _Follower:
    """Tells the tracker which part of the step is running."""

    def __init__(self, causal_lm: Any, tracker: Tracker) -> None:
        from fastft.model import tiled_mlp

        self.tracker, self.backward = tracker, False
        decoder = causal_lm.get_decoder() if hasattr(causal_lm, "get_decoder") else causal_lm
        layers = list(tiled_mlp._layers(decoder))  # noqa: SLF001 - what counts as a layer
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._entering(number), with_kwargs=True)
        if layers:
            layers[-1].register_forward_hook(self._leaving(len(layers) - 1))

    def forward(self) -> None:
        """A micro-batch begins."""
        self.backward = False
        self.tracker.enter("the embedding")

    def _entering(self, number: int) -> Any:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.backward:
                return
            self.tracker.enter(("forward pass", number))
            hidden = args[0] if args else kwargs.get("hidden_states")
            if number and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda _gradient: self._back(number - 1))  # type: ignore[no-untyped-call]

        return hook

    def _leaving(self, last: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            if self.backward:
                return
            self.tracker.enter("the loss")
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _gradient: self._back(last))

        return hook

    def _back(self, number: int) -> None:
        self.backward = True
        self.tracker.enter(("backward pass", number))
