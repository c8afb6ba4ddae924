"""A plan as text of 80 columns, and as plain data."""

import textwrap
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastft.config import schema
from fastft.plan import fit
from fastft.plan.accounting import Account, Subject, account, samples_of_row
from fastft.plan.fit import CONTEXT_BYTES, GAPS, GIB, Advice, Card

WIDTH = 80
# Bytes per trained weight in a checkpoint: fp32 weight and two moments.
_STATE_BYTES = 12
# Rates for which the time is told, in 1e12 operations per second that a card reaches (not what its maker promises).
_RATES = (20, 100)


@dataclass(frozen=True)
class Plan:
    """All that the table tells.

    Attributes:
        subject: what is planned.
        card: for which card; None: no card was named.
        gpus: number of cards, each with a whole copy of the model.
        account: of a row of data.max_length tokens.
        unchecked: peak without recomputed layers.
        unchunked: peak with the logits of all tokens.
        longest: tokens of the longest row that fits, None without a card.
        advice: what to change when it does not fit, else None.
        advised_longest: the longest row with all advised changes when even they do not suffice.
    """

    subject: Subject
    card: Card | None
    gpus: int
    account: Account
    unchecked: int
    unchunked: int
    longest: int | None
    advice: Advice | None
    advised_longest: int | None

    @property
    def buckets(self) -> int:
        """What several processes need to exchange gradients: a second copy of them."""
        return self.account.gradients if self.gpus > 1 else 0

    @property
    def needed(self) -> int:
        """Bytes of a card that the run takes, all in all."""
        return int((self.account.peak + self.buckets) * GAPS) + CONTEXT_BYTES

    @property
    def fits(self) -> bool | None:
        """Whether it fits on the card."""
        return None if self.card is None else self.account.peak + self.buckets <= self.card.budget


def make(subject: Subject, card: Card | None, gpus: int = 1) -> Plan:
    """Count, look for the longest row, and look for what would fit."""
    config = subject.config
    tokens = config.data.max_length
    counted = fit.count(subject, tokens)
    stored = replace(subject, config=_without_checkpoints(config))
    unchecked = fit.count(stored, tokens).peak
    unchunked = account(replace(subject, config=_with_plain_head(config)), tokens, chunked_loss=False).peak
    plan = Plan(subject, card, gpus, counted, unchecked, unchunked, None, None, None)
    if card is None:
        return plan
    budget = card.budget - plan.buckets
    advice = fit.advise(subject, tokens, budget) if counted.peak > budget else None
    advised_longest = None
    if advice is not None and not advice.fits:
        advised_longest = fit.longest(replace(subject, config=fit.changed(config, advice.changes)), budget)
    return replace(plan, longest=fit.longest(subject, budget), advice=advice, advised_longest=advised_longest)


def _without_checkpoints(config: schema.Config) -> schema.Config:
    memory = config.memory.model_copy(update={"checkpoints": "auto"})
    train = config.train.model_copy(update={"gradient_checkpointing": False})
    return config.model_copy(update={"memory": memory, "train": train})


def _with_plain_head(config: schema.Config) -> schema.Config:
    """The model's own loss knows no head in tiles; the head's own bytes are taken off again by the reader."""
    tables = {"head": "device", "embedding": "device"} if config.memory.head in {"host", "nf4"} else {}
    return config.model_copy(update={"memory": config.memory.model_copy(update=tables)})


def lines(plan: Plan) -> list[str]:
    """The table."""
    config, counted = plan.subject.config, plan.account
    rows = f"rows of {config.data.max_length:,} tokens, {config.train.batch_size} at once"
    if samples_of_row(config.task) > 1:
        rows = f"pairs of {config.data.max_length:,} tokens each, {config.train.batch_size} at once"
    opening = (f"plan of {config.name}: {config.method.kind}, {rows}", f"memory: {counted.line}")
    found = [line for text in opening for line in textwrap.wrap(text, WIDTH, subsequent_indent="  ")]
    found.append("")
    for name, num_bytes, remark in _parts(plan):
        found.append(f"  {name:<32}{num_bytes / GIB:6.2f} GiB  {remark}".rstrip())
    found.append("")
    if plan.card is not None:
        usable = f"{plan.card.free / GIB:.2f} of {plan.card.total / GIB:.2f} GiB"
        found.append(f"  {'card':<34}{usable} usable: {'it fits' if plan.fits else 'NO FIT'}")
        assert plan.longest is not None
        none = "not even 256 tokens" if plan.longest == 0 else f"{plan.longest:,} tokens"
        found.append(f"  {'longest row that fits':<34}{none}")
    for name, text in _beside(plan):
        found.append(f"  {name:<34}{text}")
    return found + _advice_lines(plan)


def _parts(plan: Plan) -> list[tuple[str, int, str]]:
    config, counted = plan.subject.config, plan.account
    is_4bit = config.method.kind == "qlora" or plan.subject.stored_4bit is not None
    tied = getattr(plan.subject.model_config.get_text_config(), "tie_word_embeddings", False)
    parts = [
        ("layers" + (", linear ones in 4 bit" if is_4bit else ""), counted.layers, ""),
        ("embedding", counted.embedding, "in RAM" if config.memory.embedding == "host" else ""),
        ("head", counted.head, _head_remark(config, tied=bool(tied))),
        ("trained weights", counted.trained, f"{counted.trained_weights / 1e6:,.1f} M"),
        ("gradients", counted.gradients, ""),
        (f"optimizer ({config.train.optimizer})", counted.optimizer, ""),
        ("activations and all in passing", counted.working, ""),
        (
            "peak of torch's allocator",
            counted.peak,
            f"in the {counted.part}".replace("in the the", "in the").replace("in the", "in"),
        ),
        ("  without recomputed layers", plan.unchecked, ""),
        ("  with the logits of all tokens", plan.unchunked, ""),
    ]
    if plan.gpus > 1:
        parts.append(("to exchange gradients", plan.buckets, f"on each of {plan.gpus} cards"))
    gaps = plan.needed - counted.peak - plan.buckets - CONTEXT_BYTES
    parts += [
        ("gaps of the allocator", gaps, ""),
        ("CUDA context", CONTEXT_BYTES, ""),
        ("needed on the card", plan.needed, ""),
    ]
    return parts


def _head_remark(config: schema.Config, *, tied: bool) -> str:
    if tied:
        return "the same table as the embedding"
    return {"host": "in RAM", "nf4": "in 4 bit, not exact"}.get(config.memory.head, "")


def _beside(plan: Plan) -> list[tuple[str, str]]:
    """RAM, disk and time."""
    config, counted = plan.subject.config, plan.account
    frozen = counted.all_weights - counted.trained_weights
    width = plan.subject.checkpoint.itemsize
    base = (frozen if config.method.has_adapter else counted.all_weights) * width
    # Beside an adapter no base is kept; a model trained in part is kept whole.
    states = counted.trained_weights * _STATE_BYTES + (0 if config.method.has_adapter else frozen * width)
    samples = config.train.batch_size * samples_of_row(config.task)
    tokens = config.data.max_length * samples * config.train.grad_accumulation * plan.gpus
    operations = _operations(plan.subject, counted) * tokens / plan.gpus
    times = ", ".join(f"{operations / rate / 1e12:,.1f} s at {rate}" for rate in _RATES)
    return [
        ("RAM for what waits there", f"{counted.ram / GIB:.2f} GiB" + (" per card" if plan.gpus > 1 else "")),
        ("disk: base", f"{base / 1e9:.1f} GB"),
        ("disk: checkpoints", f"{config.output.keep + 1} x {states / 1e9:.2f} GB"),
        (f"time of a step of {tokens:,} tokens", f"{times} TFLOP/s"),
    ]


def _operations(subject: Subject, counted: Account) -> float:
    """Floating-point operations per token that are made, those of recomputed layers included."""
    text = subject.model_config.get_text_config()
    table = text.vocab_size * text.hidden_size
    tied = bool(getattr(text, "tie_word_embeddings", False))
    multiplied = counted.all_weights - (0 if tied else table)
    method = subject.config.method
    again = subject.config.train.gradient_checkpointing is not False
    passes = 2.0 + 2 + (2 if method.kind == "full" else 0) + (2 if again else 0)
    if method.trained_layers is not None:  # the way back ends at the first trained layer
        part = min(method.trained_layers / text.num_hidden_layers, 1.0)
        passes = 2 + part * (4 + (2 if again else 0))
    passes += {"dpo": 2, "kto": 6}.get(subject.config.task, 0)  # the reference, and kto's drift
    # Half of all pairs of tokens meet; scores and sums; twice as much in the backward pass.
    attention = text.num_hidden_layers * 4 * text.hidden_size * subject.config.data.max_length / 2
    return float(multiplied * passes + attention * (4 if again else 3))


def _advice_lines(plan: Plan) -> list[str]:
    advice = plan.advice
    if advice is None or plan.card is None:
        return []
    peak = f"{(advice.account.peak + plan.buckets) / GIB:.2f} of {plan.card.budget / GIB:.2f} GiB"
    if advice.fits:
        found = ["", f"With these settings it fits (peak {peak} for torch):"]
    elif plan.advised_longest:
        found = ["", f"With these settings rows of {plan.advised_longest:,} tokens fit:"]
    else:
        found = ["", "No setting makes it fit; these bring it closest:"]
    found += [f"  {change.text():<34}{change.cost}" for change in advice.changes]
    if not advice.fits and plan.advised_longest:
        found.append(f"  data.max_length={plan.advised_longest:<20}longer samples are cut off")
    if not advice.fits and plan.subject.config.method.kind != "qlora":
        found.append("  method.kind=qlora                   a frozen base in 4 bit")
    elif not advice.fits and not plan.advised_longest:
        found.append("  a smaller model, or a larger card")
    return found


def short(plan: Plan) -> str:
    """One line for the start of a run."""
    counted = plan.account
    text = f"plan: peak {counted.peak / GIB:.2f} GiB for torch, {plan.needed / GIB:.2f} GiB of the card"
    return text if plan.card is None else f"{text}, {plan.card.free / GIB:.2f} GiB are free"


def to_json(plan: Plan) -> dict[str, Any]:
    """Plain data; sizes in bytes."""
    card, advice = plan.card, plan.advice
    return {
        "config": plan.subject.config.name,
        "tokens": plan.subject.config.data.max_length,
        "gpus": plan.gpus,
        **{f"{name}_bytes": value for name, value in asdict(plan.account).items() if name in _BYTES},
        "trained_weights": plan.account.trained_weights,
        "all_weights": plan.account.all_weights,
        "peak_in": plan.account.part,
        "without_checkpoints_peak_bytes": plan.unchecked,
        "full_logits_peak_bytes": plan.unchunked,
        "context_bytes": CONTEXT_BYTES,
        "needed_bytes": plan.needed,
        "card_bytes": None if card is None else card.total,
        "usable_bytes": None if card is None else card.free,
        "fits": plan.fits,
        "longest_tokens": plan.longest,
        "advice": None if advice is None else [change.text() for change in advice.changes],
        "advice_fits": None if advice is None else advice.fits,
        "advice_longest_tokens": plan.advised_longest,
    }


_BYTES = ("layers", "embedding", "head", "trained", "gradients", "optimizer", "working", "peak", "ram")
