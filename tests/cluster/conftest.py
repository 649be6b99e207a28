"""A cluster of stand-in workers, and what is needed to see that nothing is left of one."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.cluster.local_cluster import LocalCluster
from baton.core.config import ClusterConfig
from baton.core.topology import Role

MakeCluster = Callable[..., LocalCluster]


@pytest.fixture
def progress() -> list[str]:
    """The progress lines of `make_cluster`'s cluster."""
    return []


@pytest.fixture
def make_cluster(monkeypatch: pytest.MonkeyPatch, progress: list[str]) -> MakeCluster:
    """Return a function that makes a cluster hosting a class of stand_in_worker.py."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def make(worker: str = "StandIn", **config: object) -> LocalCluster:
        return LocalCluster(
            ClusterConfig.checked(model_dir=Path("none"), model_name="none", **config),
            progress.append,
            factories=dict.fromkeys(Role, f"stand_in_worker:{worker}"),
        )

    return make


@pytest.fixture
def short_temp_dir() -> Iterator[Path]:
    """A folder whose name is short enough for Ray's sockets, and which must be empty in the end."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="b-") as folder:
        yield Path(folder)
