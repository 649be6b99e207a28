"""What an HPA or KEDA asks of a BatonPool comes to the controller, and what came of it back."""

import importlib.util
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from baton.cluster.placement import room_of
from baton.cluster.spec import load_spec
from baton.cluster.status import InstanceStatus, PoolStatus, Status
from baton.core.autoscale import AutoscaleConfig
from baton.core.errors import InvalidRequest, Unavailable
from baton.core.metric_table import INSTANCE_OPEN
from tests.deploy.api_server import ApiServer
from tests.deploy.chart import (
    CHART,
    EVERYTHING,
    NAME,
    NAMESPACE,
    Document,
    groups,
    of_kind,
    rendered,
    spec_text,
)
from tests.deploy.schemas import CRD, VERSIONS, mistakes
from tests.deploy.test_values import merged

HPA: Document = merged(EVERYTHING, {"scaling": {"by": "hpa"}})
BY = pytest.mark.parametrize("values", [EVERYTHING, HPA], ids=["keda", "hpa"])


@pytest.fixture(scope="module")
def sizes() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("sizes", CHART / "scripts" / "sizes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    with ApiServer(0, tmp_path, NAMESPACE) as server:
        for name, replicas in Cluster().counts.items():
            server.write(f"{NAME}-{name}", {"spec": {"pool": name, "replicas": replicas}})
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def api(sizes: ModuleType, server: ApiServer, tmp_path: Path) -> Any:
    (tmp_path / "token").write_text("secret\n")
    host, port = server.server_address[:2]
    return sizes.Kubernetes(f"http://{host!s}:{port}", NAMESPACE, tmp_path)


@dataclass
class Cluster:
    """A controller that has so many instances, and takes some sizes."""

    counts: dict[str, int] = field(default_factory=lambda: {"demo-prefill": 1, "demo-decode": 2})
    most: int = 4

    async def call(self, method: str, *arguments: Any) -> Any:
        if method == "scale":
            pool, count = arguments
            if count > 8:
                raise InvalidRequest("instances", count, "1 to 8, as autoscale says")
            if count > self.most:
                raise Unavailable("all nodes have baton-decode 4")
            self.counts[pool] = count
            return True
        assert method == "status"
        return Status(
            controller_pid=1,
            epoch=1,
            settled=True,
            drain_timeout_s=1.0,
            pools=tuple(
                PoolStatus(name, "decode", "demo", count, self._instances(count))
                for name, count in self.counts.items()
            ),
            gateways=(),
        )

    def _instances(self, count: int) -> tuple[InstanceStatus, ...]:
        phase = {1: "starting"}
        return tuple(InstanceStatus(f"i{k}", phase.get(k, "ready"), 0, 1) for k in range(count))


DECODE = f"{NAME}-demo-decode"


def ask(server: ApiServer, replicas: int) -> None:
    server.write(DECODE, {"spec": {"pool": "demo-decode", "replicas": replicas}})


def told(server: ApiServer) -> Any:
    return server.read(DECODE)["status"]


async def test_what_is_asked_is_done_and_told(
    sizes: ModuleType, server: ApiServer, api: Any
) -> None:
    cluster = Cluster()
    assert await sizes.look(cluster, api, NAME) == (cluster.counts, False)
    assert told(server) == {
        "replicas": 2,
        "readyReplicas": 1,
        "selector": f"ray.io/cluster={NAME},ray.io/group=decode",
        "problem": "",
    }
    ask(server, 3)
    await sizes.look(cluster, api, NAME)
    assert (cluster.counts["demo-decode"], told(server)["replicas"]) == (3, 3)
    assert cluster.counts["demo-prefill"] == 1
    assert set(server.tokens) == {"Bearer secret"}


async def test_without_room_it_is_said_and_ray_is_to_be_asked(
    sizes: ModuleType, server: ApiServer, api: Any
) -> None:
    cluster = Cluster()
    ask(server, 6)
    assert await sizes.look(cluster, api, NAME) == ({"demo-prefill": 1, "demo-decode": 6}, True)
    assert (cluster.counts["demo-decode"], told(server)["replicas"]) == (4, 4), "as far as it goes"
    assert "baton-decode 4" in told(server)["problem"]
    cluster.most = 8  # Ray's autoscaler has brought nodes
    sized, lacking = await sizes.look(cluster, api, NAME)
    assert (sized["demo-decode"], lacking, cluster.counts["demo-decode"]) == (6, False, 6)
    assert told(server)["problem"] == ""
    ask(server, 1)
    await sizes.look(cluster, api, NAME)
    assert cluster.counts["demo-decode"] == 1


async def test_what_the_spec_does_not_allow_is_said_and_asks_for_no_nodes(
    sizes: ModuleType, server: ApiServer, api: Any
) -> None:
    cluster = Cluster()
    ask(server, 9)
    _, lacking = await sizes.look(cluster, api, NAME)
    assert not lacking
    assert "1 to 8" in told(server)["problem"]
    assert cluster.counts["demo-decode"] == 2


async def test_a_pool_that_is_not_there_is_an_error(
    sizes: ModuleType, server: ApiServer, api: Any
) -> None:
    (server.folder / f"{DECODE}.json").unlink()
    with pytest.raises(OSError, match=f"{NAME}-demo-decode: HTTP Error 404"):
        await sizes.look(Cluster(), api, NAME)


def test_the_room_that_ray_is_asked_for_is_that_of_all_pools(
    sizes: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(spec_text(rendered({"decode": {"pool": {"parallel": {"tp": 2}}}})))
    found = sizes.bundles(path, {"demo-prefill": 1, "demo-decode": 3})
    pools = {name: pool for name, (_, pool) in load_spec(path).pools().items()}
    one, three = room_of(pools["demo-prefill"]), room_of(pools["demo-decode"])
    assert found == [*one.bundles, *three.bundles * 3]
    assert found[-1]["baton-decode"] == 2


@BY
def test_somebody_else_sizes_every_pool_by_what_gateways_export(values: Document) -> None:
    documents = rendered(values)
    pools = {p["metadata"]["name"]: p["spec"]["pool"] for p in of_kind(documents, "BatonPool")}
    spec = yaml.safe_load(spec_text(documents))
    wanted = {name: pool for model in spec["models"] for name, pool in model["pools"].items()}
    assert pools == {f"{NAME}-{name}": name for name in wanted}
    kind = "ScaledObject" if values is EVERYTHING else "HorizontalPodAutoscaler"
    scalers = of_kind(documents, kind)
    assert len(scalers) == len(pools) == 4
    assert not [
        d
        for d in documents
        if d["kind"] in ("ScaledObject", "HorizontalPodAutoscaler") and d["kind"] != kind
    ]
    services = {s["metadata"]["name"] for s in of_kind(documents, "Service")}
    for scaler in scalers:
        target = scaler["spec"]["scaleTargetRef"]
        version = CRD["spec"]["versions"][0]
        group = f"{CRD['spec']['group']}/{version['name']}"
        assert (target["apiVersion"], target["kind"]) == (group, CRD["spec"]["names"]["kind"])
        pool = wanted[pools[target["name"]]]
        text = json.dumps(scaler["spec"])
        service = f"{NAME}-{pools[target['name']].partition('-')[0]}"
        assert service in services
        assert service in text
        assert pool["role"] in text
        if kind == "ScaledObject":
            query = scaler["spec"]["triggers"][0]["metadata"]["query"]
            assert f'{INSTANCE_OPEN.full_name}{{namespace="{NAMESPACE}"' in query
            assert "role" in INSTANCE_OPEN.labels
        bounds = AutoscaleConfig.model_validate(pool["autoscale"])
        assert (bounds.min, bounds.max) == (1, 1)
        assert "instances" not in pool, "`up` leaves the size as it is"


@BY
def test_only_the_container_that_asks_kubernetes_has_a_token(values: Document) -> None:
    found = groups(rendered(merged(values, {"ray": {"autoscaler": {"enabled": False}}})))
    for group in found:
        assert not group.spec["automountServiceAccountToken"]
    projected = [v["name"] for v in found[0].spec["volumes"] if "projected" in v]
    having = [
        c["name"]
        for c in found[0].spec["containers"]
        if any(m["name"] in projected for m in c["volumeMounts"])
    ]
    assert having == ["sizes"]


def test_its_command_line_is_its_own(sizes: ModuleType, capsys: Any, monkeypatch: Any) -> None:
    (container,) = [
        c for c in groups(rendered(EVERYTHING))[0].spec["containers"] if c["name"] == "sizes"
    ]
    assert container["command"][1].endswith("/sizes.py")
    monkeypatch.setattr("sys.argv", [*container["command"][1:], "--help"])
    with pytest.raises(SystemExit):
        sizes.main()
    options = capsys.readouterr().out
    for argument in container["args"]:
        assert f"{argument.partition('=')[0]} " in options


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_would_take_what_the_chart_defines(version: str) -> None:
    assert not list(mistakes(CRD, version))
    assert CRD["metadata"]["name"] == f"{CRD['spec']['names']['plural']}.{CRD['spec']['group']}"


def test_what_is_told_is_what_is_defined(sizes: ModuleType) -> None:
    defined = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    assert set(sizes.PoolState.__annotations__) == set(defined["properties"])
