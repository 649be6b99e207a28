"""The chart as its users would install it: each example, and the defaults."""

import copy
import functools
import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from baton.cli.main import app
from baton.cluster.placement import Node, lacking
from baton.cluster.spec import load_spec
from baton.core.cluster_spec import ClusterSpec
from tests.deploy.chart import (
    EXAMPLES,
    NAME,
    NAMESPACE,
    Document,
    Group,
    all_groups,
    containers,
    example,
    files,
    groups,
    lint,
    of_kind,
    one,
    rendered,
    spec_text,
)
from tests.deploy.schemas import VERSIONS, mistakes

CASES = ["defaults", "everything", *EXAMPLES]
pytestmark = pytest.mark.parametrize("case", CASES)
_MADE_BY_KUBERAY = {NAME}
"""Secrets."""


@pytest.fixture
def documents(case: str) -> list[Document]:
    return rendered(example(case))


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_would_take_all_of_it(documents: list[Document], version: str) -> None:
    assert not [wrong for document in documents for wrong in mistakes(document, version)]


def test_lint_has_nothing_to_say(case: str) -> None:
    report = lint(example(case))
    assert not report["errors"]
    told = [m for m in report["messages"] if m["severity"] > 1 or "icon" not in m["error"]]
    assert not told


def test_names_are_there_once(documents: list[Document]) -> None:
    names = [(d["kind"], d["metadata"]["name"]) for d in documents]
    assert len(names) == len(set(names))


def matching(found: list[Group], labels: dict[str, str]) -> list[Group]:
    return [group for group in found if labels.items() <= group.labels.items()]


def test_every_selector_selects_pods(documents: list[Document]) -> None:
    found = all_groups(documents)
    selectors = [s["spec"]["selector"] for s in of_kind(documents, "Service")]
    budgets = of_kind(documents, "PodDisruptionBudget")
    selectors += [b["spec"]["selector"]["matchLabels"] for b in budgets]
    for selector in selectors:
        assert len(matching(found, selector)) == 1, selector
    for policy in of_kind(documents, "NetworkPolicy"):
        assert matching(found, policy["spec"]["podSelector"]["matchLabels"])


def test_every_port_exists(documents: list[Document]) -> None:
    found = all_groups(documents)
    for service in of_kind(documents, "Service"):
        (group,) = matching(found, service["spec"]["selector"])
        names = {port["name"]: port["containerPort"] for port in group.ray["ports"]}
        for port in service["spec"]["ports"]:
            assert names[port["targetPort"]] == port["port"]
    for group in found:
        names = {port["name"] for port in group.ray["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = group.ray[probe]
            assert (asked.get("tcpSocket") or asked["httpGet"])["port"] in names
    for policy in of_kind(documents, "NetworkPolicy"):
        (selected, *_) = matching(found, policy["spec"]["podSelector"]["matchLabels"])
        names = {port["name"] for port in selected.ray["ports"]}
        ports = [p["port"] for rule in policy["spec"]["ingress"] for p in rule.get("ports", [])]
        assert set(ports) <= names


def test_routes_lead_to_services(documents: list[Document]) -> None:
    services = {
        s["metadata"]["name"]: {p["port"] for p in s["spec"]["ports"]}
        for s in of_kind(documents, "Service")
    }
    for route in (*of_kind(documents, "HTTPRoute"), *of_kind(documents, "GRPCRoute")):
        for backend in itertools.chain(*(r["backendRefs"] for r in route["spec"]["rules"])):
            assert backend["port"] in services[backend["name"]]
    for monitor in of_kind(documents, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"].items()
        read = [
            s["metadata"]["name"]
            for s in of_kind(documents, "Service")
            if wanted <= s["metadata"]["labels"].items()
        ]
        models = yaml.safe_load(spec_text(documents))["models"]
        assert len(read) == len(models), "and not Redis"


def test_volumes_are_there_and_mounted(documents: list[Document]) -> None:
    for group in all_groups(documents):
        volumes = {volume["name"] for volume in group.spec["volumes"]}
        mounted = [m["name"] for c in containers(group) for m in c["volumeMounts"]]
        assert volumes == set(mounted), group.name
        for container in containers(group):
            paths = [mount["mountPath"] for mount in container["volumeMounts"]]
            assert len(paths) == len(set(paths))


def secrets_in(value: Any) -> set[str]:
    """Return the names of all secrets that are referred to."""
    found = set()
    if isinstance(value, dict):
        for key, item in value.items():
            if key in ("secretKeyRef", "credentials"):
                found.add(item["name"])
            elif key == "secretName" or (key == "secret" and "key" in item):
                found.add(item if key == "secretName" else item["name"])
            found |= secrets_in(item)
    if isinstance(value, list):
        found = set().union(*map(secrets_in, value), found)
    return found


def test_every_secret_is_one_that_the_user_named_or_that_is_made(
    case: str, documents: list[Document]
) -> None:
    made = {c["spec"]["secretName"] for c in of_kind(documents, "Certificate")} | _MADE_BY_KUBERAY
    named = json.dumps(example(case))
    for secret in secrets_in(documents) - made:
        assert f'"{secret}"' in named, secret


def test_accounts_claims_and_config_maps_exist(case: str, documents: list[Document]) -> None:
    maps = {m["metadata"]["name"] for m in of_kind(documents, "ConfigMap")}
    claims = {c["metadata"]["name"] for c in of_kind(documents, "PersistentVolumeClaim")}
    claims |= {example(case).get("store", {}).get("existingClaim")}
    accounts = {a["metadata"]["name"] for a in of_kind(documents, "ServiceAccount")}
    for group in all_groups(documents):
        assert group.spec["serviceAccountName"] in accounts
        for volume in group.spec["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in maps
            for source in volume.get("projected", {}).get("sources", []):
                # Kubernetes makes this one in every namespace.
                assert source.get("configMap", {"name": ""})["name"] in ("", "kube-root-ca.crt")
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims


def spec_of(documents: list[Document], tmp_path: Any) -> ClusterSpec:
    path = tmp_path / "cluster.yaml"
    path.write_text(spec_text(documents))
    return load_spec(path)


def nodes(documents: list[Document]) -> list[Node]:
    """Return the pods as Ray will see them."""
    found = []
    for group in groups(documents):
        limits = group.ray["resources"]["limits"]
        custom = json.loads(group.start.get("resources", "'{}'")[1:-1])
        cpus = float(group.start.get("num-cpus", limits["cpu"]))
        total = {"CPU": cpus, "GPU": float(limits.get("nvidia.com/gpu", 0)), **custom}
        found += [Node(f"{group.name}-{i}", "", total, total) for i in range(group.replicas)]
    return found


def test_baton_takes_the_spec_and_everything_has_room(
    documents: list[Document], tmp_path: Any
) -> None:
    spec = spec_of(documents, tmp_path)
    there = nodes(documents)
    wanted = {
        name: (pool, pool.autoscale.max if pool.autoscale else pool.instances)
        for name, (_, pool) in spec.pools().items()
    }
    assert lacking(wanted, there) is None
    for model in spec.models:
        resource = model.gateways.node_resource
        assert sum(node.total.get(resource, 0) for node in there) == model.gateways.count
        assert model.gateways.of(model.gateways.count - 1).http_port == model.gateways.http_port


def test_the_specs_files_are_where_they_are_mounted(documents: list[Document]) -> None:
    spec = yaml.safe_load(spec_text(documents))
    (gateway, *_) = [g for g in groups(documents) if g.name.startswith("gateway-")]
    for group, paths in (
        (gateway, [spec["models"][0]["gateways"].get("api_keys")]),
        (gateway, spec["models"][0]["gateways"].get("tls", {}).values()),
        *((group, spec.get("tls", {}).values()) for group in groups(documents)),
    ):
        mounts = tuple(f"{m['mountPath']}/" for m in group.ray["volumeMounts"])
        assert all(file.startswith(mounts) for file in paths if file)


def accepted(command: list[str]) -> None:
    """Raise unless the real parser takes a command of `baton`."""
    assert command[0] == "baton"
    group: Any = typer.main.get_command(app)
    name, subcommand, rest = group.resolve_command(None, command[1:])
    subcommand.make_context(name, list(rest))


def test_every_command_is_one_that_baton_and_ray_know(documents: list[Document]) -> None:
    (head, *workers) = groups(documents)
    (_, controller, *_) = head.spec["containers"]
    accepted(controller["args"])
    options = help_of("ray", "start")
    for group in (head, *workers):
        assert all(f"--{name} " in options or f"--{name}\n" in options for name in group.start)
    for container in itertools.chain(*(containers(group) for group in (head, *workers))):
        if container.get("command") == ["hf"]:
            command, *arguments = container["args"]
            flags = {argument for argument in arguments if argument.startswith("--")}
            assert command == "download"
            assert all(flag in help_of("hf", command) for flag in flags)


@functools.cache
def help_of(program: str, command: str) -> str:
    """Return what a program of the environment says of one of its commands."""
    path = Path(sys.executable).parent / program
    found = str(path) if path.exists() else shutil.which(program)
    assert found, f"{program} is not installed"
    words = [found, command, "--help"]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout


def test_commands_in_the_notes_are_known(case: str) -> None:
    notes = files(example(case))["baton/templates/NOTES.txt"]
    commands = re.findall(r"-- (baton .*)", notes)
    assert len(commands) == 2
    for command in commands:
        accepted(command.split())


def test_rays_autoscaler_understands_the_groups(documents: list[Document]) -> None:
    # Ray reads its environment when it is imported, which this sets before.
    importlib.import_module("baton.cluster.ray_calls")
    from ray.autoscaler._private.kuberay import autoscaling_config

    cluster = copy.deepcopy(one(documents, "RayCluster"))
    cluster["metadata"]["namespace"] = NAMESPACE
    config = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)
    for group in groups(documents):
        kind = config["available_node_types"][group.name]
        custom = json.loads(group.start.get("resources", "'{}'")[1:-1])
        assert custom.items() <= kind["resources"].items()
        limits = group.ray["resources"]["limits"]
        assert kind["resources"].get("GPU", 0) == int(limits.get("nvidia.com/gpu", 0))
        if group.name != "headgroup":
            assert kind["min_workers"] <= group.replicas <= kind["max_workers"]


def test_containers_have_no_more_rights_than_they_need(
    case: str, documents: list[Document]
) -> None:
    for group in all_groups(documents):
        with_rdma = "rdma" in example(case) and group.name in ("prefill", "decode")
        assert group.spec["securityContext"]["runAsNonRoot"]
        asks = group.name == "headgroup" and case == "everything"  # which has Ray's autoscaler
        assert group.spec["automountServiceAccountToken"] == asks
        for container in containers(group):
            security = container["securityContext"]
            assert not security["allowPrivilegeEscalation"]
            added = ["IPC_LOCK"] if with_rdma and container is group.ray else []
            assert security["capabilities"] == {
                "drop": ["ALL"],
                **({"add": added} if added else {}),
            }


def test_a_new_version_of_the_chart_keeps_pods_and_what_may_not_change(
    documents: list[Document], case: str
) -> None:
    """Nothing in a pod is there because of the release's number or of whether it is an upgrade."""
    later = rendered(example(case), revision=7, is_install=False, is_upgrade=True)
    assert later == documents
    text = yaml.safe_dump(one(documents, "RayCluster")["spec"])
    assert "helm.sh/chart" not in text
    assert "app.kubernetes.io/version" not in text
