"""Processes that the tests' functions run in as ranks."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The ranks' processes import the tests by their full names.
sys.path.append(str(Path(__file__).parents[2]))

from tests.parallel.ranks import RankProcesses


@pytest.fixture(scope="session")
def processes() -> Iterator[RankProcesses]:
    """Runs functions on ranks; its processes are started once and used by all tests."""
    with RankProcesses() as processes:
        yield processes
