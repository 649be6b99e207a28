"""Checks before anything is started, so that a mistake costs a second and not a minute."""

import socket
from collections.abc import Mapping
from pathlib import Path

from baton.api.identity import Identity
from baton.cluster.spec import spec_of
from baton.core.cluster_spec import ClusterSpec
from baton.core.config import ClusterConfig
from baton.core.errors import InvalidConfig
from baton.core.kv_layout import ITEM_BYTES
from baton.core.memory import MIB, available_memory
from baton.core.tls_files import server_context
from baton.models.spec import ModelSpec, read_spec


def check_before_start(config: ClusterConfig) -> None:
    """Check names, folders, limits, memory and ports; InvalidConfig for the first mistake."""
    spec_of(config)  # names
    specs = {model.dir: read_spec(model.dir) for model in config.models}
    for spec in specs.values():
        _check_length(config, spec)
    _check_memory(config, specs)
    gateway = config.gateway
    _check_files(config)
    if gateway.http_port == gateway.grpc_port != 0:
        raise InvalidConfig("--grpc-port", gateway.grpc_port, "another port than --port")
    check_port("--port", gateway.host, gateway.http_port)
    check_port("--grpc-port", gateway.host, gateway.grpc_port)


def check_spec(spec: ClusterSpec) -> None:
    """Check the model folders and limits of a cluster; raises InvalidConfig for the first mistake.

    Memory is that of other machines, perhaps: the instances themselves say if it is too little.
    """
    for i, model in enumerate(spec.models):
        found = read_spec(model.dir)
        for name, pool in model.pools.items():
            wanted = pool.engine.max_model_len
            if wanted is not None and wanted > found.max_position:
                allowed = f"at most {found.max_position}, which the model was made for"
                field = f"models.{i}.pools.{name}.engine.max_model_len"
                raise InvalidConfig(field, wanted, allowed)


def check_port(field: str, host: str, port: int) -> None:
    """Raise InvalidConfig unless `port` of `host` can be listened on."""
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
            trial.listen(1)
        except OSError as error:
            allowed = f"a free port of {host} ({error.strerror or error}), or 0 for any"
            raise InvalidConfig(field, port, allowed) from None


def _check_files(config: ClusterConfig) -> None:
    """Read keys and certificates as the gateway and the instances will."""
    Identity(config.gateway.api_keys)
    if config.gateway.tls is not None:
        server_context(config.gateway.tls)
    if config.tls is not None:
        server_context(config.tls.server)


def _check_length(config: ClusterConfig, spec: ModelSpec) -> None:
    wanted = config.engine.max_model_len
    if wanted is not None and wanted > spec.max_position:
        allowed = f"at most {spec.max_position}, which the model was made for"
        raise InvalidConfig("--max-model-len", wanted, allowed)


def _check_memory(config: ClusterConfig, specs: Mapping[Path, ModelSpec]) -> None:
    if config.engine.device == "cuda":
        return  # each instance measures its GPU
    kv, weights = config.engine.kv_mib_on_host, 0
    for model in config.models:
        spec = specs[model.dir]
        layout = spec.kv_layout(config.engine.block_size, config.engine.dtype)
        if kv * MIB < layout.block_bytes:
            least = -(-layout.block_bytes // MIB)
            allowed = f"at least {least}: one block of the KV of {model.name}"
            raise InvalidConfig("--kv-memory-mib", kv, allowed)
        stored = weight_bytes(model.dir) // MIB
        weights += stored * ITEM_BYTES[config.engine.dtype] // ITEM_BYTES[spec.dtype]
    each = config.prefill + config.decode
    instances = each * len(config.models)
    room = available_memory() // MIB
    if instances * kv + each * weights > room:
        allowed = (
            f"less: {instances} instances with {each * weights} MiB of weights"
            f" have {room} MiB of free memory between them"
        )
        raise InvalidConfig("--kv-memory-mib", kv, allowed)


def weight_bytes(model_dir: Path) -> int:
    """Return the size on disk of a checkpoint's weights."""
    return sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
