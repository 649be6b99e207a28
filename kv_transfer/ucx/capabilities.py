"""What UCX can do on this machine; for `baton doctor`."""

import ctypes as c
import re
from dataclasses import dataclass

from baton.kv_transfer.ucx import structs as s
from baton.kv_transfer.ucx.config import UcxConfig
from baton.kv_transfer.ucx.libucp import LibUcp, load
from baton.kv_transfer.ucx.session import memory_types, open_context

_RESOURCE = re.compile(r"^#\s+resource \d+ .* (\w+)/(\S+)$", re.MULTILINE)
_VERBS = ("rc_", "ud_", "dc_", "srd_")
_CUDA = ("cuda_", "gdr_")


@dataclass(frozen=True, slots=True)
class UcxDevice:
    """A way to move bytes: a transport on a device, for example `tcp` on `eth0`."""

    transport: str
    device: str


@dataclass(frozen=True, slots=True)
class UcxCapabilities:
    """UCX as it is found here."""

    version: str
    library: str
    """Path of libucp."""
    devices: tuple[UcxDevice, ...]
    """What UCX would choose from, with the settings given and the user's UCX_* variables."""
    moves_cuda: bool = False
    """Whether it can move the memory of GPUs: it was built for CUDA, and finds a driver."""

    @property
    def transports(self) -> tuple[str, ...]:
        """Return the names of the transports, each once."""
        return tuple(dict.fromkeys(device.transport for device in self.devices))

    @property
    def has_verbs(self) -> bool:
        """True if UCX knows verbs and finds an RDMA device."""
        return any(name.startswith(_VERBS) for name in self.transports)

    @property
    def cuda_transports(self) -> tuple[str, ...]:
        """Return those that are for the memory of GPUs: cuda_copy, cuda_ipc, gdr_copy.

        With RDMA devices, GPUDirect is theirs, and goes by the name of the device's transport.
        """
        return tuple(name for name in self.transports if name.startswith(_CUDA))


def describe(config: UcxConfig) -> UcxCapabilities:
    """Open a UCX context as a transport would, and return what it finds; takes about 0.1 s.

    Raises TransportError if UCX is missing or refuses a setting.
    """
    lib = load()
    context = open_context(lib, config)
    try:
        found = _RESOURCE.findall(_context_info(lib, context))
        moves_cuda = bool(memory_types(lib, context) & 1 << s.MEMORY_TYPE_CUDA)
    finally:
        lib.ucp_cleanup(context)
    devices = tuple(UcxDevice(transport, device) for transport, device in found)
    return UcxCapabilities(lib.version, lib.path, devices, moves_cuda)


def _context_info(lib: LibUcp, context: c.c_void_p) -> str:
    """Return what UCX prints about a context: it has no other public list of its devices."""
    libc = c.CDLL(None)
    libc.open_memstream.restype = c.c_void_p
    libc.free.argtypes = (c.c_void_p,)
    text, size = c.c_void_p(), c.c_size_t()
    stream = c.c_void_p(libc.open_memstream(c.byref(text), c.byref(size)))
    lib.ucp_context_print_info(context, stream)
    libc.fclose(stream)
    try:
        return c.string_at(text, size.value).decode(errors="replace")
    finally:
        libc.free(text)
