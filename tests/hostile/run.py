"""Runs the hostile corpus by hand: `python tests/hostile/run.py [WORD]`, only names with WORD; prints what fails.

`--json FILE` writes counts, seconds and memory, for benches/results.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hostile.corpus import all_cases
from hostile.forked import Commands
from hostile.judge import judge
from hostile.stock import write_stock


def main(words: list[str]) -> int:
    """Run and print."""
    target = words.pop(words.index("--json") + 1) if "--json" in words else None
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
            rows.append({"name": case.name, **vars(verdict.ended), "faults": verdict.faults})
            for fault in verdict.faults:
                print(f"{case.name}: {fault}", flush=True)
            if "--show" in words:
                print(f"{case.name}: {verdict.ended.err.strip()[-300:]}")
        commands.close()
    bad = [row for row in rows if row["faults"]]
    print(f"{len(rows) - len(bad)} of {len(rows)} survived in {time.monotonic() - started:.0f} s", end="; ")
    print(f"at most {max(r['seconds'] for r in rows):.2f} s and {max(r['grown_mb'] for r in rows):.0f} MB")
    for row in sorted(rows, key=lambda row: -row["seconds"])[:4]:
        print(f"  {row['seconds']:.2f} s, {row['grown_mb']:.0f} MB: {row['name']}")
    if target:
        Path(target).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
