"""report.html: a run on one page, to be opened from the disk or sent to somebody.

Built from what lies in the run folder (metrics.jsonl, samples.jsonl) and what the run knows of itself. One file, no
script, nothing loaded from anywhere: the page's own policy forbids it. Everything that comes from data is escaped.
"""

import html
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft import publish
from fastft.config import schema, show
from fastft.config.mask import masked
from fastft.training import curve, metrics, report

FILE_NAME = "report.html"
# Rounds of answers that are shown per prompt; of more, the first, the last and some between.
MOST_ROUNDS = 12

_STYLE = """
:root { --ink: #1d2733; --soft: #5d6b7a; --paper: #ffffff; --panel: #f4f6f8; --edge: #dde3e9;
  --c0: #9ab8d6; --c1: #1f5a93; --c2: #c4501b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #9aa7b4; --paper: #14191f; --panel: #1d242c;
  --edge: #313b46; --c0: #3f617f; --c1: #7db7ec; --c2: #f0935f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 780px; padding: 24px 16px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 36px 0 8px; }
h3 { font-size: 15px; margin: 20px 0 4px; overflow-wrap: anywhere; }
p { margin: 4px 0; color: var(--soft); }
.tiles { display: flex; flex-wrap: wrap; gap: 8px; margin-top: 16px; }
.tile { background: var(--panel); border-radius: 6px; padding: 8px 14px; }
.tile b { display: block; font-size: 18px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; }
svg { width: 100%; height: auto; display: block; margin: 12px 0; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg text.title { font-weight: 600; font-size: 13px; }
svg text.tick, svg text.label { fill: var(--soft); font-size: 11px; }
.grid { stroke: var(--edge); stroke-width: 1; }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.line-0 { stroke: var(--c0); } .line-1 { stroke: var(--c1); } .line-2 { stroke: var(--c2); }
.dot { fill: var(--paper); stroke-width: 1.6; }
pre { background: var(--panel); border-radius: 6px; padding: 10px 14px; margin: 8px 0; overflow-x: auto;
  font: 12.5px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid var(--edge); padding: 6px 8px 6px 0; vertical-align: top; white-space: pre-wrap;
  overflow-wrap: anywhere; }
td:first-child { color: var(--soft); white-space: nowrap; width: 1%; padding-right: 16px; text-align: right;
  font-variant-numeric: tabular-nums; }
summary { cursor: pointer; }
@media print { body { max-width: none; } details:not([open]) > * { display: block; } }
"""
# Nothing is loaded, nothing runs; styles stand in the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class About:
    """What the page says beside the numbers.

    Attributes:
        config: of the run.
        steps: optimizer steps of the whole run.
        data: the data report, line by line.
        record: as in fastft_training.json.
    """

    config: schema.Config
    steps: int
    data: Sequence[str]
    record: Mapping[str, Any]


def write(run_dir: Path, about: About, *, state: str) -> Path:
    """Write report.html from what lies in the run folder; an older one is replaced at once.

    Args:
        run_dir: the run folder.
        about: what the run knows of itself.
        state: `running`, `stopped` or `finished`.

    Returns:
        the file.

    Raises:
        FileError: the disk refuses.
    """
    lines = metrics.read(run_dir / "metrics.jsonl")
    answers = metrics.read(run_dir / "samples.jsonl")
    path = run_dir / FILE_NAME
    publish.write_text(path, page(about, lines, answers, state=state))
    return path


def page(about: About, lines: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]], *, state: str) -> str:
    """The page as HTML; see `write`.

    Args:
        about: what the run knows of itself.
        lines: of metrics.jsonl.
        answers: of samples.jsonl.
        state: `running`, `stopped` or `finished`.
    """
    config = about.config
    done = max((int(line["step"]) for line in lines), default=0)
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    name, made_by = _text(config.name), _text(str(about.record.get("fastft")))
    head = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{name}</h1>",
        f"<p>{_text(state)}, step {done:,} of {about.steps:,}; written {written} by fastft {made_by}</p>",
    ]
    body = [_tiles(lines), _curves(lines), _answers(answers), _settings(about)]
    return "\n".join([*head, *(part for part in body if part), "</body></html>"]) + "\n"


def _tiles(lines: Sequence[Mapping[str, Any]]) -> str:
    """The newest numbers."""
    wanted = (
        ("loss", "loss", ".4f", ""),
        ("eval_loss", "eval loss", ".4f", ""),
        ("tokens_per_s", "tokens per second", ",.0f", ""),
        ("memory_gib", "peak memory", ".2f", " GiB"),
    )
    tiles = []
    for key, title, form, unit in wanted:
        values = [line[key] for line in lines if key in line]
        if values:
            tiles.append(f'<div class="tile"><b>{values[-1]:{form}}{unit}</b><span>{title}</span></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    def points(key: str) -> list[tuple[float, float]]:
        return [(float(line["step"]), float(line[key])) for line in lines if line.get(key) is not None]

    loss = points("loss")
    losses = [curve.Line("loss", loss, 0 if len(loss) >= report.SMOOTHED_FROM else 1, dots=len(loss) < 30)]
    if len(loss) >= report.SMOOTHED_FROM:
        smoothed = report.smooth([y for _, y in loss])
        losses.append(curve.Line("smoothed", [(x, y) for (x, _), y in zip(loss, smoothed, strict=True)], 1))
    losses.append(curve.Line("eval loss", points("eval_loss"), 2, dots=True))
    plots = [
        curve.plot("Loss", losses, "nats per learned token"),
        curve.plot("Learning rate", [curve.Line("lr", points("lr"), 1)], "of the optimizer"),
        curve.plot("Gradient norm", [curve.Line("norm", points("grad_norm"), 1)], "before clipping"),
        curve.plot("Speed", [curve.Line("speed", points("tokens_per_s"), 1)], "tokens per second"),
    ]
    drawn = [plot for plot in plots if plot is not None]
    return "\n".join(["<h2>Curves</h2>", *drawn]) if drawn else ""


def _answers(answers: Sequence[Mapping[str, Any]]) -> str:
    if not answers:
        return ""
    parts = ["<h2>Answers over time</h2>"]
    for prompt in dict.fromkeys(str(line["prompt"]) for line in answers):
        rounds = [line for line in answers if str(line["prompt"]) == prompt]
        parts.append(f"<h3>{_text(prompt)}</h3><table>")
        parts += [
            f"<tr><td>step {int(line['step']):,}</td><td>{_text(str(line['answer']).strip() or '(nothing)')}</td></tr>"
            for line in _some(rounds, MOST_ROUNDS)
        ]
        parts.append("</table>")
        if len(rounds) > MOST_ROUNDS:
            parts.append(f"<p>{MOST_ROUNDS} of {len(rounds)} rounds; all are in samples.jsonl</p>")
    return "\n".join(parts)


def _settings(about: About) -> str:
    base, versions = about.record.get("base", {}), about.record.get("versions", {})
    made = [
        f"base: {masked(str(base.get('name')))}" + (f", revision {base['revision']}" if base.get("revision") else "")
    ]
    made.append("versions: " + ", ".join(f"{name} {version}" for name, version in versions.items() if version))
    return "\n".join(
        [
            "<h2>Run</h2>",
            f"<pre>{_text(show.short(about.config))}</pre>",
            f"<pre>{_text(chr(10).join(made))}</pre>",
            "<h2>Data</h2>",
            f"<pre>{_text(chr(10).join(about.data))}</pre>",
            "<h2>Settings</h2>",
            f"<details><summary>config.yaml</summary><pre>{_text(show.flat_yaml(about.config))}</pre></details>",
        ]
    )


def _some(rounds: Sequence[Mapping[str, Any]], most: int) -> Sequence[Mapping[str, Any]]:
    """At most `most` of them, evenly, the first and the last included."""
    if len(rounds) <= most:
        return rounds
    return [rounds[round(index * (len(rounds) - 1) / (most - 1))] for index in range(most)]


def _text(text: str) -> str:
    """`text` as text of the page; control characters, which a page may not hold, are shown as such."""
    shown = "".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in text)
    return html.escape(shown)
