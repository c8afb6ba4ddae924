"""Curves as SVG, drawn here: a report needs no library and no network to be looked at.

All text is escaped; colours are CSS classes of the page (`line-0`, `line-1`, ...), so that light and dark pages differ.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720, 280
# Room for the numbers at the left and below.
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 30, 38
# More points than this are thinned to their extremes: no screen shows more.
MOST_POINTS = 1000


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        name: for the legend.
        points: (x, y), x rising; y that is not finite is left out.
        style: number of the page's line style, from 0.
        dots: mark the points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    dots: bool = False


def plot(title: str, lines: Sequence[Line], y_label: str, x_label: str = "step") -> str | None:
    """Draw lines over common axes.

    Args:
        title: above the plot.
        lines: drawn in this order.
        y_label: with the unit.
        x_label: below.

    Returns:
        an `<svg>` element of WIDTH by HEIGHT that scales with the page, or None if there is no point.
    """
    finite = [Line(a.name, [p for p in a.points if math.isfinite(p[1])], a.style, a.dots) for a in lines]
    drawn = [line for line in finite if line.points]
    if not drawn:
        return None
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    x_ticks = [x for x in ticks(min(xs), max(xs), 8) if min(xs) <= x <= max(xs) and x == round(x)]
    y_ticks = ticks(min(ys), max(ys), 5)
    low_x, high_x = min(xs), max(*xs, min(xs) + 1)
    low_y, high_y = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def place(x: float, y: float) -> str:
        across = _LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - _LEFT - _RIGHT)
        down = HEIGHT - _BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    parts.append(f'<text class="title" x="{_LEFT}" y="16">{html.escape(title)}</text>')
    for value in y_ticks:
        left, down = place(low_x, value).split(",")
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - _RIGHT}" y1="{down}" y2="{down}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{float(down) + 4:.1f}" text-anchor="end">{_short(value)}</text>'
        )
    for value in x_ticks:
        middle = place(value, low_y).split(",")[0]
        parts.append(
            f'<text class="tick" x="{middle}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_short(value)}</text>'
        )
    parts.append(
        f'<text class="label" x="{WIDTH - _RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{html.escape(x_label)}</text>'
    )
    for line in drawn:
        points = thinned(line.points, MOST_POINTS)
        if len(points) > 1:
            path = " ".join(place(x, y) for x, y in points)
            parts.append(f'<polyline class="line line-{line.style}" points="{path}"/>')
        if line.dots or len(points) == 1:
            for x, y in points:
                across, down = place(x, y).split(",")
                said = html.escape(f"{line.name}, {x_label} {_short(x)}: {y:.4g}")
                parts.append(
                    f'<circle class="dot line-{line.style}" cx="{across}" cy="{down}" r="3"><title>{said}</title></circle>'
                )
    parts.append(_legend(drawn, y_label))
    parts.append("</svg>")
    return "\n".join(part for part in parts if part)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers around and within [low, high], at most `most` + 2, 1, 2 or 5 times a power of ten apart."""
    if low == high:
        high = low + (abs(low) or 1.0)
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first) + 1)]


def thinned(points: Sequence[tuple[float, float]], most: int) -> Sequence[tuple[float, float]]:
    """At most `most` points that keep each peak: of each block of neighbours the lowest and the highest, and the ends."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most // 2 - 1))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        block = range(start, min(start + size, len(points)))
        kept |= {min(block, key=lambda i: points[i][1]), max(block, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _legend(lines: Sequence[Line], y_label: str) -> str:
    """The names at the right end of the title's line, and what the numbers at the left are."""
    parts, x = [], float(WIDTH - _RIGHT)
    if len(lines) > 1:
        for line in reversed(lines):
            x -= 6.6 * len(line.name)
            parts.append(f'<text class="tick" x="{x:.0f}" y="16">{html.escape(line.name)}</text>')
            parts.append(f'<line class="line line-{line.style}" x1="{x - 22:.0f}" x2="{x - 5:.0f}" y1="12" y2="12"/>')
            x -= 34
    parts.append(f'<text class="label" x="{_LEFT}" y="{HEIGHT - 6}">{html.escape(y_label)}</text>')
    return "\n".join(parts)


def _short(value: float) -> str:
    """A number of a scale in few signs: 1,500, 0.02, 2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1_000_000 or abs(value) < 0.001:
        return f"{value:.3g}"
    return f"{value:,.4f}".rstrip("0").rstrip(".")
