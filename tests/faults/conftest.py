"""A server of runs, and what these read."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fault_cases
import forks
from fault_cases import Sources


@pytest.fixture(scope="session")
def server() -> Iterator[forks.Forks]:
    """Runs commands that need no torch."""
    with forks.Forks(fault_cases.MODULES) as started:
        yield started


@pytest.fixture(scope="session")
def watched(server: forks.Forks) -> forks.Forks:
    """The same, for tests that count write calls."""
    if (reason := forks.can_watch()) is not None:
        pytest.skip(reason)
    return server


@pytest.fixture(scope="session")
def medium(server: forks.Forks, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return fault_cases.with_four_bit(
        server, fault_cases.write_sources(tmp_path_factory.mktemp("medium"), fault_cases.MEDIUM)
    )


@pytest.fixture(scope="session")
def tiny(server: forks.Forks, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return fault_cases.with_four_bit(
        server, fault_cases.write_sources(tmp_path_factory.mktemp("tiny"), fault_cases.TINY)
    )
