"""Every value does something, and what makes no sense is refused."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from baton import __version__
from tests.deploy.chart import (
    CHART,
    EVERYTHING,
    ROOT,
    Document,
    Refused,
    files,
    of_kind,
    one,
    rendered,
    spec_text,
)
from tests.deploy.upgrade import broken

DEFAULTS: Document = yaml.safe_load((CHART / "values.yaml").read_text())
MODEL = DEFAULTS["models"][0]
_PROBE = {"tcpSocket": {"port": 1}}
OTHERS: dict[str, Any] = {
    r"models": [MODEL],
    r"fullnameOverride": "other",
    r"image\.digest": "sha256:" + "0" * 64,
    r"image\.pullPolicy": "Always",
    r"ray\.upgradeStrategy": "Recreate",
    r".*\.service\.type": "NodePort",
    r".*\.(resources)": {"limits": {"cpu": "3"}},
    r"(prefill|decode)\.pool": {"threads": 3},
    r"gateway\.httpPort": 8080,
    r"gateway\.config": {"max_open_requests": 3},
    r".*\w+Issuer": {"name": "other", "kind": "Issuer", "group": "example.com"},
    r".*\w+Probe": _PROBE,
    r".*\.(shmSize|size|emptyDirSize)": "7Gi",
    r".*\.env": [{"name": "A", "value": "b"}],
    r".*\.tolerations": [{"key": "a", "operator": "Exists"}],
    r".*\.affinity": {"nodeAffinity": {}},
    r".*\.topologySpreadConstraints": [{"maxSkew": 1}],
    r".*\.parentRefs": [{"name": "other"}],
    r"networkPolicy\.egressPorts": [8443],
    r"networkPolicy\.clients": [{"podSelector": {}}],
    r"networkPolicy\.extraEgress": [{"to": [{"podSelector": {}}]}],
    r".*\.(pullSecrets|dnsNames)": ["other"],
    r".*\.accessModes": ["ReadWriteOnce"],
    r".*([lL]abels|[aA]nnotations|nodeSelector|ucxOptions)": {"a": "b"},
    r"(podS|s)ecurityContext": {"runAsUser": 7},
    r"redis\.address": "other:6379",
    r"scaling\.by": "hpa",
    r"scaling\.keda\.serverAddress": "https://other",
    r"rdma\.resourceName": "example.com/other",
}
"""Another value than the default, by path, where its type does not tell one."""
CONTEXTS: dict[str, Document] = {
    r"store\.claim\..*": {"store": {"claim": {"create": True}}},
    r"(prefill|decode)\.replicas": {"ray": {"autoscaler": {"enabled": False}}},
    r"redis\.address": {"redis": {"bundled": {"enabled": False}}},
    r"scaling\.hpa\..*": {"scaling": {"by": "hpa"}},
    r"scaling\.prefill\.minReplicas": {"scaling": {"prefill": {"maxReplicas": 2}}},
    r"scaling\.decode\.minReplicas": {"scaling": {"decode": {"maxReplicas": 2}}},
    r"tls\.certManager\.enabled": {
        "tls": {"gateway": {"secretName": "one"}, "cluster": {"secretName": "two"}}
    },
}
"""What else must be so for a value to count."""
UNCHANGEABLE = {
    "store.claim.accessModes": "Cannot be changed later",
    "store.claim.storageClassName": "Cannot be changed later",
    "store.claim.size": "Can only grow",
    "redis.bundled.storageClassName": "Cannot be changed later",
    "redis.bundled.size": "Can only grow",
}
"""What Kubernetes would refuse to change, or to roll back, and how its text says so."""


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Find every path that is documented, or below which nothing is."""
    if isinstance(value, dict) and value and not _whole(path):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path


def _whole(path: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, ".".join(path)) for pattern in OTHERS)


def other(path: tuple[str, ...]) -> Any:
    """Return a value that is not the default."""
    name, default = ".".join(path), DEFAULTS
    for key in path:
        default = default[key]
    for pattern, value in OTHERS.items():
        if re.fullmatch(pattern, name):
            return value
    match default:
        case bool():
            return not default
        case int():
            return default + 1
        case str():
            return "other"
    raise AssertionError(f"{name}: say in OTHERS what else it may be")


def merged(base: Document, over: Document) -> Document:
    result = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def at(path: tuple[str, ...], value: Any) -> Document:
    for key in reversed(path):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def objects(values: Document) -> dict[str, str]:
    """Return the text of all objects; the notes do not count."""
    return {name: text for name, text in files(values).items() if name.endswith(".yaml")}


PATHS = list(leaves(DEFAULTS))


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_every_value_changes_the_output(path: tuple[str, ...]) -> None:
    name = ".".join(path)
    base = EVERYTHING
    for pattern, context in CONTEXTS.items():
        if re.fullmatch(pattern, name):
            base = merged(base, context)
    value = other(path)
    current: Any = merged(DEFAULTS, base)
    for key in path:
        current = current[key]
    if current == value:
        value = not value if isinstance(value, bool) else f"{value}-2"
    before, after = objects(base), objects(merged(base, at(path, value)))
    assert before != after
    kept = [name for name in before if before[name] != after[name]]
    refused = list(broken(documents(before, kept), documents(after, kept)))
    assert bool(refused) == (name in UNCHANGEABLE), refused


def documents(texts: dict[str, str], names: list[str]) -> list[Document]:
    parts = [yaml.load_all(texts[name], yaml.CSafeLoader) for name in names]
    return [document for part in parts for document in part if document]


@pytest.mark.parametrize("name", UNCHANGEABLE)
def test_what_cannot_be_changed_says_so(name: str) -> None:
    rows = (CHART / "README.md").read_text().splitlines()
    (row,) = [row for row in rows if row.startswith(f"| `{name}` |")]
    assert UNCHANGEABLE[name] in row


def test_every_value_says_what_it_is() -> None:
    text = (CHART / "README.md").read_text()
    told = re.findall(r"^\| `([A-Za-z.]+)` \| \S", text, re.MULTILINE)
    for path in map(".".join, PATHS):
        assert any(path == name or path.startswith(f"{name}.") for name in told), path


MODEL_FIELDS: dict[str, Any] = {
    "name": "other",
    "id": "other",
    "path": "/other",
    "aliases": ["another", "team/another"],
    "limits": {"max_open_requests": 1 << 16},
    "tool_parser": "mistral",
    "engine": {"max_sequences": 7},
    "handover": {"transport": "tcp"},
    "gateways": {"max_open_requests": 7},
    "prefill": {"instances": 2},
    "decode": {"autoscale": {"max": 3}},
}


@pytest.mark.parametrize("field", MODEL_FIELDS)
def test_every_field_of_a_model_changes_the_spec(field: str) -> None:
    changed = spec_text(rendered({"models": [{**MODEL, field: MODEL_FIELDS[field]}]}))
    assert changed != spec_text(rendered({}))


def test_versions_and_paths_are_those_of_baton() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == __version__
    ray = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert ray is not None
    assert DEFAULTS["ray"]["version"] == ray[1]
    assert MODEL["path"].endswith("/baton/demo_model/main")
    assert (ROOT / "baton" / "demo_model" / "main" / "config.json").is_file()


def test_a_model_has_no_other_fields() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    fields = schema["$defs"]["Model"]["properties"]
    assert set(fields) == {*MODEL_FIELDS, "download"}


def test_a_models_own_pool_goes_before_that_of_all() -> None:
    models = [{**MODEL, "prefill": {"instances": 3, "resources": {"cpus": 2}}}]
    values = {"models": models, "prefill": {"pool": {"threads": 2, "instances": 1}}}
    pool = yaml.safe_load(spec_text(rendered(values)))["models"][0]["pools"]["demo-prefill"]
    assert (pool["instances"], pool["threads"], pool["resources"]["cpus"]) == (3, 2, 2)


def test_large_numbers_stay_whole() -> None:
    engine = {"kv_memory_mib": 1 << 20, "max_batch_tokens": 1 << 17}
    gateways = {"limits": {"max_body_bytes": 1 << 30}}
    values = {"models": [{**MODEL, "engine": engine, "gateways": gateways}]}
    values["controller"] = {"startTimeoutSeconds": 10_000_000, "pauseSeconds": 10_000_000}
    values["ray"] = {"healthCheck": dict.fromkeys(DEFAULTS["ray"]["healthCheck"], 10_000_000)}
    assert not re.search(r"\de\+", "".join(files(values).values()))
    text = spec_text(rendered(values))
    model = yaml.safe_load(text)["models"][0]
    assert model["engine"] == engine
    assert model["gateways"]["limits"] == gateways["limits"]


def test_a_change_of_models_makes_no_new_pods() -> None:
    changed = rendered({"models": [{**MODEL, "engine": {"max_sequences": 7}}]})
    assert one(changed, "RayCluster") == one(rendered({}), "RayCluster")


def test_without_prefill_decode_does_both() -> None:
    documents = rendered({"prefill": {"enabled": False}})
    (pool,) = yaml.safe_load(spec_text(documents))["models"][0]["pools"].values()
    assert pool["role"] == "mixed"
    names = {
        group["groupName"] for group in one(documents, "RayCluster")["spec"]["workerGroupSpecs"]
    }
    assert names == {"decode", "gateway-demo"}


def test_weights_are_only_where_they_are_used() -> None:
    spec = one(rendered(EVERYTHING), "RayCluster")["spec"]
    templates = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    downloads = [t["template"]["spec"]["initContainers"][0]["args"] for t in templates]
    assert ["*.safetensors" in args for args in downloads] == [True, False, False, True, True]


def test_clients_of_the_gateways_can_be_named() -> None:
    clients = [{"namespaceSelector": {"matchLabels": {"team": "web"}}}]
    policies = of_kind(rendered({"networkPolicy": {"clients": clients}}), "NetworkPolicy")
    (rule,) = policies[1]["spec"]["ingress"]
    assert rule["from"][0] == clients[0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prefil": {}}, "prefil"),
        ({"prefill": {"replica": 1}}, "replica"),
        ({"prefill": {"replicas": -1}}, "replicas"),
        ({"prefill": {"replicas": "two"}}, "replicas"),
        ({"prefill": {"pool": {"engine": {"block_size": 7}}}}, "block_size"),
        ({"prefill": {"pool": {"parallel": {"tp": 0}}}}, "tp"),
        ({"prefill": {"pool": {"resources": {"gpus": 2}}}}, "gpus"),
        ({"prefill": {"shmSize": "lots"}}, "shmSize"),
        ({"models": []}, "models"),
        ({"models": [{**MODEL, "id": "A"}]}, "id"),
        ({"models": [{"id": "a", "name": "a"}]}, "models"),
        ({"models": [{**MODEL, "download": {"repo": "x/y", "revision": "main"}}]}, "models"),
        ({"models": [{**MODEL, "handover": {"secret": "0" * 32}}]}, "secret"),
        ({"models": [{**MODEL, "engine": {"max_sequence": 7}}]}, "max_sequence"),
        ({"models": [MODEL, {**MODEL, "name": "again"}]}, "id"),
        ({"gateway": {"config": {"http_port": 80}}}, "http_port"),
        ({"gateway": {"httpPort": 70000}}, "httpPort"),
        ({"gateway": {"httpPort": 8001}}, "grpcPort"),
        ({"gateway": {"service": {"type": "ExternalName"}}}, "type"),
        ({"gateway": {"terminationGracePeriodSeconds": 15}}, "terminationGracePeriodSeconds"),
        ({"redis": {"address": "redis"}}, "address"),
        ({"redis": {"bundled": {"enabled": True}}}, "passwordSecret"),
        (
            {"redis": {"bundled": {"enabled": True}, "passwordSecret": "a", "address": "a:1"}},
            "redis.address",
        ),
        ({"scaling": {"by": "both"}}, "by"),
        ({"scaling": {"by": "hpa", "decode": {"minReplicas": 0}}}, "minReplicas"),
        ({"scaling": {"by": "hpa", "decode": {"minReplicas": 5}}}, "maxReplicas"),
        ({"scaling": {"by": "keda"}, "decode": {"pool": {"autoscale": {}}}}, "autoscale"),
        ({"scaling": {"by": "hpa"}, "prefill": {"pool": {"autoscale": {"max": 2}}}}, "autoscale"),
        ({"scaling": {"by": "hpa"}, "models": [{**MODEL, "decode": {"autoscale": {}}}]}, "demo"),
        (merged(EVERYTHING, at(("gateway", "grpcRoute", "parentRefs"), [])), "parentRefs"),
        (
            merged(EVERYTHING, at(("gateway", "grpcRoute", "host"), "baton.example.com")),
            "grpcRoute.host",
        ),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"store": {"existingClaim": "a", "claim": {"create": True}}}, "create"),
        ({"ray": {"upgradeStrategy": "Rolling"}}, "upgradeStrategy"),
        ({"tls": {"gateway": {"enabled": True}}}, "tls.gateway.secretName"),
        ({"tls": {"cluster": {"enabled": True}}}, "tls.cluster.secretName"),
        (merged(EVERYTHING, at(("tls", "certManager", "gatewayIssuer", "name"), "")), "Issuer"),
        (merged(EVERYTHING, at(("tls", "certManager", "clusterIssuer", "name"), "")), "Issuer"),
        (merged(EVERYTHING, at(("gateway", "httpRoute", "parentRefs"), [])), "parentRefs"),
        (
            merged(
                {"metrics": {"serviceMonitor": {"enabled": True}}},
                {"tls": {"gateway": {"enabled": True, "secretName": "s", "clientAuth": True}}},
            ),
            "clientCertSecret",
        ),
        ({"fullnameOverride": "No"}, "fullnameOverride"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_no_sense_is_refused(values: Document, words: str) -> None:
    with pytest.raises(Refused, match=words):
        files(values)


def test_schema_and_readme_are_fresh() -> None:
    command = [
        sys.executable,
        str(ROOT / "deploy" / "helm" / "generate" / "generate.py"),
        "--check",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
