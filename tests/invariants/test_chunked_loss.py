"""The chunked loss is the plain loss: values and gradients, whatever the chunk, also inside the models."""

import pytest
import torch
from torch.nn import functional

from fastft.training import loss

B, T, D, V = 3, 17, 8, 50


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.nn.Linear]:
    torch.manual_seed(0)
    head = torch.nn.Linear(D, V, bias=False, dtype=torch.float64)
    hidden_BTD = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    labels_BT = torch.randint(0, V, (B, T))
    labels_BT[torch.rand(B, T) < 0.4] = -100
    return hidden_BTD, labels_BT, head


def _plain(hidden_BTD: torch.Tensor, labels_BT: torch.Tensor, head: torch.nn.Module) -> torch.Tensor:
    logits = head(hidden_BTD)[:, :-1].reshape(-1, V).float()
    return functional.cross_entropy(logits, labels_BT[:, 1:].reshape(-1), reduction="sum", ignore_index=-100)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 7, 1000])
def test_sum_count_and_gradients(chunk_tokens: int) -> None:
    hidden, labels, head = _batch()
    _plain(hidden, labels, head).backward()
    expected = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None
    total, count = loss.chunked_cross_entropy(hidden, labels, head, chunk_tokens)
    total.backward()
    assert count == int((labels[:, 1:] != -100).sum())
    # Logits are rounded to fp32 once in both; sums of at most 51 terms in another order differ by 51 * 2^-24.
    assert torch.allclose(total, _plain(hidden, labels, head), rtol=51 * 2**-24)
    assert torch.allclose(hidden.grad, expected[0], rtol=1e-5, atol=1e-7)
    assert torch.allclose(head.weight.grad, expected[1], rtol=1e-5, atol=1e-6)


def test_only_a_chunk_of_logits_is_held() -> None:
    hidden, labels, head = _batch()
    seen: list[int] = []

    def watched(hidden_ND: torch.Tensor) -> torch.Tensor:
        seen.append(hidden_ND.shape[0])
        return head(hidden_ND)

    total, count = loss.chunked_cross_entropy(hidden, labels, watched, 4)
    total.backward()
    assert max(seen) == 4
    assert sum(seen) == 2 * count  # each chunk once forward, once again for its gradient


def test_a_batch_without_learned_tokens_has_a_gradient_of_zero() -> None:
    hidden, labels, head = _batch()
    total, count = loss.chunked_cross_entropy(hidden, torch.full_like(labels, -100), head, 4)
    total.backward()
    assert (count, total.item()) == (0, 0.0)
    assert not hidden.grad.any()


def _tiny(kind: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

    sizes = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    configs = {
        "llama": lambda: LlamaConfig(**sizes),
        "gemma2": lambda: Gemma2Config(**sizes, final_logit_softcapping=3.0),
        "cohere": lambda: CohereConfig(**{k: v for k, v in sizes.items() if k != "head_dim"}, logit_scale=0.25),
        "granite": lambda: GraniteConfig(**{k: v for k, v in sizes.items() if k != "head_dim"}, logits_scaling=4.0),
    }
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(configs[kind](), attn_implementation="eager")


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite"])
def test_models_give_their_own_loss(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft capping and scaling of logits are part of the loss; chunks of 5 tokens are forced."""
    model = _tiny(kind)
    ids = torch.randint(0, V, (2, 12))
    labels = ids.clone()
    labels[:, :4] = -100
    own = model(input_ids=ids, labels=labels, use_cache=False).loss
    own.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * V * 5)
    assert loss.install(model)
    ours = model(input_ids=ids, labels=labels, use_cache=False).loss
    ours.backward()
    assert torch.allclose(ours, own, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if name in expected:
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-3, atol=1e-5), name


def test_a_model_with_a_loss_of_its_own_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    model = _tiny("llama")
    own_forward = model.forward

    def other(*args: object, **kwargs: object) -> object:
        outputs = own_forward(*args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss * 1.5
        return outputs

    model.forward = other
    assert not loss.install(model)
    assert model.forward is other
    assert "computes its loss in its own way" in capsys.readouterr().err
