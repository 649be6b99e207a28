"""Where requests go once something is known: by predicted times, caches, sessions and lots."""

from dataclasses import replace
from random import Random

import pytest

from baton.core.hashing import chain_hashes, prefix_root
from baton.core.instance_events import KEY_BYTES, BlockChanges, CacheTerms, InstanceLoad
from baton.core.request import FinishReason
from baton.core.topology import Membership, Role
from baton.core.trace import HandoverTrace, MigrationTrace, RequestTrace
from baton.router.load import key_of
from baton.router.router import Hint, Router
from baton.router.state import RouterState

PROMPT = tuple(range(512))
TERMS = CacheTerms(16, "xxh3_128", local_prefill=True)
ROOMY = InstanceLoad(free_tokens=100_000)


@pytest.fixture
def state():
    return RouterState(10_000)


@pytest.fixture
def last() -> dict:
    """What each instance told last of its load."""
    return {}


@pytest.fixture
def tell(state, last):
    """Let instances tell their load, and of having so many blocks of PROMPT."""

    def tell(*instances, load=ROOMY, blocks=0, terms=TERMS):
        chain = chain_hashes(PROMPT, 16, prefix_root(""))[:blocks]
        keys = b"".join(value[:KEY_BYTES] for value in chain)
        for instance in instances:
            key = key_of(instance)
            state.opened(key, terms)
            assert state.changed(key, BlockChanges(0, 0, 0, True, keys, b""))
            state.told(key, load)
            last[key] = load

    return tell


@pytest.fixture
def fleet(make_instance):
    prefill = [make_instance(f"p{n}", Role.PREFILL, kv_tokens=100_000) for n in range(3)]
    decode = [make_instance(f"d{n}", kv_tokens=100_000) for n in range(3)]
    return prefill, decode


@pytest.fixture
def ask(state, fleet, last):
    """Route a request; if it is not kept, it is over, and all who tell anything tell so again."""
    router = Router(max_open_requests=1000, state=state)

    def ask(request_id="r", prompt=PROMPT, session="", router=router, keep=False):
        membership = Membership(1, (*fleet[0], *fleet[1]))
        hint = Hint(request_id, prompt, "", session)
        lease = router.admit(membership, prompt_tokens=len(prompt), max_tokens=16, hint=hint)
        if not keep:
            lease.close()
            for key, load in last.items():
                state.told(key, load)
        return lease

    ask.router = router
    yield ask
    router.check()


def names(instances):
    return [str(i.instance_id) for i in instances]


def test_a_prompt_goes_where_its_blocks_are(ask, tell, fleet):
    (p0, p1, p2), (d0, d1, d2) = fleet
    tell(p0, p2, d0, d1)
    tell(p1, d2, blocks=30)
    route = ask().route
    assert names(route.prefill) == ["p1", "p0", "p2"]
    assert route.decode is d2
    other = ask(prompt=PROMPT[::-1]).route
    assert (other.decode, other.prefill[0]) == (d0, p0), "nobody has anything of it"


def test_a_cache_yields_to_a_queue(ask, tell, fleet):
    (p0, p1, p2), decode = fleet
    tell(p0, p2, *decode)
    tell(p1, blocks=30, load=replace(ROOMY, queued_tokens=300))
    assert ask().route.prefill[0] is p1, "480 tokens more to compute, or 300 to wait for"
    tell(p1, blocks=30, load=replace(ROOMY, queued_tokens=3000))
    assert ask().route.prefill[0] is p0


def test_what_was_sent_since_counts_until_the_next_report(ask, tell, fleet, state):
    (p0, p1, p2), decode = fleet
    tell(p0, p1, p2, *decode)
    leases = [ask(f"r{n}", keep=True) for n in range(3)]
    assert {str(lease.route.prefill[0].instance_id) for lease in leases} == {"p0", "p1", "p2"}
    assert {str(lease.route.decode.instance_id) for lease in leases} == {"d0", "d1", "d2"}
    for lease in leases:
        lease.close()


def test_full_batches_and_pools_are_avoided(ask, tell, fleet):
    prefill, (d0, d1, d2) = fleet
    tell(*prefill, d2)
    tell(d0, load=replace(ROOMY, running=60, context_tokens=60_000))
    tell(d1, load=InstanceLoad(free_tokens=10))
    assert ask().route.decode is d2


def test_a_session_stays_with_its_instances_while_it_may(ask, tell, fleet, state):
    prefill, decode = fleet
    tell(*prefill, *decode)
    first = {s: ask(session=s).route for s in map(str, range(40))}
    assert {str(r.decode.instance_id) for r in first.values()} == {"d0", "d1", "d2"}
    other = Router(max_open_requests=9, state=state, salt="b", rng=Random(1))
    for session, route in first.items():
        again = ask(session=session, router=other).route
        assert (again.decode, again.prefill[0]) == (route.decode, route.prefill[0])
    own = first["0"].decode
    tell(own, load=replace(ROOMY, running=300, context_tokens=300_000))
    assert ask(session="0").route.decode is not own, "it yields to load"
    left = {str(i.instance_id) for i in (*prefill, *decode)} - {str(own.instance_id)}
    moved = {s: ask(session=s).route.decode for s in first}
    stayed = [s for s, route in first.items() if str(route.decode.instance_id) in left]
    assert all(moved[s] is first[s].decode for s in stayed), "only those that were there move"


def test_a_session_is_kept_where_nothing_is_told(ask):
    route = ask(session="s").route
    assert all(ask(session="s").route.decode is route.decode for _ in range(5))
    leases = [ask(session="s", keep=True) for _ in range(9)]
    assert len({str(lease.route.decode.instance_id) for lease in leases}) == 3, "yields to load"
    for lease in leases:
        lease.close()


def test_gateways_that_see_the_same_choose_differently_among_equals(ask, tell, fleet, state):
    tell(*fleet[0], *fleet[1])
    chosen = set()
    for n in range(30):
        router = Router(max_open_requests=9, state=state, salt=f"gateway-{n}", rng=Random(n))
        lease = ask(router=router, keep=True)
        chosen.add(str(lease.route.decode.instance_id))
        state.told(key_of(lease.route.decode), ROOMY)
        lease.close()
    assert chosen == {"d0", "d1", "d2"}


def test_of_many_that_tell_nothing_two_are_drawn(ask, fleet, state, make_instance):
    many = tuple(make_instance(f"x{n}", kv_tokens=100_000) for n in range(50))
    router = Router(max_open_requests=500, state=state, salt="a", rng=Random(7))
    leases = [router.admit(Membership(1, many), prompt_tokens=10, max_tokens=1) for _ in range(200)]
    loads = [load.requests for load in router.stats().decode.values()]
    assert len(loads) > 40
    assert max(loads) <= 8, "two choices keep 200 requests on 50 close together"
    for lease in leases:
        lease.close()
    router.check()


def test_at_most_eight_prefill_instances_are_tried(ask, make_instance, state):
    many = tuple(make_instance(f"p{n}", Role.PREFILL) for n in range(20))
    router = Router(max_open_requests=9, state=state)
    membership = Membership(1, (*many, make_instance("d0")))
    with router.admit(membership, prompt_tokens=10, max_tokens=1) as lease:
        assert len(lease.route.prefill) == 8


# What was measured


def trace_of(lease, request_id="r", **changes) -> RequestTrace:
    handover = HandoverTrace(
        str(lease.route.prefill[0].instance_id) if lease.route.prefill else "",
        0,
        "ok",
        queue_s=0.001,
        compute_s=0.8,
        handshake_s=0.3,
        blocks=32,
        bytes=32 << 20,
    )
    values = {
        "request_id": request_id,
        "decode_instance": str(lease.route.decode.instance_id),
        "prompt_tokens": len(PROMPT),
        "output_tokens": 16,
        "finish": FinishReason.LENGTH,
        "handovers": (handover,),
        "ttft_s": 1.2,
        "tpot_s": 0.01,
    }
    return RequestTrace(**{**values, **changes})


def test_a_prompt_stays_with_decode_where_that_is_measured_to_be_cheaper(ask, tell, fleet):
    prefill, decode = fleet
    tell(*prefill, *decode)
    for n in range(3):  # handovers are slow
        lease = ask(f"h{n}")
        assert lease.route.prefill
        ask.router.ended(trace_of(lease, f"h{n}"))
        ask.router.ended(
            trace_of(ask(f"l{n}"), f"l{n}", local_prefill=True, handovers=(), ttft_s=0.02)
        )
    alone = [ask(f"x{n}").route.prefill == () for n in range(64)]
    assert alone.count(False) == 2, "each 32nd is handed over, to measure it again"
    assert ask.router.explain("x1")["decisions"][0]["chosen"]["prefill"] is None
    tell(*decode, terms=replace(TERMS, local_prefill=False))
    assert ask().route.prefill, "they do not compute by choice"


def test_predictions_follow_what_was_measured(ask, tell, fleet):
    tell(*fleet[0], *fleet[1])
    for n in range(60):
        ask.router.ended(trace_of(ask(f"r{n}"), f"r{n}"))
    [decision] = ask.router.explain("r59")["decisions"]
    ask("last")
    chosen = ask.router.explain("last")["decisions"][0]["chosen"]
    assert chosen["ttft_s"] == pytest.approx(1.2, rel=0.2)
    assert chosen["tpot_s"] == pytest.approx(0.01, rel=0.2)
    assert decision["expected_output_tokens"] == 16


def test_regret_is_what_is_known_better_now(ask, tell, fleet):
    """A queue was thought to cost little; now it is known to cost much."""
    (p0, p1, p2), decode = fleet
    tell(p1, p2, *decode, load=ROOMY)
    tell(p0, load=replace(ROOMY, queued_tokens=400), blocks=31)
    lease = ask("first")
    assert lease.route.prefill[0] is p0
    assert ask.router.explain("first")["decisions"][0]["regret_s"] == 0
    for n in range(40):
        lease = ask(f"r{n}")
        [handover] = trace_of(lease).handovers
        slow = replace(handover, queue_s=2.0, compute_s=0.001, cached_tokens=496)
        ask.router.ended(trace_of(lease, f"r{n}", handovers=(slow,)))
    told = ask.router.explain("first")
    assert told["decisions"][0]["regret_s"] > 0.1
    assert told["measured"] is None, "it never ended"


def test_requests_that_moved_or_failed_teach_nothing(ask, tell, fleet):
    tell(*fleet[0], *fleet[1])
    before = ask.router.explain(ask("a").hint.request_id)["decisions"][0]["chosen"]
    moved = (MigrationTrace("d0", "instance_lost", 3, 0.1),)
    for n in range(20):
        ask.router.ended(trace_of(ask(f"r{n}"), f"r{n}", migrations=moved, ttft_s=60.0))
        ask.router.ended(trace_of(ask(f"s{n}"), f"s{n}", output_tokens=0, ttft_s=0.0))
    assert ask.router.explain(ask("b").hint.request_id)["decisions"][0]["chosen"] == before


def test_decisions_are_forgotten_in_their_order(state, fleet, ask):
    router = Router(max_open_requests=9, state=state, decisions_kept=3)
    leases = [ask(f"r{n}", router=router) for n in range(5)]
    router.ended(trace_of(leases[0], "r0"))
    router.ended(trace_of(leases[4], "r4"))
    assert [router.explain(f"r{n}") is None for n in range(5)] == [True, True, False, False, False]
    told = router.explain("r4")
    assert told["tenant"] == ""
    assert told["measured"]["ttft_s"] == 1.2
    assert told["decisions"][0]["decided"].startswith("least loaded")


def test_a_move_is_a_decision_of_its_own(ask, fleet):
    lease = ask("moved", keep=True)
    old = lease.route.decode
    lease.move(Membership(2, tuple(i for i in (*fleet[0], *fleet[1]) if i is not old)))
    lease.close()
    first, second = ask.router.explain("moved")["decisions"]
    assert first["chosen"]["decode"] == str(old.instance_id) != second["chosen"]["decode"]
    assert second["membership_version"] == 2
