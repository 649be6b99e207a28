"""Opens the transports that an instance is to use."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from baton.core.config import HandoverConfig
from baton.core.errors import InvalidConfig, TransportError
from baton.core.ids import Incarnation
from baton.core.log import get_logger
from baton.kv_transfer.cuda_ipc.backend import CudaIpcBackend
from baton.kv_transfer.grants import Grants
from baton.kv_transfer.link.transport import LinkTransport
from baton.kv_transfer.negotiated import NegotiatedTransport
from baton.kv_transfer.shm.backend import ShmBackend
from baton.kv_transfer.shm.memory import SharedMemory
from baton.kv_transfer.tcp.backend import TcpBackend
from baton.kv_transfer.transport import Region, Transport
from baton.kv_transfer.ucx.capabilities import describe
from baton.kv_transfer.ucx.config import UcxConfig
from baton.kv_transfer.ucx.transport import UcxTransport

_AUTO = ("shm", "ucx", "tcp")
"""By preference. UCX is for RDMA: within a host shm is faster, and where UCX has nothing but TCP a
reader that dies takes the owner of the memory along; see docs/decisions/0010."""

_RDMA_DEVICES = Path("/sys/class/infiniband")

_log = get_logger(__name__)


def allocate(size: int, config: HandoverConfig) -> SharedMemory | None:
    """Return host memory of `size` bytes for a pool that the transports may read, zeroed.

    None if ordinary memory serves as well: shm is not wanted, or the system has no sealed memory.
    """
    if config.transport not in ("auto", "shm"):
        return None
    try:
        return SharedMemory(size)
    except OSError as error:
        _log.warning("transport.no_shared_memory", bytes=size, reason=str(error))
        return None


async def open_device_transport(
    region: Region, config: HandoverConfig, *, host: str, owner: str, incarnation: Incarnation
) -> NegotiatedTransport | None:
    """Open what reads pools on devices into `region`, which lies on one.

    That is cuda_ipc within a host, with `auto`, and UCX where it moves the memory of GPUs: with
    `auto` only over RDMA, with `ucx` in whatever way it has. None if there is nothing of it here,
    or if `config.transport` wants shm or tcp: then KV on devices passes through staging.
    """
    ucx = UcxConfig(host=host, options=config.ucx_options)
    opened: list[Transport] = []
    if config.transport == "auto":
        try:
            opened.append(_cuda_ipc(region, config, owner, incarnation))
        except (TransportError, InvalidConfig) as error:
            _log.warning("transport.left_out", kind="cuda_ipc", reason=str(error))
    if config.transport == "ucx" or (
        config.transport == "auto" and await asyncio.to_thread(_has_rdma, ucx)
    ):
        try:
            opened.append(
                await UcxTransport.open(region, owner=owner, incarnation=incarnation, config=ucx)
            )
        except TransportError as error:
            _log.warning("transport.left_out", kind="ucx", reason=str(error))
    if not opened:
        return None
    return NegotiatedTransport(opened, region, owner=owner, incarnation=incarnation)


def _cuda_ipc(
    region: Region, config: HandoverConfig, owner: str, incarnation: Incarnation
) -> Transport:
    backend, secret = CudaIpcBackend(region), config.secret.get_secret_value().encode()
    return LinkTransport(region, backend, owner=owner, incarnation=incarnation, secret=secret)


class OpenTransport(Protocol):
    """How an instance has its KV pool registered; `open_transport`, unless it is told otherwise."""

    async def __call__(
        self,
        region: Region,
        config: HandoverConfig,
        *,
        host: str,
        owner: str,
        incarnation: Incarnation,
    ) -> Transport:
        """Return a transport over `region`, which the instance then owns."""


async def open_transport(
    region: Region, config: HandoverConfig, *, host: str, owner: str, incarnation: Incarnation
) -> Transport:
    """Open what `config.transport` says, at `host`, the address by which peers reach this process.

    With `auto`, what cannot be opened here is left out with a warning; UCX is opened where it has
    RDMA, and where nothing else can be opened, for want of a secret for example.

    Raises TransportError if nothing can be opened, InvalidConfig for a secret that is missing.
    """
    secret = config.secret.get_secret_value().encode()
    ucx = UcxConfig(host=host, options=config.ucx_options)

    async def open_one(kind: str) -> Transport:
        if kind == "ucx":
            return await UcxTransport.open(region, owner=owner, incarnation=incarnation, config=ucx)
        grants = Grants() if kind == "tcp" else None
        backend = ShmBackend(region) if kind == "shm" else TcpBackend(region, host, grants)
        try:
            return LinkTransport(
                region, backend, owner=owner, incarnation=incarnation, secret=secret, grants=grants
            )
        except OSError as error:
            raise TransportError(f"{kind} cannot listen: {error}") from error

    if config.transport != "auto":
        opened = [await open_one(config.transport)]
    else:
        opened = await _open_all(open_one, ucx)
    return NegotiatedTransport(opened, region, owner=owner, incarnation=incarnation)


async def _open_all(
    open_one: Callable[[str], Awaitable[Transport]], ucx: UcxConfig
) -> list[Transport]:
    """Open each kind that is of use here; raises TransportError with the reasons if none is."""
    opened: dict[str, Transport] = {}
    reasons: list[str] = []
    for kind in sorted(_AUTO, key="ucx".__eq__):  # whether UCX is needed shows last
        try:
            if kind != "ucx" or not opened or await asyncio.to_thread(_has_rdma, ucx):
                opened[kind] = await open_one(kind)
        except (TransportError, InvalidConfig) as error:
            reasons.append(f"{kind}: {error}")
            _log.warning("transport.left_out", kind=kind, reason=str(error))
    if not opened:
        raise TransportError("no transport can be opened; " + "; ".join(reasons))
    return [opened[kind] for kind in _AUTO if kind in opened]


def _has_rdma(ucx: UcxConfig) -> bool:
    """Return whether UCX can use an RDMA device; without one it is not even loaded."""
    return any(_RDMA_DEVICES.glob("*")) and describe(ucx).has_verbs
