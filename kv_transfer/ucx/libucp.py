"""libucp, bound by ctypes: finds the library, types its functions, turns statuses into errors."""

import ctypes as c
import functools
import time
from collections.abc import Callable
from typing import Any, cast

from baton.core.errors import PeerLost, TransportError
from baton.kv_transfer.ucx import structs as s

_LOST = frozenset({-3, -6, -16, -20, -23, -24, -25, *range(-89, -59)})
"""I/O error, unreachable, cancelled, timed out, rejected, not connected, reset, endpoint failure:
what a read ends with when the other side is gone or its endpoint was closed."""

_PTR_BITS = 8 * c.sizeof(c.c_void_p)
_FIRST_ERROR_PTR = (1 << _PTR_BITS) + s.ERR_LAST

_VP, _SIZE, _OUT = c.c_void_p, c.c_size_t, c.POINTER(c.c_void_p)

# Called with the GIL released: these may copy, connect or take long.
_LONG: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ucp_config_read": (s.Status, (c.c_char_p, c.c_char_p, _OUT)),
    "ucp_config_modify": (s.Status, (_VP, c.c_char_p, c.c_char_p)),
    "ucp_config_release": (None, (_VP,)),
    "ucp_init_version": (s.Status, (c.c_uint, c.c_uint, c.POINTER(s.ContextParams), _VP, _OUT)),
    "ucp_cleanup": (None, (_VP,)),
    "ucp_context_print_info": (None, (_VP, _VP)),
    "ucp_context_query": (s.Status, (_VP, c.POINTER(s.ContextAttr))),
    "ucp_get_version_string": (c.c_char_p, ()),
    "ucp_worker_create": (s.Status, (_VP, c.POINTER(s.WorkerParams), _OUT)),
    "ucp_worker_destroy": (None, (_VP,)),
    "ucp_worker_query": (s.Status, (_VP, c.POINTER(s.WorkerAttr))),
    "ucp_worker_release_address": (None, (_VP, _VP)),
    "ucp_worker_flush_nbx": (_VP, (_VP, c.POINTER(s.RequestParam))),
    "ucp_worker_get_efd": (s.Status, (_VP, c.POINTER(c.c_int))),
    "ucp_mem_map": (s.Status, (_VP, c.POINTER(s.MemMapParams), _OUT)),
    "ucp_mem_unmap": (s.Status, (_VP, _VP)),
    "ucp_rkey_pack": (s.Status, (_VP, _VP, _OUT, c.POINTER(c.c_size_t))),
    "ucp_rkey_buffer_release": (None, (_VP,)),
    "ucp_ep_create": (s.Status, (_VP, c.POINTER(s.EndpointParams), _OUT)),
    "ucp_ep_rkey_unpack": (s.Status, (_VP, c.c_char_p, _OUT)),
    "ucp_rkey_destroy": (None, (_VP,)),
    "ucp_ep_close_nbx": (_VP, (_VP, c.POINTER(s.RequestParam))),
    "ucs_status_string": (c.c_char_p, (s.Status,)),
}

# Called with the GIL held: each lasts about a microsecond and is called once a run, and to take
# the GIL back from a busy thread may cost 5 ms each time.
_SHORT: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ucp_get_nbx": (_VP, (_VP, _VP, _SIZE, c.c_uint64, _VP, c.POINTER(s.RequestParam))),
    "ucp_request_check_status": (s.Status, (_VP,)),
    "ucp_request_free": (None, (_VP,)),
    "ucp_request_query": (s.Status, (_VP, c.POINTER(s.RequestAttr))),
    "ucp_worker_arm": (s.Status, (_VP,)),
}

_BURST_S = 500e-6


class LibUcp:
    """The functions of the one libucp of this process."""

    def __init__(self, path: str) -> None:
        self.path = path
        releasing, holding = c.CDLL(path), c.PyDLL(path)
        for dll, table in ((releasing, _LONG), (holding, _SHORT)):
            for name, (result, arguments) in table.items():
                setattr(self, name, _bind(dll, name, result, arguments))
        self._progress = _bind(releasing, "ucp_worker_progress", c.c_uint, (_VP,))
        self._progress_holding = _bind(holding, "ucp_worker_progress", c.c_uint, (_VP,))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"{name} is not bound by baton.kv_transfer.ucx.libucp")

    def progress(self, worker: c.c_void_p) -> bool:
        """Go on with what `worker` has to do, for about `_BURST_S`; False if that was nothing.

        One call of ucp_worker_progress moves as little as one run, and taking the GIL back from a
        busy thread may cost 5 ms (sys.getswitchinterval) each time: so the GIL is given up once a
        burst, not once a run.
        """
        if not self._progress(worker):
            return False
        until = time.perf_counter() + _BURST_S
        while self._progress_holding(worker) and time.perf_counter() < until:
            pass
        return True

    def __repr__(self) -> str:
        return f"LibUcp({self.version!r}, {self.path!r})"

    @property
    def version(self) -> str:
        """UCX's version, for example `1.22.0`."""
        return str(self.ucp_get_version_string().decode())

    def status_string(self, status: int) -> str:
        """Return UCX's words for `status`, with its number."""
        return f"{self.ucs_status_string(status).decode()} ({status})"

    def expect_ok(self, status: int, what: str) -> None:
        """Raise TransportError unless `status` is OK; `what` says what was tried."""
        if status != s.OK:
            raise TransportError(f"UCX could not {what}: {self.status_string(status)}")

    def read_error(self, status: int, peer: str, *, lost: bool) -> TransportError:
        """Return the error of a read from `peer` that ended with `status`.

        `lost` says that the endpoint is known to have failed or to have been closed.
        """
        words = self.status_string(status)
        if lost or status in _LOST:
            return PeerLost(f"{peer} is gone or was removed: {words}")
        return TransportError(f"read from {peer} failed: {words}")


def _bind(dll: c.CDLL, name: str, result: Any, arguments: tuple[Any, ...]) -> Callable[..., Any]:
    function = getattr(dll, name)
    function.restype, function.argtypes = result, arguments
    return cast(Callable[..., Any], function)


def error_of(pointer: int | None) -> int:
    """Return the status in a ucs_status_ptr_t: negative if it is an error, else 0."""
    if pointer is None or pointer < _FIRST_ERROR_PTR:
        return s.OK
    return pointer - (1 << _PTR_BITS)


def _mapped(name: str) -> str | None:
    """Return the path of the library `name` that this process has mapped already."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            path = line.rstrip("\n").partition("/")[2]
            base = path.rpartition("/")[2]
            if base.startswith((f"{name}.so", f"{name}-")):
                return "/" + path
    return None


@functools.cache
def load() -> LibUcp:
    """Load UCX once and return it.

    A libucp that is mapped already is taken as it is, since two UCX in one process hook the same
    memory events. Otherwise the libucx wheel decides: its own copy, or, if
    RAPIDS_LIBUCX_PREFER_SYSTEM_LIBRARY=true, the system's (which has verbs for RDMA).

    Raises TransportError if there is none.
    """
    if _mapped("libucp") is None:
        try:
            import libucx
        except ModuleNotFoundError as error:
            raise TransportError("UCX is not installed: pip install libucx-cu12") from error
        libucx.load_library()
    path = _mapped("libucp")
    if path is None:
        raise TransportError("the libucx package has no libucp for this machine")
    return LibUcp(path)
