"""`fastft` and `python -m fastft`: finds the command, checks its words, builds the job, runs it, ends with its exit code.

0: done. 1: failed. 2: wrong use. 130 and 143: stopped by Ctrl-C and SIGTERM. Errors are one or a few lines; `--debug`
anywhere on the line shows the traceback too.
"""

from fastft import stop

if __name__ == "__main__":
    stop.listen()  # before the imports below, which take their time

import inspect
import os
import sys
import time
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from fastft import console
from fastft.cli import table, words
from fastft.cli.job import Job
from fastft.errors import ConfigError, FastftError

_AFTER_THE_FIRST_S = 2.0


def program() -> NoReturn:
    """The process that the command line started: `main`, and Ctrl-C and SIGTERM."""
    stop.listen()
    code = main()
    if code in (130, 143) and "wandb" not in sys.modules:  # which sends the rest of its lines at the end
        stop.leave(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return the exit code."""
    typed = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in typed or bool(os.environ.get("FASTFT_DEBUG"))
    typed = [word for word in typed if word != "--debug"]
    try:
        return _build(typed).run() or 0
    except FastftError as problem:
        if debug:
            _print_traceback()
        _let_the_first_speak()
        # Only a config's mistakes are several; elsewhere a line break comes from a name in a file.
        console.error(str(problem) if isinstance(problem, ConfigError) else console.one_line(str(problem)))
        return problem.exit_code
    except KeyboardInterrupt:
        console.note("stopped")
        return 130
    except SystemExit as left:
        if left.code not in (130, 143):
            raise
        return int(left.code)
    except BrokenPipeError:
        # The reader of our output left (`fastft list-cfg | head`); keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError) as problem:
        if debug:
            _print_traceback()
        console.error(_about_machine(problem))
        return 1
    except Exception as problem:  # noqa: BLE001 - the last door: a bug of ours, said as such
        if debug:
            _print_traceback()
        console.error(
            f"this is a bug in fastft, not a mistake of yours: {type(problem).__name__}: {console.one_line(str(problem))}\n"
            "       run the same command with --debug to see where it happened"
        )
        return 1


def _build(typed: Sequence[str]) -> Job:
    """The job that the words ask for; nothing has run yet."""
    asked = next((place for place, word in enumerate(typed) if word in ("-h", "--help")), None)
    if asked is not None:
        typed = ["help", *[word for word in typed[:asked] if not word.startswith("-")][:2]]
    command, rest = table.find(typed or ["help"])
    function = command.function()
    return _bind(command.name, function, words.check(command.name, function, rest, command.shorts))


def _bind(name: str, function: Callable[..., Job], checked: list[str]) -> Job:
    """Let Fire bind words that have been checked; every value is read as its annotation says."""
    fire = _fire()

    def command(*args: Any, **kwargs: Any) -> Job:
        return function(*args, **kwargs)

    command.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    reads = words.converters(function)
    bound = fire.decorators.SetParseFns(**reads)(fire.decorators.SetParseFn(str)(command))
    job: Job = fire.Fire(bound, command=checked, name=f"fastft {name}", serialize=lambda _: None)
    return job


def _fire() -> Any:
    """Python Fire, imported without asyncio, which is two thirds of its import time.

    Fire asks asyncio one thing, whether a function is a coroutine; no command is. 44 of 66 ms on an AMD EPYC, 2026-11-24.
    """
    needed = "asyncio" not in sys.modules
    if needed:
        stand_in = types.ModuleType("asyncio")
        stand_in.iscoroutinefunction = inspect.iscoroutinefunction  # type: ignore[attr-defined]
        sys.modules["asyncio"] = stand_in
    try:
        import fire
        import fire.decorators
    finally:
        if needed:
            del sys.modules["asyncio"]
    return fire


def _let_the_first_speak() -> None:
    """Wait, in all but the first of several training processes.

    What fails in all of them is said by the first; the others are ended then. What fails here alone is said.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_AFTER_THE_FIRST_S)
        console.note(f"in process {rank}:")


def _about_machine(problem: OSError | MemoryError) -> str:
    """One line for what the operating system refused."""
    if isinstance(problem, MemoryError):
        return "out of memory; close other programs, or use a smaller model, batch or max_length"
    where = f"{problem.filename}: " if problem.filename else ""
    return f"{where}{problem.strerror or problem}"


def _print_traceback() -> None:
    import traceback

    from fastft.config.mask import masked

    print(masked(traceback.format_exc()), end="", file=sys.stderr)


if __name__ == "__main__":
    program()
