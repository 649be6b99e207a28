"""The settings of UCX: Baton's defaults, the caller's, and above both the user's variables."""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from baton.core.errors import InvalidConfig

_DEFAULTS = {
    # Otherwise UCX counts on its rendezvous protocol, gives the endpoint no lane for remote reads
    # and carries them through TCP, even between two processes of one host.
    "RNDV_THRESH": "inf",
    # A host that does not answer must not hold up the thread that serves all other peers.
    "TCP_CONN_NB": "y",
    # The default of 8 KiB costs half the speed; the receiver's own default takes up to 64 KiB.
    "TCP_TX_SEG_SIZE": "32k",
    # Notices a dead peer within about a second where no socket says so; the default is 20 s.
    "KEEPALIVE_INTERVAL": "1s",
}


@dataclass(frozen=True, slots=True)
class UcxConfig:
    """How to open UCX."""

    host: str = "127.0.0.1"
    """The address by which peers reach this process. If it is a loopback address, UCX uses and
    listens on the loopback interface only; otherwise on each interface, at its own address."""
    options: Mapping[str, str] = field(default_factory=dict)
    """UCX's own settings without `UCX_`, for example `TLS` or `NET_DEVICES`. A UCX_* variable of
    the environment wins over them."""
    max_queued: int = 4096
    """Transfers that may wait for the thread; more are refused."""

    def __post_init__(self) -> None:
        for name in self.options:
            if not name or name != name.upper() or name.startswith("UCX_"):
                raise InvalidConfig("ucx.options", name, "names in capitals, without UCX_")
        if self.max_queued < 1:
            raise InvalidConfig("ucx.max_queued", self.max_queued, "1 or more")

    def settings(self) -> dict[str, str]:
        """Return what to set: the defaults and the options, less what the environment has."""
        settings = dict(_DEFAULTS)
        if _is_loopback(self.host):
            settings["NET_DEVICES"] = "lo"
        settings.update(self.options)
        return {name: v for name, v in settings.items() if f"UCX_{name}" not in os.environ}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
