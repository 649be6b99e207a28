"""Who calls, and what each tenant may do."""

from dataclasses import dataclass
from typing import Self

from pydantic import Field, model_validator

from baton.core.config import Config
from baton.core.errors import InvalidConfig
from baton.core.request import PRIORITY_LEVELS

TENANT_NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
"""What a tenant may be called; the anonymous tenant alone has the empty name."""


class Tenant(Config):
    """Users who share limits, cached KV and traces, and share none of them with other tenants.

    The anonymous tenant, who has no name and no limits, is everybody where there are no API keys.
    """

    name: str = Field(default="", pattern=rf"{TENANT_NAME}|^$")
    """Salts the hashes of cached prefixes: no other tenant ever hits them."""
    weight: float = Field(default=1.0, gt=0, le=1000)
    """Its share of a busy system, relative to the weights of the others."""
    max_concurrent: int | None = Field(default=None, ge=1, le=1 << 16)
    """Requests at instances at once, per gateway; more wait. None: as many as the gateway takes."""
    tokens_per_minute: int | None = Field(default=None, ge=1, le=1 << 40)
    """Prompt and output tokens, per gateway; a bucket holds those of a minute. None: any number."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Of one request; None: as the model allows."""
    max_output_tokens: int | None = Field(default=None, ge=1)
    """Of one choice; None: as the model allows."""
    priority_min: int = Field(default=-PRIORITY_LEVELS, ge=-PRIORITY_LEVELS, le=PRIORITY_LEVELS)
    """The most urgent priority that it may ask for: lower is served earlier."""
    priority_max: int = Field(default=PRIORITY_LEVELS, ge=-PRIORITY_LEVELS, le=PRIORITY_LEVELS)
    """The least urgent one."""
    ttft_slo_s: float | None = Field(default=None, gt=0)
    """Within how many seconds its first tokens are due; None: no promise."""
    tpot_slo_s: float | None = Field(default=None, gt=0)
    """Within how many seconds each later token is due, on average; None: no promise. A request is
    not let in where it would take longer; who is let in later may make it slower."""
    models: tuple[str, ...] | None = None
    """The models that it may use, by name; None: all. Others do not exist for it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.priority_min > self.priority_max:
            allowed = f"at most priority_max, which is {self.priority_max}"
            raise InvalidConfig("priority_min", self.priority_min, allowed)
        return self

    @property
    def default_priority(self) -> int:
        """The priority of a request that asks for none: 0, or what is nearest to it."""
        return min(max(0, self.priority_min), self.priority_max)

    def may_use(self, model: str) -> bool:
        """Return whether a model exists for it."""
        return self.models is None or model in self.models


@dataclass(frozen=True, slots=True)
class Caller:
    """Who made one call; established at the edge, once, and passed down from there."""

    tenant: Tenant
    key_id: str = ""
    """The public part of the key; empty without keys."""
    admin: bool = False
    """May see what is everybody's: metrics, and the requests of all tenants."""

    def sees(self, tenant: str) -> bool:
        """Return whether the requests of a tenant exist for this caller."""
        return self.admin or tenant == self.tenant.name


ANONYMOUS = Tenant()
"""The tenant of all who bring no key where none is asked for."""
ANYBODY = Caller(ANONYMOUS, admin=True)
"""The caller where no keys are asked for: there is nobody to keep anything from."""
