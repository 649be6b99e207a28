"""How many instances a pool should have, from how its work goes. Pure: no Ray, no clock.

autoscaler.py asks, and does what is said; signals.py gathers what is seen.

Each signal is a *pressure*: what is seen over what is wanted, so that 1.0 is exactly enough and
the largest decides. A pool of n instances under pressure p needs about n × p of them.

    1.0 ┤············╭─────╮············ grow when over `grow_over` for `grow_after_s`
        │      ╭─────╯     ╰──╮
    0.7 ┤──────╯·············│╰──────── shrink when one fewer would stay under `shrink_under`
        └──────────────────────────────  for `shrink_after_s`, one at a time
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from baton.core.autoscale import AutoscaleConfig


@dataclass(frozen=True, slots=True)
class Signals:
    """How a pool's work goes now; None where nothing was seen."""

    open_requests: int = 0
    """Requests, or handovers, that its instances have; with none instances: that wait for one."""
    queue_s: float | None = None
    """How long the one that has waited longest has, at an instance or at a gateway."""
    ttft_s: float | None = None
    """90th percentile."""
    tpot_s: float | None = None
    """90th percentile."""
    kv_use: float = 0.0
    """Share of blocks that are held."""
    coming: int = 0
    """Instances that are wanted and not ready: until they are, their effect is not seen."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Since when things have been as they are; None: they are not."""

    over: float | None = None
    under: float | None = None
    idle: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many instances there should be, and why; what to remember until the next time."""

    target: int
    reason: str
    memory: Memory


def pressures(config: AutoscaleConfig, signals: Signals) -> Mapping[str, float]:
    """Return each signal over what is wanted of it, by name."""
    found = {"kv_use": signals.kv_use / config.kv_use}
    if signals.queue_s is not None:
        found["queue_s"] = signals.queue_s / config.queue_s
    if signals.ttft_s is not None and config.ttft_s is not None:
        found["ttft_s"] = signals.ttft_s / config.ttft_s
    if signals.tpot_s is not None and config.tpot_s is not None:
        found["tpot_s"] = signals.tpot_s / config.tpot_s
    return found


def decide(
    config: AutoscaleConfig, instances: int, signals: Signals, memory: Memory, now: float
) -> Verdict:
    """Return the size that a pool of `instances`, those that are starting included, should have.

    Growing is by as many as the pressure says, at most doubling; shrinking is by one. Either resets
    what is remembered, so that the next change waits to see what this one did; and none grows
    while instances are still to come.
    """
    if bounded := _bounded(config, instances):
        return bounded
    if instances == 0:
        if signals.open_requests:
            return Verdict(1, f"requests wait for an instance: {signals.open_requests}", Memory())
        return Verdict(0, "nothing to do", memory)
    name, pressure = max(pressures(config, signals).items(), key=lambda item: item[1])
    lower = pressure * instances / (instances - 1) if instances > 1 else math.inf
    memory = Memory(
        over=_since(memory.over, pressure > config.grow_over and not signals.coming, now),
        under=_since(memory.under, lower < config.shrink_under, now),
        idle=_since(memory.idle, signals.open_requests == 0, now),
    )
    seen = f"{name} is {pressure:.2f} of what is wanted"
    if _lasted(memory.over, config.grow_after_s, now) and instances < config.max:
        target = min(config.max, 2 * instances, math.ceil(instances * pressure))
        return Verdict(target, f"{seen} for {config.grow_after_s:g} s", Memory())
    if _lasted(memory.under, config.shrink_after_s, now) and instances > max(config.min, 1):
        reason = f"{seen}: one fewer would do, for {config.shrink_after_s:g} s"
        return Verdict(instances - 1, reason, replace(memory, over=None, under=None))
    if instances == 1 and config.min == 0 and _lasted(memory.idle, config.idle_after_s, now):
        return Verdict(0, f"nothing to do for {config.idle_after_s:g} s", Memory())
    return Verdict(instances, seen, memory)


@dataclass(frozen=True, slots=True)
class Giver:
    """A pool that may give the place of one instance to a pool of the other role."""

    pool: str
    config: AutoscaleConfig
    instances: int
    memory: Memory
    """As the last verdict on it left it."""


def giver_for(config: AutoscaleConfig, givers: Sequence[Giver], now: float) -> Giver | None:
    """Return who is to give a place to a pool of `config` that must grow, and has no room.

    One that would do with one fewer, and has for as long as the other has needed one more: both
    have lasted. It does not swing back while the load stays as it is, because whoever has just got
    an instance needed it, and would be under pressure again with one fewer. Of several the one that
    has had it easy for longest.
    """
    able = [
        (giver.memory.under, giver)
        for giver in givers
        if giver.instances > max(giver.config.min, 1)
        and giver.memory.under is not None
        and _lasted(giver.memory.under, config.grow_after_s, now)
    ]
    return min(able, key=lambda found: found[0], default=(None, None))[1]


def _bounded(config: AutoscaleConfig, instances: int) -> Verdict | None:
    if instances < config.min:
        return Verdict(config.min, f"the least is {config.min}", Memory())
    if instances > config.max:
        return Verdict(config.max, f"the most is {config.max}", Memory())
    return None


def _since(since: float | None, holds: bool, now: float) -> float | None:
    if not holds:
        return None
    return now if since is None else since


def _lasted(since: float | None, seconds: float, now: float) -> bool:
    return since is not None and now - since >= seconds
