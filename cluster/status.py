"""What the controller tells: who is there, and how they are. Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.core.config import ClusterTlsConfig, GatewayConfig
from baton.core.served_model import FrontModel
from baton.core.topology import Role


@dataclass(frozen=True, slots=True)
class GatewayPlan:
    """What one gateway is started with."""

    name: str
    models: Mapping[FrontModel, Path]
    """What it serves, each with its checkpoint folder."""
    config: GatewayConfig
    tls: ClusterTlsConfig | None = None
    """For the way to instances."""
    node_resource: str = ""
    """What it takes 1 of, of its node; empty: nothing."""


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """How the requests of one model go at a gateway."""

    open_requests: int
    waiting: int = 0
    """Requests that need a decode instance, of which there is none."""
    queue_s: float = 0.0
    """How long the first has waited in its queue, because instances have no room."""
    queue_for: Role | None = None
    """Whose pool has none; decode stands for mixed instances too."""
    ttft_s: float | None = None
    """90th percentile, over the requests of the last minute."""
    tpot_s: float | None = None
    """Likewise."""


@dataclass(frozen=True, slots=True)
class GatewayInfo:
    """What a gateway says of itself."""

    name: str
    http_url: str
    grpc_address: str
    pid: int
    epoch: int
    """The version of the membership that it uses."""
    models: Mapping[str, ModelLoad]
    """What it serves."""

    @property
    def open_requests(self) -> int:
        """Of all models."""
        return sum(load.open_requests for load in self.models.values())


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """One instance."""

    name: str
    phase: str
    generation: int
    """How often it was started before."""
    ranks: int
    incarnation: int | None = None
    """None unless it is ready."""
    pid: int | None = None
    address: str = ""
    kv_tokens: int = 0
    kv_used: float | None = None
    """Share of its KV blocks that requests hold; None if it did not tell."""
    running: int | None = None
    waiting: int | None = None


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """One pool."""

    name: str
    role: str
    model: str
    wanted: int
    instances: tuple[InstanceStatus, ...]


@dataclass(frozen=True, slots=True)
class GatewayStatus:
    """One gateway."""

    name: str
    info: GatewayInfo | None
    problem: str = ""
    """Why there is no info."""


@dataclass(frozen=True, slots=True)
class Status:
    """Everything."""

    controller_pid: int
    epoch: int
    settled: bool
    """Everything is as it is wanted."""
    drain_timeout_s: float
    """How long requests of an instance that is to leave may take."""
    pools: tuple[PoolStatus, ...]
    gateways: tuple[GatewayStatus, ...]
