"""Strict schemas of what is rendered: Kubernetes' own, and the parts of custom resources in use.

The latter are closed and written by hand from the published references of their APIs (KubeRay 1.6,
Gateway API 1.1, cert-manager 1, Prometheus' operator 1, KEDA 2): a field that is not here is a
mistake here, or is to be looked up and added. That of BatonPool is the chart's own.
"""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tests.deploy.chart import CHART

VERSIONS = ("1.27", "1.37")
"""The oldest that Chart.yaml allows, and the newest that there are schemas of."""
Schema = dict[str, Any]
_TEXT: Schema = {"type": "string"}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_MAP: Schema = {"type": "object", "additionalProperties": _TEXT}
_COUNT: Schema = {"type": "integer", "minimum": 0}


def _closed(required: str = "", **properties: Schema) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": required.split(),
    }


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item, "minItems": 1}


def _kubernetes(name: str) -> Schema:
    return {"$ref": f"kubernetes#/$defs/{name}"}


_POD = _kubernetes("io.k8s.api.core.v1.PodTemplateSpec")
_KEY = _closed("name key", name=_TEXT, key=_TEXT)
_SECRET = _closed("secret", secret=_KEY)
_RAY = _closed(
    "headGroupSpec",
    rayVersion=_TEXT,
    upgradeStrategy=_closed("type", type={"enum": ["None", "Recreate"]}),
    authOptions=_closed("mode", mode={"enum": ["token", "disabled"]}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=_closed(
        idleTimeoutSeconds=_COUNT,
        resources=_kubernetes("io.k8s.api.core.v1.ResourceRequirements"),
        securityContext=_kubernetes("io.k8s.api.core.v1.SecurityContext"),
    ),
    gcsFaultToleranceOptions=_closed(
        "redisAddress",
        redisAddress=_TEXT,
        redisPassword=_closed("valueFrom", valueFrom=_closed("secretKeyRef", secretKeyRef=_KEY)),
    ),
    headGroupSpec=_closed("rayStartParams template", rayStartParams=_MAP, template=_POD),
    workerGroupSpecs=_list(
        _closed(
            "groupName rayStartParams template minReplicas maxReplicas",
            groupName=_TEXT,
            replicas=_COUNT,
            minReplicas=_COUNT,
            maxReplicas={"type": "integer", "minimum": 1},
            rayStartParams=_MAP,
            template=_POD,
        )
    ),
)
_ROUTE = _closed(
    "parentRefs rules",
    parentRefs=_list(_closed("name", name=_TEXT, namespace=_TEXT, sectionName=_TEXT, port=_COUNT)),
    hostnames=_TEXTS,
    rules=_list(_closed(backendRefs=_list(_closed("name port", name=_TEXT, port=_COUNT)))),
)
_CERTIFICATE = _closed(
    "secretName issuerRef dnsNames",
    secretName=_TEXT,
    duration={"type": "string", "pattern": "^([0-9]+h)?([0-9]+m)?([0-9]+s)?$"},
    issuerRef=_closed("name", name={"type": "string", "minLength": 1}, kind=_TEXT, group=_TEXT),
    usages=_list({"enum": ["server auth", "client auth"]}),
    dnsNames=_list(_TEXT),
)
_MONITOR = _closed(
    "selector endpoints",
    selector=_closed("matchLabels", matchLabels=_MAP),
    endpoints=_list(
        _closed(
            "port",
            port=_TEXT,
            path=_TEXT,
            interval=_TEXT,
            scheme={"enum": ["http", "https"]},
            tlsConfig=_closed(ca=_SECRET, cert=_SECRET, keySecret=_KEY, serverName=_TEXT),
            authorization=_closed("credentials", credentials=_KEY),
        )
    ),
)
_SCALED = _closed(
    "scaleTargetRef triggers",
    scaleTargetRef=_closed("name", apiVersion=_TEXT, kind=_TEXT, name=_TEXT),
    pollingInterval=_COUNT,
    minReplicaCount=_COUNT,
    maxReplicaCount=_COUNT,
    advanced=_closed(
        horizontalPodAutoscalerConfig=_closed(
            behavior=_kubernetes("io.k8s.api.autoscaling.v2.HorizontalPodAutoscalerBehavior")
        )
    ),
    triggers=_list(
        _closed(
            "type metadata",
            type={"const": "prometheus"},
            metricType={"enum": ["AverageValue", "Value"]},
            metadata=_closed(
                "serverAddress query threshold", serverAddress=_TEXT, query=_TEXT, threshold=_TEXT
            ),
            authenticationRef=_closed("name", name=_TEXT),
        )
    ),
)
CRD: Schema = yaml.safe_load((CHART / "crds" / "batonpools.yaml").read_text())
"""What the chart brings itself."""
_SIZED = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
_CUSTOM = {
    ("ray.io/v1", "RayCluster"): _RAY,
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _ROUTE,
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): _ROUTE,
    ("keda.sh/v1alpha1", "ScaledObject"): _SCALED,
    ("baton-serve.io/v1alpha1", "BatonPool"): {**_SIZED, "additionalProperties": False},
    ("cert-manager.io/v1", "Certificate"): _CERTIFICATE,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): _MONITOR,
}


@functools.cache
def _registry(version: str) -> tuple[str, Registry[Any], dict[tuple[str, str], str]]:
    """Return the name of Kubernetes' definitions, them, and the definition of each kind."""
    reason = "kubernetes-validate is not installed"
    utils = pytest.importorskip("kubernetes_validate.utils", reason=reason)
    path = f"kubernetes-json-schema/v{version}.0-local-strict/_definitions.json"
    definitions = utils.schema_contents(path, version)
    kinds: dict[tuple[str, str], str] = {}
    for name, schema in definitions["$defs"].items():
        for known in schema.get("x-kubernetes-group-version-kind", []):
            api = "/".join(part for part in (known["group"], known["version"]) if part)
            kinds[api, known["kind"]] = name
    resource = Resource.from_contents(definitions)
    registry: Registry[Any] = Registry().with_resource(definitions["$id"], resource)
    return definitions["$id"], registry, kinds


def mistakes(document: dict[str, Any], version: str) -> Iterator[str]:
    """Find what a Kubernetes of that version would refuse, or silently drop."""
    base, registry, kinds = _registry(version)
    kind = (document["apiVersion"], document["kind"])
    if kind in _CUSTOM:
        metadata = _kubernetes("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta")
        schema = _closed(
            "metadata spec", apiVersion=_TEXT, kind=_TEXT, metadata=metadata, spec=_CUSTOM[kind]
        )
        schema = _with_base(schema, base)
    elif kind in kinds:
        schema = {"$ref": f"{base}#/$defs/{kinds[kind]}"}
    else:
        yield f"{kind} is not known"
        return
    for error in Draft202012Validator(schema, registry=registry).iter_errors(document):
        where = ".".join(str(part) for part in error.absolute_path)
        yield f"{kind[1]} {where}: {error.message}"


def _with_base(schema: Any, base: str) -> Any:
    """Turn references to Kubernetes' definitions into those of one version."""
    if isinstance(schema, dict):
        return {key: _with_base(value, base) for key, value in schema.items()}
    if isinstance(schema, list):
        return [_with_base(item, base) for item in schema]
    if isinstance(schema, str) and schema.startswith("kubernetes#"):
        return base + schema.removeprefix("kubernetes")
    return schema
