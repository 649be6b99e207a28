"""Which gateways a spec wants."""

from pathlib import Path

from baton.cluster.gateway_keeper import gateway_plans, revision_of
from baton.core.cluster_spec import ClusterSpec


def spec(**gateways: int) -> ClusterSpec:
    pools = {"prefill": {}, "decode": {}}
    one = {"name": "one", "dir": Path("m"), "pools": pools, "gateways": gateways}
    two = {"name": "two", "dir": Path("m"), "pools": {"mixed": {}}}
    return ClusterSpec.checked(models=[one, two])


def test_each_model_has_its_own_with_ports_of_their_own() -> None:
    plans = gateway_plans(spec(count=2, http_port=80, grpc_port=81))
    seen = {n: (p.model_name, p.config.http_port, p.expects_prefill) for n, p in plans.items()}
    assert seen == {
        "gateway-0": ("one", 80, True),
        "gateway-1": ("one", 82, True),
        "gateway-2": ("two", 8000, False),
    }


def test_a_gateway_knows_which_pools_may_be_empty() -> None:
    def plan(**autoscale: int) -> tuple[bool, bool]:
        pools = {role: {"autoscale": {"max": 2, **autoscale}} for role in ("prefill", "decode")}
        model = {"name": "one", "dir": Path("m"), "pools": pools}
        found = gateway_plans(ClusterSpec.checked(models=[model]))["gateway-0"]
        return found.expects_prefill, found.may_be_empty

    assert plan(min=1) == (True, False)
    assert plan(min=0) == (False, True)


def test_a_change_of_what_it_is_started_with_is_another_revision() -> None:
    first = gateway_plans(spec(count=1))["gateway-0"]
    assert revision_of(first) == revision_of(gateway_plans(spec(count=2))["gateway-0"])
    other = gateway_plans(spec(count=1, max_open_requests=7))["gateway-0"]
    assert revision_of(first) != revision_of(other)
