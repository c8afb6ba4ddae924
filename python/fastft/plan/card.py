"""The card of this process, asked for its memory."""

from fastft.model import device
from fastft.plan.fit import Card


def here() -> Card | None:
    """The card that a run would use, with what is free on it; None without a GPU."""
    import torch

    on = device.choose()
    if on.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(on)
    # Asking made this process' context, which the plan counts by itself.
    from fastft.plan.fit import CONTEXT_BYTES

    return Card(total, min(free + CONTEXT_BYTES, total))


def has_bf16() -> bool:
    """Whether the card here multiplies bf16; a card that is only named is taken to."""
    on = device.choose()
    return on.type != "cuda" or device.has_bf16(on)
