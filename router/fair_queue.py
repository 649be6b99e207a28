"""Who is next of those that wait: fair between tenants, by tokens and weight; urgent ones earlier.

Between tenants this is start-time fair queueing (Goyal, Vin and Cheng, 1996) with tokens for bytes,
and what was guessed put right afterwards (Sheng et al., "Fairness in Serving Large Language
Models", 2024):

    virtual time of a tenant += tokens / weight        with each request that is taken
    next = first request of the tenant whose virtual time is least

Who had nothing waiting begins at the queue's own virtual time: it neither saves up nor owes. Of two
tenants that both wait, what they were given differs, over any time and each by its weight, by no
more than one request of each.

Within a tenant a step of priority is worth PRIORITY_STEP_S seconds of waiting, so that what is not
urgent is overtaken for so long and no longer.

Of a queue that is too long the tenant with the most tokens waiting for its weight loses its last
request, so that one who floods it crowds out nobody but itself.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NewType

Turn = NewType("Turn", int)
"""One request's number in the queue; a later one has a higher number."""

PRIORITY_STEP_S = 1.0
"""By how many seconds of waiting a request may overtake those of the next lower urgency."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that waits."""

    turn: Turn
    tenant: str
    weight: float
    """Its tenant's share, relative to those of others."""
    tokens: int
    """Of its prompt, and of its output as far as can be guessed; at least one."""
    arrived: float
    """Seconds, by the caller's clock."""
    priority: int = 0
    """Lower is served earlier."""

    @property
    def place(self) -> tuple[float, Turn]:
        """What orders the requests of one tenant."""
        return self.arrived + self.priority * PRIORITY_STEP_S, self.turn


@dataclass(slots=True)
class _Flow:
    """One tenant's requests, in order."""

    virtual: float
    """Tokens by weight that it was given, or was held to have been when it began to wait."""
    weight: float
    waiting: list[Waiting] = field(default_factory=list)
    tokens: int = 0
    """Of these."""

    def index_of(self, request: Waiting) -> int:
        return bisect_left(self.waiting, request.place, key=_place)

    def remove(self, index: int) -> Waiting:
        request = self.waiting.pop(index)
        self.tokens -= request.tokens
        return request


def _place(request: Waiting) -> tuple[float, Turn]:
    return request.place


def _anybody(tenant: str) -> bool:
    return True


class FairQueue:
    """Holds at most `most` requests; no clock, no task."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._flows: dict[str, _Flow] = {}
        self._waiting: dict[Turn, Waiting] = {}
        self._virtual = 0.0
        """Of whoever was served last."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, turn: Turn) -> bool:
        return turn in self._waiting

    def __repr__(self) -> str:
        return f"FairQueue({len(self)} of {self._most}, {len(self._flows)} tenants)"

    def push(self, request: Waiting) -> None:
        """Put a request into the queue, which is not full; see `evict`."""
        assert len(self._waiting) < self._most, self
        assert request.turn not in self._waiting
        assert request.tokens > 0, request
        flow = self._flows.get(request.tenant)
        if flow is None:
            flow = self._flows[request.tenant] = _Flow(self._virtual, request.weight)
        elif not flow.waiting:
            flow.virtual = max(flow.virtual, self._virtual)
        flow.weight = request.weight  # it may have changed
        insort(flow.waiting, request, key=_place)
        flow.tokens += request.tokens
        self._waiting[request.turn] = request

    def evict(self) -> Waiting:
        """Take out the last request of the tenant with the most tokens waiting for its weight."""
        greediest = max(self._flows.values(), key=lambda flow: flow.tokens / flow.weight)
        last = greediest.waiting[-1]
        return self.remove(last.turn)

    def next(self, may_start: Callable[[str], bool] = _anybody) -> Waiting | None:
        """Return who is next, of the tenants that may start one; None if there is nobody."""
        heads = (
            (flow.virtual, flow.waiting[0].turn, flow.waiting[0])
            for tenant, flow in self._flows.items()
            if flow.waiting and may_start(tenant)
        )
        best = min(heads, default=None)
        return None if best is None else best[2]

    def first_arrival(self, may_start: Callable[[str], bool] = _anybody) -> float | None:
        """Return when the one came that has waited longest, of the tenants that may start one."""
        came = (
            request.arrived
            for tenant, flow in self._flows.items()
            if flow.waiting and may_start(tenant)
            for request in flow.waiting
        )
        return min(came, default=None)

    def take(self, turn: Turn, may_start: Callable[[str], bool] = _anybody) -> Waiting:
        """Take out the request that is next, and count it as given to its tenant.

        Tenants that may not start one now save nothing up meanwhile.
        """
        request = self._waiting.pop(turn)
        flow = self._flows[request.tenant]
        flow.remove(flow.index_of(request))
        self._virtual = max(self._virtual, flow.virtual)
        for tenant, other in self._flows.items():
            if other.waiting and other is not flow and not may_start(tenant):
                other.virtual = max(other.virtual, self._virtual)
        flow.virtual += request.tokens / flow.weight
        self._forget()
        return request

    def remove(self, turn: Turn) -> Waiting:
        """Take out a request that is not served: it counts for nothing."""
        request = self._waiting.pop(turn)
        flow = self._flows[request.tenant]
        flow.remove(flow.index_of(request))
        self._forget()
        return request

    def correct(self, tenant: str, tokens: int) -> None:
        """Count `tokens` more, or less if negative: a request was not as long as was guessed.

        A tenant that the queue has forgotten owes nothing: nobody had to wait for it.
        """
        flow = self._flows.get(tenant)
        if flow is not None:
            flow.virtual += tokens / flow.weight

    def tokens_ahead(self, request: Waiting, may_start: Callable[[str], bool] = _anybody) -> float:
        """Return how many tokens would be taken before a request that is not in the queue yet."""
        flow = self._flows.get(request.tenant)
        own, start = 0, self._virtual
        if flow is not None:
            own = sum(w.tokens for w in flow.waiting[: flow.index_of(request)])
            start = flow.virtual if flow.waiting else max(flow.virtual, self._virtual)
        until = start + own / request.weight
        ahead = float(own)
        for tenant, other in self._flows.items():
            if tenant == request.tenant or not other.waiting or not may_start(tenant):
                continue
            if other.virtual <= until:
                lead = (until - other.virtual) * other.weight
                ahead += min(other.tokens, lead + other.waiting[0].tokens)
        return ahead

    def _forget(self) -> None:
        """Forget tenants that a new one would not differ from; all, once nobody waits."""
        if not self._waiting:
            self._virtual = max((f.virtual for f in self._flows.values()), default=self._virtual)
            self._flows.clear()
            return
        gone = [t for t, f in self._flows.items() if not f.waiting and f.virtual <= self._virtual]
        for tenant in gone:
            del self._flows[tenant]

    def waiting_of(self, tenant: str) -> int:
        """Return how many requests of a tenant wait."""
        flow = self._flows.get(tenant)
        return 0 if flow is None else len(flow.waiting)

    def check(self) -> None:
        """Assert that each request is in its tenant's list, in order, and that sums are right."""
        seen: set[Turn] = set()
        for tenant, flow in self._flows.items():
            assert flow.waiting == sorted(flow.waiting, key=_place), tenant
            assert flow.tokens == sum(w.tokens for w in flow.waiting), tenant
            assert all(w.tenant == tenant for w in flow.waiting), tenant
            seen |= {w.turn for w in flow.waiting}
        assert seen == set(self._waiting), seen ^ set(self._waiting)
        assert len(seen) <= self._most
