"""Opens the transports that an instance is to use."""

from collections.abc import Awaitable, Callable
from typing import Protocol

from baton.core.config import HandoverConfig
from baton.core.errors import InvalidConfig, TransportError
from baton.core.ids import Incarnation
from baton.core.log import get_logger
from baton.kv_transfer.link.transport import LinkTransport
from baton.kv_transfer.negotiated import NegotiatedTransport
from baton.kv_transfer.shm.backend import ShmBackend
from baton.kv_transfer.shm.memory import SharedMemory
from baton.kv_transfer.tcp.backend import TcpBackend
from baton.kv_transfer.transport import Region, Transport
from baton.kv_transfer.ucx.config import UcxConfig
from baton.kv_transfer.ucx.transport import UcxTransport

_AUTO = ("ucx", "shm", "tcp")
"""By preference: UCX has RDMA and GPU memory."""

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

    With `auto`, what cannot be opened here is left out with a warning.

    Raises TransportError if nothing can be opened, InvalidConfig for a secret that is missing.
    """
    secret = config.secret.get_secret_value().encode()

    async def open_one(kind: str) -> Transport:
        if kind == "ucx":
            ucx = UcxConfig(host=host, options=config.ucx_options)
            return await UcxTransport.open(region, owner=owner, incarnation=incarnation, config=ucx)
        backend = ShmBackend(region) if kind == "shm" else TcpBackend(region, host)
        try:
            return LinkTransport(
                region, backend, owner=owner, incarnation=incarnation, secret=secret
            )
        except OSError as error:
            raise TransportError(f"{kind} cannot listen: {error}") from error

    if config.transport != "auto":
        opened = [await open_one(config.transport)]
    else:
        opened = await _open_all(open_one)
    return NegotiatedTransport(opened, region, owner=owner, incarnation=incarnation)


async def _open_all(open_one: Callable[[str], Awaitable[Transport]]) -> list[Transport]:
    """Open each kind that works here; raises TransportError with the reasons if none does."""
    opened: list[Transport] = []
    reasons: list[str] = []
    for kind in _AUTO:
        try:
            opened.append(await open_one(kind))
        except (TransportError, InvalidConfig) as error:
            reasons.append(f"{kind}: {error}")
            _log.warning("transport.left_out", kind=kind, reason=str(error))
    if not opened:
        raise TransportError("no transport can be opened; " + "; ".join(reasons))
    return opened
