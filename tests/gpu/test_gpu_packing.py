"""Packed, padded, flattened or alone on a GPU: the same loss and gradients, by whichever attention kernel torch takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fastft.data.collate import Collator
from fastft.data.dialogue import Where
from fastft.data.packing import pack
from fastft.data.samples import Documents, Samples

pytestmark = pytest.mark.gpu

VOCABULARY = 64
LENGTHS = (50, 129, 3, 96, 160, 2, 70)
# Part of the norm by which loss and gradients may differ. float64 (plain kernels): sums in another order, as on a CPU.
# float32: the memory-efficient kernel sums over up to 512 keys and tokens, sqrt(512) 2^-24 = 1.4e-6 for independent
# roundings, some ten operations deep. bfloat16: each operand is off by up to 2^-9, some 30 on the way there and back,
# on both of the roads compared: sqrt(60) 2^-9 = 1.5 %, and a few times that where a sum nearly cancels.
TOLERANCES = {"float64": 1e-12, "float32": 3e-5, "bfloat16": 0.05}


def _documents() -> Documents:
    random = np.random.default_rng(0)
    starts = np.cumsum([0, *LENGTHS], dtype=np.int64)
    ids = random.integers(3, VOCABULARY, starts[-1]).astype(np.int32)
    learned = np.concatenate([np.arange(length) >= length // 3 for length in LENGTHS])
    return Documents(ids, learned, starts, tuple(Where("memory", i + 1) for i in range(len(LENGTHS))))


def _model(dtype: str, device: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).to(device, getattr(torch, dtype))


def _loss_and_gradients(model: Any, batches: Sequence[Any]) -> tuple[float, Any]:
    """Sum of the token losses over all batches, and its gradient by all parameters as one vector."""
    import torch

    model.zero_grad()
    total = 0.0
    for batch in batches:
        inputs = {name: None if value is None else value.to(model.device) for name, value in batch.items()}
        logits = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
        wide = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        loss = torch.nn.functional.cross_entropy(wide, inputs["labels"][:, 1:].flatten(), reduction="sum")
        loss.backward()
        total += loss.item()
    return total, torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_packed_equals_padded_equals_alone(dtype: str, device: str) -> None:
    model = _model(dtype, device)
    whole = _documents()
    single = Samples(whole, np.arange(len(LENGTHS) + 1, dtype=np.int64))
    rows = pack(LENGTHS, 256, 0)
    packed = Samples(whole.take([d for row in rows for d in row]), np.cumsum([0, *map(len, rows)], dtype=np.int64))
    assert 1 < len(packed) < len(LENGTHS)
    collate, flatten = Collator(0), Collator(0, flatten=True)
    # Alone, through transformers' own causal mask: no positions, no padding, nothing of ours.
    expected_loss, expected = _loss_and_gradients(model, [{**collate([row]), "position_ids": None} for row in single])
    assert expected_loss > 1.0
    roads = {
        "padded": [collate(list(single))],
        "packed row by row": [collate([row]) for row in packed],
        "packed, rows padded": [collate(list(packed))],
        "flattened": [flatten(list(packed))],
    }
    for name, batches in roads.items():
        loss, gradients = _loss_and_gradients(model, batches)
        off = ((gradients - expected).norm() / expected.norm()).item()
        print(f"{dtype} {name}: loss off by {abs(loss / expected_loss - 1):.1e}, gradients by {off:.1e}")
        assert loss == pytest.approx(expected_loss, rel=TOLERANCES[dtype]), name
        assert off <= TOLERANCES[dtype], name


def test_without_positions_documents_would_see_each_other(device: str) -> None:
    """The test above can fail: drop the positions and both are far off, also for bfloat16's bound."""
    model = _model("bfloat16", device)
    batch = Collator(0)(list(Samples(_documents(), np.asarray([0, len(LENGTHS)], dtype=np.int64))))
    _, right = _loss_and_gradients(model, [batch])
    _, wrong = _loss_and_gradients(model, [{**batch, "position_ids": None}])
    assert (wrong - right).norm() / right.norm() > 4 * TOLERANCES["bfloat16"]
