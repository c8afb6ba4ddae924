"""What comes in from outside: unsafe code, dependencies, licences, build steps. Held against the files themselves."""

import re
import tomllib
from pathlib import Path

import pytest

import licences

REPOSITORY = Path(__file__).resolve().parents[2]


SOURCES = sorted(
    path for path in (REPOSITORY / "rust").rglob("*.rs") if "target" not in path.relative_to(REPOSITORY).parts
)
# The only places that may have it: the kernels, and the border's view of Python's memory.
MAY_BE_UNSAFE = ("rust/kernels/", "rust/py/src/borrow.rs")


def _code(path: Path) -> list[str]:
    """Lines without their comments."""
    return [re.sub(r"//.*", "", line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_unsafe_stands_only_where_it_may() -> None:
    assert len(SOURCES) > 40
    found = set()
    for path in SOURCES:
        name = path.relative_to(REPOSITORY).as_posix()
        if any(re.search(r"\bunsafe\s*(\{|fn|impl|trait|extern)", line) for line in _code(path)):
            found.add(name)
    assert "rust/py/src/borrow.rs" in found
    assert "rust/kernels/src/nf4/avx2.rs" in found
    assert [name for name in found if not name.startswith(MAY_BE_UNSAFE)] == []


def test_every_unsafe_block_has_its_reason() -> None:
    """Clippy's undocumented_unsafe_blocks says so too; it is on for every crate of the workspace."""
    blocks = 0
    for path in SOURCES:
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(_code(path)):
            if re.search(r"\bunsafe\s*\{", line):
                blocks += 1
                assert any("SAFETY:" in near for near in lines[max(0, number - 8) : number + 1]), f"{path}:{number + 1}"
    assert blocks > 20
    workspace = tomllib.loads((REPOSITORY / "Cargo.toml").read_text())
    assert workspace["workspace"]["lints"]["clippy"]["undocumented_unsafe_blocks"] == "warn"
    for member in workspace["workspace"]["members"]:
        assert tomllib.loads((REPOSITORY / member / "Cargo.toml").read_text())["lints"] == {"workspace": True}, member


@pytest.mark.parametrize(
    ("crate", "said"), [("checkpoint", "forbid"), ("convert", "forbid"), ("tokens", "forbid"), ("py", "deny")]
)
def test_the_other_crates_forbid_it(crate: str, said: str) -> None:
    root = (REPOSITORY / "rust" / crate / "src" / "lib.rs").read_text()
    assert f"#![{said}(unsafe_code)]" in root


def test_crates_come_from_one_registry_with_a_checksum() -> None:
    for lock in ("Cargo.lock", "rust/fuzz/Cargo.lock"):
        packages = tomllib.loads((REPOSITORY / lock).read_text())["package"]
        assert len(packages) > 20
        for package in packages:
            if "source" in package:
                assert package["source"] == "registry+https://github.com/rust-lang/crates.io-index", package
                assert re.fullmatch("[0-9a-f]{64}", package["checksum"])
            else:
                assert package["name"].startswith("fastft"), package


def test_python_packages_are_locked_with_hashes() -> None:
    text = (REPOSITORY / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    wanted = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    assert len(wanted) > 50
    for line in wanted:
        assert re.match(r"[A-Za-z0-9._-]+==\S+ ", line), line
        assert "--hash=sha256:" in line, line


def test_the_build_takes_nothing_that_is_not_locked() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for line in makefile.splitlines():
        command = line.strip().lstrip("@")
        if re.match(r"cargo (clippy|nextest|test|build|bench)\b", command) and "--version" not in command:
            assert "--locked" in command, command
        if "pip install" in command and "-r requirements.lock" in command:
            assert "--require-hashes" in command, command
    assert tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["maturin"]["locked"] is True


def test_no_build_step_of_ours_runs_code() -> None:
    scripts = [path for path in SOURCES if path.name == "build.rs"]
    assert scripts == []
    for manifest in (REPOSITORY / "rust").glob("*/Cargo.toml"):
        read = tomllib.loads(manifest.read_text())
        assert "build" not in read["package"]
        assert "build-dependencies" not in read


def test_licences_are_permissive_or_named() -> None:
    found = licences.python_licences()
    assert len(found) > 50
    assert [text for name, said in found.items() if (text := licences.complaint(name, said))] == []
    assert set(licences.EXCEPTIONS) <= {*licences.locked()}


@pytest.mark.parametrize(
    ("said", "is_taken"),
    [
        ("MIT", True), ("Apache-2.0 OR GPL-2.0", True), ("GPL-3.0-only", False), ("", False), ("MPL-2.0", False),
        ("BSD License", True), ("AGPL-3.0", False),
    ],
)  # fmt: skip
def test_a_copyleft_licence_would_be_noticed(said: str, *, is_taken: bool) -> None:
    assert (licences.complaint("new", said) is None) is is_taken


def test_what_cargo_deny_allows_is_what_the_crates_have() -> None:
    rules = tomllib.loads((REPOSITORY / "deny.toml").read_text())
    allowed = set(rules["licenses"]["allow"])
    assert rules["sources"] == {"unknown-registry": "deny", "unknown-git": "deny", "allow-git": []}
    for name, said in licences.rust_licences().items():
        choices = re.split(r"\s+OR\s+|\s*/\s*", re.sub(r"[()]", "", said))
        fits = [all(part in allowed for part in re.split(r"\s+AND\s+", choice)) for choice in choices]
        assert any(fits), f"{name}: {said}"
