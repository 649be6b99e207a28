"""Choose the pair of instances for a request, or refuse it: bounded, and each choice explained."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random
from types import TracebackType
from typing import Any, Self

import numpy as np

from baton.core.clock import Clock, monotonic
from baton.core.errors import Overloaded, Unavailable
from baton.core.topology import InstanceInfo, Membership, Role
from baton.core.trace import HandoverTrace, RequestTrace
from baton.router.admission_room import Room, RoomLimits, keeps_promises, look_for_room, outlook_of
from baton.router.affinity import mark_of
from baton.router.costs import Costs
from baton.router.decisions import Decision, DecisionLog
from baton.router.failures import RecentFailures
from baton.router.fleet import Fleet, Fleets
from baton.router.load import CompletionRate, InstanceKey, Load, LoadTable, key_of
from baton.router.policy import Ask, Policy
from baton.router.promises import Promises
from baton.router.route import NO_HINT, Hint, Plan, Route
from baton.router.state import RouterState

_SMALL_INDEX = 1 << 10
"""Blocks, for a router that nobody tells of any."""


@dataclass(frozen=True, slots=True)
class RouterStats:
    """A snapshot. Loads are by (instance, incarnation); an instance without work has no row."""

    open_requests: int
    admitted: int
    overloaded: int
    unavailable: int
    decode: dict[InstanceKey, Load]
    prefill: dict[InstanceKey, Load]


def _nothing() -> None:
    """Tell nobody."""


class Lease:
    """One admitted request's place in the system: a context manager that gives it back once."""

    def __init__(
        self,
        router: "Router",
        route: Route,
        *,
        prompt_tokens: int,
        max_tokens: int,
        hint: Hint = NO_HINT,
    ) -> None:
        self.route = route
        self.hint = hint
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.output_tokens = 0
        self.computing = 0
        """Tokens that the first prefill instance of the route has yet to compute."""
        self.missing = 0.0
        """Of these, what it is thought not to have cached."""
        self.served = False
        """The instances are done with it."""
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

    def instances_done(self) -> None:
        """Note that no instance does anything for it any more: others may have their room.

        Its place among the open requests it keeps until its consumer has taken all of it.
        """
        self._router._served(self)

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
    """Decides from a membership, its own open work and what is told; no network and no task."""

    def __init__(
        self,
        *,
        max_open_requests: int,
        clock: Clock = monotonic,
        state: RouterState | None = None,
        salt: str = "",
        rng: Random | None = None,
        decisions_kept: int = 1024,
        on_room: Callable[[], None] = _nothing,
    ) -> None:
        """`state` is where somebody tells what instances say of themselves.

        `salt`, another at each gateway, is the order in which ties are broken; "" is by name. `rng`
        draws two of those that say nothing. A gateway that is alone needs neither: its own counts
        are all there is. `on_room` is called when there may be room for another request.
        """
        self._on_room = on_room
        self._max_open_requests = max_open_requests
        self._leases: set[Lease] = set()
        self._decode = LoadTable()
        self._prefill = LoadTable()
        self._state = RouterState(_SMALL_INDEX) if state is None else state
        self._costs = Costs()
        self._policy = Policy(self._state, self._costs, rng)
        self._fleets = Fleets(self._state, salt)
        self._decisions = DecisionLog(decisions_kept)
        self._failures = RecentFailures(clock)
        self._promises = Promises()
        self._lacking: Role | None = None
        self._rate = CompletionRate(clock)
        self._admitted = 0
        self._overloaded = 0
        self._unavailable = 0

    def admit(
        self,
        membership: Membership,
        *,
        prompt_tokens: int,
        max_tokens: int,
        hint: Hint = NO_HINT,
    ) -> Lease:
        """Let a request in and choose its instances.

        Raises Overloaded if as many requests as allowed are open, and Unavailable if no decode
        instance can hold `prompt_tokens` + `max_tokens` tokens.
        """
        if len(self._leases) >= self._max_open_requests:
            self._overloaded += 1
            message = f"{len(self._leases)} requests are open, which is the most that is allowed"
            raise Overloaded(message, self._rate.seconds_to_next())
        fleet = self._fleets.of(membership.instances)
        plan = self._new_plan(fleet, self._ask(prompt_tokens, max_tokens, hint), membership)
        return self.open(plan, prompt_tokens=prompt_tokens, max_tokens=max_tokens, hint=hint)

    def plan(
        self,
        membership: Membership,
        *,
        prompt_tokens: int,
        max_tokens: int,
        hint: Hint = NO_HINT,
        room: RoomLimits | None = None,
    ) -> Plan | None:
        """Return where a request would go, and how it would fare; nothing is held for it.

        With `room` only a pair that has room is chosen; None: there is none now. A decode instance
        has none where some request's tokens, or this one's, would become slower than is promised.
        Raises Unavailable as `admit` does.
        """
        fleet = self._fleets.of(membership.instances)
        ask = self._ask(prompt_tokens, max_tokens, hint)
        if room is None:
            return self._new_plan(fleet, ask, membership)
        self._lacking = None
        if len(self._leases) >= self._max_open_requests:
            return None
        tokens = prompt_tokens + self._costs.expected_output(max_tokens)
        found = look_for_room(fleet, self._state, self._costs, tokens, room)
        if self._promises or hint.tpot_slo_s is not None:
            found = self._keeping_promises(found, prompt_tokens, hint.tpot_slo_s)
        if len(fleet.decode) and not found.decode.any():
            self._lacking = Role.DECODE
            return None
        failing = (*ask.failing, *found.full_prefill)
        plan = self._new_plan(
            fleet, replace(ask, avoided=found.full_decode, failing=failing), membership
        )
        self._lacking = found.lacking(plan.choice)
        return plan if self._lacking is None else None

    @property
    def lacking(self) -> Role | None:
        """Whose pool had no room for the request that was last planned with room; None: it had."""
        return self._lacking

    def _keeping_promises(self, room: Room, tokens: int, tpot_slo_s: float | None) -> Room:
        fleet = room.fleet
        promised_s = self._promises.tightest(fleet.decode)
        if tpot_slo_s is not None:
            promised_s = np.minimum(promised_s, tpot_slo_s)
        keeps = keeps_promises(fleet, self._state, self._costs, tokens, promised_s)
        return replace(room, decode=room.decode & (keeps | room.idle))

    def open(
        self, plan: Plan, *, prompt_tokens: int, max_tokens: int, hint: Hint = NO_HINT
    ) -> Lease:
        """Let a request in as planned just now."""
        self._note(plan, hint)
        lease = Lease(
            self, plan.route, prompt_tokens=prompt_tokens, max_tokens=max_tokens, hint=hint
        )
        self._leases.add(lease)
        self._admitted += 1
        self._count(lease, plan.computing)
        return lease

    def expected_output(self, max_tokens: int) -> float:
        """Return how many tokens an answer is likely to have, by those that ended lately."""
        return self._costs.expected_output(max_tokens)

    def ended(self, trace: RequestTrace) -> None:
        """Learn from how a request went whose lease is closed."""
        decision = self._decisions.ended(trace)
        if decision is not None:
            decision.learn(self._costs, trace)

    def explain(self, request_id: str) -> dict[str, Any] | None:
        """Return why a request went where it did, ready for JSON; None if that is forgotten."""
        return self._decisions.explain(request_id, self._costs)

    def _move(
        self,
        lease: Lease,
        membership: Membership,
        avoided: Collection[InstanceKey],
        preferred: InstanceKey | None,
    ) -> None:
        assert not lease.served
        ask = self._ask(
            lease.held_tokens,
            lease.max_tokens - lease.output_tokens,
            lease.hint,
            avoided=avoided,
            preferred=preferred,
        )
        fleet = self._fleets.of(membership.instances)
        plan = self._plan(fleet, ask, membership)
        self._note(plan, lease.hint)
        self._uncount(lease)
        lease.route = plan.route
        self._count(lease, plan.computing)

    def _ask(
        self,
        tokens: int,
        max_tokens: int,
        hint: Hint,
        avoided: Collection[InstanceKey] = (),
        preferred: InstanceKey | None = None,
    ) -> Ask:
        return Ask(
            tokens=tokens,
            most=tokens + max_tokens,
            max_tokens=max_tokens,
            known=self._state.known_tokens(hint.prompt, hint.tenant),
            session=mark_of(f"{hint.tenant}\0{hint.session}") if hint.session else None,
            avoided=avoided,
            preferred=preferred,
            failing=self._failures.failing(),
        )

    def _new_plan(self, fleet: Fleet, ask: Ask, membership: Membership) -> Plan:
        try:
            return self._plan(fleet, ask, membership)
        except Unavailable:
            self._unavailable += 1
            raise

    def _plan(self, fleet: Fleet, ask: Ask, membership: Membership) -> Plan:
        choice = self._policy.choose(fleet, ask)
        if choice is None:
            raise Unavailable("no decode instance is ready to take the request")
        ranked = choice.ranked_decode()
        decode = next(ranked)
        return Plan(
            Route(decode, choice.ranked_prefill(), _backup_of(decode, ranked)),
            choice.missing(),
            choice,
            ask,
            membership.version,
            outlook_of(choice, self._costs, ask.max_tokens),
        )

    def _note(self, plan: Plan, hint: Hint) -> None:
        if hint.request_id:
            decision = Decision.of(
                plan.choice,
                self._costs,
                tenant=hint.tenant,
                max_tokens=plan.ask.max_tokens,
                membership=plan.membership,
                state=self._state.version,
            )
            self._decisions.decided(hint.request_id, decision)

    def _count(self, lease: Lease, computing: float) -> None:
        """Add a request that is yet to be computed to the loads of its route.

        Of its tokens, the first prefill instance is thought to lack `computing`.
        """
        tokens, decode = lease.held_tokens, key_of(lease.route.decode)
        self._add_decode(decode, requests=1, tokens=tokens)
        self._promises.came(decode, lease.hint.tpot_slo_s)
        if lease.route.prefill:
            prefill = key_of(lease.route.prefill[0])
            lease.computing = tokens
            self._add_prefill(prefill, requests=1, tokens=tokens)
            lease.missing = computing
            self._state.sent(prefill, tokens=computing)
        self._state.sent(decode, requests=1, context=tokens)

    def _uncount(self, lease: Lease) -> None:
        self._end_prefill(lease)
        decode, held = key_of(lease.route.decode), lease.held_tokens
        self._add_decode(decode, requests=-1, tokens=-held)
        self._promises.left(decode, lease.hint.tpot_slo_s)
        self._state.sent(decode, requests=-1, context=-held)

    def _add_decode(self, key: InstanceKey, *, requests: int = 0, tokens: int = 0) -> None:
        self._decode.add(key, requests=requests, tokens=tokens)
        self._state.own(key, requests=requests, context=tokens)

    def _add_prefill(self, key: InstanceKey, *, requests: int, tokens: int) -> None:
        self._prefill.add(key, requests=requests, tokens=tokens)
        self._state.own(key, requests=requests, queued=tokens)

    def _handed_over(self, lease: Lease, handovers: Sequence[HandoverTrace]) -> None:
        keys = {str(i.instance_id): key_of(i) for i in lease.route.prefill}
        for handover in handovers:
            if handover.prefill_instance in keys:
                self._failures.ended(keys[handover.prefill_instance], handover.outcome)

    def _generated(self, lease: Lease, tokens: int) -> None:
        assert not lease.served
        lease.output_tokens += tokens
        self._add_decode(key_of(lease.route.decode), tokens=tokens)
        self._end_prefill(lease)

    def _end_prefill(self, lease: Lease) -> None:
        if lease.computing:
            key = key_of(lease.route.prefill[0])
            self._add_prefill(key, requests=-1, tokens=-lease.computing)
            self._state.sent(key, tokens=-lease.missing)
            lease.computing = 0
            self._on_room()

    def _served(self, lease: Lease) -> None:
        if not lease.served:
            lease.served = True
            self._uncount(lease)
            self._on_room()

    def _close(self, lease: Lease) -> None:
        if lease.closed:
            return
        lease.closed = True
        self._leases.remove(lease)
        self._served(lease)
        self._rate.completed()
        self._on_room()

    def check(self) -> None:
        """Assert that the loads are exactly those of the open leases."""
        decode, prefill = LoadTable(), LoadTable()
        for lease in self._leases:
            assert not lease.closed
            if lease.served:
                continue
            decode.add(key_of(lease.route.decode), requests=1, tokens=lease.held_tokens)
            if lease.computing:
                prefill.add(key_of(lease.route.prefill[0]), requests=1, tokens=lease.computing)
        assert decode.rows() == self._decode.rows(), (decode.rows(), self._decode.rows())
        assert prefill.rows() == self._prefill.rows(), (prefill.rows(), self._prefill.rows())
        assert len(self._leases) <= self._max_open_requests
        assert bool(self._promises) == any(
            lease.hint.tpot_slo_s is not None for lease in self._leases if not lease.served
        )
        self._state.check_own(decode.rows(), prefill.rows())

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


def _backup_of(decode: InstanceInfo, others: Iterable[InstanceInfo]) -> InstanceInfo | None:
    """Return the first of the others that can read the KV of `decode`; mixed ones never can."""
    for other in others:
        same = other.compatibility == decode.compatibility
        if same and decode.role == other.role == Role.DECODE:
            return other
    return None
