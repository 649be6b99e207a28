import pytest

from baton.core.clock import ManualClock
from baton.core.topology import InstanceInfo, Membership, Role
from baton.core.trace import HandoverTrace
from baton.router.failures import AVOIDED_S
from baton.router.router import Router

from .conftest import MakeInstance


@pytest.fixture
def prefill(make_instance: MakeInstance) -> tuple[InstanceInfo, InstanceInfo]:
    return make_instance("p0", Role.PREFILL), make_instance("p1", Role.PREFILL)


@pytest.fixture
def membership(make_instance: MakeInstance, prefill: tuple[InstanceInfo, ...]) -> Membership:
    return Membership(1, (make_instance("d0"), *prefill))


def ranking(router: Router, membership: Membership, *handovers: HandoverTrace) -> list[str]:
    """Admit a request whose attempts end with `handovers`; return how prefill was ranked for it."""
    with router.admit(membership, prompt_tokens=10, max_tokens=1) as lease:
        lease.handed_over(handovers)
        return [instance.instance_id for instance in lease.route.prefill]


@pytest.mark.parametrize(
    "outcome", ["peer_lost", "unavailable", "instance_lost", "draining", "deadline_exceeded"]
)
def test_a_prefill_instance_that_failed_comes_last_for_a_while(
    router: Router, membership: Membership, clock: ManualClock, outcome: str
) -> None:
    failed, good = HandoverTrace("p0", 0, outcome), HandoverTrace("p1", 1, "ok")
    assert ranking(router, membership, failed, good) == ["p0", "p1"]
    clock.advance(AVOIDED_S / 2)
    assert ranking(router, membership) == ["p1", "p0"]
    clock.advance(AVOIDED_S / 2)
    assert ranking(router, membership) == ["p0", "p1"]


@pytest.mark.parametrize("outcome", ["cancelled", "wrong_kv", "incompatible", "ok"])
def test_other_outcomes_say_nothing_of_its_life(
    router: Router, membership: Membership, outcome: str
) -> None:
    ranking(router, membership, HandoverTrace("p0", 0, outcome))
    assert ranking(router, membership) == ["p0", "p1"]


def test_a_success_ends_it_and_all_failing_are_ranked_by_load(
    router: Router, membership: Membership
) -> None:
    lost = [HandoverTrace(name, 0, "peer_lost") for name in ("p0", "p1")]
    ranking(router, membership, *lost)
    assert ranking(router, membership) == ["p0", "p1"], "still better than none"
    ranking(router, membership, HandoverTrace("p1", 0, "ok"))
    assert ranking(router, membership) == ["p1", "p0"]


def test_a_restarted_instance_has_not_failed_and_an_unknown_one_is_ignored(
    router: Router, membership: Membership, make_instance: MakeInstance
) -> None:
    ranking(router, membership, *(HandoverTrace(n, 0, "peer_lost") for n in ("p0", "stranger")))
    restarted = make_instance("p0", Role.PREFILL, incarnation=2)
    others = tuple(i for i in membership.instances if i.instance_id != "p0")
    assert ranking(router, Membership(2, (*others, restarted))) == ["p0", "p1"]
