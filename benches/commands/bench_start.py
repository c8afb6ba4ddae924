"""How long light commands take to start, beside a Python that does nothing (DESIGN: at most 150 ms more).

Runs `python -c pass`, `fastft help`, `fastft list-cfg` and `fastft version` in turns, checks each answer first, and prints
minimum, median and maximum of the wall time in ms.

    python benches/commands/bench_start.py [rounds]
"""

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "fastft help": ["-m", "fastft", "help"],
    "fastft version": ["-m", "fastft", "version"],
    "fastft list-cfg": ["-m", "fastft", "list-cfg"],
    "fastft list-cfg -p qlora": ["-m", "fastft", "list-cfg", "-p", "qlora"],
}
EXPECTED = {"fastft help": "usage:", "fastft version": "fastft ", "fastft list-cfg": "demo"}


def run(words: list[str]) -> tuple[float, str]:
    """Wall time in seconds and stdout of one run."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    return time.perf_counter() - started, done.stdout


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    for name, text in EXPECTED.items():
        assert text in run(COMMANDS[name])[1], name
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, words in COMMANDS.items():
            times[name].append(run(words)[0] * 1e3)
    nothing = statistics.median(times["python -c pass"])
    print(f"{'ms':<28}{'min':>8}{'median':>8}{'max':>8}{'more than nothing':>20}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:<28}{min(values):8.0f}{median:8.0f}{max(values):8.0f}{median - nothing:20.0f}")


if __name__ == "__main__":
    main()
