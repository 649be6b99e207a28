"""Goodput under overload: `python -m bench.goodput`.

Two tenants of equal weight share two prefill and two decode instances. One asks for 30 % of what
these can serve; the other floods them with the rest of 1, 1.5, 2 and 3 times that. A request is
good if its first token comes within TTFT_S and its later tokens take TPOT_S each, on average.

    fair    router/admission.py as the gateway uses it: queue, limits of room, refusal by prediction
    fcfs    first come, first served: everything is sent to instances, at most 256 at once

Router, admission and fair queue are the real ones; the instances are scripted, and time is
simulated, so that figures do not depend on the machine. Their service times are those of an 8B
model on a large GPU: a prompt takes 2 ms and 0.1 ms per token, one at a time, in order of arrival;
its KV 5 µs per token over the link; a decode step 6 ms, 0.1 ms per sequence and 40 ns per token of
context, for 32 sequences at most, and the others wait in order.
"""

import argparse
import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

from baton.core.clock import ManualClock
from baton.core.errors import Overloaded
from baton.core.ids import Incarnation, InstanceId
from baton.core.instance_events import CacheTerms, InstanceLoad
from baton.core.tenants import Tenant
from baton.core.topology import InstanceInfo, Membership, Role
from baton.core.trace import HandoverTrace, RequestTrace
from baton.router.admission import Admission, Want
from baton.router.admission_room import RoomLimits
from baton.router.fair_queue import Turn
from baton.router.load import key_of
from baton.router.route import Hint, Plan
from baton.router.router import Lease, Router
from baton.router.state import RouterState

TTFT_S, TPOT_S = 1.0, 0.05
WARM_S = 10.0
"""At the beginning, that are not counted: the router is learning."""
SEQUENCES, KV_TOKENS = 32, 64_000
STEADY = 0.3
"""Of what can be served: what the tenant asks for that does not flood."""
MAX_TOKENS = 512
TENANTS = {
    name: Tenant(name=name, ttft_slo_s=TTFT_S, tpot_slo_s=TPOT_S) for name in ("steady", "flood")
}


@dataclass(slots=True, eq=False)
class Request:
    """One request, and what came of it."""

    number: int
    tenant: str
    came: float
    prompt: int
    output: int
    lease: Lease | None = None
    turn: Turn | None = None
    sent: float = 0.0
    began: float = 0.0
    computed: float = 0.0
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    refused: str = ""

    @property
    def good(self) -> bool:
        """Whether it met its SLO."""
        if self.refused or not self.last:
            return False
        tpot_s = (self.last - self.first) / max(1, self.output - 1)
        return self.first - self.came <= TTFT_S and tpot_s <= TPOT_S

    def trace(self) -> RequestTrace:
        """Return what a gateway would have measured."""
        assert self.lease is not None
        route = self.lease.route
        handover = HandoverTrace(
            str(route.prefill[0].instance_id),
            0,
            "ok",
            queue_s=self.began - self.sent,
            compute_s=self.computed - self.began,
            exposed_s=self.first - self.computed,
            blocks=max(1, self.prompt // 16),
            bytes=self.prompt << 17,
        )
        return RequestTrace(
            request_id=str(self.number),
            decode_instance=str(route.decode.instance_id),
            prompt_tokens=self.prompt,
            output_tokens=self.output,
            finish="length",
            handovers=(handover,),
            queue_s=self.sent - self.came,
            ttft_s=self.first - self.came,
            tpot_s=(self.last - self.first) / max(1, self.output - 1),
            e2e_s=self.last - self.came,
        )


@dataclass(slots=True)
class Prefill:
    """Computes one prompt after the other."""

    info: InstanceInfo
    queue: deque[Request] = field(default_factory=deque)

    def load(self) -> InstanceLoad:
        """Return what it would tell."""
        return InstanceLoad(queued_tokens=sum(r.prompt for r in self.queue))


@dataclass(slots=True)
class Decode:
    """Generates for all sequences at once, step by step."""

    info: InstanceInfo
    running: list[Request] = field(default_factory=list)
    waiting: deque[Request] = field(default_factory=deque)
    steps: bool = False

    def context(self) -> int:
        """Return the tokens that its sequences have."""
        return sum(r.prompt + r.tokens for r in self.running)

    def load(self) -> InstanceLoad:
        """Return what it would tell."""
        held = self.context() + sum(r.prompt for r in self.waiting)
        running = len(self.running) + len(self.waiting)
        return InstanceLoad(0, running, held, max(0, KV_TOKENS - held))


class World:
    """Simulated time, instances, and a gateway's admission in front of them."""

    def __init__(self, *, fair: bool) -> None:
        self.clock = ManualClock()
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = iter(range(1 << 60))
        self.state = RouterState(1 << 10)
        self.router = Router(
            max_open_requests=1 << 16 if fair else 256, clock=self.clock, state=self.state
        )
        self.admission = Admission(max_queued=1024, queue_timeout_s=60.0, clock=self.clock)
        self.fair = fair
        self.prefill = [Prefill(_info(Role.PREFILL, n)) for n in range(2)]
        self.decode = [Decode(_info(Role.DECODE, n)) for n in range(2)]
        both = [*self.prefill, *self.decode]
        self.membership = Membership(1, tuple(i.info for i in both))
        self.waiting: dict[Turn, Request] = {}
        for instance in both:
            self.state.opened(key_of(instance.info), CacheTerms(16, "", local_prefill=False))
            self.tell(instance)

    def at(self, seconds: float, what: Callable[[], None]) -> None:
        """Let something happen later."""
        heapq.heappush(self.events, (seconds, next(self.numbers), what))

    def run(self) -> None:
        """Let everything happen."""
        while self.events:
            seconds, _, what = heapq.heappop(self.events)
            self.clock.now = max(self.clock.now, seconds)
            what()

    def tell(self, instance: Prefill | Decode) -> None:
        """Let an instance tell its load."""
        self.state.told(key_of(instance.info), instance.load())

    # ---- the gateway ------------------------------------------------------------------------

    def arrive(self, request: Request) -> None:
        """A request comes."""
        try:
            if not self.fair:
                lease = self.router.admit(self.membership, hint=_hint(request), **_size(request))
                self.send(request, lease)
                return
            want = Want(TENANTS[request.tenant], request.prompt, MAX_TOKENS, request.came + 600.0)
            waits = self.admission.next() is not None
            plan = self.plan(request, None) if waits else None
            outlook = None if plan is None else plan.outlook
            expected = self.router.expected_output(MAX_TOKENS)
            turn = request.turn = self.admission.arrive(want, expected, outlook)
        except Overloaded as error:
            request.refused = error.reason
            return
        self.waiting[turn] = request
        self.at(self.admission.gives_up_at(turn), lambda: self.give_up(turn))
        self.pump()

    def plan(self, request: Request, room: RoomLimits | None) -> Plan | None:
        """Ask the router."""
        hint = _hint(request)
        return self.router.plan(self.membership, hint=hint, room=room, **_size(request))

    def pump(self) -> None:
        """Start all who can start, as api/waiting_room.py does."""
        while self.fair and (turn := self.admission.next()) is not None:
            request = self.waiting[turn]
            plan = self.plan(request, RoomLimits())
            if plan is None:
                break
            try:
                self.admission.check_start(turn, plan.outlook)
            except Overloaded as error:
                self.refuse(turn, error.reason)
                continue
            lease = self.router.open(plan, hint=_hint(request), **_size(request))
            self.admission.start(turn)
            del self.waiting[turn]
            self.send(request, lease)
        while self.fair and (turn := self.admission.settle()) is not None:
            self.refuse(turn, "queue_full")

    def give_up(self, turn: Turn) -> None:
        """Refuse a request that has waited for as long as it may."""
        if turn in self.waiting:
            self.refuse(turn, "queue_timeout")

    def refuse(self, turn: Turn, reason: str) -> None:
        """Refuse one that waits."""
        self.waiting.pop(turn).refused = reason
        self.admission.left(turn)

    # ---- the instances ----------------------------------------------------------------------

    def send(self, request: Request, lease: Lease) -> None:
        """Send an admitted request to its prefill instance."""
        request.lease, request.sent = lease, self.clock()
        assert lease.route.prefill, "no decode instance computes prompts here"
        there = next(p for p in self.prefill if p.info is lease.route.prefill[0])
        there.queue.append(request)
        self.tell(there)
        if len(there.queue) == 1:
            self.compute(there)

    def compute(self, there: Prefill) -> None:
        """Compute the first prompt of a queue."""
        request = there.queue[0]
        request.began = self.clock()
        self.at(request.began + 0.002 + 1e-4 * request.prompt, lambda: self.computed(there))

    def computed(self, there: Prefill) -> None:
        """Hand over what was computed, and go on with the next."""
        request = there.queue.popleft()
        request.computed = self.clock()
        self.at(request.computed + 5e-6 * request.prompt, lambda: self.arrived(request))
        self.tell(there)
        if there.queue:
            self.compute(there)

    def arrived(self, request: Request) -> None:
        """The KV and the first token are there."""
        assert request.lease is not None
        request.first, request.tokens = self.clock(), 1
        request.lease.generated(1)
        there = next(d for d in self.decode if d.info is request.lease.route.decode)
        there.waiting.append(request)
        self.tell(there)
        if not there.steps:
            there.steps = True
            self.step(there)
        self.pump()

    def step(self, there: Decode) -> None:
        """Begin a step with all that fit."""
        while there.waiting and len(there.running) < SEQUENCES:
            there.running.append(there.waiting.popleft())
        if not there.running:
            there.steps = False
            return
        seconds = 0.006 + 1e-4 * len(there.running) + 4e-8 * there.context()
        self.at(self.clock() + seconds, lambda: self.stepped(there))

    def stepped(self, there: Decode) -> None:
        """Take a token of each sequence."""
        for request in list(there.running):
            assert request.lease is not None
            if request.tokens < request.output:
                request.tokens += 1
                request.lease.generated(1)
            if request.tokens >= request.output:
                there.running.remove(request)
                self.end(request)
        self.tell(there)
        self.pump()
        self.step(there)

    def end(self, request: Request) -> None:
        """A request has all its tokens."""
        assert request.lease is not None
        request.last = self.clock()
        request.lease.close()
        if request.turn is not None:
            self.admission.left(request.turn, request.output)
        self.router.ended(request.trace())


def _hint(request: Request) -> Hint:
    return Hint(str(request.number), tpot_slo_s=TENANTS[request.tenant].tpot_slo_s)


def _size(request: Request) -> dict[str, int]:
    return {"prompt_tokens": request.prompt, "max_tokens": MAX_TOKENS}


def _info(role: Role, number: int) -> InstanceInfo:
    return InstanceInfo(
        instance_id=InstanceId(f"{role}-{number}"),
        role=role,
        address="127.0.0.1:1",
        incarnation=Incarnation(1),
        pid=1,
        model="m",
        compatibility="same",
        max_model_len=8192,
        kv_tokens=KV_TOKENS,
        max_sequences=SEQUENCES,
        load_s=0.0,
    )


def arrivals(rates: dict[str, float], seconds: float, seed: int) -> Iterator[Request]:
    """Yield requests of both tenants as they come: Poisson, prompts and outputs log-normal."""
    draw = Random(seed)
    number = 0
    for tenant, rate in rates.items():
        now = 0.0
        while (now := now + draw.expovariate(rate)) < seconds:
            prompt = min(4096, max(16, round(draw.lognormvariate(6.0, 0.7))))
            output = min(MAX_TOKENS, max(2, round(draw.lognormvariate(4.6, 0.6))))
            number += 1
            yield Request(number, tenant, now, prompt, output)


def simulate(
    rates: dict[str, float], seconds: float, *, fair: bool, seed: int
) -> tuple[list[Request], float]:
    """Return the requests that came after the warm-up, and for how long they came."""
    world = World(fair=fair)
    requests = list(arrivals(rates, WARM_S + seconds, seed))
    for request in requests:
        world.at(request.came, lambda request=request: world.arrive(request))  # type: ignore[misc]
    world.run()
    world.router.check()
    world.admission.check()
    return [r for r in requests if r.came >= WARM_S], seconds


def capacity(seconds: float, seed: int) -> tuple[float, float]:
    """Return the requests and tokens per second that instances do when there are always more."""
    world = World(fair=False)
    requests = list(arrivals({"flood": 200.0}, seconds, seed))
    for request in requests:
        world.at(request.came, lambda request=request: world.arrive(request))  # type: ignore[misc]
    world.run()
    done = [r for r in requests if WARM_S <= r.last < seconds]
    tokens = sum(r.prompt + r.output for r in done)
    return len(done) / (seconds - WARM_S), tokens / (seconds - WARM_S)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    full, tokens = capacity(WARM_S + options.seconds, options.seed)
    print(f"capacity: {full:.1f} requests/s, {tokens:,.0f} tokens/s\n")
    print(
        "| load | | good/s | good tokens/s "
        "| steady good/s | steady good, % | steady TTFT p99, s | refused, % |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for load in (1.0, 1.5, 2.0, 3.0):
        rates = {"steady": STEADY * full, "flood": (load - STEADY) * full}
        for fair in (False, True):
            found, seconds = simulate(rates, options.seconds, fair=fair, seed=options.seed)
            steady = [r for r in found if r.tenant == "steady"]
            good = sum(r.good for r in found) / seconds
            tokens = sum(r.prompt + r.output for r in found if r.good) / seconds
            steady_good = sum(r.good for r in steady)
            waits = sorted(r.first - r.came for r in steady if r.last)
            p99 = waits[int(0.99 * (len(waits) - 1))] if waits else float("nan")
            refused = 100 * sum(bool(r.refused) for r in found) / len(found)
            print(
                f"| {load:g} | {'fair' if fair else 'fcfs'} | {good:.1f} | {tokens:,.0f} "
                f"| {steady_good / seconds:.1f} | {100 * steady_good / len(steady):.0f} "
                f"| {p99:.2f} | {refused:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
