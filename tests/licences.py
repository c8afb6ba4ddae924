"""Prints the licence of every locked dependency, by name: `python tests/licences.py`; exit code 1 if one is not allowed.

Python: each package of requirements.lock that is installed, by its own metadata. Rust: `cargo metadata --locked`, which needs
no network where the crates are in cargo's cache. What is not permissive stands in `EXCEPTIONS` with the reason.
"""

import json
import re
import subprocess
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# A licence text is read as permissive by one of these words, and as copyleft by one of those.
PERMISSIVE = re.compile(
    r"\b(apache|mit|bsd|isc|psf|python software foundation|zlib|unicode|unlicense|0bsd|hpnd|cc0|mit-cmu|dual license)",
    re.IGNORECASE,
)
COPYLEFT = re.compile(r"\b(a?gpl|lgpl|gnu|mozilla|mpl|eupl|cddl|epl|sspl)", re.IGNORECASE)
# Not permissive, and why they may be used all the same: none of them is shipped with fastft.
EXCEPTIONS = {
    "certifi": "MPL-2.0: a list of certificates, used unchanged",
    "hypothesis": "MPL-2.0: only the tests use it",
    "pathspec": "MPL-2.0: only mypy uses it",
    "tqdm": "MPL-2.0 and MIT: used unchanged",
}
NVIDIA = re.compile(r"^(nvidia-|cuda-)")


def locked() -> list[str]:
    """Names in requirements.lock."""
    text = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8")
    return re.findall(r"^([A-Za-z0-9._-]+)==", text, re.MULTILINE)


def licence(package: Distribution) -> str:
    """What the metadata of a package say about its licence, in one line."""
    metadata = package.metadata
    said = [metadata.get("License-Expression") or ""]
    said += [line.rpartition("::")[2].strip() for line in metadata.get_all("Classifier") or [] if "License ::" in line]
    if not any(said):
        said = [metadata.get("License") or "", *(metadata.get_all("License-File") or [])]
    return " ".join(" ".join(said).split())[:80]


def python_licences() -> dict[str, str]:
    """Licence by package; what is locked for other platforms only is left out."""
    found = {}
    for name in locked():
        try:
            found[name] = licence(distribution(name))
        except PackageNotFoundError:
            continue
    return found


def rust_licences() -> dict[str, str]:
    """Licence by crate of the workspace's lock file."""
    command = ["cargo", "metadata", "--locked", "--offline", "--format-version", "1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return {package["name"]: package["license"] or "" for package in json.loads(done.stdout)["packages"]}


def complaint(name: str, said: str) -> str | None:
    """Why a licence is not taken as it is; None for one that is."""
    if name in EXCEPTIONS or NVIDIA.match(name):
        return None
    choice = bool(re.search(r"\bOR\b", said) and PERMISSIVE.search(said))
    if COPYLEFT.search(said) and not choice:
        return f"{name}: copyleft? {said}"
    return None if PERMISSIVE.search(said) else f"{name}: not understood: {said!r}"


def main() -> int:
    """Print all, then what is not allowed."""
    found = python_licences() | {f"{name} (crate)": said for name, said in rust_licences().items()}
    for name, said in sorted(found.items()):
        print(f"{name}: {EXCEPTIONS.get(name) or said}")
    complaints = [text for name, said in found.items() if (text := complaint(name, said))]
    for text in complaints:
        print(f"error: {text}")
    return 1 if complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
