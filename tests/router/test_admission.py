from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.core.clock import ManualClock
from baton.core.errors import Overloaded
from baton.core.tenants import ANONYMOUS, Tenant
from baton.router.admission import Admission, Want
from baton.router.admission_room import Outlook
from baton.router.fair_queue import Turn

FAR = 1e9


def want(tenant: Tenant = ANONYMOUS, prompt: int = 90, **more: object) -> Want:
    values = {"max_tokens": 10, "deadline": FAR} | more
    return Want(tenant, prompt, **values)  # type: ignore[arg-type]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


@pytest.fixture
def admission(clock):
    admission = Admission(max_queued=8, queue_timeout_s=60.0, clock=clock)
    yield admission
    admission.check()


def serve(admission: Admission, clock: ManualClock, requests: int, seconds: float) -> None:
    """Start so many of those that wait, one each so many seconds."""
    admission.settle()
    for _ in range(requests):
        clock.advance(seconds)
        turn = admission.next()
        assert turn is not None
        admission.start(turn)
        admission.settle()


def test_a_request_is_let_in_and_given_back(admission):
    turn = admission.arrive(want(), 10)
    assert admission.next() == turn
    admission.check_start(turn, None)
    admission.start(turn)
    assert admission.settle() is None
    assert len(admission) == 0
    admission.left(turn, output_tokens=3)


def test_a_used_up_rate_is_refused_with_when_there_is_more_of_it(admission, clock):
    tenant = Tenant(name="a", tokens_per_minute=120)
    turn = admission.arrive(want(tenant), 10)
    with pytest.raises(Overloaded, match="tenant 'a' has used up its 120 tokens") as refused:
        admission.arrive(want(tenant), 10)
    assert refused.value.reason == "tokens_per_minute"
    assert refused.value.retry_after_s == pytest.approx(40)
    clock.advance(refused.value.retry_after_s)
    admission.left(admission.arrive(want(tenant), 10))  # never started: all is given back
    assert admission.next() == turn
    admission.start(turn)
    admission.left(turn, output_tokens=1000)
    with pytest.raises(Overloaded) as refused:
        admission.arrive(want(tenant), 10)
    assert refused.value.retry_after_s > 40, "it was longer than was guessed"


def test_who_cannot_be_in_time_is_refused_before_it_waits(admission, clock):
    for _ in range(8):
        admission.arrive(want(), 10)
    serve(admission, clock, 4, seconds=0.5)  # 200 tokens a second; 400 wait
    hurried = Tenant(name="a", ttft_slo_s=1.0)
    outlook = Outlook(ttft_s=0.8, e2e_s=1.0, tpot_s=0.01)
    with pytest.raises(Overloaded, match="due after 1") as refused:
        admission.arrive(want(hurried), 10, outlook)  # its turn is after two of theirs, at most
    assert refused.value.reason == "ttft"
    with pytest.raises(Overloaded, match="its answer is expected") as refused:
        admission.arrive(want(deadline=clock() + 2.0), 10, outlook)
    assert refused.value.reason == "deadline"
    late = refused.value.retry_after_s
    admission.left(admission.arrive(want(deadline=clock() + 2.0 + late), 10, outlook))
    assert len(admission) == 4


def test_who_is_late_when_its_turn_comes_is_refused_then(admission, clock):
    hurried = Tenant(name="a", ttft_slo_s=1.0)
    first, turn = (admission.arrive(want(hurried), 10) for _ in range(2))
    admission.check_start(first, Outlook(9.0, 9.0, 0.0))  # nothing is there: it is tried
    admission.start(first)
    clock.advance(0.5)
    admission.check_start(turn, Outlook(0.4, 0.4, 0.0))
    with pytest.raises(Overloaded):
        admission.check_start(turn, Outlook(0.6, 0.6, 0.0))


def test_who_would_get_its_tokens_too_slowly_is_refused(admission):
    quick = Tenant(name="quick", tpot_slo_s=0.05)
    slow = Outlook(ttft_s=0.1, e2e_s=1.0, tpot_s=0.06)
    turn = admission.arrive(want(quick), 10, slow)
    admission.check_start(turn, slow)  # nothing is at the instances: it is tried
    admission.start(turn)
    waiting = admission.arrive(want(quick), 10)
    with pytest.raises(Overloaded, match="take 60 ms, alone; 50 are promised") as refused:
        admission.check_start(waiting, slow)
    assert (refused.value.reason, refused.value.retry_after_s) == ("tpot", 60.0)
    with pytest.raises(Overloaded, match="take 60 ms"):
        admission.arrive(want(quick), 10, slow)
    for fine in (None, Outlook(0.1, 1.0, 0.05), Outlook(0.1, 1.0, None)):
        admission.check_start(waiting, fine)
    others = (
        admission.arrive(want(), 10, slow),
        admission.arrive(want(quick, max_tokens=1), 1, slow),
    )
    for each in (turn, waiting, *others):
        admission.left(each)


def test_nobody_waits_for_longer_than_anything_allows(admission, clock):
    patient = admission.arrive(want(), 10)
    hurried = admission.arrive(want(Tenant(name="a", ttft_slo_s=3.0)), 10)
    due = admission.arrive(want(deadline=clock() + 2.0), 10)
    until = [admission.gives_up_at(t) - clock() for t in (patient, hurried, due)]
    assert until == pytest.approx([60.0, 3.0, 2.0])
    assert admission.gave_up(patient).reason == "queue_timeout"


def test_how_long_somebody_has_waited_leaves_out_who_waits_for_its_own_limit(admission, clock):
    one = Tenant(name="one", max_concurrent=1)
    turn = admission.arrive(want(one), 10)
    admission.start(turn)
    own = admission.arrive(want(one), 10)
    clock.advance(3.0)
    assert admission.waited_s() == 0
    other = admission.arrive(want(), 10)
    clock.advance(2.0)
    assert admission.waited_s() == 2.0
    admission.left(turn)
    assert admission.waited_s() == 5.0
    for each in (own, other):
        admission.left(each)
    assert admission.waited_s() == 0


def test_what_a_tenant_makes_wait_by_its_own_limit_keeps_nobody_else_out(admission, clock):
    narrow = Tenant(name="a", max_concurrent=1)
    admission.arrive(want(narrow), 10)
    admission.start(admission.next())
    admission.arrive(want(narrow), 10)
    assert admission.next() is None
    admission.settle()
    clock.advance(1000)
    other = admission.arrive(want(Tenant(name="b", ttft_slo_s=0.1)), 10)
    assert admission.next() == other


ARRIVALS = st.tuples(st.just("arrive"), st.integers(0, 3), st.integers(1, 300))
ACTIONS = st.one_of(
    ARRIVALS,
    st.tuples(st.just("room"), st.integers(1, 4), st.just(0)),
    st.tuples(st.just("end"), st.integers(0, 9), st.integers(0, 300)),
    st.tuples(st.just("cancel"), st.integers(0, 9), st.just(0)),
    st.tuples(st.just("wait"), st.integers(1, 30), st.just(0)),
)
LIMITS = st.lists(
    st.tuples(
        st.sampled_from([0.5, 1.0, 4.0]),
        st.sampled_from([None, 1, 3]),
        st.sampled_from([None, 200, 5000]),
        st.sampled_from([None, 5.0]),
    ),
    min_size=4,
    max_size=4,
)


class World:
    """Drives an Admission as a gateway does; instances end what they have when told to."""

    def __init__(self, limits: list[tuple[float, int | None, int | None, float | None]]) -> None:
        self.clock = ManualClock()
        self.admission = Admission(max_queued=6, queue_timeout_s=20.0, clock=self.clock)
        self.tenants = [
            Tenant(name=f"t{n}", weight=w, max_concurrent=c, tokens_per_minute=r, ttft_slo_s=s)
            for n, (w, c, r, s) in enumerate(limits)
        ]
        self.waiting: dict[Turn, float] = {}
        self.open: dict[Turn, str] = {}
        self.told: list[float] = []
        """After how many seconds those who were refused at once may come back."""

    def arrive(self, tenant: int, tokens: int) -> None:
        try:
            turn = self.admission.arrive(want(self.tenants[tenant], tokens), tokens)
        except Overloaded as refused:
            self.told.append(refused.retry_after_s)
            return
        self.waiting[turn] = self.clock()
        self.room(0)

    def room(self, places: int) -> None:
        while places and (turn := self.admission.next()) is not None:
            places -= 1
            self.admission.start(turn)
            del self.waiting[turn]
            self.open[turn] = self.admission.want(turn).tenant.name
        while (turn := self.admission.settle()) is not None:
            assert self.admission.crowded_out(turn).reason == "queue_full"
            self.admission.left(turn)
            del self.waiting[turn]

    def end(self, index: int, output: int) -> None:
        if self.open:
            turn = sorted(self.open)[index % len(self.open)]
            del self.open[turn]
            self.admission.left(turn, output)

    def cancel(self, index: int, _: int) -> None:
        if self.waiting:
            turn = sorted(self.waiting)[index % len(self.waiting)]
            del self.waiting[turn]
            self.admission.left(turn)

    def wait(self, seconds: int) -> None:
        """Let time pass; who may wait no longer goes at that moment."""
        until = self.clock() + seconds
        for turn in sorted(self.waiting, key=self.admission.gives_up_at):
            due = self.admission.gives_up_at(turn)
            if due <= until:
                self.clock.advance(max(0.0, due - self.clock()))
                self.admission.left(turn)
                assert self.clock() - self.waiting.pop(turn) <= 20.0 + 1e-6
        self.clock.advance(until - self.clock())

    def check(self) -> None:
        self.admission.check()
        assert all(seconds >= 1 for seconds in self.told)
        assert len(self.admission) == len(self.waiting) <= 6
        for name, count in Counter(self.open.values()).items():
            most = self.tenants[int(name[1:])].max_concurrent
            assert most is None or count <= most


@given(LIMITS, st.lists(ACTIONS, max_size=80))
def test_every_request_is_started_or_refused_in_time_whatever_happens(limits, actions):
    world = World(limits)
    for action, first, second in actions:
        match action:
            case "room":
                world.room(first)
            case "wait":
                world.wait(first)
            case _:
                getattr(world, action)(first, second)
        world.check()
    while world.waiting:  # instances go on: all that wait get their turn
        before = len(world.waiting)
        world.room(1)
        while world.open:
            world.end(0, 1)
        assert len(world.waiting) < before
    world.check()
    assert repr(world.admission).startswith("Admission(0 wait, ")


@given(st.lists(st.integers(1, 200), min_size=30, max_size=30), st.integers(1, 9))
def test_who_floods_gets_its_share_and_the_other_all_that_it_asks_for_within_its_own(sizes, every):
    """One tenant always has eight waiting; the other asks for less than its half."""
    world = World([(1.0, None, None, None)] * 4)
    quiet = 0
    for number, size in enumerate(sizes):
        while len(world.waiting) < 6:
            world.arrive(0, size)
        if number % (2 + every) == 0:
            before = len(world.waiting)
            world.arrive(1, 1)
            quiet += 1
            assert len(world.waiting) == before, "one of the flood left for it"
        world.room(1)
        world.room(1)
    assert Counter(world.open.values())["t1"] == quiet
