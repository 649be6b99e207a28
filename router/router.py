"""Choose the pair of instances for a request, or refuse it: bounded, and least loaded first."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from baton.core.clock import Clock, monotonic
from baton.core.errors import Overloaded, Unavailable
from baton.core.topology import InstanceInfo, Membership, Role
from baton.core.trace import HandoverTrace
from baton.router.failures import RecentFailures
from baton.router.load import CompletionRate, InstanceKey, Load, LoadTable, key_of


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
class RouterStats:
    """A snapshot. Loads are by (instance, incarnation); an instance without work has no row."""

    open_requests: int
    admitted: int
    overloaded: int
    unavailable: int
    decode: dict[InstanceKey, Load]
    prefill: dict[InstanceKey, Load]


class Lease:
    """One admitted request's place in the system: a context manager that gives it back once."""

    def __init__(
        self, router: "Router", route: Route, *, prompt_tokens: int, max_tokens: int
    ) -> None:
        self.route = route
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.output_tokens = 0
        self.computing = 0
        """Tokens that the first prefill instance of the route has yet to compute."""
        self.closed = False
        self._router = router

    @property
    def held_tokens(self) -> int:
        """Tokens of KV on the decode instance: prompt and output so far."""
        return self.prompt_tokens + self.output_tokens

    def generated(self, tokens: int) -> None:
        """Note new output tokens; the first ones show that the prompt has been computed."""
        self._router._generated(self, tokens)

    def handed_over(self, handovers: Sequence[HandoverTrace]) -> None:
        """Note how the attempts of this request's handover ended, in order."""
        self._router._handed_over(self, handovers)

    def move(
        self,
        membership: Membership,
        *,
        avoided: Collection[InstanceKey] = (),
        preferred: InstanceKey | None = None,
    ) -> None:
        """Choose another pair, for what is left of a request whose decode instance is gone.

        `preferred` is the decode instance that has its KV: it is chosen if it is there. Those in
        `avoided` are chosen last. Raises Unavailable, and nothing has changed, if no decode
        instance can take it.
        """
        self._router._move(self, membership, avoided, preferred)

    def close(self) -> None:
        """Give the place back; any further call does nothing."""
        self._router._close(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


class Router:
    """Decides from a membership and its own count of open work; knows no network and no task."""

    def __init__(self, *, max_open_requests: int, clock: Clock = monotonic) -> None:
        self._max_open_requests = max_open_requests
        self._leases: set[Lease] = set()
        self._decode = LoadTable()
        self._prefill = LoadTable()
        self._failures = RecentFailures(clock)
        self._rate = CompletionRate(clock)
        self._admitted = 0
        self._overloaded = 0
        self._unavailable = 0

    def admit(self, membership: Membership, *, prompt_tokens: int, max_tokens: int) -> Lease:
        """Let a request in and choose its instances.

        Raises Overloaded if as many requests as allowed are open, and Unavailable if no decode
        instance can hold `prompt_tokens` + `max_tokens` tokens.
        """
        if len(self._leases) >= self._max_open_requests:
            self._overloaded += 1
            message = f"{len(self._leases)} requests are open, which is the most that is allowed"
            raise Overloaded(message, self._rate.seconds_to_next())
        try:
            route = self._route(membership, prompt_tokens, prompt_tokens + max_tokens)
        except Unavailable:
            self._unavailable += 1
            raise
        lease = Lease(self, route, prompt_tokens=prompt_tokens, max_tokens=max_tokens)
        self._leases.add(lease)
        self._admitted += 1
        self._count(lease)
        return lease

    def _move(
        self,
        lease: Lease,
        membership: Membership,
        avoided: Collection[InstanceKey],
        preferred: InstanceKey | None,
    ) -> None:
        assert not lease.closed
        most = lease.prompt_tokens + lease.max_tokens
        route = self._route(membership, lease.held_tokens, most, avoided, preferred)
        self._uncount(lease)
        lease.route = route
        self._count(lease)

    def _route(
        self,
        membership: Membership,
        tokens: int,
        most: int,
        avoided: Collection[InstanceKey] = (),
        preferred: InstanceKey | None = None,
    ) -> Route:
        """Choose a pair to compute `tokens` tokens, which may become as many as `most`."""
        ranked = self._ranked_decode(membership, most, avoided, preferred)
        if not ranked:
            raise Unavailable("no decode instance is ready to take the request")
        decode = ranked[0]
        return Route(
            decode, self._ranked_prefill(membership, decode, tokens), _backup_of(decode, ranked)
        )

    def _count(self, lease: Lease) -> None:
        """Add a request that is yet to be computed to the loads of its route."""
        tokens = lease.held_tokens
        self._decode.add(key_of(lease.route.decode), requests=1, tokens=tokens)
        if lease.route.prefill:
            lease.computing = tokens
            self._prefill.add(key_of(lease.route.prefill[0]), requests=1, tokens=tokens)

    def _uncount(self, lease: Lease) -> None:
        self._end_prefill(lease)
        self._decode.add(key_of(lease.route.decode), requests=-1, tokens=-lease.held_tokens)

    def _ranked_decode(
        self,
        membership: Membership,
        tokens: int,
        avoided: Collection[InstanceKey],
        preferred: InstanceKey | None,
    ) -> list[InstanceInfo]:
        """Return those that can take the request, by how much our open ones fill their pools.

        But `preferred` comes first, and `avoided` ones last. KV held, unlike max_tokens, is
        what a decode step costs; it grows with every token.
        """

        def order(instance: InstanceInfo) -> tuple[bool, bool, float, int, str]:
            load, key = self._decode.of(instance), key_of(instance)
            share = load.tokens / instance.kv_tokens
            return key in avoided, key != preferred, share, load.requests, instance.instance_id

        candidates = membership.of(Role.DECODE, Role.MIXED)
        return sorted((i for i in candidates if tokens <= i.max_model_len), key=order)

    def _ranked_prefill(
        self, membership: Membership, decode: InstanceInfo, tokens: int
    ) -> tuple[InstanceInfo, ...]:
        """Return the prefill instances that can hand over to `decode`, least loaded first.

        Those whose last attempt has just failed come after all others.
        """
        if decode.role is Role.MIXED:
            return ()
        candidates = [
            i
            for i in membership.of(Role.PREFILL)
            if i.compatibility == decode.compatibility and tokens <= i.max_model_len
        ]

        def failing_then_load(instance: InstanceInfo) -> tuple[bool, int, int, str]:
            load = self._prefill.of(instance)
            failing = self._failures.failing(key_of(instance))
            return failing, load.tokens, load.requests, instance.instance_id

        return tuple(sorted(candidates, key=failing_then_load))

    def _handed_over(self, lease: Lease, handovers: Sequence[HandoverTrace]) -> None:
        keys = {str(i.instance_id): key_of(i) for i in lease.route.prefill}
        for handover in handovers:
            if handover.prefill_instance in keys:
                self._failures.ended(keys[handover.prefill_instance], handover.outcome)

    def _generated(self, lease: Lease, tokens: int) -> None:
        assert not lease.closed
        lease.output_tokens += tokens
        self._decode.add(key_of(lease.route.decode), tokens=tokens)
        self._end_prefill(lease)

    def _end_prefill(self, lease: Lease) -> None:
        if lease.computing:
            key = key_of(lease.route.prefill[0])
            self._prefill.add(key, requests=-1, tokens=-lease.computing)
            lease.computing = 0

    def _close(self, lease: Lease) -> None:
        if lease.closed:
            return
        lease.closed = True
        self._leases.remove(lease)
        self._uncount(lease)
        self._rate.completed()

    def check(self) -> None:
        """Assert that the loads are exactly those of the open leases."""
        decode, prefill = LoadTable(), LoadTable()
        for lease in self._leases:
            assert not lease.closed
            decode.add(key_of(lease.route.decode), requests=1, tokens=lease.held_tokens)
            if lease.computing:
                prefill.add(key_of(lease.route.prefill[0]), requests=1, tokens=lease.computing)
        assert decode.rows() == self._decode.rows(), (decode.rows(), self._decode.rows())
        assert prefill.rows() == self._prefill.rows(), (prefill.rows(), self._prefill.rows())
        assert len(self._leases) <= self._max_open_requests

    def stats(self) -> RouterStats:
        """Return a snapshot."""
        return RouterStats(
            open_requests=len(self._leases),
            admitted=self._admitted,
            overloaded=self._overloaded,
            unavailable=self._unavailable,
            decode=self._decode.rows(),
            prefill=self._prefill.rows(),
        )

    def __repr__(self) -> str:
        return f"Router(open={len(self._leases)}, max={self._max_open_requests})"


def _backup_of(decode: InstanceInfo, ranked: Sequence[InstanceInfo]) -> InstanceInfo | None:
    """Return the first of the others that can read the KV of `decode`; mixed ones never can."""
    for other in ranked:
        same = other.compatibility == decode.compatibility
        if other is not decode and same and decode.role == other.role == Role.DECODE:
            return other
    return None
