"""`fastft copy-cfg`: a recipe as one file to edit."""

from pathlib import Path

from fastft import console
from fastft.cli.job import Job
from fastft.errors import FileError


def copy_cfg(config: str, save_path: str, *, force: bool = False) -> Job:
    """Write a recipe as one commented YAML file to edit.

    Args:
        config: recipe name (see list-cfg) or config file
        save_path: a .yaml file, or a folder, which gets NAME_copy.yaml
        force: overwrite the file if it exists
    """

    def run() -> None:
        from fastft import publish
        from fastft.config import load, show

        loaded = load.load(config)
        target = Path(save_path)
        if target.suffix not in (".yaml", ".yml") or target.is_dir():
            target = target / f"{loaded.config.name}_copy.yaml"
        if target.exists() and not force:
            raise FileError(f"copy-cfg: {target} exists; choose another name or add --force")
        publish.write_text(target, show.flat_yaml(loaded.config))
        console.result(f"copied to {target}")

    return Job(run)
