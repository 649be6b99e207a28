import pytest

from baton.core.ids import InstanceId
from baton.core.trace import HandoverTrace
from baton.decode_worker.placement import Placement, Verdict
from baton.engine.step import Outlook

ONE, TWO = InstanceId("prefill-0"), InstanceId("prefill-1")


def handed_over(placement: Placement, name: InstanceId, tokens: int, **trace: float) -> None:
    placement.sent(name, tokens)
    placement.ended(name, tokens, HandoverTrace(name, 0, "ok", **trace))  # type: ignore[arg-type]


@pytest.fixture
def placement() -> Placement:
    """Prefill takes 1 ms per token and 10 ms per handover; a token costs 2 ms here."""
    placement = Placement()
    handed_over(placement, ONE, 100, compute_s=0.1, handshake_s=0.004, exposed_s=0.006)
    placement.stepped(0.005, 0)
    placement.stepped(0.205, 100)
    return placement


def test_before_anything_was_measured_prefill_computes() -> None:
    placement = Placement()
    assert placement.decide(ONE, Outlook(5, 0, 0)) == Verdict(here=False)
    placement.stepped(0.1, 100)
    assert placement.decide(ONE, Outlook(5, 0, 0)) == Verdict(here=False)
    assert (placement.computed_here, placement.handed_over) == (0, 2)


def test_what_prefill_takes_per_token_stands_in_for_what_it_takes_here() -> None:
    placement = Placement()
    handed_over(placement, ONE, 100, compute_s=0.1, exposed_s=0.01)
    verdict = placement.decide(ONE, Outlook(5, 0, 0))
    assert verdict.here
    assert verdict.here_s == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("outlook", "here_s", "disturbance_s", "prefill_s", "here"),
    [
        (Outlook(9, 0, 0), 0.018, 0.0, 0.019, True),
        (Outlook(11, 0, 0), 0.022, 0.0, 0.021, False),
        (Outlook(9, 1, 0), 0.020, 0.0, 0.019, False),  # others wait here
        (Outlook(9, 0, 1), 0.018, 0.018, 0.019, False),  # others would be held up
        (Outlook(1, 0, 3), 0.002, 0.006, 0.011, True),  # most of it is in the cache
    ],
)
def test_the_cheaper_way_is_taken(
    placement: Placement,
    outlook: Outlook,
    *,
    here_s: float,
    disturbance_s: float,
    prefill_s: float,
    here: bool,
) -> None:
    verdict = placement.decide(ONE, outlook)
    assert verdict.here is here
    assert verdict.here_s == pytest.approx(here_s)
    assert verdict.disturbance_s == pytest.approx(disturbance_s)
    assert verdict.prefill_s == pytest.approx(prefill_s)
    assert verdict.estimate_s == (verdict.here_s if here else verdict.prefill_s)


@pytest.mark.parametrize(("weight", "here"), [(0.0, True), (1.0, True), (4.0, False)])
def test_pauses_in_streams_can_weigh_more_than_waiting(weight: float, here: bool) -> None:
    placement = Placement(weight)
    handed_over(placement, ONE, 100, compute_s=0.1, exposed_s=0.01)
    assert placement.decide(ONE, Outlook(5, 0, 1)).here is here


def test_a_queue_in_front_of_prefill_makes_it_dearer(placement: Placement) -> None:
    outlook = Outlook(50, 0, 0)
    assert not placement.decide(ONE, outlook).here
    placement.sent(ONE, 500)
    assert placement.decide(ONE, outlook).here
    placement.ended(ONE, 500, HandoverTrace(ONE, 0, "cancelled"))
    assert not placement.decide(ONE, outlook).here
    assert (placement.computed_here, placement.handed_over) == (1, 2)


def test_a_bad_moment_of_prefill_is_not_for_ever(placement: Placement) -> None:
    outlook = Outlook(50, 0, 0)
    handed_over(placement, ONE, 100, compute_s=0.1, handshake_s=10.0)
    here = 0
    while placement.decide(ONE, outlook).here:
        here += 1
        assert here < 100
    assert here > 10


def test_waiting_for_room_here_is_no_cost_of_a_handover(placement: Placement) -> None:
    before = placement.decide(ONE, Outlook(50, 0, 0))
    trace = {"compute_s": 0.1, "handshake_s": 0.004, "exposed_s": 0.006}
    handed_over(placement, ONE, 100, allocation_wait_s=10.0, **trace)
    after = placement.decide(ONE, Outlook(50, 0, 0))
    assert after.prefill_s == pytest.approx(before.prefill_s)


def test_cached_tokens_were_not_computed(placement: Placement) -> None:
    handed_over(placement, TWO, 100, compute_s=0.01, cached_tokens=90, exposed_s=0.01)
    verdict = placement.decide(TWO, Outlook(10, 0, 0))
    assert verdict.prefill_s == pytest.approx(0.02)
    handed_over(placement, TWO, 100, compute_s=5.0, cached_tokens=100, exposed_s=0.01)
    assert placement.decide(TWO, Outlook(10, 0, 0)) == verdict


def test_an_attempt_that_failed_says_nothing_of_cost() -> None:
    placement = Placement()
    placement.sent(ONE, 100)
    placement.ended(ONE, 100, HandoverTrace(ONE, 0, "peer_lost", compute_s=9.0))
    assert placement.decide(ONE, Outlook(5, 0, 0)).prefill_s is None


def test_instances_that_are_gone_are_forgotten_once_nothing_is_under_way(
    placement: Placement,
) -> None:
    placement.sent(ONE, 10)
    placement.keep_only([TWO])
    placement.ended(ONE, 10, HandoverTrace(ONE, 0, "peer_lost"))
    assert placement.decide(ONE, Outlook(5, 0, 0)).prefill_s is not None
    placement.keep_only([ONE])
    assert placement.decide(ONE, Outlook(5, 0, 0)).prefill_s is not None
    placement.keep_only([TWO])
    assert placement.decide(ONE, Outlook(5, 0, 0)).prefill_s is None
