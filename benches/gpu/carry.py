"""Make a folder of wheels for a machine that has torch and transformers but no network, to run `tests/gpu` and benches.

    python benches/gpu/carry.py FOLDER

The folder holds fastft as it stands here (its native module runs on any x86-64 Linux with a newer C library), what it
needs beside torch, transformers, peft, accelerate and the like, and bitsandbytes with two of its libraries instead of
all (4 MB instead of 43): the CPU's, and that for the other machine's CUDA. There:

    python -m pip install --no-index --no-deps --target SITE FOLDER/*.whl && export PYTHONPATH=SITE
"""

import argparse
import base64
import csv
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = (
    "annotated-types",
    "bitsandbytes",
    "fire",
    "pydantic",
    "pydantic-core",
    "ruamel-yaml",
    "termcolor",
    "typing-extensions",
    "typing-inspection",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pinned(name: str) -> str:
    """`name==version` as requirements.lock has it."""
    for line in (REPOSITORY / "requirements.lock").read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line.split()[0]
    raise SystemExit(f"error: requirements.lock has no {name}")


def download(folder: Path, python_version: str) -> None:
    """Fetch the wheels of PACKAGES from the package index that pip is set up with."""
    line = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    line += ["--python-version", python_version, "--implementation", "cp", "--dest", str(folder)]
    line += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*line, *map(pinned, PACKAGES)], check=True)


def slim(wheel: Path, target: Path, keep: tuple[str, ...]) -> None:
    """Copy a wheel without the shared libraries that are not in `keep`, with a new RECORD."""
    rows: list[tuple[str, str, str]] = []
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        record = next(name for name in old.namelist() if name.endswith(".dist-info/RECORD"))
        missing = set(keep) - {name.rpartition("/")[2] for name in old.namelist()}
        if missing:
            raise SystemExit(f"error: {wheel.name} has no {', '.join(sorted(missing))}")
        for name in old.namelist():
            if name == record or (name.endswith(".so") and name.rpartition("/")[2] not in keep):
                continue
            content = old.read(name)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.append((name, f"sha256={digest}", str(len(content))))
            new.writestr(old.getinfo(name), content)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([*rows, (record, "", "")])
        new.writestr(record, text.getvalue())


def build(folder: Path) -> None:
    """Build fastft's own wheel from this working tree."""
    maturin = Path(sys.executable).parent / "maturin"
    line = [str(maturin), "build", "--release", "--locked", "--quiet", "--out", str(folder)]
    subprocess.run(line, cwd=REPOSITORY, check=True)


def main() -> None:
    """Fill the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python-version", default="3.12", help="of the other machine")
    parser.add_argument("--cuda", default="130", help="of the other machine's torch: 130 is CUDA 13.0")
    parser.add_argument("--only-fastft", action="store_true", help="build fastft anew, leave the rest")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("fastft-*.whl" if options.only_fastft else "*.whl"):
        old.unlink()
    if not options.only_fastft:
        with tempfile.TemporaryDirectory() as place:
            download(Path(place), options.python_version)
            for wheel in Path(place).glob("*.whl"):
                if wheel.name.startswith("bitsandbytes-"):
                    keep = ("libbitsandbytes_cpu.so", f"libbitsandbytes_cuda{options.cuda}.so")
                    slim(wheel, folder / wheel.name, keep)
                else:
                    (folder / wheel.name).write_bytes(wheel.read_bytes())
    build(folder)
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:6.2f} MB  {wheel.name}")
    print(f"{sum(w.stat().st_size for w in wheels) / 1e6:6.2f} MB in all")


if __name__ == "__main__":
    main()
