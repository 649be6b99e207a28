import contextlib
import random

import pytest

from baton.core.clock import ManualClock
from baton.core.errors import Overloaded, Unavailable
from baton.core.ids import Incarnation
from baton.core.topology import Membership, Role
from baton.router.load import Load, key_of
from baton.router.router import Router


def test_spreads_over_the_least_loaded_pair(router, make_instance):
    d0, d1 = make_instance("d0"), make_instance("d1")
    p0, p1 = make_instance("p0", Role.PREFILL), make_instance("p1", Role.PREFILL)
    membership = Membership(1, (d0, d1, p0, p1))
    first = router.admit(membership, prompt_tokens=100, max_tokens=1)
    assert first.route.decode is d0
    assert first.route.prefill == (p0, p1)
    second = router.admit(membership, prompt_tokens=10, max_tokens=1)
    assert second.route.decode is d1
    assert second.route.prefill == (p1, p0)
    third = router.admit(membership, prompt_tokens=10, max_tokens=1)
    assert third.route.decode is d1, "100 tokens of KV weigh more than 10"
    assert third.route.prefill == (p1, p0)


def test_output_tokens_weigh_on_decode_and_free_prefill(router, make_instance):
    d0, d1 = make_instance("d0"), make_instance("d1")
    p0, p1 = make_instance("p0", Role.PREFILL), make_instance("p1", Role.PREFILL)
    membership = Membership(1, (d0, d1, p0, p1))
    first = router.admit(membership, prompt_tokens=10, max_tokens=500)
    second = router.admit(membership, prompt_tokens=20, max_tokens=500)
    first.generated(1)
    first.generated(30)
    assert router.stats().decode[key_of(d0)] == Load(1, 41)
    assert key_of(p0) not in router.stats().prefill
    third = router.admit(membership, prompt_tokens=5, max_tokens=1)
    assert third.route.decode is d1
    assert third.route.prefill == (p0, p1)
    second.close()
    assert router.stats().decode[key_of(d1)] == Load(1, 5)


def test_a_bigger_pool_takes_more(router, make_instance):
    small, big = make_instance("a", kv_tokens=1000), make_instance("b", kv_tokens=4000)
    membership = Membership(1, (small, big))
    chosen = [
        router.admit(membership, prompt_tokens=100, max_tokens=1).route.decode for _ in range(4)
    ]
    assert chosen.count(big) == 3


def test_beyond_the_bound_is_overloaded_until_one_ends(router, make_instance):
    membership = Membership(1, (make_instance("d0"),))
    leases = [router.admit(membership, prompt_tokens=1, max_tokens=1) for _ in range(4)]
    with pytest.raises(Overloaded, match="4 requests are open"):
        router.admit(membership, prompt_tokens=1, max_tokens=1)
    leases[0].close()
    leases[0].close()
    router.admit(membership, prompt_tokens=1, max_tokens=1)
    assert router.stats().open_requests == 4
    assert router.stats().overloaded == 1


@pytest.mark.parametrize(("gap", "expected"), [(0.1, 1.0), (5.0, 5.0), (500.0, 60.0)])
def test_retry_after_follows_recent_completions(gap, expected, make_instance):
    clock = ManualClock()
    router = Router(max_open_requests=1, clock=clock)
    membership = Membership(1, (make_instance("d0"),))
    for _ in range(10):
        router.admit(membership, prompt_tokens=1, max_tokens=1).close()
        clock.advance(gap)
    router.admit(membership, prompt_tokens=1, max_tokens=1)
    with pytest.raises(Overloaded) as refused:
        router.admit(membership, prompt_tokens=1, max_tokens=1)
    assert refused.value.retry_after_s == pytest.approx(expected, rel=0.2)


def test_without_a_decode_instance_that_fits_it_is_unavailable(router, make_instance):
    prefill = make_instance("p0", Role.PREFILL)
    small = make_instance("d0", max_model_len=10)
    for membership in (Membership(), Membership(1, (prefill,)), Membership(1, (prefill, small))):
        with pytest.raises(Unavailable):
            router.admit(membership, prompt_tokens=8, max_tokens=3)
    assert router.stats().unavailable == 3
    assert (
        router.admit(Membership(1, (small,)), prompt_tokens=8, max_tokens=2).route.decode is small
    )


def test_prefill_must_be_compatible_and_fit(router, make_instance):
    decode = make_instance("d0")
    other = make_instance("p0", Role.PREFILL, compatibility="other")
    short = make_instance("p1", Role.PREFILL, max_model_len=10)
    membership = Membership(1, (decode, other, short))
    assert router.admit(membership, prompt_tokens=11, max_tokens=1).route.prefill == ()
    assert router.admit(membership, prompt_tokens=10, max_tokens=1).route.prefill == (short,)


def test_mixed_never_gets_a_prefill_instance(router, make_instance):
    membership = Membership(1, (make_instance("m0", Role.MIXED), make_instance("p0", Role.PREFILL)))
    assert router.admit(membership, prompt_tokens=1, max_tokens=1).route.prefill == ()


def test_a_restarted_instance_starts_empty(router, make_instance):
    old = make_instance("d0", incarnation=Incarnation(1))
    new = make_instance("d0", incarnation=Incarnation(2))
    lease = router.admit(Membership(1, (old,)), prompt_tokens=50, max_tokens=1)
    router.admit(Membership(2, (new,)), prompt_tokens=5, max_tokens=1)
    assert router.stats().decode == {key_of(old): Load(1, 50), key_of(new): Load(1, 5)}
    lease.close()
    assert router.stats().decode == {key_of(new): Load(1, 5)}


def test_a_lease_is_given_back_when_its_block_raises(router, make_instance):
    membership = Membership(1, (make_instance("d0"), make_instance("p0", Role.PREFILL)))
    with (
        pytest.raises(RuntimeError),
        router.admit(membership, prompt_tokens=1, max_tokens=1),
    ):
        raise RuntimeError
    stats = router.stats()
    assert (stats.open_requests, stats.decode, stats.prefill) == (0, {}, {})


def test_a_request_moves_with_all_that_it_holds(router, make_instance):
    d0, d1 = make_instance("d0"), make_instance("d1")
    p0, p1 = make_instance("p0", Role.PREFILL), make_instance("p1", Role.PREFILL)
    lease = router.admit(Membership(1, (d0, p0)), prompt_tokens=50, max_tokens=9)
    lease.generated(3)
    assert router.stats().prefill == {}
    lease.move(Membership(2, (d1, p1)))
    assert (lease.route.decode, lease.route.prefill) == (d1, (p1,))
    assert router.stats().decode == {key_of(d1): Load(1, 53)}
    assert router.stats().prefill == {key_of(p1): Load(1, 53)}, "output is computed again"
    router.check()
    lease.move(Membership(3, (d0, p0)))
    lease.generated(2)
    assert router.stats().decode == {key_of(d0): Load(1, 55)}
    lease.close()
    assert (router.stats().decode, router.stats().prefill) == ({}, {})


def test_an_avoided_instance_is_chosen_last(router, make_instance):
    d0, d1 = make_instance("d0"), make_instance("d1")
    busy = router.admit(Membership(1, (d1,)), prompt_tokens=500, max_tokens=1)
    lease = router.admit(Membership(1, (d0,)), prompt_tokens=5, max_tokens=1)
    lease.move(Membership(1, (d0, d1)), avoided={key_of(d0)})
    assert lease.route.decode is d1
    lease.move(Membership(2, (d0,)), avoided={key_of(d0)})
    assert lease.route.decode is d0
    busy.close()


def test_where_nobody_can_take_it_nothing_has_changed(router, make_instance):
    d0, small = make_instance("d0"), make_instance("d1", max_model_len=13)
    lease = router.admit(Membership(1, (d0,)), prompt_tokens=5, max_tokens=9)
    lease.generated(8)
    before = router.stats().decode
    for membership in (Membership(), Membership(1, (small,))):
        with pytest.raises(Unavailable):
            lease.move(membership)
    assert router.stats().decode == before
    small = make_instance("d1", max_model_len=14)
    lease.move(Membership(2, (small,)))
    assert lease.route.decode is small


@pytest.mark.parametrize("seed", range(5))
def test_any_history_keeps_the_counts_and_ends_at_zero(seed, make_instance):
    rng = random.Random(seed)
    clock = ManualClock()
    router = Router(max_open_requests=8, clock=clock)
    instances = [
        make_instance(f"i{n}", rng.choice(list(Role)), kv_tokens=rng.randint(100, 9999))
        for n in range(6)
    ] + [make_instance("d9")]
    leases = []
    for step in range(300):
        clock.advance(rng.random())
        action = rng.random()
        if action < 0.4:
            present = tuple(i for i in instances if rng.random() < 0.7) or tuple(instances)
            membership = Membership(step, present)
            with contextlib.suppress(Overloaded, Unavailable):
                tokens = rng.randint(1, 99)
                leases.append(router.admit(membership, prompt_tokens=tokens, max_tokens=1))
        elif leases and action < 0.8:
            rng.choice(leases).generated(rng.randint(1, 4))
            with contextlib.suppress(Unavailable):
                present = tuple(i for i in instances if rng.random() < 0.3)
                rng.choice(leases).move(Membership(step, present))
        elif leases:
            leases.pop(rng.randrange(len(leases))).close()
        router.check()
        assert router.stats().open_requests == len(leases)
    for lease in leases:
        lease.close()
    router.check()
    assert router.stats().decode == router.stats().prefill == {}


def test_check_notices_a_leak(router, make_instance):
    lease = router.admit(Membership(1, (make_instance("d0"),)), prompt_tokens=3, max_tokens=1)
    lease.output_tokens += 1
    with pytest.raises(AssertionError):
        router.check()
    lease.output_tokens -= 1


def test_the_backup_is_the_second_best_that_can_read_the_kv(router, make_instance):
    d0, d1, d2 = (make_instance(f"d{i}") for i in range(3))
    other = make_instance("c-other", compatibility="other")
    mixed = make_instance("b-mixed", Role.MIXED)
    short = make_instance("a-short", max_model_len=10)
    membership = Membership(1, (d0, d1, d2, short))
    first = router.admit(membership, prompt_tokens=100, max_tokens=1)
    assert (first.route.decode, first.route.backup) == (d0, d1)
    second = router.admit(membership, prompt_tokens=50, max_tokens=1)
    assert (second.route.decode, second.route.backup) == (d1, d2), "loads count for it too"
    assert key_of(d2) not in router.stats().decode, "a backup is no load"
    alone = router.admit(Membership(2, (d0, mixed, other)), prompt_tokens=20, max_tokens=1)
    assert (alone.route.decode, alone.route.backup) == (mixed, None)
    last = router.admit(Membership(3, (d0, other)), prompt_tokens=20, max_tokens=1)
    assert last.route.backup is None, "none that could read it"


def test_what_moves_goes_to_its_backup_however_busy_that_is(router, make_instance):
    d0, d1, d2 = (make_instance(f"d{i}") for i in range(3))
    membership = Membership(1, (d0, d1, d2))
    lease = router.admit(membership, prompt_tokens=100, max_tokens=1)
    assert lease.route.backup is d1
    router.admit(membership, prompt_tokens=500, max_tokens=1)
    left = Membership(2, (d1, d2))
    lease.move(left, avoided={key_of(d0)}, preferred=key_of(d1))
    assert (lease.route.decode, lease.route.backup) == (d1, d2)
    lease.move(left, avoided={key_of(d1)}, preferred=key_of(d1))
    assert lease.route.decode is d2, "it was lost on it"
    lease.move(left, preferred=key_of(d0))
    assert lease.route.decode is d2, "gone: the least loaded one"
