"""A connection to one peer and the reads posted on it; belongs to the UCX thread."""

import ctypes as c
import re
import time
from collections import deque
from collections.abc import Callable

from baton.core.errors import TransportError
from baton.kv_transfer.runs import RunTable
from baton.kv_transfer.transport import Metadata, Peer, Transfer
from baton.kv_transfer.ucx import structs as s
from baton.kv_transfer.ucx.libucp import LibUcp, error_of
from baton.kv_transfer.ucx.session import Session

Completed = tuple[Transfer, str, TransportError | None]
"""A transfer, what carried it, and its error if it failed."""

DRAIN_S = 2.0
"""How long reads may take to end after their endpoint was closed; then they are cut off."""

_INFO_BYTES = 512
_TRANSPORT = re.compile(r"\b([a-z][a-z0-9_]*)/")


def as_transport_error(error: Exception) -> TransportError:
    """Return `error` as those know it who wait for UCX."""
    if isinstance(error, TransportError):
        return error
    return TransportError(f"the UCX thread failed: {error!r}")


def transport_of(lib: LibUcp, request: int) -> str:
    """Return what carries or carried `request`, for example `cma` or `rc_mlx5+tcp`.

    UCX describes a request in words such as `get into host memory length 8 zero-copy cma/memory
    11.5 MB/s`, where `cma` is the transport and `memory` its device.
    """
    buffer = c.create_string_buffer(_INFO_BYTES)
    mask = s.REQUEST_ATTR_FIELD_INFO_STRING | s.REQUEST_ATTR_FIELD_INFO_STRING_SIZE
    attr = s.RequestAttr(mask, c.cast(buffer, c.c_char_p), _INFO_BYTES)
    if lib.ucp_request_query(request, attr) != s.OK:
        return "unknown"
    names = _TRANSPORT.findall(buffer.value.decode(errors="replace"))
    return "+".join(dict.fromkeys(names)) or "unknown"


class _Posting:
    """The requests of one transfer that UCX has not completed, oldest first."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self.pending: deque[int] = deque()
        self.status = s.OK
        self.error: TransportError | None = None
        """Set if something else than UCX failed while the reads were posted."""
        self.transport = "unknown"
        self.witness: int | None = None
        """The request of the largest run, which is asked for the transport."""

    def reap(self, lib: LibUcp) -> bool:
        """Give completed requests back; return True if none is left."""
        while self.pending:
            request = self.pending[0]
            status = lib.ucp_request_check_status(request)
            if status == s.INPROGRESS:
                return False
            if request == self.witness:
                self.transport = transport_of(lib, request)
            if self.status == s.OK:
                self.status = status
            lib.ucp_request_free(request)
            self.pending.popleft()
        return True


class Endpoint:
    """States: new → open → closing → cut off → closed, with every transfer completed.

    An endpoint is closing once it is asked to, and takes no more reads; it is cut off as soon as
    none is open, or when it is lost, or when DRAIN_S is over.
    """

    def __init__(self, session: Session, peer: Peer) -> None:
        self.peer = peer
        self.status = s.OK
        """What UCX said when the connection failed."""
        self.closed = False
        self._session = session
        self._lib = session.lib
        self._handle: c.c_void_p | None = None
        self._key: c.c_void_p | None = None
        self._base = 0
        self._postings: list[_Posting] = []
        self._closing = False
        self._cut_at = 0.0
        self._cut = False
        self._close_request: int | None = None
        mask = s.OP_ATTR_FIELD_MEMH | s.OP_ATTR_FIELD_MEMORY_TYPE
        memory, kind = session.memory, session.memory_type
        self._params = s.RequestParam(op_attr_mask=mask, memory_type=kind, memh=memory)
        # Without this flag a read that is through at once leaves no request to ask.
        mask |= s.OP_ATTR_FLAG_NO_IMM_CMPL
        self._witness_params = s.RequestParam(op_attr_mask=mask, memory_type=kind, memh=memory)

    @property
    def usable(self) -> bool:
        """False once the connection is lost or closing."""
        return not self._closing and self.status == s.OK

    @property
    def idle(self) -> bool:
        """True if nothing is under way that UCX must go on with."""
        return not self._postings and (self.closed or self.usable)

    def open(self, metadata: Metadata, on_error: Callable[..., None]) -> None:
        """Connect to the peer and take its key; UCX calls `on_error` when the connection fails.

        Raises TransportError; then `close` and `reap` until it is closed.
        """
        address = c.create_string_buffer(metadata.address, len(metadata.address))
        mask = (
            s.EP_PARAM_FIELD_REMOTE_ADDRESS
            | s.EP_PARAM_FIELD_ERR_HANDLING_MODE
            | s.EP_PARAM_FIELD_ERR_HANDLER
        )
        where = c.addressof(address)
        mode, number = s.ERR_HANDLING_MODE_PEER, self.peer.number
        params = s.EndpointParams(mask, where, mode, on_error, number)
        handle, key = c.c_void_p(), c.c_void_p()
        status = self._lib.ucp_ep_create(self._session.worker, params, handle)
        self._lib.expect_ok(status, f"connect to {self.peer}")
        self._handle = handle
        status = self._lib.ucp_ep_rkey_unpack(handle, metadata.key, key)
        self._lib.expect_ok(status, f"take the key of {self.peer}")
        self._key = key
        self._base = metadata.base

    def post(self, transfer: Transfer, runs: RunTable) -> None:
        """Start the reads of `runs`, which are within both regions and not empty.

        It raises nothing: what fails is told by `reap`, once the reads that began have completed.
        """
        posting = _Posting(transfer)
        self._postings.append(posting)
        if not self.usable:
            posting.status = self.status or s.ERR_CANCELED
            return
        try:
            self._post_runs(posting, runs)
        except Exception as error:
            posting.error = as_transport_error(error)

    def _post_runs(self, posting: _Posting, runs: RunTable) -> None:
        get = self._lib.ucp_get_nbx
        largest = int(runs.length.argmax())
        targets = (runs.local + self._session.region.address).tolist()
        sources = (runs.remote + self._base).tolist()
        rows = zip(targets, sources, runs.length.tolist(), strict=True)
        for index, (target, source, length) in enumerate(rows):
            params = self._witness_params if index == largest else self._params
            request = get(self._handle, target, length, source, self._key, params)
            if error := error_of(request):
                posting.status = error
                return
            if request is not None:
                posting.pending.append(request)
            if index == largest:
                posting.witness = request

    def reap(self) -> list[Completed]:
        """Return the transfers that have completed since; go on with closing."""
        if self.status != s.OK:
            self.close()
        done: list[_Posting] = []
        still: list[_Posting] = []
        for posting in self._postings:
            (done if posting.reap(self._lib) else still).append(posting)
        self._postings = still
        if self._closing and not self._cut and self._may_cut():
            self._cut_off()
        if self._cut and not still and not self.closed:
            self._finish_close()
        return [(p.transfer, p.transport, self._error_of(p)) for p in done]

    def close(self) -> None:
        """Begin to close: open reads may end, and complete as cancelled if they take too long.

        Where UCX emulates reads by messages (over TCP), the owner of the memory is sending, and
        UCX 1.22 ends its process if the endpoint goes meanwhile; so they are not cut off at once.
        """
        if not self._closing:
            self._closing = True
            self._cut_at = time.monotonic() + DRAIN_S

    def _may_cut(self) -> bool:
        return not self._postings or self.status != s.OK or time.monotonic() > self._cut_at

    def _cut_off(self) -> None:
        self._cut = True
        if self._handle is not None:
            mask, force = s.OP_ATTR_FIELD_FLAGS, s.EP_CLOSE_FLAG_FORCE
            params = s.RequestParam(op_attr_mask=mask, flags=force)
            request = self._lib.ucp_ep_close_nbx(self._handle, params)
            self._close_request = None if error_of(request) else request

    def abandon(self, error: TransportError) -> list[Completed]:
        """Return the transfers that are still open, once the thread has ended."""
        postings, self._postings = self._postings, []
        self.closed = True
        return [(posting.transfer, posting.transport, error) for posting in postings]

    def _finish_close(self) -> None:
        if self._close_request is not None:
            if self._lib.ucp_request_check_status(self._close_request) == s.INPROGRESS:
                return
            self._lib.ucp_request_free(self._close_request)
        if self._key is not None:
            self._lib.ucp_rkey_destroy(self._key)
        self.closed = True

    def _error_of(self, posting: _Posting) -> TransportError | None:
        if posting.error is not None:
            return posting.error
        if posting.status == s.OK:
            return None
        return self._lib.read_error(posting.status, str(self.peer), lost=not self.usable)
