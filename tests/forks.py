"""Runs of `fastft` that start in a moment, whose write calls are counted, refused, or the last thing that they do.

A server process imports what the commands need, once, and forks a child for each run. The child may put its calls that
change the disk under watch (seccomp's user notification, Linux >= 5.5, no rights needed): it stops at each of them until
the server says how it goes on. So a run is ended at its k-th write call, for every k, whatever thread and language it
comes from, and the system's errors are real ones to it.

`Forks` is the side of the tests; this file, run as a program, is the server. They talk in lines of JSON.
"""

import ctypes
import errno
import fcntl
import json
import os
import platform
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

# Calls by machine: name to number.
_NUMBERS = {
    "x86_64": {
        "write": 1,
        "pwrite64": 18,
        "writev": 20,
        "pwritev": 296,
        "sendfile": 40,
        "copy_file_range": 326,
        "fsync": 74,
        "fdatasync": 75,
        "truncate": 76,
        "ftruncate": 77,
        "fallocate": 285,
        "rename": 82,
        "mkdir": 83,
        "rmdir": 84,
        "link": 86,
        "unlink": 87,
        "symlink": 88,
        "openat": 257,
        "mkdirat": 258,
        "unlinkat": 263,
        "renameat": 264,
        "symlinkat": 266,
        "renameat2": 316,
    },
    "aarch64": {
        "write": 64,
        "pwrite64": 68,
        "writev": 66,
        "pwritev": 70,
        "sendfile": 71,
        "copy_file_range": 285,
        "fsync": 82,
        "fdatasync": 83,
        "truncate": 45,
        "ftruncate": 46,
        "fallocate": 47,
        "openat": 56,
        "mkdirat": 34,
        "unlinkat": 35,
        "renameat": 38,
        "symlinkat": 36,
        "renameat2": 276,
    },
}.get(platform.machine(), {})
# Where a call's arguments name what it changes: "fd 0" a descriptor, "path 0" a path, "at 0" a folder's descriptor and
# a path in it.
_PLACES = {
    **dict.fromkeys(("write", "pwrite64", "writev", "pwritev", "sendfile"), ("fd 0",)),
    **dict.fromkeys(("fsync", "fdatasync", "ftruncate", "fallocate"), ("fd 0",)),
    "copy_file_range": ("fd 2",),
    **dict.fromkeys(("mkdir", "rmdir", "unlink", "truncate"), ("path 0",)),
    **dict.fromkeys(("rename", "link"), ("path 0", "path 1")),
    "symlink": ("path 1",),
    **dict.fromkeys(("openat", "mkdirat", "unlinkat"), ("at 0",)),
    **dict.fromkeys(("renameat", "renameat2"), ("at 0", "at 2")),
    "symlinkat": ("at 1",),
}
REMOVING = frozenset(("unlink", "unlinkat", "rmdir"))
SYNCING = frozenset(("fsync", "fdatasync"))
RENAMING = frozenset(("rename", "renameat", "renameat2"))
WRITING = frozenset(("write", "pwrite64", "writev", "pwritev", "sendfile", "copy_file_range"))

_EXT4_SHUTDOWN, _WITHOUT_LOG_FLUSH = 0x8004587D, 2


class Call(NamedTuple):
    """A call that changes something: its name, and the paths that it changes."""

    name: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        code: exit code, or minus the signal's number.
        out: of stdout.
        err: of stderr.
        calls: write calls below the watched folder, in order, the one that was refused or not made included.
        seconds: from the signal that was sent to the end; 0 where none was sent.
    """

    code: int
    out: str
    err: str
    calls: list[Call] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Run:
    """One run, and what happens to it.

    Attributes:
        words: of the command line.
        watch: folder below which write calls are counted; None watches none.
        kill_at: the call, from 1, instead of which the run is killed.
        fail_at: the call, from 1, that fails with `error`.
        error: its errno.
        lasting: all later calls that need room fail as well.
        change_at: the call, from 1, before which somebody changes the file `change`.
        change: its path.
        how: written (in place), replaced (by another of the same bytes), cut (to half its length), or removed.
        cut: mount point of an ext4 file system that loses its power at the call `kill_at`.
        written_back: the part, 0 to 1, of each file there that the kernel has written to the disk by then of itself.
        committed: whether it has committed its journal of itself.
        after_s: the signal comes so long after the start, or after `begun`.
        begun: part of the name of an entry in `watch`: time counts from when there is one.
        signal: the signal, SIGKILL by default.
        pause_s: the run is stopped (SIGSTOP) for so long instead, and goes on.
        one_cpu: on a single core, so that there is one worker and the order of calls is always the same.
        environment: variables of this run.
    """

    words: Sequence[str]
    watch: str | None = None
    kill_at: int | None = None
    fail_at: int | None = None
    error: int = errno.ENOSPC
    lasting: bool = False
    change_at: int | None = None
    change: str = ""
    how: str = "written"
    cut: str | None = None
    written_back: float = 0.0
    committed: bool = False
    after_s: float | None = None
    begun: str | None = None
    signal: int = signal.SIGKILL
    pause_s: float | None = None
    one_cpu: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def can_watch() -> str | None:
    """Why calls cannot be watched on this machine; None where they can."""
    if sys.platform != "linux" or not _NUMBERS:
        return f"write calls are watched by seccomp on Linux on x86_64 and aarch64, not on {platform.machine()}"
    probe = subprocess.run([sys.executable, __file__, "--probe"], capture_output=True, text=True, check=False)
    return None if probe.returncode == 0 else f"seccomp's user notification is refused here: {probe.stderr.strip()}"


class Forks:
    """The server, from the tests' side.

    Args:
        modules: imported by the server before the first fork.
        path: a folder of modules more.
    """

    def __init__(self, modules: Sequence[str] = (), path: Path | None = None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        if path is not None:
            environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._server = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        try:
            self._server.wait(timeout=60)
        finally:
            self._server.kill()
            if self._server.stdout is not None:
                self._server.stdout.close()

    def run(self, words: Sequence[str], **settings: Any) -> Ended:
        """Make one run; see `Run` for the settings."""
        return self.together(Run([str(word) for word in words], **settings))[0]

    def together(self, *runs: Run) -> list[Ended]:
        """Make runs at the same time."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps([asdict(run) for run in runs]) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        assert line, "the server of forks ended"
        return [
            Ended(**{**ended, "calls": [Call(name, tuple(paths)) for name, paths in ended["calls"]]})
            for ended in json.loads(line)
        ]


class _Child:
    """A run that goes on, from the server's side."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.calls: list[Call] = []
        self.files = [os.memfd_create(name) for name in ("out", "err")]
        ours, theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _be_the_run(run, theirs, self.files)
        theirs.close()
        ours.recv(1)  # it takes signals from here on
        self.begun_at = time.monotonic()
        self.ended = os.pidfd_open(self.pid)
        self.notices: int | None = None
        if run.watch is not None and _is_watched(run):
            _, found, _, _ = socket.recv_fds(ours, 1, 1)
            self.notices = found[0] if found else None
        ours.close()
        self.due = None if run.after_s is None or run.begun is not None else self.begun_at + run.after_s
        self.waits_for_begin = run.begun is not None
        self.signalled_at: float | None = None
        self.paused = False

    def descriptors(self) -> list[int]:
        return [self.ended] if self.notices is None else [self.ended, self.notices]

    def tick(self) -> float:
        """Send the signal when it is due; the seconds until the next look."""
        now = time.monotonic()
        if self.waits_for_begin:
            assert self.run.watch is not None
            assert self.run.begun is not None
            with suppress(FileNotFoundError):
                if any(self.run.begun in entry.name for entry in os.scandir(self.run.watch)):
                    self.waits_for_begin = False
                    self.due = now + (self.run.after_s or 0)
            return 0.0005
        if self.due is None:
            return 60
        if now < self.due:
            return self.due - now
        if self.run.pause_s is not None:
            signal.pidfd_send_signal(self.ended, signal.SIGCONT if self.paused else signal.SIGSTOP)
            self.due = None if self.paused else now + self.run.pause_s
            self.paused = not self.paused
            return 0
        self.signalled_at, self.due = now, None
        signal.pidfd_send_signal(self.ended, self.run.signal)
        return 60

    def answer(self) -> None:
        """Decide about the call at which the child waits."""
        assert self.notices is not None
        notice = bytearray(80)
        try:
            fcntl.ioctl(self.notices, _request(0, 80), notice, True)
        except OSError:  # the child was killed meanwhile
            return
        identity, thread, _, number, _, _, *arguments = struct.unpack("=QIIiIQ6Q", notice)
        name = next(name for name, known in _NUMBERS.items() if known == number)
        failure = 0
        paths = _changed(name, thread, arguments)
        watched = str(self.run.watch)
        if any(path == watched or path.startswith(f"{watched}/") for path in paths):
            self.calls.append(Call(name, paths))
            failure = self._decide(name, len(self.calls))
        answer = struct.pack("=QqiI", identity, 0, -failure, 0 if failure else 1)
        with suppress(OSError):  # the child was killed meanwhile
            fcntl.ioctl(self.notices, _request(1, 24), answer)

    def _decide(self, name: str, count: int) -> int:
        run = self.run
        if count == run.kill_at:
            if run.cut is not None:
                cut_power(Path(run.cut), written_back=run.written_back, committed=run.committed)
            os.kill(self.pid, signal.SIGKILL)
        if count == run.change_at:
            _change(Path(run.change), run.how)
        if run.fail_at is None or count < run.fail_at:
            return 0
        if count == run.fail_at:
            return run.error
        return run.error if run.lasting and name not in REMOVING | RENAMING else 0

    def end(self) -> dict[str, Any]:
        _, status = os.waitpid(self.pid, 0)
        texts = []
        for file in self.files:
            os.lseek(file, 0, os.SEEK_SET)
            with os.fdopen(file, "rb") as stream:
                texts.append(stream.read().decode(errors="replace"))
        for descriptor in self.descriptors():
            os.close(descriptor)
        seconds = 0.0 if self.signalled_at is None else time.monotonic() - self.signalled_at
        return {
            "code": os.waitstatus_to_exitcode(status),
            "out": texts[0],
            "err": texts[1],
            "calls": self.calls,
            "seconds": seconds,
        }


def _is_watched(run: Run) -> bool:
    """Time alone needs no watch, and disturbs less without."""
    return run.after_s is None


def _serve() -> None:
    for line in sys.stdin:
        children = [_Child(Run(**settings)) for settings in json.loads(line)]
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < len(children):
            going = [child for child in children if child.pid not in answers]
            wait_s = min(child.tick() for child in going)
            ready, _, _ = select.select([one for child in going for one in child.descriptors()], [], [], wait_s)
            for child in going:
                if child.ended in ready:
                    answers[child.pid] = child.end()
                elif child.notices in ready:
                    child.answer()
        print(json.dumps([answers[child.pid] for child in children]), flush=True)


def _be_the_run(run: Run, server: socket.socket, files: Sequence[int]) -> None:
    """Run the command line in the child; never comes back."""
    code = 99
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in zip((1, 2), files, strict=True):
            os.dup2(file, number)
        sys.stdin, sys.stdout, sys.stderr = (open(number, mode) for number, mode in ((0, "r"), (1, "w"), (2, "w")))  # noqa: SIM115, PTH123
        os.environ.update(run.environment)
        if run.one_cpu:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from fastft import stop
        from fastft.__main__ import main

        stop.listen()
        server.send(b"!")
        if run.watch is not None and _is_watched(run):
            socket.send_fds(server, [b"!"], [_watched_from_now_on()])
        server.close()
        code = main(list(run.words))
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except KeyboardInterrupt:
        code = 98
    except BaseException:  # noqa: BLE001  reported by the text and the code
        import traceback

        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _watched_from_now_on() -> int:
    """Have this process stop at its write calls; gives the descriptor that the other side listens to."""
    allow, notify = 0x7FFF0000, 0x7FC00000
    load, equal, mask, give = 0x20, 0x15, 0x54, 0x06
    opening = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    program: list[tuple[int, int, int, int]] = [(load, 0, 0, 0)]
    for name, number in _NUMBERS.items():
        if name != "openat":
            program += [(equal, 0, 1, number), (give, 0, 0, notify)]
    program += [(equal, 0, 4, _NUMBERS["openat"]), (load, 0, 0, 32), (mask, 0, 0, opening)]
    program += [(equal, 1, 0, 0), (give, 0, 0, notify), (give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    filters = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) != 0:  # PR_SET_NO_NEW_PRIVS
        raise OSError(ctypes.get_errno(), "prctl")
    seccomp = {"x86_64": 317, "aarch64": 277}[platform.machine()]
    descriptor: int = libc.syscall(seccomp, 1, 1 << 3, filters)  # SET_MODE_FILTER, NEW_LISTENER
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor


def _request(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | ord("!") << 8 | number


def _changed(name: str, thread: int, arguments: Sequence[int]) -> tuple[str, ...]:
    """The paths that a call changes."""
    found = []
    for place in _PLACES[name]:
        kind, index = place.split()
        at = int(index)
        with suppress(OSError):
            if kind == "fd":
                found.append(_link(thread, f"fd/{arguments[at]}"))
            elif kind == "path":
                found.append(_absolute(thread, -100, _text(thread, arguments[at])))
            else:
                folder = struct.unpack("i", struct.pack("I", arguments[at] & 0xFFFFFFFF))[0]
                found.append(_absolute(thread, folder, _text(thread, arguments[at + 1])))
    return tuple(found)


def _absolute(thread: int, folder: int, path: str) -> str:
    if path.startswith("/"):
        return path
    where = "cwd" if folder == -100 else f"fd/{folder}"  # AT_FDCWD
    return f"{_link(thread, where)}/{path}"


def _link(thread: int, name: str) -> str:
    return str(Path(f"/proc/{thread}/{name}").readlink())


def _text(thread: int, address: int) -> str:
    with Path(f"/proc/{thread}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        content = b""
        while b"\0" not in content and len(content) < 4096:
            content += memory.read(min(256, 4096 - (address + len(content)) % 4096))
        return os.fsdecode(content.split(b"\0", 1)[0])


def _change(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "written":
        with path.open("r+b") as file:
            file.seek(len(content) // 2)
            file.write(content[len(content) // 2 :][:1])
    elif how == "replaced":
        other = path.with_name("replacement")
        other.write_bytes(content)
        other.replace(path)
    elif how == "cut":
        os.truncate(path, len(content) // 2)
    else:
        path.unlink()


def cut_power(mount: Path, *, written_back: float = 0.0, committed: bool = False) -> None:
    """Nothing that is not on the disk of an ext4 file system by now will come to it.

    Args:
        mount: where it is mounted; it must be mounted anew afterwards.
        written_back: the part of each file that the kernel writes back before, as it may do at any time.
        committed: whether it commits its journal before.
    """
    for path in mount.rglob("*") if written_back else ():
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                size = ctypes.c_int64(int(path.stat().st_size * written_back))
                ctypes.CDLL(None).sync_file_range(file.fileno(), ctypes.c_int64(0), size, 7)
    folder = os.open(mount, os.O_RDONLY)
    if committed:
        other = os.open(mount / "other", os.O_WRONLY | os.O_CREAT)
        os.write(other, b"x")
        os.fsync(other)
        os.close(other)
    fcntl.ioctl(folder, _EXT4_SHUTDOWN, struct.pack("I", _WITHOUT_LOG_FLUSH))
    os.close(folder)


def _main(arguments: Sequence[str]) -> None:
    if list(arguments) == ["--probe"]:
        try:
            os.close(_watched_from_now_on())
        except OSError as error:
            sys.exit(str(error))
        os._exit(0)
    import importlib

    for module in arguments:
        importlib.import_module(module)
    _serve()
    os._exit(0)  # torch takes seconds to shut down


if __name__ == "__main__":
    _main(sys.argv[1:])
