"""Where a request goes, what helps to choose that, and how it would fare there."""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.topology import InstanceInfo
from baton.router.admission_room import Outlook
from baton.router.policy import Ask, Choice


@dataclass(frozen=True, slots=True)
class Hint:
    """What helps to choose a pair for a request."""

    request_id: str = ""
    """Under which the decision can be asked for; "": it cannot."""
    prompt: Sequence[int] = ()
    """Its tokens; none: no cache is thought to have any."""
    tenant: str = ""
    session: str = ""
    """Requests of the same session would rather go to the same instances; "": of none."""
    tpot_slo_s: float | None = None
    """Within how many seconds each later token is due; None: no promise."""


NO_HINT = Hint()


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes."""

    decode: InstanceInfo
    """Owns the request to its last token."""
    prefill: tuple[InstanceInfo, ...]
    """In order of preference; empty: the decode instance computes the prompt itself."""
    backup: InstanceInfo | None = None
    """Another decode instance, to copy the request's KV to; None if none could take it over."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a request would go now. Open it at once, or forget it."""

    route: Route
    computing: float
    """Tokens that the first prefill instance is thought to lack."""
    choice: Choice
    ask: Ask
    membership: int
    """The version that it goes by."""
    outlook: Outlook | None = None
    """How it would fare; None while that would be a guess."""
