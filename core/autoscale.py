"""What a pool is sized by; cluster/autoscale.py decides."""

from pydantic import Field, model_validator

from baton.core.config import Config
from baton.core.errors import InvalidConfig


class AutoscaleConfig(Config):
    """The bounds and goals of one pool."""

    min: int = Field(default=1, ge=0, le=1024)
    """Instances at least; 0 lets an idle pool go away whole."""
    max: int = Field(default=1, ge=1, le=1024)
    """Instances at most."""
    queue_s: float = Field(default=1.0, gt=0)
    """Wanted: a request waits no longer for its turn."""
    ttft_s: float | None = Field(default=None, gt=0)
    """Wanted: the 90th percentile of time to first token is no longer."""
    tpot_s: float | None = Field(default=None, gt=0)
    """Wanted: the 90th percentile of time per output token is no longer."""
    kv_use: float = Field(default=0.85, gt=0, le=1)
    """Wanted: no larger a share of KV blocks is held."""
    grow_over: float = Field(default=1.0, gt=0)
    """Pressure over which the pool grows."""
    grow_after_s: float = Field(default=10.0, ge=0)
    """For how long it must have been over it."""
    shrink_under: float = Field(default=0.7, gt=0)
    """Pressure that one instance fewer must stay under."""
    shrink_after_s: float = Field(default=120.0, ge=0)
    """For how long it must have done so."""
    idle_after_s: float = Field(default=600.0, ge=0)
    """How long a pool whose `min` is 0 must have had nothing to do before its last one goes."""

    @model_validator(mode="after")
    def _in_order(self) -> "AutoscaleConfig":
        if self.min > self.max:
            raise InvalidConfig("autoscale.min", self.min, f"at most max, which is {self.max}")
        if self.shrink_under >= self.grow_over:
            allowed = f"less than grow_over, which is {self.grow_over:g}"
            raise InvalidConfig("autoscale.shrink_under", self.shrink_under, allowed)
        return self
