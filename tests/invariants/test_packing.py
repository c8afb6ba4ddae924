"""Packed, padded, flattened or alone: the same samples give the same loss and the same gradients."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fastft.data.collate import Collator
from fastft.data.dialogue import Where
from fastft.data.packing import pack
from fastft.data.samples import Documents, Samples

if TYPE_CHECKING:
    import torch

VOCABULARY = 64
LENGTHS = (5, 12, 3, 9, 16, 2, 7)
# As part of the largest value. The model is float64: sums in another order differ by a few 1e-16. But transformers'
# eager attention computes its softmax in float32: each weight is off by up to 2**-24 of itself, in two layers, forward
# and backward, on both of the roads that are compared.
TOLERANCES = {"sdpa": 1e-12, "eager": 8 * 2**-24}


def documents() -> Documents:
    """Random documents; the first part of each is not learned."""
    random = np.random.default_rng(0)
    starts = np.cumsum([0, *LENGTHS], dtype=np.int64)
    ids = random.integers(3, VOCABULARY, starts[-1]).astype(np.int32)
    learned = np.concatenate([np.arange(length) >= length // 3 for length in LENGTHS])
    return Documents(ids, learned, starts, tuple(Where("memory", i + 1) for i in range(len(LENGTHS))))


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=request.param,
    )
    return LlamaForCausalLM(config).double()


def loss_and_gradients(model: Any, batches: Sequence[dict[str, "torch.Tensor"]]) -> "tuple[float, list[torch.Tensor]]":
    """Sum of the token losses over all batches, and its gradient by every parameter."""
    import torch

    model.zero_grad()
    total = 0.0
    for batch in batches:
        assert "attention_mask" not in batch
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum"
        )
        loss.backward()
        total += loss.item()
    return total, [parameter.grad.clone() for parameter in model.parameters()]


def test_packed_equals_padded_equals_alone(model: Any) -> None:
    tolerance = TOLERANCES[model.config._attn_implementation]
    whole = documents()
    single = Samples(whole, np.arange(len(LENGTHS) + 1, dtype=np.int64))
    rows = pack(LENGTHS, 20, 0)
    packed = Samples(whole.take([d for row in rows for d in row]), np.cumsum([0, *map(len, rows)], dtype=np.int64))
    assert 1 < len(packed) < len(LENGTHS)
    collate, flatten = Collator(0), Collator(0, flatten=True)

    # Alone, and through transformers' own causal mask: no positions, no padding, nothing of ours.
    alone = [{**collate([sample]), "position_ids": None} for sample in single]
    expected_loss, expected = loss_and_gradients(model, alone)
    assert expected_loss > 1.0
    roads = {
        "padded": [collate(list(single))],
        "padded in two batches": [collate(single[:3]), collate(single[3:])],
        "packed row by row": [collate([row]) for row in packed],
        "packed, rows padded": [collate(list(packed))],
        "flattened": [flatten(list(packed))],
    }
    for name, batches in roads.items():
        loss, gradients = loss_and_gradients(model, batches)
        assert loss == pytest.approx(expected_loss, rel=tolerance), name
        for ours, theirs in zip(gradients, expected, strict=True):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max(), name


def test_without_positions_documents_would_see_each_other(model: Any) -> None:
    """The test above can fail: drop the positions and the loss is another."""
    whole = documents()
    row = Samples(whole, np.asarray([0, len(LENGTHS)], dtype=np.int64))
    batch = Collator(0)(list(row))
    right, _ = loss_and_gradients(model, [batch])
    wrong, _ = loss_and_gradients(model, [{**batch, "position_ids": None}])
    assert abs(right - wrong) > 1e-4
