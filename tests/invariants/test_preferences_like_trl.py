"""The losses of dpo, kto, orpo and reward against trl's own trainers, on the batches that trl makes.

trl is no dependency; the tests run where it is installed (`pip install --no-deps 'trl>=1.16,<2'`), else they are skipped.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_run
from fastft.training import loss, preference_loss

trl = pytest.importorskip("trl", reason="trl is not installed: our losses are not compared with it")

pytestmark = pytest.mark.filterwarnings("ignore")  # trl's own

ROWS = [
    {"prompt": tiny_run.QUESTIONS[n], "chosen": " apple" * (n % 4 + 1), "rejected": " pear" * (n % 3 + 2)}
    for n in range(4)
]


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Any, Any, Path]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_run.write_model(tmp_path / "model")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), folder


def _settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "trl"),
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": 64,
    }


def _moved(model: Any) -> None:
    """Another model than the reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def _log_probs(model: Any, ids_BT: torch.Tensor, learned_BT: torch.Tensor) -> torch.Tensor:
    """By our chunked head; padding stands at the right and is not learned."""
    labels_BT = torch.where(learned_BT.bool(), ids_BT, -100)
    with torch.no_grad():
        hidden_BTD = model.model(input_ids=ids_BT, use_cache=False)[0]
        return loss.row_log_probs(hidden_BTD, labels_BT, model.lm_head, 8)


def _first(trainer: Any) -> dict[str, torch.Tensor]:
    return dict(next(iter(trainer.get_train_dataloader())))


# Sums of up to 40 log probabilities of size 6 in fp32, times a beta of 0.1, in another order: 40 * 6 * 0.1 * 2^-22.
CLOSE = 1e-5


def test_dpo(parts: tuple[Any, Any, Path], tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    model, tokenizer, folder = parts
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    arguments = trl.DPOConfig(**_settings(tmp_path), beta=0.1)
    trainer = trl.DPOTrainer(
        model, reference, args=arguments, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer
    )
    _moved(model.eval())
    batch = _first(trainer)
    theirs = trainer.compute_loss(model, dict(batch))
    ours = _log_probs(model, batch["input_ids"], batch["completion_mask"])
    before = _log_probs(reference, batch["input_ids"], batch["completion_mask"])
    chosen, rejected = (ours - before).view(2, -1)
    mean = preference_loss.dpo(chosen, rejected, beta=0.1)[0].mean()
    assert abs(mean.item() - 0.6931) > 0.01  # it has moved
    assert mean.item() == pytest.approx(theirs.item(), abs=CLOSE)


def test_kto(parts: tuple[Any, Any, Path], tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    model, tokenizer, folder = parts
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"] if n % 2 else row["rejected"], "label": bool(n % 2)}
        for n, row in enumerate(ROWS)
    ]
    arguments = trl.KTOConfig(**_settings(tmp_path), beta=0.1, desirable_weight=1.5, undesirable_weight=0.5)
    trainer = trl.KTOTrainer(
        model, reference, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    _moved(model.eval())
    batch = _first(trainer)
    theirs = trainer.compute_loss(model, dict(batch))
    ratio, others = (
        _log_probs(model, batch[ids], batch[learned]) - _log_probs(reference, batch[ids], batch[learned])
        for ids, learned in (("input_ids", "completion_mask"), ("KL_input_ids", "KL_completion_mask"))
    )
    assert others.mean() > 0.1  # a drift that is not cut off at 0
    good = torch.as_tensor(batch["label"], dtype=torch.bool)
    ours, _ = preference_loss.kto(ratio, others.mean().clamp(min=0), good, beta=0.1, good_weight=1.5, bad_weight=0.5)
    assert ours.mean().item() == pytest.approx(theirs.item(), abs=CLOSE)


def test_orpo() -> None:
    """The odds' part; trl's learns the prompt too, the paper and we learn the answer."""
    from types import SimpleNamespace

    orpo = pytest.importorskip("trl.experimental.orpo")
    means = torch.tensor([-0.5, -2.0, -0.25]), torch.tensor([-1.5, -1.0, -3.0])
    as_trainer = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device="cpu"))
    theirs = orpo.ORPOTrainer.odds_ratio_loss(as_trainer, *means)[0]
    ours, _ = preference_loss.orpo(*means, beta=0.25)
    assert (ours + means[0]).tolist() == pytest.approx((-theirs).tolist(), abs=1e-6)


def test_reward(parts: tuple[Any, Any, Path], tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    from fastft.training import preferences

    _, tokenizer, folder = parts
    tokenizer.pad_token = "<|im_start|>"  # another one than the end, which trl's own model looks for
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    rows = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in ROWS]
    arguments = trl.RewardConfig(**_settings(tmp_path))
    trainer = trl.RewardTrainer(
        model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    batch = _first(trainer)
    theirs = trainer.compute_loss(model.eval(), dict(batch))
    preferences.install_scores(model)
    with torch.no_grad():
        scores = model(input_ids=batch["input_ids"], last=batch["attention_mask"].sum(dim=1) - 1).logits
    ours, _ = preference_loss.reward(*scores.view(2, -1))
    assert ours.mean().item() == pytest.approx(theirs.item(), abs=CLOSE)
