"""Cluster specs: read from YAML, or made of the flags of `baton serve`; and what follows from them.

A mistake is told with its line (core/yaml_text.py).
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from baton.core.cluster_spec import ClusterSpec, GatewaySpec, ModelSpec, PoolSpec
from baton.core.config import ClusterConfig, ParallelConfig, WorkerConfig
from baton.core.errors import InvalidConfig
from baton.core.ids import InstanceId
from baton.core.topology import Role
from baton.core.yaml_text import compose, line_of, values_of

_LONGEST_PREFIX = 40
"""Of a pool's name, as made of a model's."""
_TLS_FILES = ("cert", "key", "ca", "client_ca")


def load_spec(path: Path) -> ClusterSpec:
    """Read a spec; relative paths in it are relative to the file's folder.

    Raises InvalidConfig for the first mistake, with file, line, field, value and what is allowed.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig("file", str(path), f"a YAML file that can be read ({error})") from None
    root = compose(path, text)
    values = values_of(root)
    _resolve(values.get("tls"), _TLS_FILES, path.parent)
    _resolve_gateways(values.get("gateways"), path.parent)
    for model in _mappings(values.get("models")):
        _resolve(model, ("dir",), path.parent)
        _resolve_gateways(model.get("gateways"), path.parent)
    try:
        return ClusterSpec.checked(**values)
    except InvalidConfig as error:
        line = line_of(root, error.field.split("."))
        raise InvalidConfig(f"{path}:{line}: {error.field}", error.value, error.allowed) from None


def _resolve_gateways(values: Any, folder: Path) -> None:
    if isinstance(values, dict):
        _resolve(values, ("api_keys",), folder)
        _resolve(values.get("tls"), _TLS_FILES, folder)


def _resolve(values: Any, names: tuple[str, ...], folder: Path) -> None:
    """Make relative paths relative to the folder of the spec."""
    if isinstance(values, dict):
        for name in names:
            if isinstance(values.get(name), str):
                # Not further: a link may be there to be turned to another file.
                values[name] = Path(os.path.abspath(folder / values[name]))


def _mappings(values: Any) -> list[dict[str, Any]]:
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []


def spec_of(config: ClusterConfig) -> ClusterSpec:
    """Return the spec of what runs on this machine; without prefill, decode does both."""
    prefixes = _prefixes(config)
    return ClusterSpec(
        models=tuple(
            ModelSpec(
                name=model.name,
                aliases=model.aliases,
                dir=model.dir,
                engine=config.engine,
                handover=config.handover,
                pools={f"{prefix}{role}": pool for role, pool in _pools(config).items()},
            )
            for model, prefix in zip(config.models, prefixes, strict=True)
        ),
        gateways=GatewaySpec(**config.gateway.model_dump()),
        host=config.host,
        start_timeout_s=config.start_timeout_s,
        tls=config.tls,
    )


def _prefixes(config: ClusterConfig) -> list[str]:
    """Return what the names of each model's pools begin with; nothing if there is one model."""
    if not config.beside:
        return [""]
    found: list[str] = []
    for number, model in enumerate(config.models):
        name = re.sub("[^a-z0-9]+", "-", model.name.lower()).strip("-")[:_LONGEST_PREFIX]
        prefix = f"{name.strip('-') or 'model'}-"
        found.append(prefix if prefix not in found else f"{number}-{prefix}")
    return found


def _pools(config: ClusterConfig) -> dict[str, PoolSpec]:
    role = Role.DECODE if config.prefill else Role.MIXED
    pools = {role.value: _pool(config, role, config.decode, config.decode_parallel)}
    if config.prefill:
        prefill = _pool(config, Role.PREFILL, config.prefill, config.prefill_parallel)
        pools = {Role.PREFILL.value: prefill, **pools}
    return pools


def _pool(config: ClusterConfig, role: Role, count: int, parallel: ParallelConfig) -> PoolSpec:
    return PoolSpec(
        role=role,
        instances=count,
        threads=config.threads,
        parallel=parallel,
        engine=config.engine_of(role),
    )


def worker_config(spec: ClusterSpec, pool: str, name: InstanceId) -> WorkerConfig:
    """Return what one instance of a pool is started with."""
    model, found = spec.pools()[pool]
    return WorkerConfig(
        instance_id=name,
        role=found.role,
        model_dir=model.dir,
        model_name=model.name,
        host=spec.host or "0.0.0.0",
        threads=found.threads,
        parallel=found.parallel,
        engine=found.engine,
        handover=model.handover,
        tls=spec.tls,
    )


def revision_of(spec: ClusterSpec, pool: str) -> str:
    """Return a name for all that an instance of a pool is started with; a change is a new one."""
    config = worker_config(spec, pool, InstanceId("x")).model_dump_json()
    resources = spec.pools()[pool][1].resources.model_dump_json()
    return hashlib.sha256(f"{config}{resources}".encode()).hexdigest()[:12]
