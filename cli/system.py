"""The composition root: cluster, gateway and front door, put together and taken apart in order."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from baton.api.gateway import Gateway
from baton.api.serve import FrontDoor
from baton.cluster.local_cluster import LocalCluster
from baton.cluster.spec import spec_of
from baton.core.config import ClusterConfig
from baton.core.metrics import GatewayMetrics
from baton.models.tokenizer import Tokenizer, load_tokenizer

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class System:
    """Everything, ready for requests."""

    cluster: LocalCluster
    gateway: Gateway
    door: FrontDoor
    tokenizer: Tokenizer
    """Of the first model."""


@asynccontextmanager
async def running(
    config: ClusterConfig, say: Say, *, on_cluster: Callable[[LocalCluster], None]
) -> AsyncIterator[System]:
    """Start all parts, yield them, and end them in the reverse order, whatever happens.

    `on_cluster` gets the cluster before it starts, so that its closing can be sped up.
    """
    loading = (asyncio.to_thread(load_tokenizer, model.dir) for model in config.models)
    tokenizers = await asyncio.gather(*loading)
    fronts = [model.front() for model in spec_of(config).models]
    cluster = LocalCluster(config, say)
    on_cluster(cluster)
    async with cluster:
        metrics = GatewayMetrics()
        metrics.watch_control(cluster.reading)
        gateway = Gateway(
            config.gateway,
            dict(zip(fronts, tokenizers, strict=True)),
            cluster.board,
            metrics,
            tls=config.tls,
        )
        async with gateway, _front_door(gateway) as door:
            yield System(cluster, gateway, door, tokenizers[0])


@asynccontextmanager
async def _front_door(gateway: Gateway) -> AsyncIterator[FrontDoor]:
    door = await FrontDoor.start(gateway)
    try:
        yield door
    finally:
        await door.close()


def describe_instances(cluster: LocalCluster) -> list[str]:
    """Return a line for each instance: its name, pid, address and what it holds."""
    instances = cluster.board.current.instances
    width = max(11, *(len(i.instance_id) for i in instances))
    several = len({i.model for i in instances}) > 1
    return [
        f"{i.instance_id:<{width}} pid {i.pid:<8} {i.address:<16} KV for {i.kv_tokens:,} tokens"
        + (f" of {i.model}" if several else "")
        for i in instances
    ]


def shown_path(path: Path) -> str:
    """Return a path as short as it can be for the user."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
