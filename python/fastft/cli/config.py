"""`fastft config show`, `fastft config schema` and `fastft config import`."""

from pathlib import Path

from fastft import console
from fastft.cli.job import Job
from fastft.errors import FileError, UsageError


def show(config: str, *overrides: str) -> Job:
    """Print a config as used, with the source of each value.

    Args:
        config: recipe name or config file
        overrides: values to change, e.g. train.lr=1e-5
    """

    def run() -> None:
        from fastft.config import load
        from fastft.config import show as view

        console.result(view.full(load.load(config, overrides)).rstrip("\n"))

    return Job(run)


def schema() -> Job:
    """Print the JSON schema of a config file, for editors."""

    def run() -> None:
        from fastft.config import show as view

        console.result(view.json_schema())

    return Job(run)


def import_(config: str, save_path: str, *, force: bool = False) -> Job:
    """Write an XTuner config (.py) as YAML.

    The file is read, not run. What has no counterpart is listed.

    Args:
        config: a Python config of XTuner v0.1
        save_path: a .yaml file, or a folder, which gets NAME.yaml
        force: overwrite the file if it exists
    """

    def run() -> None:
        from fastft import publish
        from fastft.config import load
        from fastft.config import show as view

        if Path(config).suffix != ".py":
            raise UsageError(f"config import: {config} is no .py file; `copy-cfg` writes recipes and YAML configs")
        loaded = load.load(config)
        target = Path(save_path)
        if target.suffix not in (".yaml", ".yml") or target.is_dir():
            target = target / f"{loaded.config.name}.yaml"
        if target.exists() and not force:
            raise FileError(f"config import: {target} exists; choose another name or add --force")
        publish.write_text(target, view.flat_yaml(loaded.config))
        console.result(f"written to {target}")

    return Job(run)
