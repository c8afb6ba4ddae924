"""Cross-entropy of the next token without ever holding the logits of the whole batch.

The logits of a batch, their gradient and the softmax are the largest thing in memory for a big vocabulary: 6 GiB at
4,096 tokens of Qwen2.5 (spec training.md 3). Here the head is applied to a chunk of tokens at a time, and recomputed
for that chunk in the backward pass. Tokens that are not learned never reach the head.

Letters: B batch, T tokens, N learned tokens, D hidden size, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fastft import console
from fastft.model import tiled_head

# Largest block of fp32 logits that is held at once; the backward pass needs about three times as much.
CHUNK_BYTES = 64 * 2**20
# Number of tokens on which `install` compares its loss with the model's own.
_PROBE_TOKENS = 16
_IGNORED = -100

Head = Callable[[torch.Tensor], torch.Tensor]


def chunked_cross_entropy(
    hidden_BTD: torch.Tensor, labels_BT: torch.Tensor, head: Head, chunk_tokens: int
) -> tuple[torch.Tensor, int]:
    """Sum of the next-token cross-entropies, in nats, and the number of tokens in it.

    Args:
        hidden_BTD: last hidden states, any float dtype.
        labels_BT: int64; place t is predicted from place t - 1; -100 is not learned.
        head: maps hidden states [N, D] to logits [N, V].
        chunk_tokens: learned tokens whose logits are held at once, at least 1.

    Returns:
        the sum, an fp32 scalar, and the count. A batch that learns nothing gives a sum of 0 that still has a gradient.
    """
    targets_BT = labels_BT[:, 1:]
    learned = targets_BT != _IGNORED
    hidden_ND = hidden_BTD[:, :-1][learned]
    targets_N = targets_BT[learned]
    num_tokens = targets_N.shape[0]

    def of_chunk(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(head(hidden).float(), targets, reduction="sum")

    if num_tokens == 0:
        return hidden_BTD.float().sum() * 0.0, 0
    if num_tokens <= chunk_tokens:
        return of_chunk(hidden_ND, targets_N), num_tokens
    total = hidden_BTD.new_zeros((), dtype=torch.float32)
    for start in range(0, num_tokens, chunk_tokens):
        part = slice(start, start + chunk_tokens)
        total = total + checkpoint(of_chunk, hidden_ND[part], targets_N[part], use_reentrant=False)
    return total, num_tokens


def row_log_probs(hidden_BTD: torch.Tensor, labels_BT: torch.Tensor, head: Head, chunk_tokens: int) -> torch.Tensor:
    """Sum of the log probabilities of each row's learned tokens, in nats: fp32 [B].

    The arguments are those of `chunked_cross_entropy`.
    """
    targets_BT = labels_BT[:, 1:]
    learned = targets_BT != _IGNORED
    hidden_ND = hidden_BTD[:, :-1][learned]
    targets_N = targets_BT[learned]
    if targets_N.shape[0] == 0:
        return hidden_BTD.float().sum(dim=(1, 2)) * 0.0

    def of_chunk(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(head(hidden).float(), targets, reduction="none")

    parts = [slice(start, start + chunk_tokens) for start in range(0, targets_N.shape[0], chunk_tokens)]
    losses_N = torch.cat([checkpoint(of_chunk, hidden_ND[p], targets_N[p], use_reentrant=False) for p in parts])
    # A table with zeros, not index_add: its sums are the same at every run on a GPU too.
    losses_BT = losses_N.new_zeros(targets_BT.shape)
    losses_BT[learned] = losses_N
    return -losses_BT.sum(dim=1)


def install(causal_lm: Any) -> bool:
    """Let `causal_lm.forward(labels=...)` use the chunked loss; calls without labels are the model's own.

    With `row_sums=True` its `loss` is `row_log_probs`, one number per row.

    What some families do to their logits (soft capping, scaling) is applied from their config. The result is compared
    with the model's own loss on a few tokens; a family that computes something else keeps its own loss, and that is
    said aloud.

    Args:
        causal_lm: the transformers model inside a PeftModel, not the PeftModel.

    Returns:
        whether the chunked loss is in use.
    """
    own_forward = causal_lm.forward
    decoder, head = _parts(causal_lm)
    scaling = _scaling(causal_lm)
    if decoder is None:
        console.warn(f"loss: {type(causal_lm).__name__} has no decoder and head to separate; full logits are held")
        return False
    vocabulary = _vocabulary(causal_lm)

    @functools.wraps(own_forward)
    def forward(
        *args: Any, labels: Any = None, num_items_in_batch: Any = None, row_sums: bool = False, **kwargs: Any
    ) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if labels is None:
            return own_forward(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None and name != "return_dict"}
        hidden_BTD = decoder(*args, **{**kwargs, "use_cache": False})[0]
        linear = causal_lm.get_output_embeddings()
        chunk_tokens = max(CHUNK_BYTES // (4 * vocabulary), 1)
        if row_sums:
            tiles = linear if isinstance(linear, tiled_head.TiledHead) else None
            if tiles is None:
                sums_B = row_log_probs(hidden_BTD, labels, head, chunk_tokens)
            else:
                sums_B = torch.stack(
                    [
                        -_by_tiles(hidden_BTD[row : row + 1], labels[row : row + 1], tiles, scaling)[0]
                        for row in range(labels.shape[0])
                    ]
                )
            return CausalLMOutputWithPast(loss=sums_B)
        if isinstance(linear, tiled_head.TiledHead):
            total, count = _by_tiles(hidden_BTD, labels, linear, scaling)
        else:
            total, count = chunked_cross_entropy(hidden_BTD, labels, head, chunk_tokens)
        return CausalLMOutputWithPast(loss=total / (count if num_items_in_batch is None else num_items_in_batch))

    if not _agrees(causal_lm, own_forward, forward, vocabulary):
        console.warn(
            f"loss: {type(causal_lm).__name__} computes its loss in its own way; it is used, and full logits are held"
        )
        return False
    causal_lm.forward = forward
    return True


def _parts(causal_lm: Any) -> tuple[Any, Head]:
    """The decoder, and the head with the scaling of logits that the model's config asks for."""
    linear = causal_lm.get_output_embeddings()
    if hasattr(causal_lm.config, "vision_config"):
        # What puts images in their places and counts positions is part of it: more than the text decoder.
        decoder = causal_lm.base_model
    else:
        decoder = causal_lm.get_decoder() if hasattr(causal_lm, "get_decoder") else None
    scaling = _scaling(causal_lm)

    def head(hidden_ND: torch.Tensor) -> torch.Tensor:
        return scaling.apply(linear(hidden_ND))

    return (None if linear is None or decoder is causal_lm else decoder), head


def _scaling(causal_lm: Any) -> tiled_head.Scaling:
    config = causal_lm.config.get_text_config()
    return tiled_head.Scaling(
        factor=getattr(config, "logit_scale", None),
        divisor=getattr(config, "logits_scaling", None),
        cap=getattr(config, "final_logit_softcapping", None),
    )


def _by_tiles(
    hidden_BTD: torch.Tensor, labels_BT: torch.Tensor, head: tiled_head.TiledHead, scaling: tiled_head.Scaling
) -> tuple[torch.Tensor, int]:
    """`chunked_cross_entropy` for a head that is held in tiles of the vocabulary."""
    targets_BT = labels_BT[:, 1:]
    learned = targets_BT != _IGNORED
    targets_N = targets_BT[learned]
    if targets_N.shape[0] == 0:
        return hidden_BTD.float().sum() * 0.0, 0
    return tiled_head.cross_entropy(hidden_BTD[:, :-1][learned], targets_N, head, scaling), targets_N.shape[0]


def _vocabulary(causal_lm: Any) -> int:
    return int(causal_lm.config.get_text_config().vocab_size)


def _probe(config: Any, vocabulary: int) -> torch.Tensor:
    """Token ids [1, T] for a comparison, none of which asks for an image or a film."""
    names = ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "boi_token_index")
    special = torch.tensor(
        [i for i in (getattr(config, name, None) for name in names) if isinstance(i, int)], dtype=torch.int64
    )
    ids = torch.arange(4 * _PROBE_TOKENS) * 7 % vocabulary
    return ids[~torch.isin(ids, special)][:_PROBE_TOKENS].unsqueeze(0)


def _agrees(causal_lm: Any, own_forward: Any, forward: Any, vocabulary: int) -> bool:
    """Compare both losses on a few fixed tokens, without dropout; no random number is drawn."""
    device = causal_lm.device
    ids_BT = _probe(causal_lm.config, vocabulary).to(device)
    training = causal_lm.training
    causal_lm.eval()
    try:
        with torch.no_grad():
            inputs = {"input_ids": ids_BT, "labels": ids_BT, "use_cache": False}
            theirs = own_forward(**inputs).loss
            ours = forward(**inputs).loss
    finally:
        causal_lm.train(training)
    # Both are fp32 sums of the same values in another order; 16-bit logits differ by their rounding in other shapes.
    return bool(torch.allclose(ours.float(), theirs.float(), rtol=2e-2, atol=1e-3))
