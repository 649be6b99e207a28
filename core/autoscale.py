"""What a pool is sized by; cluster/autoscale.py decides."""

import math

from pydantic import Field, ValidationInfo, field_validator

from baton.core.config import Config


class AutoscaleConfig(Config):
    """The bounds and goals of one pool."""

    min: int = Field(default=1, ge=0, le=1024)
    """Instances at least; 0 lets an idle pool go away whole."""
    max: int = Field(default=1, ge=1, le=1024, validate_default=True)
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
    shrink_under: float = Field(default=0.7, gt=0, validate_default=True)
    """Pressure that one instance fewer must stay under."""
    shrink_after_s: float = Field(default=120.0, ge=0)
    """For how long it must have done so."""
    idle_after_s: float = Field(default=600.0, ge=0)
    """How long a pool whose `min` is 0 must have had nothing to do before its last one goes."""

    @field_validator("max")
    @classmethod
    def _not_below_min(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("min", 0):
            raise ValueError(f"at least min, which is {info.data['min']}")
        return value

    @field_validator("shrink_under")
    @classmethod
    def _below_grow_over(cls, value: float, info: ValidationInfo) -> float:
        if value >= info.data.get("grow_over", math.inf):
            raise ValueError(f"less than grow_over, which is {info.data['grow_over']:g}")
        return value
