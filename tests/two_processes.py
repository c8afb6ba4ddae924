"""Several runs, one after another, by the same two processes: starting them costs more than the tiny runs themselves.

`jobs` are plain dicts: `config` (of `tiny_run.config`), `work_dir`, `resume`; `die_at`: raise in every process at that
call of `training_step`, counted from 1, as a power cut would.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastft.config.schema import Config
from fastft.training import launch


def job(config: Config, work_dir: Path, *, resume: str | None = None, die_at: int | None = None) -> dict[str, Any]:
    """One run."""
    return {"config": config.model_dump(mode="json"), "work_dir": str(work_dir), "resume": resume, "die_at": die_at}


def run_all(jobs: list[dict[str, Any]], folder: Path) -> list[str]:
    """Make the runs with two processes on the CPU; what each process said."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return run_script(__file__, folder / "jobs.json")


def run_script(script: str, argument: Path, *, timeout_s: int = 300, **environment: str) -> list[str]:
    """Run a script in two processes that find each other, on the CPU; what each process said."""
    python = Path(launch.__file__).parents[2]
    environ = {**os.environ, "PYTHONPATH": str(python), "CUDA_VISIBLE_DEVICES": "", **environment}
    words = [sys.executable, script, str(argument)]
    processes = [
        subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for env in launch.environments(launch.Start(nproc_per_node=2), environ)
    ]
    said = [process.communicate(timeout=timeout_s)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return said


class _PowerCutError(Exception):
    pass


def _forget_deepspeed() -> None:
    """A command makes one run; several in one process would see the settings of those before."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def _main(path: Path) -> None:
    from fastft.model import quiet

    quiet.prepare_libraries()
    from fastft.training import run, trainer

    step = trainer.FastftTrainer.training_step
    for given in json.loads(path.read_text()):
        calls = 0

        def counted(self: Any, *args: Any, die_at: int | None = given["die_at"]) -> Any:
            nonlocal calls
            calls += 1
            if calls == die_at:
                raise _PowerCutError
            return step(self, *args)

        trainer.FastftTrainer.training_step = counted  # type: ignore[method-assign]
        try:
            config = Config.model_validate(given["config"])
            run.run(config, work_dir=Path(given["work_dir"]), resume=given["resume"])
            assert given["die_at"] is None
        except _PowerCutError:
            pass
        _forget_deepspeed()
    launch.leave()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
