"""The trainer of tasks dpo, orpo, kto and reward: FastftTrainer with the losses of `preference_loss`.

Rows come from `data.preference_rows`. The loss of a step is the mean over its rows, also over accumulated batches and
processes (kto's drift alone is estimated from each batch).

dpo and kto compare the model with where it started. With adapters that left the base as it was, the reference is the
same model with the adapters switched off, asked at each step: no second model, and a 4-bit base stays one. Where
the weights themselves move (full, freeze, lora.init pissa, olora and loftq), the reference is asked once before the first step
and kept as two numbers per row, in the checkpoints too, so that a resumed run compares with the same.

Letters: B rows, 2 B samples (all first ones, then all second ones).
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from fastft import console
from fastft.errors import TrainingError
from fastft.training import preference_loss
from fastft.training.batches import order_of_epoch
from fastft.training.trainer import FastftTrainer

if TYPE_CHECKING:
    from fastft.config import schema

FILE_NAME = "reference.safetensors"
_IGNORED = -100

Batch = Mapping[str, torch.Tensor]


class PreferenceTrainer(FastftTrainer):
    """Learns from answers that somebody compared or judged; see FastftTrainer for the arguments."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.model_accepts_loss_kwargs = True
        self.task: schema.Task = self.config.task
        # Log probabilities of the reference by row, [rows, 2]; NaN where a row is not needed.
        self.references: dict[str, torch.Tensor] = {}
        # Rows, sum of their margins, and how many are above 0, since the last line of metrics.jsonl.
        self.measured = torch.zeros(3, dtype=torch.float64)

    def install_loss(self, causal_lm: Any) -> None:
        if self.config.task == "reward":
            install_scores(causal_lm)
        else:
            super().install_loss(causal_lm)

    def train(self, resume_from_checkpoint: str | None = None, **settings: Any) -> Any:
        """As Trainer's; a resumed run reads the reference that it began with."""
        if resume_from_checkpoint is not None:
            self._load_reference(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **settings)

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The sum of the rows' losses, divided by the rows of the whole step."""
        assert not return_outputs
        losses_B, margins_B = self._losses(model, inputs, "train")
        self.measured += self._of_all(_summary(margins_B))
        num_rows = losses_B.shape[0] if num_items_in_batch is None else num_items_in_batch
        total: torch.Tensor = losses_B.sum() / num_rows
        if num_items_in_batch is not None and self.args.world_size > 1:
            total = total * self.args.world_size  # the processes' gradients are averaged
        return total

    def _of_all(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over the rows of all processes, on the CPU."""
        if self.args.world_size == 1:
            return sums
        shared = sums.to(device=self.args.device, dtype=torch.float32)
        torch.distributed.all_reduce(shared)
        return shared.cpu().double()

    def _get_num_items_in_batch(self, batch_samples: Sequence[Batch], device: torch.device) -> torch.Tensor:
        """Rows of a whole step, over all processes."""
        count = torch.tensor(sum(batch["rows"].numel() for batch in batch_samples), device=device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def _losses(self, model: Any, inputs: Batch, part: str) -> preference_loss.Losses:
        """Loss and margin of each row."""
        wanted = self.config.preference
        num_rows = inputs["rows"].shape[0]
        if self.task == "reward":
            first_B, second_B = self._scores(model, inputs).view(2, -1)
            return preference_loss.reward(first_B, second_B)
        if self.task == "orpo":
            learned_B = (inputs["labels"][:, 1:] != _IGNORED).sum(dim=1)
            first_B, second_B = (self._log_probs(model, inputs) / learned_B).view(2, -1)
            return preference_loss.orpo(first_B, second_B, beta=wanted.beta)
        reference_B2 = self._reference(inputs, part)
        if self.task == "dpo":
            first_B, second_B = self._log_probs(model, inputs).view(2, -1)
            return preference_loss.dpo(
                first_B - reference_B2[:, 0],
                second_B - reference_B2[:, 1],
                beta=wanted.beta,
                label_smoothing=wanted.label_smoothing,
            )
        with self._undisturbed():
            others_B = self._log_probs(self.model, _half(inputs, slice(num_rows, None)))
            drift = self.accelerator.reduce((others_B - reference_B2[:, 1]).mean(), "mean").clamp(min=0)
        answers_B = self._log_probs(model, _half(inputs, slice(num_rows)))
        return preference_loss.kto(
            answers_B - reference_B2[:, 0],
            drift,
            inputs["good"],
            beta=wanted.beta,
            good_weight=wanted.good_weight,
            bad_weight=wanted.bad_weight,
        )

    def _log_probs(self, model: Any, inputs: Batch) -> torch.Tensor:
        """Log probability of each sample's learned tokens, fp32."""
        asked = {name: inputs[name] for name in ("input_ids", "position_ids")}
        if self.has_chunked_loss:
            sums: torch.Tensor = model(**asked, labels=inputs["labels"], row_sums=True).loss
            return sums
        logits_BTV = model(**asked, use_cache=False).logits[:, :-1].float()
        targets_BT = inputs["labels"][:, 1:]
        losses_BT = functional.cross_entropy(
            logits_BTV.transpose(1, 2), targets_BT, reduction="none", ignore_index=_IGNORED
        )
        return -losses_BT.sum(dim=1)

    def _scores(self, model: Any, inputs: Batch) -> torch.Tensor:
        """A reward model's number for each sample, fp32."""
        scores: torch.Tensor = model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], last=inputs["last"]
        ).logits
        return scores

    def _reference(self, inputs: Batch, part: str) -> torch.Tensor:
        """Log probabilities of the reference, [B, 2]."""
        if not self._reference_moves():
            with self._undisturbed(), self.model.disable_adapter():
                return self._log_probs(self.model, inputs).view(2, -1).t()
        if part not in self.references:
            self.references[part] = self._ask_reference(self.rows if part == "train" else self.eval_rows, part)
        return self.references[part][inputs["rows"].cpu()].to(inputs["rows"].device)

    def _reference_moves(self) -> bool:
        """Whether the model with its adapters switched off is another one than where it started."""
        lora = self.config.method.lora
        return self.task in {"dpo", "kto"} and (lora is None or lora.init not in {"default", "gaussian"})

    def _ask_reference(self, rows: Any, part: str) -> torch.Tensor:
        """The log probabilities of all rows that will be seen, by the model as it is now."""
        assert self.state.global_step == 0, "the reference is the model before its first step"
        needed = self._needed_rows() if part == "train" else range(len(rows))
        found_N2 = torch.full((len(rows), 2), math.nan)
        size, world = self.args.eval_batch_size, self.args.world_size
        with console.progress("asking the reference", len(needed), "rows") as advance, self._undisturbed():
            for first in range(0, len(needed), size * world):
                start = first + self.args.process_index * size
                # All processes ask equally often; one whose rows have run out repeats the first.
                numbers = list(needed[start : start + size]) or [needed[0]]
                inputs = self._prepare_inputs(self.data_collator([rows[i] for i in numbers]))
                found_N2[numbers] = self._log_probs(self.model, inputs).view(2, -1).t().float().cpu()
                advance(min(first + size * world, len(needed)))
        if world > 1:
            gathered: list[Any] = [None] * world
            torch.distributed.all_gather_object(gathered, found_N2)
            for other_N2 in gathered:
                found_N2 = torch.where(found_N2.isnan(), other_N2, found_N2)
        return found_N2

    def _needed_rows(self) -> Sequence[int]:
        """The rows that a run of `max_steps` sees, in their own order."""
        seen = self.args.max_steps * self.args.train_batch_size * self.args.gradient_accumulation_steps
        seen *= self.args.world_size
        if seen >= len(self.rows):
            return range(len(self.rows))
        order = order_of_epoch(len(self.rows), shuffle=self.config.data.shuffle, seed=self.args.seed, epoch=0)
        return sorted(order[:seen])

    def _load_reference(self, folder: Path) -> None:
        from safetensors.torch import load_file

        path = folder / FILE_NAME
        if not path.is_file():
            raise TrainingError(f"--resume {folder}: {FILE_NAME} is missing")
        found = load_file(path)
        shapes = {"train": (len(self.rows), 2), "eval": (len(self.eval_rows or ()), 2), "measured": (3,)}
        expected = (*(part for part in ("train", "eval") if part in found), "measured")
        if {*found} != {*expected} or any(tuple(found[part].shape) != shapes[part] for part in found):
            held = ", ".join(f"{part} {tuple(value.shape)}" for part, value in found.items())
            raise TrainingError(f"--resume {folder}: {FILE_NAME} is not that of this run: it holds {held}")
        if self._reference_moves() and "train" not in found:
            raise TrainingError(f"--resume {folder}: {FILE_NAME} holds no reference")
        self.measured = found.pop("measured")
        self.references = found
        if "train" in found and bool(found["train"][list(self._needed_rows())].isnan().any()):
            raise TrainingError(
                f"--resume {folder}: the run began shorter, and its reference was not asked about all rows that a run of "
                f"{self.args.max_steps} steps sees; start anew with another --work-dir"
            )

    def _fill(self, folder: Path, *rest: Any) -> None:
        from safetensors.torch import save_file

        if self._reference_moves() and self.eval_rows is not None and "eval" not in self.references:
            raise AssertionError("the eval rows are asked before the first step")
        super()._fill(folder, *rest)
        save_file({**self.references, "measured": self.measured}, folder / FILE_NAME)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As FastftTrainer's; a reference that will have moved is asked before the first step."""
        if self._reference_moves() and not self.references:
            parts = {"train": self.rows, "eval": self.eval_rows}
            self.references = {p: self._ask_reference(rows, p) for p, rows in parts.items() if rows is not None}
        return super().training_step(model, inputs, num_items_in_batch)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Without gradient and dropout."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    @torch.no_grad()
    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Mean loss of the eval rows, and the part of them where the margin is above 0."""
        assert self.eval_rows is not None
        total = torch.zeros(4, dtype=torch.float64)  # loss; rows, margins, margins above 0
        size, world = self.args.eval_batch_size, self.args.world_size
        with self._undisturbed():
            for first in range(0, len(self.eval_rows), size * world):
                start = first + self.args.process_index * size
                numbers = range(start, min(start + size, len(self.eval_rows)))
                inputs = self._prepare_inputs(self.data_collator([self.eval_rows[i] for i in numbers or (0,)]))
                losses_B, margins_B = self._losses(self.model, inputs, "eval")
                if numbers:
                    total += torch.cat([losses_B.sum().double().cpu().view(1), _summary(margins_B)])
        total = self._of_all(total)
        metrics = {"eval_loss": (total[0] / total[1]).item(), "eval_accuracy": (total[3] / total[1]).item()}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds `accuracy` (part of the rows with a margin above 0) and `margin` (mean) since the last line."""
        if "loss" in logs and self.measured[0] > 0:
            rows, margins, right = self.measured.tolist()
            logs = {**logs, "accuracy": right / rows, "margin": margins / rows}
            self.measured.zero_()
        super().log(logs, *args, **kwargs)


def install_scores(model: Any) -> None:
    """Let a sequence classifier's `forward(last=...)` give one number per row, read at that token.

    transformers looks for the last token that is no padding, by its id; ours may end in that very token.
    """
    own_forward = model.forward
    decoder = getattr(model, model.base_model_prefix)

    @functools.wraps(own_forward)
    def forward(*args: Any, last: Any = None, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutputWithPast

        if last is None:
            return own_forward(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None and name != "return_dict"}
        hidden_BTD = decoder(*args, **{**kwargs, "use_cache": False})[0]
        hidden_BD = hidden_BTD[torch.arange(hidden_BTD.shape[0], device=hidden_BTD.device), last]
        return SequenceClassifierOutputWithPast(logits=model.score(hidden_BD).squeeze(-1).float())

    model.forward = forward


def _half(inputs: Batch, part: slice) -> Batch:
    return {name: inputs[name][part] for name in ("input_ids", "position_ids", "labels")}


def _summary(margins_B: torch.Tensor) -> torch.Tensor:
    """Rows, sum of the margins, and how many are above 0."""
    margins = margins_B.detach().double().cpu()
    return torch.stack(
        [torch.tensor(float(margins.numel()), dtype=torch.float64), margins.sum(), (margins > 0).double().sum()]
    )
