"""Cluster specs: read from YAML, or made of the flags of `baton serve`; and what follows from them.

A mistake is told with its line (core/yaml_text.py).
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from baton.core.cluster_spec import ClusterSpec, GatewaySpec, ModelSpec, PoolSpec
from baton.core.config import ClusterConfig, ParallelConfig, WorkerConfig
from baton.core.errors import InvalidConfig
from baton.core.ids import InstanceId
from baton.core.topology import Role
from baton.core.yaml_text import compose, line_of, values_of

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
    for model in _mappings(values.get("models")):
        _resolve(model, ("dir",), path.parent)
        _resolve(model.get("gateways"), ("api_keys",), path.parent)
        if isinstance(model.get("gateways"), dict):
            _resolve(model["gateways"].get("tls"), _TLS_FILES, path.parent)
    try:
        return ClusterSpec.checked(**values)
    except InvalidConfig as error:
        line = line_of(root, error.field.split("."))
        raise InvalidConfig(f"{path}:{line}: {error.field}", error.value, error.allowed) from None


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
    """Return the spec of one model on this machine; without prefill, decode does both."""
    role = Role.DECODE if config.prefill else Role.MIXED
    pools = {role.value: _pool(config, role, config.decode, config.decode_parallel)}
    if config.prefill:
        prefill = _pool(config, Role.PREFILL, config.prefill, config.prefill_parallel)
        pools = {Role.PREFILL.value: prefill, **pools}
    model = ModelSpec(
        name=config.model_name,
        dir=config.model_dir,
        engine=config.engine,
        handover=config.handover,
        pools=pools,
        gateways=GatewaySpec(**config.gateway.model_dump()),
    )
    return ClusterSpec(
        models=(model,),
        host=config.host,
        start_timeout_s=config.start_timeout_s,
        tls=config.tls,
    )


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
