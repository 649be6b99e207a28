"""The product's gateway as the driver holds it; tells of every piece of an answer as it comes."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from baton.api import gateway as product
from baton.api.validate import TextRequest
from baton.core.config import GatewayConfig
from baton.core.errors import BatonError
from baton.core.ids import RequestId
from baton.core.metrics import GatewayMetrics
from baton.core.request import FinishReason, GenerateRequest, SamplingParams
from baton.core.served_model import FrontModel
from baton.core.topology import InstanceInfo, MembershipBoard
from baton.models.tokenizer import Tokenizer, load_tokenizer
from baton.proto import worker_pb2 as pb
from baton.proto.convert import error_proto, trace_proto
from baton.router.route import Plan
from baton.router.router import Router

from .process import PATIENCE_S
from .schedule import MODEL_DIR, Entry

_MOST_LOSSES = 16
"""More than one request can meet in a run."""

Happened = Callable[[str], None]


@dataclass
class Answer:
    """What came for one request."""

    tokens: list[int] = field(default_factory=list)
    finish: pb.Finish | None = None
    """How it ended, if somebody still waited for it."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    """It has ended, or nobody waits for it any more."""
    migrations: list[str] = field(default_factory=list)
    """Why it moved to another decode instance, each time."""
    reading: asyncio.Task[None] | None = None


class Gateway:
    """One gateway; made by `open_gateway`."""

    def __init__(self, gateway: product.Gateway | None, happened: Happened) -> None:
        self.hung_up = False
        self._gateway = gateway
        self._happened = happened
        self._numbers = itertools.count(1)
        self.answers: list[Answer] = []

    def submit(self, entry: Entry, prefill: Sequence[InstanceInfo]) -> Answer:
        """Send a request, to be computed by these prefill instances in order of preference."""
        answer = Answer()
        self.answers.append(answer)
        sampling = SamplingParams(temperature=entry.temperature, seed=entry.seed)
        name = RequestId(f"request-{next(self._numbers)}")
        request = GenerateRequest(name, entry.prompt, entry.max_tokens, sampling, ())
        answer.reading = asyncio.create_task(self._read(request, tuple(prefill), answer))
        return answer

    def cancel(self, answer: Answer) -> None:
        """Stop reading an answer, as a client that goes away."""
        assert answer.reading is not None, "not submitted"
        answer.reading.cancel()

    async def hang_up(self) -> int:
        """Go away at once; return how many requests were open."""
        assert self._gateway is not None, "not opened"
        self.hung_up = True
        still = sum(not answer.done.is_set() for answer in self.answers)
        await self._gateway.close()
        return still

    async def _read(
        self, request: GenerateRequest, prefill: tuple[InstanceInfo, ...], answer: Answer
    ) -> None:
        assert self._gateway is not None, "not opened"
        _asked_for.set(prefill)
        error: BatonError | None = None
        reason = FinishReason.ERROR
        try:
            await self._somebody_there()
            async with aclosing(self._gateway.generate(TextRequest(request))) as pieces:
                async for piece in pieces:
                    answer.tokens += piece.tokens
                    reason = piece.finish or reason
                    self._happened("done" if piece.finish else "token")
        except BatonError as failure:
            error = failure
        finally:
            answer.done.set()
        trace = self._gateway.trace(request.request_id)
        answer.finish = pb.Finish(
            reason=reason,
            error=None if error is None else error_proto(error),
            handovers=[] if trace is None else map(trace_proto, trace.handovers),
        )
        answer.migrations += [] if trace is None else [move.error for move in trace.migrations]

    async def _somebody_there(self) -> None:
        """Wait as a client does that is told 503: only what is admitted has the promise."""
        assert self._gateway is not None, "not opened"
        async with asyncio.timeout(PATIENCE_S):
            while "no decode instance is ready" in self._gateway.health():
                await self._gateway.models.by_name("model")._sessions.changed()


_asked_for: ContextVar[tuple[InstanceInfo, ...] | None] = ContextVar("asked_for", default=None)
"""The prefill instances that the request wants which this task reads."""


class _ObedientRouter(Router):
    """Ranks prefill instances as the schedule has it; for requests that move, as it thinks best."""

    def _plan(self, *arguments: Any) -> Plan:
        plan = super()._plan(*arguments)
        asked_for = _asked_for.get()
        if asked_for is None:
            return plan
        return replace(plan, route=replace(plan.route, prefill=asked_for))


@cache
def _tokenizer() -> Tokenizer:
    return load_tokenizer(MODEL_DIR)


@asynccontextmanager
async def open_gateway(board: MembershipBoard, happened: Happened) -> AsyncIterator[Gateway]:
    """Open a gateway to the instances of a board; it has given everything back at the end."""
    config = GatewayConfig(
        request_timeout_s=PATIENCE_S, migration_wait_s=PATIENCE_S, max_migrations=_MOST_LOSSES
    )
    model = FrontModel(name="model", expects_prefill=True)
    inner = product.Gateway(config, {model: _tokenizer()}, board, GatewayMetrics())
    inner.models.by_name("model")._router = _ObedientRouter(
        max_open_requests=config.max_open_requests
    )
    await inner.start()
    gateway = Gateway(inner, happened)
    try:
        yield gateway
        late = {s.instance_id: s.late_updates for s in inner.stats().sessions if s.late_updates}
        assert not late, f"updates after the last of their request: {late}"
    finally:
        await inner.close()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*(answer.reading for answer in gateway.answers if answer.reading))
    inner.check()
