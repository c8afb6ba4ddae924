"""What is left behind to look at: loss.png."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastft import publish

# Points from which a smoothed curve says more than the raw one; the raw values stay visible behind it.
SMOOTHED_FROM = 40


def plot(path: Path, lines: Sequence[Mapping[str, Any]], title: str) -> bool:
    """Draw the loss over the steps as PNG.

    Args:
        path: file to write; an older one is replaced at once.
        lines: of metrics.jsonl.
        title: above the picture.

    Returns:
        False when there is nothing to draw; no file is written then.
    """
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    held_out = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    if not train:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = zip(*train, strict=True)
    axes.plot(steps, losses, color="#9ab8d6", linewidth=1, marker="." if len(steps) < 30 else "", label="loss")
    if len(steps) >= SMOOTHED_FROM:
        axes.plot(steps, smooth(losses), color="#1f5a93", linewidth=2, label="loss, smoothed")
    if held_out:
        axes.plot(
            *zip(*held_out, strict=True), color="#c4501b", linewidth=1.5, marker="o", markersize=4, label="eval loss"
        )
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel("loss per learned token (nats)")
    axes.grid(visible=True, color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    publish.write_bytes(path, picture.getvalue())
    return True


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window centred at each value, a tenth of the curve wide and narrower at its ends: it does not lag."""
    reach = len(values) // 20
    smoothed = []
    for place in range(len(values)):
        near = min(reach, place, len(values) - 1 - place)
        window = values[place - near : place + near + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed
