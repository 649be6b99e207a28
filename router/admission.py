"""Who is let in, who waits and who is refused: limits, a fair queue, and what can be in time.

A request is refused, with the reason and when to come back, before anything was computed for it:

    tokens_per_minute   its tenant's rate is used up
    queue_full          its tenant has more waiting, for its weight, than anybody else
    ttft                its first token would come later than its tenant's SLO
    tpot                … or its later tokens more slowly, even with nobody beside it
    deadline            its answer would not be complete in time
    queue_timeout       no place came free in the time for which it may wait

Otherwise it waits until it is its turn (fair_queue.py), its tenant has fewer requests at instances
than it may have, and the instances have room (admission_room.py). All of it is plain state: the
caller has the clock, the tasks and the router.
"""

from collections import Counter
from dataclasses import dataclass

from baton.core.clock import Clock
from baton.core.errors import Overloaded
from baton.core.tenants import Tenant
from baton.router.admission_room import Outlook
from baton.router.drain_rate import DrainRate
from baton.router.fair_queue import FairQueue, Turn, Waiting
from baton.router.limits import TenantLimits
from baton.router.load import CompletionRate

_SOONEST_S, _LATEST_S = 1.0, 60.0
"""To come back; sooner makes no sense to who was refused, later is a guess."""


@dataclass(frozen=True, slots=True)
class Want:
    """What somebody wants to be let in for."""

    tenant: Tenant
    prompt_tokens: int
    max_tokens: int
    deadline: float
    """When the answer has to be complete, by the clock."""
    priority: int = 0


@dataclass(slots=True)
class _Entry:
    want: Want
    came: float
    tokens: int
    """Taken for it: prompt, and output as far as it can be guessed."""
    started: bool = False


class Admission:
    """Of one model at one gateway; `left` gives each turn that `arrive` gave back, once."""

    def __init__(
        self,
        *,
        max_queued: int,
        queue_timeout_s: float,
        clock: Clock,
        limits: TenantLimits | None = None,
    ) -> None:
        """At most `max_queued` requests wait, each for `queue_timeout_s` seconds.

        `limits` are the tenants', for all models together; None: there is no other model.
        """
        self._queue = FairQueue(max_queued + 1)  # the one that has just come is yet to be tried
        self._max_queued = max_queued
        self._queue_timeout_s = queue_timeout_s
        self._clock = clock
        self._limits = TenantLimits(clock) if limits is None else limits
        self._alone = limits is None
        self._rate = DrainRate(clock)
        self._completions = CompletionRate(clock)
        self._entries: dict[Turn, _Entry] = {}
        self._last = 0
        self._started = 0
        """Requests that are at instances."""

    def __repr__(self) -> str:
        return f"Admission({len(self._queue)} wait, {len(self._entries)} in the system)"

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._queue)

    # ---- in ---------------------------------------------------------------------------------

    def arrive(self, want: Want, expected_output: float, outlook: Outlook | None = None) -> Turn:
        """Let a request in, to wait; raises Overloaded if it may not, or cannot be in time.

        `outlook` is how it would fare at an instance, if that is known.
        """
        tokens = want.prompt_tokens + max(1, round(expected_output))
        wait_s = self._limits.seconds_until(want.tenant, tokens)
        if wait_s > 0:
            message = (
                f"{_name(want.tenant)} has used up its {want.tenant.tokens_per_minute} tokens "
                f"per minute; this request takes about {tokens}"
            )
            raise Overloaded(message, max(wait_s, _SOONEST_S), "tokens_per_minute")
        now = self._clock()
        request = Waiting(
            Turn(self._last + 1), want.tenant.name, want.tenant.weight, tokens, now, want.priority
        )
        if self.next() is not None:
            self._check_in_time(want, now, outlook, self._wait_s(request))
        self._last += 1
        self._limits.came(want.tenant, tokens)
        self._entries[request.turn] = _Entry(want, now, tokens)
        self._queue.push(request)
        return request.turn

    def settle(self) -> Turn | None:
        """Return who has to leave because more wait than may; call it when nobody can start.

        Its turn is out of the queue, and is yet to be given back.
        """
        evicted = self._queue.evict() if len(self._queue) > self._max_queued else None
        # One who waits only because of its tenant's limits does not show what instances can do.
        self._rate.waits(self.next() is not None)
        return None if evicted is None else evicted.turn

    def next(self) -> Turn | None:
        """Return whose turn it is; None if nobody waits who may start."""
        request = self._queue.next(self._limits.may_start)
        return None if request is None else request.turn

    def waited_s(self) -> float:
        """Return for how long the one has waited that has waited longest, and may start; or 0."""
        came = self._queue.first_arrival(self._limits.may_start)
        return 0.0 if came is None else self._clock() - came

    def want(self, turn: Turn) -> Want:
        """Return what a turn is for."""
        return self._entries[turn].want

    def check_start(self, turn: Turn, outlook: Outlook | None) -> None:
        """Raise Overloaded if the request, started now, would not be in time.

        With nothing at the instances it is tried in any case: were a prediction too dark, nothing
        would ever be measured that could brighten it.
        """
        entry = self._entries[turn]
        known = outlook if self._started else None
        self._check_in_time(entry.want, entry.came, known, 0.0)

    def start(self, turn: Turn) -> None:
        """The request whose turn it is goes to its instances."""
        entry = self._entries[turn]
        waited = self._queue.take(turn, self._limits.may_start)
        self._limits.started(entry.want.tenant.name)
        entry.started = True
        self._started += 1
        self._rate.took(waited.tokens)

    # ---- out --------------------------------------------------------------------------------

    def left(self, turn: Turn, output_tokens: int = 0) -> None:
        """A request is over, however; of one that started, what was guessed is put right."""
        self.withdraw(turn)
        entry = self._entries.pop(turn)
        name, back = entry.want.tenant.name, entry.tokens
        if entry.started:
            self._started -= 1
            back -= entry.want.prompt_tokens + output_tokens
            self._queue.correct(name, -back)
            self._completions.completed()
        self._limits.left(name, started=entry.started, back=back)

    def withdraw(self, turn: Turn) -> None:
        """Take a request out of the queue, if it waits; its turn is yet to be given back."""
        if turn in self._queue:
            self._queue.remove(turn)

    def gives_up_at(self, turn: Turn) -> float:
        """Return until when a request may wait, by the clock."""
        entry = self._entries[turn]
        until = min(entry.came + self._queue_timeout_s, entry.want.deadline)
        slo_s = entry.want.tenant.ttft_slo_s
        return until if slo_s is None else min(until, entry.came + slo_s)

    def gave_up(self, turn: Turn) -> Overloaded:
        """Return the error for a request that has waited for as long as it may."""
        entry = self._entries[turn]
        waited = self._clock() - entry.came
        text = f"no place came free within {waited:.3g} s; {len(self._queue)} requests wait"
        return Overloaded(text, self._retry_s(entry.tokens), "queue_timeout")

    def crowded_out(self, turn: Turn) -> Overloaded:
        """Return the error for a request that had to leave a full queue."""
        entry = self._entries[turn]
        tenant = _name(entry.want.tenant)
        text = f"{self._max_queued} requests wait, and {tenant} has most of what waits"
        if self._max_queued == 0:
            text = "as many requests are open as the instances, or this gateway, can take"
        return Overloaded(text, self._retry_s(entry.tokens), "queue_full")

    # ---- in time? ---------------------------------------------------------------------------

    def _check_in_time(
        self, want: Want, came: float, outlook: Outlook | None, wait_s: float
    ) -> None:
        """Raise Overloaded if, after `wait_s` more in the queue, it would be too late."""
        self._check_tpot(want, outlook)
        waited_s = self._clock() - came + wait_s
        ttft_s = 0.0 if outlook is None else outlook.ttft_s
        e2e_s = 0.0 if outlook is None else outlook.e2e_s
        slo_s = want.tenant.ttft_slo_s
        if slo_s is not None and waited_s + ttft_s > slo_s:
            late_s = waited_s + ttft_s - slo_s
            text = f"its first token is expected after {slo_s + late_s:.3g} s, due after {slo_s:g}"
            raise Overloaded(text, _bounded(late_s), "ttft")
        left_s = want.deadline - came
        if waited_s + e2e_s > left_s:
            late_s = waited_s + e2e_s - left_s
            text = f"its answer is expected after {left_s + late_s:.3g} s, due after {left_s:.3g}"
            raise Overloaded(text, _bounded(late_s), "deadline")
        if waited_s > self._queue_timeout_s:
            late_s = waited_s - self._queue_timeout_s
            limit = f"{self._queue_timeout_s:g}"
            text = f"a place is expected after {waited_s:.3g} s; nobody waits longer than {limit}"
            raise Overloaded(text, _bounded(late_s), "queue_timeout")

    def _check_tpot(self, want: Want, outlook: Outlook | None) -> None:
        """Raise Overloaded if its tokens would come too slowly even from an idle instance.

        While that is only because of others it waits for batches to become smaller.
        """
        slo_s = want.tenant.tpot_slo_s
        tpot_s = None if outlook is None or want.max_tokens == 1 else outlook.tpot_s
        if slo_s is not None and tpot_s is not None and tpot_s > slo_s:
            text = f"each later token is expected to take {1000 * tpot_s:.3g} ms, alone"
            raise Overloaded(f"{text}; {1000 * slo_s:g} are promised", _LATEST_S, "tpot")

    def _wait_s(self, request: Waiting) -> float:
        """Return how long a request would wait, as far as is known."""
        rate = self._rate.tokens_per_s()
        if not rate:
            return 0.0
        ahead = self._queue.tokens_ahead(request, self._limits.may_start)
        return (ahead + request.tokens) / rate

    def _retry_s(self, tokens: int) -> float:
        """Return when there may be a place, from how fast the queue is served, or requests end."""
        rate = self._rate.tokens_per_s()
        return _bounded(tokens / rate) if rate else self._completions.seconds_to_next()

    def check(self) -> None:
        """Assert that queue, limits and turns agree."""
        self._queue.check()
        waiting = {t for t, entry in self._entries.items() if t in self._queue}
        assert len(waiting) == len(self._queue)
        known = Counter(entry.want.tenant.name for entry in self._entries.values())
        started = Counter(e.want.tenant.name for e in self._entries.values() if e.started)
        assert self._started == started.total()
        if self._alone:
            self._limits.check(dict(known), dict(started))


def _bounded(seconds: float) -> float:
    return min(max(seconds, _SOONEST_S), _LATEST_S)


def _name(tenant: Tenant) -> str:
    return f"tenant {tenant.name!r}" if tenant.name else "everybody together"
