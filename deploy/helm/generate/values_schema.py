"""The strict schema of the chart's values: what Baton's own configs allow, and what the chart adds.

Each key of values.yaml has the type of its default, unless RULES say more. No other key is allowed.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from values_doc import documented, load_values

from baton.core.autoscale import AutoscaleConfig
from baton.core.cluster_spec import MOST_INSTANCES, RankResources
from baton.core.config import (
    Config,
    EngineConfig,
    GatewayConfig,
    HandoverConfig,
    ParallelConfig,
    ToolParser,
)
from baton.core.served_model import ModelLimits

Schema = dict[str, Any]
_QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kKMGTPE]i?)?$"}
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
_OBJECTS = {"type": "array", "items": {"type": "object"}}
_STRINGS = {"type": "array", "items": {"type": "string", "minLength": 1}}
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_ENV = {"type": "array", "items": {"type": "object", "required": ["name"]}}
_POSITIVE = {"type": "integer", "minimum": 1}


def _closed(properties: Mapping[str, Schema], required: Iterable[str] = ()) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": dict(properties),
        "required": list(required),
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _definitions() -> Schema:
    """Return the schemas of Baton's configs, less what the chart itself decides."""
    own: dict[type[Config], tuple[str, ...]] = {
        EngineConfig: (),
        HandoverConfig: ("secret",),
        ParallelConfig: (),
        AutoscaleConfig: (),
        ModelLimits: (),
        RankResources: (),
        GatewayConfig: ("host", "http_port", "grpc_port", "api_keys", "tls"),
    }
    found: Schema = {}
    for cls, decided in own.items():
        schema = cls.model_json_schema()
        found.update(schema.pop("$defs", {}))
        for field in decided:
            del schema["properties"][field]
        found[cls.__name__] = schema
    del found["TlsConfig"]
    found["Pool"] = _closed(
        {
            "instances": {"type": "integer", "minimum": 0, "maximum": MOST_INSTANCES},
            "autoscale": _ref("AutoscaleConfig"),
            "threads": {"type": "integer", "minimum": 1, "maximum": 1024},
            "parallel": _ref("ParallelConfig"),
            "engine": _ref("EngineConfig"),
            "resources": _ref("RankResources"),
        }
    )
    found["Model"] = _model()
    return found


def _model() -> Schema:
    text = {"type": "string", "minLength": 1}
    schema = _closed(
        {
            "id": {"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,18}[a-z0-9])?$"},
            "name": text,
            "aliases": {"type": "array", "items": text},
            "limits": _ref("ModelLimits"),
            "tool_parser": {"enum": list(get_args(ToolParser))},
            "path": {"type": "string", "pattern": "^/"},
            "download": _closed({"repo": text, "revision": text}, ["repo", "revision"]),
            "engine": _ref("EngineConfig"),
            "handover": _ref("HandoverConfig"),
            "gateways": _ref("GatewayConfig"),
            "prefill": _ref("Pool"),
            "decode": _ref("Pool"),
        },
        ["id", "name"],
    )
    schema["oneOf"] = [{"required": ["path"]}, {"required": ["download"]}]
    return schema


_ISSUER = _closed({k: {"type": "string"} for k in ("name", "kind", "group")}, ["name", "kind"])
RULES: tuple[tuple[str, Schema], ...] = (
    (r"fullnameOverride", {"type": "string", "pattern": "^([a-z]([a-z0-9-]{0,38}[a-z0-9])?)?$"}),
    (r"models", {"type": "array", "minItems": 1, "items": _ref("Model")}),
    (r"(prefill|decode)\.pool", _ref("Pool")),
    (r"gateway\.config", _ref("GatewayConfig")),
    (r"image\.digest", {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"}),
    (r"image\.pullPolicy", {"enum": ["Always", "IfNotPresent", "Never"]}),
    (r"gateway\.service\.type", {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}),
    (r"ray\.upgradeStrategy", {"enum": ["None", "Recreate"]}),
    (r"scaling\.by", {"enum": ["baton", "hpa", "keda"]}),
    (r"scaling\.(prefill|decode)\.\w+", _POSITIVE),
    (r"scaling\.keda\.serverAddress", {"type": "string", "pattern": "^https?://[^ ]+$"}),
    (r"redis\.address", {"type": "string", "pattern": "^([^:/ ]+:[0-9]+)?$"}),
    (r"rdma\.resourceName", {"type": "string", "pattern": "^[a-z0-9.-]+/[A-Za-z0-9._-]+$"}),
    (r"tls\.certManager\.\w+Issuer", _ISSUER),
    (r".*\.(shmSize|size|emptyDirSize)", _QUANTITY),
    (r".*[pP]ort", _PORT),
    (r"networkPolicy\.egressPorts", {"type": "array", "items": _PORT}),
    (r"networkPolicy\.\w+|.*\.(tolerations|topologySpreadConstraints|parentRefs)", _OBJECTS),
    (r".*\.(pullSecrets|dnsNames|accessModes)", _STRINGS),
    (r".*([lL]abels|[aA]nnotations|nodeSelector|ucxOptions)", _LABELS),
    (r".*\.env", _ENV),
    (r".*\.pdb\.maxUnavailable", {"anyOf": [_POSITIVE, {"pattern": "^[1-9][0-9]?%$"}]}),
    (
        r".*\.(pauseSeconds|pollingIntervalSeconds|\w+TimeoutSeconds|count|failureThreshold|\w+Ms)",
        _POSITIVE,
    ),
)
"""What the value at a path may be; the first that matches the whole path counts."""
_TYPES: tuple[tuple[type, Schema], ...] = (
    (bool, {"type": "boolean"}),
    (int, {"type": "integer", "minimum": 0}),
    (str, {"type": "string"}),
    (dict, {"type": "object"}),
)


def values_schema() -> Schema:
    """Return the whole schema."""
    texts = {value.path: value.text for value in documented()}
    schema = _schema_of((), load_values(), texts)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of Baton's Helm chart",
        **schema,
        "$defs": _definitions(),
    }


def _schema_of(path: tuple[str, ...], default: Any, texts: Mapping[tuple[str, ...], str]) -> Schema:
    name = ".".join(path)
    told = {"description": texts[path]} if path in texts else {}
    for pattern, rule in RULES:
        if re.fullmatch(pattern, name) and not (isinstance(default, bool)):
            return {**rule, **told}
    if isinstance(default, dict) and path not in texts:
        below = {key: _schema_of((*path, key), value, texts) for key, value in default.items()}
        return {**_closed(below), **told}
    kind = next(rule for cls, rule in _TYPES if isinstance(default, cls))
    return {**kind, **told}
