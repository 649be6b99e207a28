"""What a cluster is to be: models, their pools of instances, and gateways.

ClusterSpec ── models ───▶ ModelSpec ── pools ──▶ PoolSpec      one role, many instances
            │                        └─ gateways ▶ GatewaySpec   of this model alone
            └─ gateways ─▶ GatewaySpec                           of all models
"""

import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from baton.core.autoscale import AutoscaleConfig
from baton.core.config import (
    ClusterTlsConfig,
    Config,
    EngineConfig,
    GatewayConfig,
    HandoverConfig,
    ParallelConfig,
    ToolParser,
)
from baton.core.errors import InvalidConfig
from baton.core.served_model import FrontModel, ModelLimits, Name
from baton.core.topology import Role

POOL_NAME = r"^[a-z0-9][a-z0-9-]{0,54}$"
"""What a pool may be called: its instances are <pool>-<number>."""
MOST_INSTANCES = 1024
"""Of one pool."""
_DECODES = (Role.DECODE, Role.MIXED)
_RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")
"""Resources that are not of one's own naming."""


class RankResources(Config):
    """What one rank takes of its node, in Ray's units."""

    cpus: float = Field(default=1.0, gt=0, le=1024)
    """CPUs that are reserved."""
    gpus: float = Field(default=0.0, ge=0, le=1)
    """1: a GPU of its own. Less only if the cluster says share_gpus."""
    custom: dict[str, float] = Field(default_factory=dict)
    """Resources that nodes were started with, such as {"gpu-h200": 1}: to have prefill where there
    is most compute, and decode where memory is fastest."""


class PoolSpec(Config):
    """All instances of one role for one model."""

    role: Role
    """prefill, decode or mixed; a pool that is called so need not say it."""
    instances: int = Field(default=1, ge=0, le=MOST_INSTANCES)
    """How many; with `autoscale`, how many at first: if not said, 1 or what is nearest to it."""
    autoscale: AutoscaleConfig | None = None
    """By what the size follows the load; None: it is as was said last, here or by a command. Its
    bounds hold for commands too."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads per rank for the model."""
    parallel: ParallelConfig = ParallelConfig()
    """Over how many ranks each instance is spread."""
    engine: EngineConfig = EngineConfig()
    """Limits of each engine; what is not said here is as the model says."""
    resources: RankResources = RankResources()
    """What each rank takes of its node."""

    @property
    def bounds(self) -> tuple[int, int]:
        """How many instances at least and at most."""
        if self.autoscale is None:
            return 0, MOST_INSTANCES
        return self.autoscale.min, self.autoscale.max

    @property
    def never_empty(self) -> bool:
        """It always has instances, or is to have them."""
        return self.instances > 0 and (self.autoscale is None or self.autoscale.min > 0)


class GatewaySpec(GatewayConfig):
    """Front doors, all alike."""

    count: int = Field(default=1, ge=0, le=64)
    """How many. The ports of the next are 2 above those of the one before, unless they are 0."""
    node_resource: str = Field(default="", max_length=63)
    """A resource of which each takes 1, on nodes that were started with 1 of it: each gateway then
    has such a node to itself, and all have the same ports. Empty: they go to any nodes."""

    def of(self, number: int) -> GatewayConfig:
        """Return the config of one gateway, by its number from 0."""
        values = self.model_dump(exclude={"count", "node_resource"})
        for port in ("http_port", "grpc_port"):
            if values[port] and not self.node_resource:
                values[port] += 2 * number
        return GatewayConfig.checked(**values)


class ModelSpec(Config):
    """One model, and who serves it."""

    name: Name
    """The name by which users ask for it."""
    aliases: tuple[Name, ...] = ()
    """Other names by which they may."""
    dir: Path
    """A Hugging Face checkpoint folder, on every node."""
    engine: EngineConfig = EngineConfig()
    """Limits of each engine, for all pools."""
    limits: ModelLimits = ModelLimits()
    """What its requests may take, at each gateway."""
    tool_parser: ToolParser | None = None
    """How it writes tool calls; None: as its gateways' config says."""
    handover: HandoverConfig = HandoverConfig()
    """Deadlines and transport of the handover."""
    pools: dict[str, PoolSpec] = Field(min_length=1)
    """By name, which is the role if it says no other."""
    gateways: GatewaySpec | None = None
    """Front doors that serve it alone, besides those of all models."""

    @model_validator(mode="before")
    @classmethod
    def _fill_pools(cls, values: Any) -> Any:
        """Give each pool its name as role, and the model's engine where it says nothing else."""
        pools = values.get("pools") if isinstance(values, dict) else None
        if not isinstance(pools, dict):
            return values
        engine = values.get("engine")
        filled = {name: _filled(name, pool, engine) for name, pool in pools.items()}
        return {**values, "pools": filled}

    def front(self) -> FrontModel:
        """Return it as gateways serve it."""
        pools = self.pools.values()
        return FrontModel(
            name=self.name,
            aliases=self.aliases,
            limits=self.limits,
            tool_parser=self.tool_parser,
            expects_prefill=any(p.role is Role.PREFILL and p.never_empty for p in pools),
            may_be_empty=not any(p.role in _DECODES and p.never_empty for p in pools),
        )


def _filled(name: Any, pool: Any, engine: Any) -> Any:
    """Return a pool as its model completes it; None, which is what YAML makes of nothing, is {}."""
    if pool is None:
        pool = {}
    if not isinstance(pool, dict):
        return pool
    if name in list(Role):
        pool = {"role": name, **pool}
    own = pool.get("engine", {})
    if isinstance(engine, dict) and isinstance(own, dict):
        pool = {**pool, "engine": {**engine, **own}}
    elif isinstance(engine, EngineConfig) and "engine" not in pool:
        pool = {**pool, "engine": engine}
    if isinstance(bounds := pool.get("autoscale"), dict) and "instances" not in pool:
        least = bounds.get("min", 1)
        pool = {**pool, "instances": max(least, 1) if isinstance(least, int) else 1}
    return pool


class ClusterSpec(Config):
    """All that Baton is to keep running on one Ray cluster."""

    models: tuple[ModelSpec, ...] = Field(min_length=1)
    """What is served."""
    gateways: GatewaySpec | None = None
    """Front doors of all models; None: one, if no model has its own."""
    host: str = Field(default="", examples=["127.0.0.1"])
    """Address that instances listen on; empty: that by which Ray knows their node."""
    share_gpus: bool = False
    """Let ranks have parts of a GPU, and so share it, whatever their roles."""
    cpus: int | None = Field(default=None, ge=1, le=1024)
    """For a Ray that is started here: the CPUs that it gives out; by default the machine's, or what
    the instances take and one more if that is more."""
    start_timeout_s: float = Field(default=180.0, gt=0)
    """For an instance to become ready."""
    drain_timeout_s: float = Field(default=60.0, gt=0)
    """For the requests of an instance that is to leave."""
    tls: ClusterTlsConfig | None = None
    """For gRPC between Baton's processes, gateways included; None: without TLS. To be turned on or
    off while nothing is up: those with it and those without cannot talk."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_names()
        self._check_gateways()
        for i, model in enumerate(self.models):
            for name, pool in model.pools.items():
                self._check_pool(f"models.{i}.pools.{name}", pool)
            decodes = [p for p in model.pools.values() if p.role in _DECODES]
            if not any(p.instances or p.autoscale for p in decodes):
                allowed = "at least one instance that decodes, in a pool of role decode or mixed"
                raise InvalidConfig(f"models.{i}.pools", list(model.pools), allowed)
        return self

    def _check_names(self) -> None:
        """Refuse names of models, or of pools, that are not of one thing alone."""
        pools: set[str] = set()
        names: set[str] = set()
        for i, model in enumerate(self.models):
            own = {f"models.{i}.aliases.{k}": alias for k, alias in enumerate(model.aliases)}
            for where, name in {f"models.{i}.name": model.name, **own}.items():
                if name in names:
                    raise InvalidConfig(where, name, "a name or alias that no other model has")
                names.add(name)
            for name in model.pools:
                where = f"models.{i}.pools.{name}"
                if not re.match(POOL_NAME, name):
                    allowed = "a to z, 0 to 9 and dashes, at most 55"
                    raise InvalidConfig(where, name, allowed)
                if name in pools:
                    raise InvalidConfig(where, name, "a name that no pool of another model has")
                pools.add(name)

    def _check_gateways(self) -> None:
        doors = {f"models.{i}.gateways": model.gateways for i, model in enumerate(self.models)}
        for where, door in {**doors, "gateways": self.gateways}.items():
            if door is not None and door.node_resource in _RAYS_OWN:
                allowed = "a resource that is not Ray's own"
                raise InvalidConfig(f"{where}.node_resource", door.node_resource, allowed)
        for where, door in doors.items():
            if door is None and self.shared_gateways is None:
                allowed = "gateways of its own, as another model has; or `gateways` for all models"
                raise InvalidConfig(where, None, allowed)

    def _check_pool(self, where: str, pool: PoolSpec) -> None:
        least, most = pool.bounds
        if not least <= pool.instances <= most:
            allowed = f"{least} to {most}, as autoscale says"
            raise InvalidConfig(f"{where}.instances", pool.instances, allowed)
        gpus = pool.resources.gpus
        if 0 < gpus < 1 and not self.share_gpus:
            allowed = "0 or 1; parts of a GPU only with share_gpus: true"
            raise InvalidConfig(f"{where}.resources.gpus", gpus, allowed)
        for name, amount in pool.resources.custom.items():
            if amount <= 0 or name in ("CPU", "GPU"):
                allowed = "more than 0 of a resource that is not CPU or GPU"
                raise InvalidConfig(f"{where}.resources.custom.{name}", amount, allowed)

    @property
    def shared_gateways(self) -> GatewaySpec | None:
        """The front doors of all models; None if each model has its own alone."""
        if self.gateways is None and not any(model.gateways for model in self.models):
            return GatewaySpec()
        return self.gateways

    def pools(self) -> dict[str, tuple[ModelSpec, PoolSpec]]:
        """Return every pool, and the model that it serves, by the pool's name."""
        return {name: (m, pool) for m in self.models for name, pool in m.pools.items()}

    def with_secrets(self) -> Self:
        """Return this spec, each model with a secret for its handovers if it has none."""
        models = tuple(
            m.model_copy(update={"handover": m.handover.with_secret()}) for m in self.models
        )
        return self.model_copy(update={"models": models})
