"""Runs the hostile corpus by hand: `python tests/hostile/run.py [WORD]`, only names with WORD; prints what fails.

`--json FILE` writes seconds and memory of each case; `--table` prints what stands in benches/results: per command what was
tried and survived, and the most seconds and memory of a refusal. Seconds mean something on a quiet machine only.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hostile.case import Case
from hostile.corpus import all_cases
from hostile.forked import Commands
from hostile.judge import judge
from hostile.stock import write_stock


def main(words: list[str]) -> int:
    """Run and print."""
    target = Path(words.pop(words.index("--json") + 1)) if "--json" in words else None
    wanted = [word for word in words if not word.startswith("--")]
    cases = [case for name, case in all_cases().items() if not wanted or any(word in name for word in wanted)]
    rows = []
    with tempfile.TemporaryDirectory(prefix="fastft-hostile-") as folder:
        stock = Path(folder) / "stock"
        commands = Commands(limit_s=10)
        write_stock(stock, commands)
        started = time.monotonic()
        for number, case in enumerate(cases):
            root = Path(folder) / f"{number}"
            root.mkdir()
            verdict = judge(case, root, stock, commands, 2.0)
            rows.append({**described(case), **vars(verdict.ended), "faults": verdict.faults})
            shutil.rmtree(root)
            for fault in verdict.faults:
                print(f"{case.name}: {fault}", flush=True)
            if "--show" in words:
                print(f"{case.name}: {verdict.ended.err.strip()[-300:]}")
        commands.close()
    bad = [row for row in rows if row["faults"]]
    print(f"{len(rows) - len(bad)} of {len(rows)} survived in {time.monotonic() - started:.0f} s", end="; ")
    print(f"at most {max(r['seconds'] for r in rows):.2f} s and {max(r['grown_mb'] for r in rows):.0f} MB")
    for row in sorted(rows, key=lambda row: -row["seconds"])[:4]:
        print(f"  {row['seconds']:.2f} s, {row['cpu_seconds']:.2f} s of CPU, {row['grown_mb']:.0f} MB: {row['name']}")
    if target:
        target.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if "--table" in words:
        print(table(rows))
    return 1 if bad else 0


def described(case: Case) -> dict[str, Any]:
    """What a row says of the case itself."""
    command = " ".join(case.words[:2] if case.words[0] in ("convert", "config") else case.words[:1])
    return {"name": case.name, "command": command, "is_control": case.code == 0}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line per command, then all; the good inputs are counted apart, for they may take their time."""
    lines = [
        "| command | hostile inputs | refused as they must be | most s | most CPU s | most MB above start-up | good inputs | accepted |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for command in (*sorted({row["command"] for row in rows}), None):
        of_it = [row for row in rows if command in (None, row["command"])]
        hostile = [row for row in of_it if not row["is_control"]]
        good = [row for row in of_it if row["is_control"]]
        cells = [
            command or "all",
            len(hostile),
            sum(not row["faults"] for row in hostile),
            f"{max((row['seconds'] for row in hostile), default=0):.2f}",
            f"{max((row['cpu_seconds'] for row in hostile), default=0):.2f}",
            f"{max((row['grown_mb'] for row in hostile), default=0):.0f}",
            len(good),
            sum(not row["faults"] for row in good),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
