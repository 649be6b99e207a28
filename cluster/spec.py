"""Cluster specs: read from YAML, or made of the flags of `baton serve`; and what follows from them.

A mistake is told with its line: PyYAML's nodes know where in the file they stand.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from baton.core.cluster_spec import ClusterSpec, GatewaySpec, ModelSpec, PoolSpec
from baton.core.config import ClusterConfig, ParallelConfig, WorkerConfig
from baton.core.errors import InvalidConfig
from baton.core.ids import InstanceId
from baton.core.topology import Role


def load_spec(path: Path) -> ClusterSpec:
    """Read a spec; a relative model folder is relative to the file's.

    Raises InvalidConfig for the first mistake, with file, line, field, value and what is allowed.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfig("file", str(path), f"a YAML file that can be read ({error})") from None
    root = _parsed(path, text)
    values = yaml.SafeLoader("").construct_document(root)
    for model in _mappings(values.get("models")):
        if isinstance(model.get("dir"), str):
            model["dir"] = (path.parent / model["dir"]).resolve()
    try:
        return ClusterSpec.checked(**values)
    except InvalidConfig as error:
        line = _line_of(root, error.field.split("."))
        raise InvalidConfig(f"{path}:{line}: {error.field}", error.value, error.allowed) from None


def _parsed(path: Path, text: str) -> Any:
    """Return the root node of a document, which is a mapping and names no key twice."""
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidConfig(f"{path}:{line}", error.problem, "valid YAML") from None
    if not isinstance(root, yaml.MappingNode):
        raise InvalidConfig(f"{path}:1", text, "a mapping, with at least the key models")
    _check_keys(path, root)
    return root


def _check_keys(path: Path, node: Any) -> None:
    """Refuse a mapping that has a key twice, or one that is no string."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(path, item)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:str" or key.value in seen:
                where = f"{path}:{key.start_mark.line + 1}"
                raise InvalidConfig(where, key.value, "a text that is a key once")
            seen.add(key.value)
            _check_keys(path, value)


def _mappings(values: Any) -> list[dict[str, Any]]:
    return [v for v in values if isinstance(v, dict)] if isinstance(values, list) else []


def _line_of(root: Any, field: Sequence[str]) -> int:
    """Return the line, from 1, of a field, or of the last on the way to it that is there."""
    node, line = root, root.start_mark.line
    for part in field:
        if isinstance(node, yaml.MappingNode):
            pairs = {key.value: (key, value) for key, value in node.value}
            if part not in pairs:
                break
            key, node = pairs[part]
            line = key.start_mark.line
        elif isinstance(node, yaml.SequenceNode) and part.isdigit():
            if int(part) >= len(node.value):
                break
            node = node.value[int(part)]
            line = node.start_mark.line
        else:
            break
    return int(line) + 1


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
    return ClusterSpec(models=(model,), host=config.host, start_timeout_s=config.start_timeout_s)


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
    )


def revision_of(spec: ClusterSpec, pool: str) -> str:
    """Return a name for all that an instance of a pool is started with; a change is a new one."""
    config = worker_config(spec, pool, InstanceId("x")).model_dump_json()
    resources = spec.pools()[pool][1].resources.model_dump_json()
    return hashlib.sha256(f"{config}{resources}".encode()).hexdigest()[:12]
