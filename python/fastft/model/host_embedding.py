"""The embedding table in host RAM; only the rows of a batch come to the device.

A frozen table is read at a few thousand rows a step and takes 0.24 (Llama-2-7B) to 1.02 GiB (Qwen2.5-7B) on the card.
Here the rows are looked up by the CPU and copied: 2048 x 3584 x 2 bytes = 15 MB over PCIe, and the step waits once for
the token ids. Exact: the same rows, and the same scaling where the family's embedding scales.

Accelerate's offload hooks would copy the whole table to the device at each forward (spec training.md 3).
"""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import torch


class HostEmbedding(nn.Module):
    """Takes the place of a frozen embedding.

    The table is neither parameter nor buffer, so that `.to(device)`, `model.device` and `state_dict` pass it by.

    Args:
        embedding: any module that maps ids to rows; it is moved to the CPU and frozen.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self._kept = (embedding.to("cpu").requires_grad_(requires_grad=False),)  # in a tuple nn.Module does not see it

    @property
    def weight(self) -> "torch.Tensor":
        """The table [V, D], on the CPU."""
        table: torch.Tensor = self._kept[0].weight  # type: ignore[assignment]  # nn.Module types it as Tensor | Module
        return table

    @property
    def num_weights(self) -> int:
        """Numbers in the table; parameters() does not list them."""
        return self.weight.numel()

    def forward(self, ids_BT: "torch.Tensor") -> "torch.Tensor":
        """Rows [B, T, D] of the ids [B, T], on the device of the ids."""
        rows_BTD: torch.Tensor = self._kept[0](ids_BT.to("cpu"))
        return rows_BTD.to(ids_BT.device)


def install(causal_lm: Any) -> HostEmbedding:
    """Move the input embedding of a transformers model to host RAM."""
    hosted = HostEmbedding(causal_lm.get_input_embeddings())
    causal_lm.set_input_embeddings(hosted)
    return hosted
