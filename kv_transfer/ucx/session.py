"""One UCP context and worker with one registered region; used by one thread only."""

import ctypes as c
from contextlib import ExitStack

from baton.core.errors import TransportError
from baton.kv_transfer.transport import Region
from baton.kv_transfer.ucx import structs as s
from baton.kv_transfer.ucx.config import UcxConfig
from baton.kv_transfer.ucx.libucp import LibUcp, error_of

_left: list["Session"] = []
"""Sessions that could not be given back; kept, since UCX still knows their memory."""


def open_context(lib: LibUcp, config: UcxConfig) -> c.c_void_p:
    """Return a UCP context for remote reads and sleeping; ucp_cleanup gives it back.

    Raises TransportError if UCX refuses a setting or finds no device.
    """
    settings = c.c_void_p()
    lib.expect_ok(lib.ucp_config_read(None, None, settings), "read its settings")
    try:
        for name, value in config.settings().items():
            status = lib.ucp_config_modify(settings, name.encode(), value.encode())
            lib.expect_ok(status, f"set {name}={value}")
        params = s.ContextParams(s.PARAM_FIELD_FEATURES, s.FEATURE_RMA | s.FEATURE_WAKEUP)
        context = c.c_void_p()
        status = lib.ucp_init_version(s.API_MAJOR, s.API_MINOR, params, settings, context)
        lib.expect_ok(status, "open a context")
    finally:
        lib.ucp_config_release(settings)
    return context


def memory_types(lib: LibUcp, context: c.c_void_p) -> int:
    """Return which kinds of memory a context can move, a bit each, such as 1 << MEMORY_TYPE_CUDA.

    Raises TransportError.
    """
    attr = s.ContextAttr(field_mask=s.CONTEXT_ATTR_FIELD_MEMORY_TYPES)
    lib.expect_ok(lib.ucp_context_query(context, attr), "say which memory it moves")
    return int(attr.memory_types)


class Session:
    """What a transport has of UCX, apart from its endpoints."""

    def __init__(self, lib: LibUcp, config: UcxConfig, region: Region) -> None:
        self.lib = lib
        self.region = region
        self.memory_type = s.MEMORY_TYPE_HOST
        """Said, and not found out by UCX at every read."""
        if region.device is not None:
            self.memory_type = s.MEMORY_TYPE_CUDA
            region.device.attach()  # UCX asks CUDA which device the thread works with
        with ExitStack() as stack:
            self.context = open_context(lib, config)
            stack.callback(lib.ucp_cleanup, self.context)
            if not memory_types(lib, self.context) & 1 << self.memory_type:
                raise TransportError("UCX has no transport that moves the memory of GPUs here")
            self.memory = self._register()
            stack.callback(lib.ucp_mem_unmap, self.context, self.memory)
            self.worker = self._open_worker()
            stack.callback(lib.ucp_worker_destroy, self.worker)
            self.key = self._pack_key()
            self.address = self._worker_address()
            fd = c.c_int()
            lib.expect_ok(lib.ucp_worker_get_efd(self.worker, fd), "give an event descriptor")
            self.event_fd = fd.value
            self._stack = stack.pop_all()
        self._flush: int | None = None
        self._settling = False
        self._settled = False

    def settle(self) -> bool:
        """Return True once UCX has taken down all that closed endpoints left behind.

        To be called again, with progress in between, until it is so. An endpoint that was closed
        by force has lanes that UCX takes down later, and a worker that is destroyed before that
        ends the process (`ucs_arbiter_group_is_empty(group)`); a flush waits for them.
        """
        if not self._settling:
            self._settling = True
            flush = self.lib.ucp_worker_flush_nbx(self.worker, s.RequestParam())
            self._flush = None if error_of(flush) else flush
        if self._flush is not None:
            if self.lib.ucp_request_check_status(self._flush) == s.INPROGRESS:
                return False
            self.lib.ucp_request_free(self._flush)
            self._flush = None
        self._settled = True
        return True

    def close(self) -> None:
        """Give all back. If UCX has not settled, leave it and the region as they are instead.

        Either way nothing is written to the region any more, as nobody makes progress: what is
        left costs memory, whereas to destroy it could end the process.
        """
        if self._settled:
            self._stack.close()
        else:
            _left.append(self)

    def _open_worker(self) -> c.c_void_p:
        params = s.WorkerParams(s.WORKER_PARAM_FIELD_THREAD_MODE, s.THREAD_MODE_SINGLE)
        worker = c.c_void_p()
        status = self.lib.ucp_worker_create(self.context, params, worker)
        self.lib.expect_ok(status, "open a worker")
        return worker

    def _register(self) -> c.c_void_p:
        mask = s.MEM_MAP_PARAM_FIELD_ADDRESS | s.MEM_MAP_PARAM_FIELD_LENGTH
        mask |= s.MEM_MAP_PARAM_FIELD_MEMORY_TYPE
        place = self.region.address, self.region.length
        params = s.MemMapParams(mask, *place, memory_type=self.memory_type)
        memory = c.c_void_p()
        status = self.lib.ucp_mem_map(self.context, params, memory)
        self.lib.expect_ok(status, f"register {self.region.length} bytes of memory")
        return memory

    def _pack_key(self) -> bytes:
        buffer, size = c.c_void_p(), c.c_size_t()
        status = self.lib.ucp_rkey_pack(self.context, self.memory, buffer, size)
        self.lib.expect_ok(status, "make a key for the region")
        try:
            return c.string_at(buffer, size.value)
        finally:
            self.lib.ucp_rkey_buffer_release(buffer)

    def _worker_address(self) -> bytes:
        attr = s.WorkerAttr(field_mask=s.WORKER_ATTR_FIELD_ADDRESS)
        status = self.lib.ucp_worker_query(self.worker, attr)
        self.lib.expect_ok(status, "give its address")
        try:
            return c.string_at(attr.address, attr.address_length)
        finally:
            self.lib.ucp_worker_release_address(self.worker, attr.address)
