import pytest

from baton.core.errors import Unavailable
from baton.core.instance_events import CacheTerms, InstanceLoad
from baton.core.request import FinishReason
from baton.core.topology import Membership, Role
from baton.core.trace import RequestTrace
from baton.router.admission_room import RoomLimits
from baton.router.load import key_of
from baton.router.route import Hint
from baton.router.router import Router
from baton.router.state import RouterState

TERMS = CacheTerms(16, "", local_prefill=False)


@pytest.fixture
def state() -> RouterState:
    return RouterState(1 << 10)


@pytest.fixture
def pool(make_instance):
    """One prefill and two decode instances of eight sequences and 10,000 tokens each."""
    prefill = make_instance("prefill-0", Role.PREFILL)
    return prefill, make_instance("decode-0"), make_instance("decode-1")


@pytest.fixture
def router(clock, state):
    router = Router(max_open_requests=100, clock=clock, state=state)
    yield router
    router.check()


def start(router: Router, pool, limits: RoomLimits, prompt: int = 10):
    size = {"prompt_tokens": prompt, "max_tokens": 20}
    plan = router.plan(Membership(1, pool), room=limits, **size)
    return None if plan is None else router.open(plan, **size)


def fill(router: Router, pool, limits: RoomLimits, prompt: int = 10) -> list:
    leases = []
    while (lease := start(router, pool, limits, prompt)) is not None:
        leases.append(lease)
    return leases


def names(leases: list) -> list[str]:
    return sorted(str(lease.route.decode.instance_id) for lease in leases)


def test_each_decode_instance_gets_what_keeps_it_busy(router, pool):
    limits = RoomLimits(decode_fill=0.5, prefill_ahead_s=600)
    leases = fill(router, pool, limits)
    assert names(leases) == ["decode-0"] * 4 + ["decode-1"] * 4
    leases[3].instances_done()
    freed = leases[3].route.decode
    lease = start(router, pool, limits)
    assert lease.route.decode == freed
    assert start(router, pool, limits) is None
    assert router.lacking is Role.DECODE


def test_a_prompt_that_does_not_fit_beside_the_others_waits(router, pool):
    limits = RoomLimits(decode_fill=8, prefill_ahead_s=600)
    assert names(fill(router, pool, limits, prompt=900)) == ["decode-0"] * 11 + ["decode-1"] * 11


def test_what_an_instance_tells_counts_for_more_than_own_work(router, state, pool):
    limits = RoomLimits(decode_fill=1, prefill_ahead_s=600)
    for instance in pool[1:]:
        state.opened(key_of(instance), TERMS)
    state.told(key_of(pool[1]), InstanceLoad(0, running=8, context_tokens=80, free_tokens=9000))
    state.told(key_of(pool[2]), InstanceLoad(0, running=1, context_tokens=9990, free_tokens=10))
    assert start(router, pool, limits) is None, "of other gateways"
    state.told(key_of(pool[2]), InstanceLoad(0, running=0, context_tokens=0, free_tokens=0))
    assert names([start(router, pool, limits)]) == ["decode-1"], "nothing would make more room"


def test_prefill_gets_no_more_than_keeps_it_busy(router, state, pool):
    limits = RoomLimits(decode_fill=16, prefill_ahead_s=0.05)
    leases = fill(router, pool, limits, prompt=100)  # 0.1 ms a token, as long as none is measured
    assert len(leases) == 5
    assert router.lacking is Role.PREFILL
    leases[0].generated(1)
    assert start(router, pool, limits, prompt=100) is not None
    assert start(router, pool, limits, prompt=100) is None


def test_a_full_instance_is_not_chosen_for_its_session_or_cache(router, pool):
    limits = RoomLimits(decode_fill=0.125, prefill_ahead_s=600)
    assert names(fill(router, pool, limits)) == ["decode-0", "decode-1"]


def test_room_or_not_without_an_instance_there_is_no_plan(router, pool, make_instance):
    for instances in ((), pool[:1], (make_instance("small", max_model_len=20),)):
        with pytest.raises(Unavailable):
            start(router, instances, RoomLimits())


def test_whoever_waits_is_told_of_room(clock, pool):
    told = []
    router = Router(max_open_requests=2, clock=clock, on_room=lambda: told.append(1))
    first, second = fill(router, pool, RoomLimits())
    assert not told
    assert router.lacking is None, "it is the router that has no place"
    first.generated(1)
    assert len(told) == 1, "prefill has done its part"
    first.instances_done()
    assert len(told) == 2
    second.close()
    assert len(told) > 2
    first.close()
    router.check()


def serve(router: Router, clock, instance, *, running: int, tpot_s: float) -> None:
    """Let a request end that took so long per token beside `running` others."""
    membership = Membership(1, (instance,))
    hint = Hint(f"{instance.instance_id}-{running}-{clock()}")
    leases = [router.admit(membership, prompt_tokens=10, max_tokens=2) for _ in range(running)]
    lease = router.admit(membership, prompt_tokens=10, max_tokens=20, hint=hint)
    for each in (lease, *leases):
        each.close()
    router.ended(
        RequestTrace(
            request_id=hint.request_id,
            decode_instance=str(instance.instance_id),
            prompt_tokens=10,
            output_tokens=10,
            finish=FinishReason.LENGTH,
            local_prefill=True,
            ttft_s=0.01,
            tpot_s=tpot_s,
        )
    )


@pytest.fixture
def measured(router, clock, make_instance):
    """Two decode instances that take 10 ms a token, and 10 ms more for each further sequence."""
    instances = make_instance("decode-0"), make_instance("decode-1")
    for _ in range(20):
        for instance in instances:
            for running in range(6):
                serve(router, clock, instance, running=running, tpot_s=0.01 * (running + 1))
    return instances


def join(router: Router, instances, tpot_slo_s: float | None, fill: float = 4):
    size = {"prompt_tokens": 10, "max_tokens": 20, "hint": Hint(tpot_slo_s=tpot_slo_s)}
    plan = router.plan(Membership(1, instances), room=RoomLimits(decode_fill=fill), **size)
    return None if plan is None else router.open(plan, **size)


def test_who_is_promised_quick_tokens_goes_where_they_are_quick_or_waits(router, measured):
    first, second = measured
    size = {"prompt_tokens": 10, "max_tokens": 20}
    busy = [router.admit(Membership(1, (second,)), **size) for _ in range(6)]
    few = [router.admit(Membership(1, (first,)), **size) for _ in range(3)]
    assert join(router, measured, 0.025) is None, "both are too busy"
    few.pop().close()
    assert join(router, measured, 0.045, fill=0.25) is None, "the quick one has no place"
    quick = join(router, measured, 0.035)
    assert quick.route.decode == first
    assert names([join(router, measured, None)]) == ["decode-1"], "it would make it slower"
    quick.instances_done()
    assert names([join(router, measured, None)]) == ["decode-0"]
    for lease in (quick, *busy, *few):
        lease.close()


def test_with_nobody_beside_it_a_promise_is_tried(router, measured):
    tight = [join(router, measured, 1e-9) for _ in range(2)]
    assert names(tight) == ["decode-0", "decode-1"]
    assert join(router, measured, None) is None
    for lease in tight:
        lease.close()


def test_nobody_looks_away_because_of_a_guess(router, pool):
    assert join(router, pool[1:], 1e-9) is not None
    assert join(router, pool[1:2], 1e-9) is not None
    assert router.plan(Membership(1, pool), prompt_tokens=1, max_tokens=1).outlook is None
