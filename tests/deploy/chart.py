"""The chart, rendered by Helm's own library, and what is in what comes out."""

import atexit
import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "baton"
EXAMPLES = {path.stem: path for path in sorted((CHART / "examples").glob("*.yaml"))}
Document = dict[str, Any]
NAME, NAMESPACE = "b", "serving"
_END_S = 20.0
EVERYTHING: Document = {
    "models": [
        {"id": "a", "name": "a", "download": {"repo": "x/y", "revision": "main"}},
        {"id": "b", "name": "b", "path": "/models/b"},
    ],
    "store": {"hubTokenSecret": "hub"},
    "ray": {"autoscaler": {"enabled": True}},
    "redis": {"bundled": {"enabled": True, "storageClassName": "fast"}, "passwordSecret": "redis"},
    "scaling": {"by": "keda", "prefill": {"maxReplicas": 1}, "decode": {"maxReplicas": 1}},
    "rdma": {"enabled": True},
    "gateway": {
        "apiKeysSecret": "keys",
        "ingress": {"enabled": True},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}]},
        "grpcRoute": {"enabled": True, "parentRefs": [{"name": "public"}]},
    },
    "tls": {
        "gateway": {"enabled": True},
        "cluster": {"enabled": True},
        "certManager": {
            "enabled": True,
            "gatewayIssuer": {"name": "public", "kind": "ClusterIssuer"},
            "clusterIssuer": {"name": "own", "kind": "Issuer"},
        },
    },
    "metrics": {
        "serviceMonitor": {
            "enabled": True,
            "apiKeySecret": "prometheus",
            "clientCertSecret": "scraper",
        }
    },
}
"""Values with which every object and every part of one is there."""


class Refused(Exception):
    """Helm refuses the values, or cannot render them; with its reason."""


@functools.cache
def _helm() -> "subprocess.Popen[str]":
    """Start Helm's process; it ends with this one."""
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("helm-python-sdk is not installed")
    script = Path(__file__).with_name("helm_process.py")
    process = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate, timeout=_END_S)
    return process


def _ask(what: str, values: Document, *, chart: str = str(CHART), **options: Any) -> Any:
    process = _helm()
    assert process.stdin is not None
    assert process.stdout is not None
    asked = {"what": what, "chart": chart, "values": values, "options": options}
    process.stdin.write(f"{json.dumps(asked)}\n")
    process.stdin.flush()
    told = json.loads(process.stdout.readline())
    if "refused" in told:
        raise Refused(told["refused"])
    return told["answer"]


def example(name: str) -> Document:
    """Return the values of an example; `defaults` has none, and `everything` all."""
    if name in ("defaults", "everything"):
        return EVERYTHING if name == "everything" else {}
    values: Document = yaml.safe_load(EXAMPLES[name].read_text())
    return values


def files(values: Document, **options: Any) -> dict[str, str]:
    """Return what each template gives, of the folder `chart` if one is said; raises Refused."""
    given: dict[str, str] = _ask("render", values, name=NAME, namespace=NAMESPACE, **options)
    return given


def lint(values: Document) -> Document:
    """Return what Helm's linter says."""
    report: Document = _ask("lint", values, strict=True, kube_version="v1.30.0")
    return report


def rendered(values: Document, **options: Any) -> list[Document]:
    """Return all objects; they are not to be changed."""
    return _rendered(json.dumps(values, sort_keys=True), **options)


@functools.lru_cache(maxsize=32)
def _rendered(values: str, **options: Any) -> list[Document]:
    given = files(json.loads(values), **options)
    texts = [text for name, text in given.items() if name.endswith(".yaml")]
    return [doc for text in texts for doc in yaml.load_all(text, yaml.CSafeLoader) if doc]


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def one(documents: list[Document], kind: str) -> Document:
    """Return the only object of a kind."""
    (found,) = of_kind(documents, kind)
    return found


class Group(NamedTuple):
    """Pods of one kind."""

    name: str
    replicas: int
    start: dict[str, str]
    """Parameters of `ray start`."""
    template: Document
    of_ray: bool = True

    @property
    def labels(self) -> Mapping[str, str]:
        """What is on the pods: KubeRay adds its own."""
        own = {"ray.io/cluster": NAME, "ray.io/group": self.name} if self.of_ray else {}
        return {**self.template["metadata"]["labels"], **own}

    @property
    def spec(self) -> Document:
        spec: Document = self.template["spec"]
        return spec

    @property
    def ray(self) -> Document:
        """Ray's container, which is the first; the only one where there is no Ray."""
        container: Document = self.spec["containers"][0]
        return container


def groups(documents: list[Document]) -> list[Group]:
    """Return the groups of pods of the RayCluster."""
    spec = one(documents, "RayCluster")["spec"]
    head = spec["headGroupSpec"]
    found = [Group("headgroup", 1, head["rayStartParams"], head["template"])]
    for group in spec["workerGroupSpecs"]:
        start, template = group["rayStartParams"], group["template"]
        found.append(Group(group["groupName"], group["replicas"], start, template))
    return found


def all_groups(documents: list[Document]) -> list[Group]:
    """Return the groups of pods of the RayCluster, and those of others."""
    others = [
        Group(s["metadata"]["name"], s["spec"]["replicas"], {}, s["spec"]["template"], False)
        for s in of_kind(documents, "StatefulSet")
    ]
    return [*groups(documents), *others]


def containers(group: Group) -> Iterator[Document]:
    yield from group.spec.get("initContainers", [])
    yield from group.spec["containers"]


def spec_text(documents: list[Document]) -> str:
    """Return the cluster's spec."""
    maps = {m["metadata"]["name"]: m["data"] for m in of_kind(documents, "ConfigMap")}
    text: str = maps[f"{NAME}-spec"]["cluster.yaml"]
    return text
