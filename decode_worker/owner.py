"""The owner of one request, from its arrival at the decode leader to its last token."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.core.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
)
from baton.core.ids import Attempt, RequestId, SeqId
from baton.core.log import get_logger, tag_request
from baton.core.request import FinishReason, GenerateRequest
from baton.core.trace import HandoverTrace
from baton.decode_worker.attempt import AttemptHost, HandoverAttempt
from baton.decode_worker.first_token import FirstTokenWatch
from baton.decode_worker.outbox import Outbox
from baton.decode_worker.peer_channels import PeerRef
from baton.decode_worker.placement import Verdict
from baton.engine.step import EngineEvent, Reserved, StepPlan, TokenSampled
from baton.proto import worker_pb2 as pb
from baton.proto.convert import error_proto, trace_proto
from baton.proto.convert_sampling import logprobs_proto

_log = get_logger("decode")


@dataclass(frozen=True, slots=True)
class Submission:
    """A request as the gateway sent it."""

    key: int
    """Its name on the gateway's stream."""
    request: GenerateRequest
    prefill: tuple[PeerRef, ...]
    """In order of preference; none: compute the prompt here."""
    timeout_s: float
    backup: PeerRef | None = None
    """The decode instance that goes on with the request if this one is lost."""


class RequestOwner:
    """Tries the prefill instances in order, then computes the prompt here; then follows the tokens.

    Every reservation lives exactly as long as `run`: whatever ends it gives the blocks back (an
    attempt that still has to pass its fence keeps its own, until it has).
    """

    def __init__(
        self, submission: Submission, host: AttemptHost, owners: "OwnerTable", outbox: Outbox
    ) -> None:
        self.outbox = outbox
        self.reason: FinishReason | None = None
        """How it ended."""
        self._submission = submission
        self._host = host
        self._owners = owners
        self._seq_id: SeqId | None = None
        self._attempts: list[HandoverAttempt] = []
        self._admitted_at: float | None = None
        self._admission_wait_s = 0.0
        self._arrived_at = 0.0
        self._watch: FirstTokenWatch | None = FirstTokenWatch(host.clock)
        """Until the first token."""
        self._verdict: Verdict | None = None
        self._local_prefill = False
        self._started = False
        self._ended = asyncio.Event()

    @property
    def request_id(self) -> RequestId:
        """The request that is served."""
        return self._submission.request.request_id

    def __repr__(self) -> str:
        return f"RequestOwner({self._submission.request.request_id}, seq={self._seq_id})"

    async def run(self) -> None:
        """Serve the request; ends with its last update in the outbox, or cancelled."""
        self._arrived_at = self._host.clock()
        tag_request(self.request_id, self._submission.request.traceparent)
        try:
            async with asyncio.timeout(self._submission.timeout_s):
                # Before any prefill instance computes a prompt that could never be taken.
                self._host.instance.engine.expect_fits(self._submission.request)
                await self._host.instance.prepare(self._submission.request)
                self._verdict = self._decide()
                self._watch_is().decided()
                if self._verdict.here or not await self._hand_over():
                    self._prefill_here()
                await self._ended.wait()
        except TimeoutError:
            self.fail(DeadlineExceeded(f"not done after {self._submission.timeout_s:g} s"))
        except BatonError as error:
            self.fail(error)
        except asyncio.CancelledError:
            self.fail(Cancelled("the caller asked for it"))
            raise
        except Exception as bug:
            _log.exception("bug in the owner of a request", owner=repr(self))
            self.fail(InternalError(f"{type(bug).__name__} in the decode instance"))
        finally:
            self._give_back()

    def _decide(self) -> Verdict:
        """Choose between this instance and prefill; see placement.py."""
        prefill = [ref.instance_id for ref in self._submission.prefill]
        instance = self._host.instance
        if not prefill:
            return Verdict(here=True)
        self._host.placement.keep_only(prefill)
        if instance.config.handover.local_prefill == "fallback":
            return Verdict(here=False)
        outlook = instance.engine.outlook(self._submission.request)
        return self._host.placement.decide(prefill[0], outlook)

    async def _hand_over(self) -> bool:
        """Try each prefill instance once; False if none could do it."""
        tokens = len(self._submission.request.prompt)
        for number, prefill in enumerate(self._submission.prefill):
            attempt = HandoverAttempt(
                self._host, self._submission.request, prefill, Attempt(number)
            )
            self._attempts.append(attempt)
            self._host.placement.sent(prefill.instance_id, tokens)
            self._host.tasks.start(attempt.run())
            try:
                try:
                    first = await attempt.landed
                finally:
                    self._host.placement.ended(prefill.instance_id, tokens, attempt.trace)
            except BatonError as error:
                _log.warning(
                    "handover failed",
                    request=self._submission.request.request_id,
                    prefill=prefill.instance_id,
                    attempt=number,
                    code=error.code,
                    reason=error.message,
                )
                self._watch_is().failed()
                continue
            assert attempt.seq_id is not None, "landed without a sequence"
            self._own(attempt.seq_id)
            self._admitted_at = self._host.clock()
            self._watch_is().landed(attempt.wait)
            self.outbox.cached(self._submission.key, first.cached_tokens)
            event = self._host.instance.engine.admit(attempt.seq_id, first.token)
            self.sampled(replace(event, logprobs=first.logprobs))
            self.outbox.flush()
            return True
        return False

    def _prefill_here(self) -> None:
        self._local_prefill = True
        self._own(self._host.instance.engine.submit(self._submission.request))

    def _own(self, seq_id: SeqId) -> None:
        self._seq_id = seq_id
        self._owners[seq_id] = self
        # With each token that is sampled, the KV of the one before it is there.
        computed = len(self._submission.request.prompt) - 1
        self._host.backups.follow(seq_id, self._submission.backup, computed, self._backed_up)

    def _backed_up(self, tokens: int) -> None:
        if not self._ended.is_set():
            self.outbox.backed_up(self._submission.key, tokens)

    def stepped(self, start: int) -> None:
        """A step is about to run with this sequence's tokens from position `start` on."""
        if self._local_prefill and not self._started and not self._ended.is_set():
            self.outbox.cached(self._submission.key, start)
            self._watch_is().computing()
        self._started = True
        if self._admitted_at is not None:
            self._admission_wait_s = self._host.clock() - self._admitted_at
            self._admitted_at = None

    def sampled(self, event: TokenSampled) -> None:
        """Pass a token on; the caller flushes the outbox."""
        self._see_first_token()
        if self._seq_id is not None:
            self._host.backups.grew(self._seq_id)
        logprobs = None if event.logprobs is None else logprobs_proto(event.logprobs)
        self.outbox.token(self._submission.key, event.token, logprobs)
        self._tell_spans()
        if event.finish is not None:
            self._finish(pb.Finish(reason=event.finish))

    def _watch_is(self) -> FirstTokenWatch:
        assert self._watch is not None, "the first token has come already"
        return self._watch

    def _tell_spans(self) -> None:
        """With the first token of all, tell where the time until then went."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        if self._local_prefill:
            watch.computed()
        if not self._submission.request.resumed:
            self.outbox.first_token(self._submission.key, watch.ready())

    def _see_first_token(self) -> None:
        """Log once what was decided, why, and how long it took then."""
        verdict, self._verdict = self._verdict, None
        if verdict is None or verdict.estimate_s is None:
            return
        _log.info(
            "prompt placed",
            request=self._submission.request.request_id,
            here=verdict.here,
            here_s=verdict.here_s,
            disturbance_s=verdict.disturbance_s,
            prefill_s=verdict.prefill_s,
            took_s=self._host.clock() - self._arrived_at,
        )

    def fail(self, error: BatonError) -> None:
        """End the request with an error, if it has not ended."""
        cancelled = isinstance(error, Cancelled)
        reason = FinishReason.CANCELLED if cancelled else FinishReason.ERROR
        self._finish(pb.Finish(reason=reason, error=error_proto(error)))

    def _finish(self, finish: pb.Finish) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        self.reason = FinishReason(finish.reason)
        finish.local_prefill = self._local_prefill
        finish.handovers.extend(trace_proto(trace) for trace in self._traces())
        self.outbox.finish(self._submission.key, finish)
        self.outbox.flush()

    def _traces(self) -> Sequence[HandoverTrace]:
        traces = [attempt.trace for attempt in self._attempts]
        if traces and traces[-1].outcome == "ok":
            traces[-1] = replace(traces[-1], admission_wait_s=self._admission_wait_s)
        return traces

    def _give_back(self) -> None:
        if self._seq_id is not None:
            self._owners.pop(self._seq_id, None)
            self._host.backups.forget(self._seq_id)
            self._host.instance.engine.release(self._seq_id)
        elif self._attempts:
            self._attempts[-1].abandon()


class OwnerTable(dict[SeqId, RequestOwner]):
    """The owners by sequence; listens to the engine and brings each its events."""

    host: AttemptHost | None = None
    """Set once the engine is there; no step runs before."""

    def step_started(self, plan: StepPlan) -> Sequence[int]:
        """A step is about to run; nobody waits for single layers."""
        assert self.host is not None, "a step before the engine was there"
        for scheduled in plan.sequences:
            if scheduled.seq_id in self:
                self[scheduled.seq_id].stepped(scheduled.start)
        return ()

    def layers_done(self, plan: StepPlan, layers: int) -> None:
        """Never called: see `step_started`."""

    def step_ran(self, plan: StepPlan, seconds: float) -> None:
        """See Listener."""
        assert self.host is not None, "a step before the engine was there"
        prompt_tokens = sum(len(s.tokens) for s in plan.sequences if len(s.tokens) > 1)
        self.host.placement.stepped(seconds, prompt_tokens)

    def step_done(self, events: Sequence[EngineEvent]) -> None:
        """A step has run, or room was granted: every gateway gets one message."""
        assert self.host is not None, "a step before the engine was there"
        touched: set[Outbox] = set()
        for event in events:
            owner = self.get(event.seq_id)
            match event:
                case TokenSampled() if owner:
                    touched.add(owner.outbox)
                    owner.sampled(event)
                case Reserved(seq_id, blocks, cached) if seq_id in self.host.attempts:
                    self.host.attempts[seq_id].granted(blocks, cached)
                case Reserved():
                    self.host.store.pulls.granted(event)
        for outbox in touched:
            outbox.flush()

    def step_failed(self, seq_ids: Sequence[SeqId], error: Exception) -> None:
        """These sequences are gone: a step raised, or they ask for what cannot be done."""
        lost: BatonError
        if isinstance(error, InvalidRequest):
            lost = error
        else:
            lost = InternalError(f"the model failed in a step: {error!r}")
            requests = [self[seq].request_id for seq in seq_ids if seq in self]
            _log.error("a step failed", requests=requests, exc_info=error)
        for seq_id in seq_ids:
            if seq_id in self:
                self[seq_id].fail(lost)
