"""Runs command lines in forked children of one warmed process, and measures each from the fork on.

Started as a program, it imports what the commands import, then reads one request per line (JSON) and answers each with
one line. A command is what `fastft.__main__.main` makes of its words, with its own working directory, session and
streams, so that what a user would see is what is seen here; only the imports are paid once.
"""

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

# The address space above that of the warmed process: what runs away is stopped by an error, not by the machine.
_ROOM_BYTES = 4 << 30


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit code; negative: the signal that killed it; None: it did not end in time.
        out: stdout.
        err: stderr.
        seconds: wall clock from the fork on.
        cpu_seconds: of the processor, which other work on the machine hardly changes.
        grown_mb: peak of the resident memory above that at the fork.
    """

    code: int | None
    out: str
    err: str
    seconds: float
    cpu_seconds: float
    grown_mb: float


class Commands:
    """The warmed process."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def run(self, words: list[str], folder: Path, stdin: str = "") -> Ended:
        """Run `fastft WORDS` in a folder."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"words": words, "folder": str(folder), "limit_s": self._limit_s, "stdin": stdin}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _status(field: str, process: str = "self") -> int:
    """A line of /proc/PID/status in bytes."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _warm() -> None:
    """Import what commands import."""
    import importlib

    for name in (
        "torch", "transformers", "transformers.trainer", "transformers.models.auto.modeling_auto", "peft",
        "bitsandbytes", "datasets", "pyarrow.parquet", "ruamel.yaml", "tokenizers", "jinja2.sandbox", "accelerate",
        "matplotlib.pyplot", "rich.progress", "transformers.models.llama.modeling_llama", "torch.nested._internal",
        "transformers.models.llama.tokenization_llama", "torch._dynamo",
        "fastft.__main__", "fastft.convert.merge", "fastft.convert.rewrite", "fastft.convert.quantize",
        "fastft.convert.pth", "fastft.convert.split", "fastft.convert.verify", "fastft.convert.names_transformers",
        "fastft.training.run", "fastft.training.trainer", "fastft.training.preferences", "fastft.chat.session",
        "fastft.chat.repl", "fastft.config.load", "fastft.config.xtuner", "fastft.data.prepare", "fastft.plan.for_run",
        "fastft.plan.table", "fastft.convert.peft_layers", "fastft.convert.layout", "fastft.demo.corpus",
        "fastft.training.deepspeed",
    ):  # fmt: skip
        importlib.import_module(name)
    from fastft.cli import table

    for command in table.COMMANDS:
        command.function()


def _child(request: dict[str, Any], files: dict[str, IO[bytes]], report: int) -> None:
    """Be the command; never returns."""
    code = 99
    try:
        os.setsid()
        os.chdir(request["folder"])
        for number, name in enumerate(("in", "out", "err")):
            os.dup2(files[name].fileno(), number)
        sys.stdin = os.fdopen(os.dup(0), "r", encoding="utf-8")
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8")
        limit = _status("VmSize") + _ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        from fastft.__main__ import main

        try:
            code = main(request["words"])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except BaseException:  # noqa: BLE001 - as Python itself would: the traceback, and 1
            import traceback

            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(report, json.dumps({"grown_mb": (_status("VmHWM") - before) / 1e6}).encode())
    finally:
        os._exit(code)


def _served(request: dict[str, Any]) -> Ended:
    """Fork, wait, measure."""
    import tempfile

    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(request["stdin"].encode())
        given.seek(0)
        receive, send = os.pipe()
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _child(request, {"in": given, "out": out, "err": err}, send)
        os.close(send)
        code, cpu_seconds = _waited(child, request["limit_s"])
        seconds = time.monotonic() - started
        told = os.read(receive, 1000) if select.select([receive], [], [], 0)[0] else b""
        os.close(receive)
        out.seek(0)
        err.seek(0)
        grown = json.loads(told)["grown_mb"] if told else -1.0
        texts = [stream.read(1 << 20).decode("utf-8", "replace") for stream in (out, err)]
        return Ended(code, texts[0], texts[1], seconds, cpu_seconds, grown)


def _waited(child: int, limit_s: float) -> tuple[int | None, float]:
    """Wait for the child; when it takes too long, end it and its own children. Gives its exit code and CPU seconds."""
    handle = os.pidfd_open(child)
    ready, _, _ = select.select([handle], [], [], limit_s)
    os.close(handle)
    if not ready:
        os.killpg(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status) if ready else None, used.ru_utime + used.ru_stime


def _serve() -> None:
    _warm()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        answer = json.dumps(vars(_served(json.loads(line))))
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
    _serve()
