"""One long-lived stream to one decode instance: requests go out, each engine step comes back.

A request is submitted under a key, and ends with exactly one Finish under that key, also after it
was cancelled. If the stream is lost, every request on it ends as InstanceLost at once. An instance
that ends one as `draining` is sent no more; one that says `instance_lost` is fenced, and is sent
more on another stream, which it opens once it serves again.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc

from baton.core.clock import Clock
from baton.core.config import ClusterTlsConfig
from baton.core.errors import (
    BatonError,
    Draining,
    HandoverError,
    InstanceLost,
    InternalError,
    Unavailable,
)
from baton.core.log import get_logger
from baton.core.request import FinishReason, GenerateRequest, TokenLogprobs
from baton.core.spans import DecodeSpans
from baton.core.topology import InstanceInfo
from baton.core.trace import HandoverTrace
from baton.proto import worker_pb2 as pb
from baton.proto.convert import error_core, request_proto, spans_core, trace_core
from baton.proto.convert_sampling import logprobs_core
from baton.proto.errors import from_rpc_error
from baton.proto.grpc_runtime import open_channel
from baton.proto.worker_pb2_grpc import DecodeStub

CANCEL_TIMEOUT_S = 30.0
"""For a decode instance to say that a cancelled request has ended; then it is given up."""

_log = get_logger("gateway.session")
_Call = grpc.aio.StreamStreamCall[pb.GatewayFrame, pb.DecodeFrame]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a request ended on its decode instance."""

    reason: FinishReason
    error: BatonError | None = None
    """Set if the reason is ERROR."""
    local_prefill: bool = False
    handovers: tuple[HandoverTrace, ...] = ()


class Listener(Protocol):
    """Who waits for a request's tokens. Its methods are called on the event loop and return."""

    def deliver(
        self, tokens: Sequence[int], at: float, logprobs: Sequence[TokenLogprobs] = ()
    ) -> None:
        """Take the tokens of one engine step, which arrived `at` that time of the clock.

        Raises InternalError if there are more than were asked for, or if their logprobs are not
        as they were asked for: the session is then broken off.
        """
        ...

    def cached(self, prompt_tokens: int) -> None:
        """Hear, before the first tokens, how many of the prompt's a prefix cache had, if any."""
        ...

    def backed_up(self, tokens: int) -> None:
        """Hear how many tokens, from the first, the request's backup instance has by now."""
        ...

    def first_token(self, spans: DecodeSpans) -> None:
        """Hear, before the first tokens, where the instance's time until then went."""
        ...

    def ended(self, ended: Ended) -> None:
        """Called exactly once, after the last tokens."""
        ...


@dataclass(slots=True)
class _Entry:
    listener: Listener
    expiry: asyncio.TimerHandle | None = None
    """Runs once the request is cancelled."""


@dataclass(frozen=True, slots=True)
class SessionStats:
    """A snapshot."""

    instance_id: str
    ready: bool
    open_requests: int
    unsent_frames: int
    late_updates: int
    """For requests that had been given up."""


class DecodeSession:
    """One stream, from its opening to its loss; a lost session is never used again."""

    def __init__(
        self,
        instance: InstanceInfo,
        *,
        clock: Clock,
        max_unsent: int,
        tls: ClusterTlsConfig | None = None,
    ) -> None:
        """`max_unsent` bounds the frames that wait for an instance that does not read."""
        self.instance = instance
        self._clock = clock
        self._tls = tls
        self._unsent: asyncio.Queue[pb.GatewayFrame] = asyncio.Queue(max_unsent)
        self._entries: dict[int, _Entry] = {}
        self._last_key = 0
        self._call: _Call | None = None
        self._ready = False
        self._retired = False
        self._broken_by: InstanceLost | None = None
        self._draining = False
        self._late_updates = 0

    @property
    def ready(self) -> bool:
        """Requests may be submitted."""
        return self._ready and not (self._retired or self._draining)

    def submit(
        self,
        request: GenerateRequest,
        prefill: Sequence[InstanceInfo],
        *,
        timeout_s: float,
        listener: Listener,
        backup: InstanceInfo | None = None,
    ) -> int:
        """Send a request and return its key. The session must be ready."""
        assert self.ready, self
        self._last_key += 1
        key = self._last_key
        submit = pb.Submit(
            key=key,
            request=request_proto(request),
            prefill=map(_ref, prefill),
            timeout_s=timeout_s,
            backup=None if backup is None else _ref(backup),
        )
        self._entries[key] = _Entry(listener)
        self._send(pb.GatewayFrame(submit=submit))
        return key

    def cancel(self, key: int) -> None:
        """Ask for a request's end; does nothing if it has ended."""
        entry = self._entries.get(key)
        if entry is None or entry.expiry is not None:
            return
        loop = asyncio.get_running_loop()
        entry.expiry = loop.call_later(CANCEL_TIMEOUT_S, self._give_up, key)
        self._send(pb.GatewayFrame(cancel=pb.Cancel(key=key)))

    def retire(self) -> None:
        """Take no more requests, and end when the last one has ended."""
        self._retired = True
        self._end_if_retired()

    def break_off(self, error: InstanceLost) -> None:
        """Give the instance up: every request on the session ends with `error`."""
        self._ready = False
        self._broken_by = error
        if self._call is not None:
            self._call.cancel()

    async def run(self, *, connect_timeout_s: float, on_ready: Callable[[], None]) -> BatonError:
        """Hold the stream until it is lost, and return why; calls `on_ready` once it is open."""
        lost: BatonError = Unavailable("the gateway is shutting down")
        try:
            async with open_channel(self.instance.address, self._tls) as channel:
                self._call = DecodeStub(channel).Session()
                try:
                    lost = await self._hold(self._call, connect_timeout_s, on_ready)
                except Exception:  # a bug; it must not end the sessions with other instances
                    _log.exception("bug in a session", session=repr(self))
                    lost = InternalError(f"the session with {self.instance.instance_id} failed")
                finally:
                    self._call.cancel()
        finally:
            self._ready = False
            self._lose(lost)
        return lost

    async def _hold(
        self, call: _Call, connect_timeout_s: float, on_ready: Callable[[], None]
    ) -> BatonError:
        name = self.instance.instance_id
        try:
            async with asyncio.timeout(connect_timeout_s):
                self._greet(await call.read())
        except TimeoutError:
            return InstanceLost(f"{name} did not open the session in {connect_timeout_s:g} s")
        except grpc.aio.AioRpcError as error:
            return InstanceLost(f"{name} cannot be reached: {from_rpc_error(error).message}")
        except InstanceLost as error:
            return error
        except asyncio.CancelledError:
            return self._closed(call)
        self._ready = True
        on_ready()
        async with asyncio.TaskGroup() as group:
            writer = group.create_task(self._write(call))
            lost = await self._read(call)
            writer.cancel()
        return lost

    def _greet(self, frame: object) -> None:
        """Check that the instance is the one that the membership meant."""
        expected = self.instance
        if not isinstance(frame, pb.DecodeFrame) or not frame.HasField("hello"):
            raise InstanceLost(f"{expected.instance_id} did not greet")
        hello = frame.hello
        if (hello.instance_id, hello.incarnation) != (expected.instance_id, expected.incarnation):
            raise InstanceLost(
                f"{expected.address} is {hello.instance_id!r} of incarnation {hello.incarnation}, "
                f"not {expected.instance_id!r} of {expected.incarnation}"
            )

    async def _read(self, call: _Call) -> BatonError:
        name = self.instance.instance_id
        try:
            while True:
                frame = await call.read()
                if not isinstance(frame, pb.DecodeFrame):
                    return InstanceLost(f"{name} closed the session")
                self._take(frame)
        except grpc.aio.AioRpcError as error:
            return InstanceLost(f"{name} was lost: {from_rpc_error(error).message}")
        except (InternalError, HandoverError) as error:
            return InstanceLost(f"{name} was broken off: {error.message}")
        except asyncio.CancelledError:
            return self._closed(call)

    def _closed(self, call: _Call) -> BatonError:
        """Tell a stream that we closed ourselves from a task that is cancelled; gRPC does not."""
        if not call.cancelled() or _being_cancelled():
            raise asyncio.CancelledError
        if self._broken_by is not None:
            return self._broken_by
        return InstanceLost(f"the session with {self.instance.instance_id} was closed")

    def _take(self, frame: pb.DecodeFrame) -> None:
        """Hand one engine step's tokens out: the hot path of the gateway.

        Raises InternalError or HandoverError for what no decode instance of ours would say. Only
        the request that it was said of ends with that; the others were only on the same stream.
        """
        now = self._clock()
        entries = self._entries
        for update in frame.updates:
            entry = entries.get(update.key)
            if entry is None:
                self._late_updates += 1
                continue
            if update.cached_tokens:
                entry.listener.cached(update.cached_tokens)
            if update.HasField("first_token"):
                entry.listener.first_token(spans_core(update.first_token))
            if update.backed_up_tokens:
                entry.listener.backed_up(update.backed_up_tokens)
            try:
                if update.logprobs:
                    logprobs = [logprobs_core(message) for message in update.logprobs]
                    entry.listener.deliver(update.tokens, now, logprobs)
                elif update.tokens:
                    entry.listener.deliver(update.tokens, now)
            except (InternalError, HandoverError) as error:
                self._end(update.key, Ended(FinishReason.ERROR, error))
                raise
            if update.HasField("finish"):
                self._finish(update.key, _ended(update.finish))

    def _finish(self, key: int, ended: Ended) -> None:
        """End a request as the instance says, which may say by it that it takes no more."""
        if isinstance(ended.error, InstanceLost):
            self.break_off(ended.error)
        elif isinstance(ended.error, Draining) and not self._draining:
            self._draining = True
            _log.info("a decode instance drains", instance=self.instance.instance_id)
        self._end(key, ended)

    async def _write(self, call: _Call) -> None:
        try:
            while True:
                await call.write(await self._unsent.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # The reader sees the same loss and knows why.

    def _send(self, frame: pb.GatewayFrame) -> None:
        try:
            self._unsent.put_nowait(frame)
        except asyncio.QueueFull:
            _log.error("a decode instance does not read", instance=self.instance.instance_id)
            self._ready = False
            assert self._call is not None
            self._call.cancel()

    def _give_up(self, key: int) -> None:
        _log.error("a cancel was not answered", instance=self.instance.instance_id, key=key)
        error = InternalError(f"{self.instance.instance_id} did not answer a cancel")
        self._end(key, Ended(FinishReason.ERROR, error))

    def _end(self, key: int, ended: Ended) -> None:
        entry = self._entries.pop(key)
        if entry.expiry is not None:
            entry.expiry.cancel()
        entry.listener.ended(ended)
        self._end_if_retired()

    def _end_if_retired(self) -> None:
        if self._retired and not self._entries and self._call is not None:
            self._call.cancel()

    def _lose(self, error: BatonError) -> None:
        for key in list(self._entries):
            self._end(key, Ended(FinishReason.ERROR, error))

    def stats(self) -> SessionStats:
        """Return a snapshot."""
        return SessionStats(
            instance_id=self.instance.instance_id,
            ready=self.ready,
            open_requests=len(self._entries),
            unsent_frames=self._unsent.qsize(),
            late_updates=self._late_updates,
        )

    def __repr__(self) -> str:
        return f"DecodeSession({self.instance.instance_id}, open={len(self._entries)})"


def _ref(instance: InstanceInfo) -> pb.InstanceRef:
    return pb.InstanceRef(
        instance_id=instance.instance_id,
        address=instance.address,
        incarnation=instance.incarnation,
    )


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _ended(finish: pb.Finish) -> Ended:
    """Take a Finish off the wire; what makes no sense becomes an InternalError."""
    error = error_core(finish.error) if finish.HasField("error") else None
    try:
        reason = FinishReason(finish.reason)
    except ValueError:
        reason, error = FinishReason.ERROR, InternalError(f"unknown reason {finish.reason!r}")
    if reason is FinishReason.ERROR and error is None:
        error = InternalError("the request failed without a reason")
    handovers = tuple(trace_core(trace) for trace in finish.handovers)
    return Ended(reason, error, finish.local_prefill, handovers)
