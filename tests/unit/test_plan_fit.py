"""What fits on a card, the longest row that does, and what a plan advises when it does not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastft import console
from fastft.config.schema import Config
from fastft.errors import ConfigError
from fastft.model import load
from fastft.plan import accounting, fit, for_run, subject
from fastft.plan.fit import GIB, Card

LLAMA_3_1_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
MEMORY_8GB = {"checkpoints": "host", "embedding": "host", "head": "host", "mlp_tile_tokens": 2048, "lora": "fused"}


def config(kind: str = "qlora", rank: int = 8, **sections: Any) -> Config:
    method: dict[str, Any] = {"kind": kind}
    if kind != "full":
        method["lora"] = {"r": rank, "alpha": rank}
    return Config.model_validate(
        {
            "task": "pretrain",
            "model": {"name": "none"},
            "method": method,
            "data": {"train": [{"source": "none"}], "packing": False, "max_length": 1024},
            **sections,
        }
    )


def tiny(**sections: Any) -> accounting.Subject:
    return subject.of_json(config(**sections), TINY)


def test_the_longest_row_that_an_h200_limited_to_7_gib_could_train() -> None:
    """Measured (benches/results/2026-11-26_nvidia-h200.md): 15,360 tokens fit, 16,384 do not."""
    train = {"optimizer": "adamw_8bit", "grad_accumulation": 1}
    planned = subject.of_json(config(rank=32, memory=MEMORY_8GB, train=train), LLAMA_3_1_8B)
    budget = int(7.0 * GIB / fit.GAPS)
    assert fit.longest(planned, budget) == pytest.approx(15872, rel=0.1)


def test_the_longest_row_is_the_last_that_fits() -> None:
    planned = tiny()
    budget = (fit.count(planned, 1024).peak + fit.count(planned, 1280).peak) // 2
    assert fit.longest(planned, budget) == 1024
    assert fit.longest(planned, fit.count(planned, 2048).peak) == 2048  # all that the model knows
    assert fit.longest(planned, fit.count(planned, 256).peak - 1) == 0


def test_nothing_dear_is_advised_where_something_cheap_is_enough() -> None:
    planned = tiny(memory={"lora": "plain"}, train={"batch_size": 1})
    budget = fit.count(planned, 1024).peak - 1
    advice = fit.advise(planned, 1024, budget)
    assert advice.fits
    assert advice.account.peak <= budget
    dear = {"memory.checkpoints", "memory.head", "memory.mlp_tile_tokens"}
    assert not dear & {change.key for change in advice.changes}


def test_what_is_advised_fits_when_it_is_followed() -> None:
    planned = tiny()
    everything = fit.changed(planned.config, fit.possible(planned))
    least = fit.count(replace(planned, config=everything), 1024).peak
    budget = (fit.count(planned, 1024).peak + least) // 2
    advice = fit.advise(planned, 1024, budget)
    followed = replace(planned, config=fit.changed(planned.config, advice.changes))
    assert advice.fits
    assert accounting.account(followed, 1024).peak <= budget
    assert not fit.advise(planned, 1024, least // 2).fits


def test_a_run_uses_what_it_needs_and_nothing_that_was_asked_otherwise(tmp_path: Path) -> None:
    asked = config(memory={"embedding": "device"})
    base = load.Base("none", tmp_path, tmp_path, TINY, None)
    peak = fit.count(subject.of_json(asked, TINY), 1024).peak
    said: list[str] = []
    budget = int(peak * 0.9)
    card = Card(2**40, int(budget * fit.GAPS) + fit.CONTEXT_BYTES + 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "note", said.append)
        patch.setattr(console, "warn", said.append)
        choice = for_run.choose(asked, base, card, 1)
        roomy = for_run.choose(asked, base, Card.of_size(2**40), 1)
        none = for_run.choose(asked, base, None, 1)
        tight = for_run.choose(asked, base, Card(2**40, fit.CONTEXT_BYTES + 2**20), 1)
    assert roomy.config == none.config == asked
    assert choice.config != asked
    assert choice.config.memory.embedding == "device"
    assert choice.config.train == asked.train
    assert set(choice.reasons) <= {"checkpoints", "head", "mlp_tile_tokens"}
    assert fit.count(subject.of_json(choice.config, TINY), 1024).peak <= budget
    assert "chosen to fit" in said[1]
    assert "will not fit" in said[-1]
    assert tight.config.memory.embedding == "device"


@pytest.mark.parametrize(
    ("config_json", "reason"),
    [
        ({"model_type": "no_such_model"}, "no text model of type no_such_model"),
        ({"model_type": "clip"}, "no text model of type clip"),
        ({"model_type": "gemma3", "text_config": {}, "vision_config": {}}, "reads more than text"),
    ],
)
def test_what_cannot_be_planned_is_refused(config_json: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        subject.of_json(config(), config_json)
