"""What instances and gateways tell, put together for each pool."""

from dataclasses import replace
from pathlib import Path

from baton.cluster.autoscale import Signals
from baton.cluster.fleet import Phase
from baton.cluster.signals import signals_of
from baton.cluster.state import ControlState, scaled
from baton.cluster.status import GatewayInfo, ModelLoad
from baton.core.cluster_spec import ClusterSpec
from baton.core.ids import InstanceId
from baton.core.lease import Report, Standing
from baton.core.topology import Role
from tests.cluster.worlds import World

D0, D1 = InstanceId("decode-0"), InstanceId("decode-1")
AUTO = {"autoscale": {"min": 0, "max": 4}}
ONE = Report(
    Standing.HELD, waited_s=0.5, waiting=1, open_requests=3, blocks_used=10, blocks_total=100
)
OTHER = Report(Standing.HELD, waited_s=2.5, open_requests=4, blocks_used=50, blocks_total=100)
LOAD = ModelLoad(5, waiting=2, ttft_s=0.5, tpot_s=0.01)


def gateway(model: str = "m", load: ModelLoad = LOAD) -> GatewayInfo:
    """Return what a gateway of one model, and of another without requests, says."""
    return GatewayInfo("gateway-0", "", "", 1, 1, {model: load, "idle": ModelLoad(0)})


GATEWAY = gateway()


def running() -> ControlState:
    """Return a state in which one prefill and two decode instances are ready."""
    pools = {"prefill": AUTO, "decode": {**AUTO, "instances": 2}}
    spec = ClusterSpec.checked(models=[{"name": "m", "dir": Path("m"), "pools": pools}])
    state = ControlState.of(spec.with_secrets())
    world = World(*state.wishes())
    world.settle()
    return replace(state, fleet=world.fleet)


def test_instances_are_added_up_and_the_slowest_gateway_counts() -> None:
    gateways = [
        GATEWAY,
        gateway(load=replace(LOAD, ttft_s=0.75, tpot_s=None)),
        gateway("other", replace(LOAD, ttft_s=9.0)),
    ]
    reports = {D0: ONE, D1: OTHER, InstanceId("prefill-0"): replace(ONE, open_requests=99)}
    found = signals_of(running(), "decode", reports, gateways)
    assert found == Signals(open_requests=7, queue_s=2.5, ttft_s=0.75, tpot_s=0.01, kv_use=0.3)


def test_who_waits_at_a_gateway_counts_for_the_pool_that_has_no_room() -> None:
    gateways = [
        gateway(load=replace(LOAD, queue_s=3.5, queue_for=Role.DECODE)),
        gateway(load=replace(LOAD, queue_s=1.5, queue_for=Role.PREFILL)),
        gateway(load=replace(LOAD, queue_s=9.0)),  # it has as many open as it may itself
        gateway("other", replace(LOAD, queue_s=9.0, queue_for=Role.DECODE)),
    ]
    reports = {D0: ONE, D1: OTHER, InstanceId("prefill-0"): ONE}
    found = [signals_of(running(), pool, reports, gateways) for pool in ("decode", "prefill")]
    assert [signals and signals.queue_s for signals in found] == [3.5, 1.5]
    alone = signals_of(running(), "prefill", reports, gateways[:1])
    assert alone is not None
    assert alone.queue_s == ONE.waited_s


def test_nothing_is_said_before_every_instance_has_told() -> None:
    assert signals_of(running(), "decode", {D0: ONE}, [GATEWAY]) is None
    fleet = {n: replace(s, phase=Phase.LOST) for n, s in running().fleet.items()}
    assert signals_of(replace(running(), fleet=fleet), "decode", {}, [GATEWAY]) is None


def test_those_to_come_are_counted_and_those_that_leave_are_not() -> None:
    state = running()
    more = signals_of(scaled(state, "decode", 4), "decode", {D0: ONE, D1: ONE}, [])
    assert more is not None
    assert more.coming == 2
    leaving = {**state.fleet, D1: replace(state.fleet[D1], phase=Phase.DRAINING)}
    fewer = scaled(replace(state, fleet=leaving), "decode", 1)
    found = signals_of(fewer, "decode", {D0: ONE, D1: OTHER}, [])
    assert found is not None
    assert (found.open_requests, found.coming) == (3, 0)


def test_an_empty_pool_hears_of_work_from_gateways() -> None:
    state = scaled(scaled(running(), "decode", 0), "prefill", 0)
    other = gateway("other")
    assert signals_of(state, "decode", {}, [GATEWAY, other]) == Signals(open_requests=2)
    assert signals_of(state, "prefill", {}, [GATEWAY, other]) == Signals(open_requests=7)
    assert signals_of(state, "decode", {}, []) == Signals()
