"""One admitted request, from its submission to its trace: between its journey and a consumer."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

from baton.api.decode_session import Ended
from baton.api.text_stream import Piece, TextStream
from baton.api.validate import TextRequest
from baton.core.clock import Clock
from baton.core.errors import BatonError, Cancelled, DeadlineExceeded, InternalError
from baton.core.request import FinishReason, GenerateRequest, TokenLogprobs
from baton.core.spans import DecodeSpans, TtftSpans
from baton.core.trace import MigrationTrace, RequestTrace
from baton.engine.stop import finish_reason
from baton.router.router import Lease

_A_MOMENT_S = 0.1


class OpenRequest:
    """Holds a request's tokens: until its consumer takes them, and in case it must move.

    Its journey calls `deliver` and `ended`; the consumer reads `pieces` and then calls `leave`. It
    is over when the decode instance has ended it and the consumer has left, in either order: then
    its place in the router is given back and `on_over` is called with its trace.

    What is kept here is bounded by the request's max_tokens, so that a consumer that reads slowly
    costs little memory and never holds up the stream that all requests share.
    """

    def __init__(
        self,
        request: TextRequest,
        lease: Lease,
        text: TextStream,
        *,
        model: str,
        clock: Clock,
        timeout_s: float,
        waited_s: float = 0.0,
        on_over: Callable[["OpenRequest", RequestTrace], None],
    ) -> None:
        """The request came `waited_s` seconds ago, and is given up `timeout_s` after it came."""
        self.request = request
        self.lease = lease
        self._model = model
        self._text = text
        self._clock = clock
        self._timeout_s = timeout_s
        self._on_over = on_over
        arrival = request.arrival
        self._waited_s = waited_s
        self._started = clock() - waited_s if arrival is None else arrival.valid_at
        self._traceparent = "" if arrival is None else arrival.traceparent
        self._spans = TtftSpans()
        if arrival is not None:
            self._spans = TtftSpans(wake_s=arrival.wake_s, tokenize_s=arrival.tokenize_s)
        self._before_s = self._spans.total_s
        """Of the time to first token, what had passed when it was found valid."""
        self._sent_at: float | None = None
        """When it was sent to the decode instance that has it now."""
        self._decode_spans = DecodeSpans()
        self._first_at = 0.0
        self._last_at = 0.0
        self._gaps: list[float] = []
        self._tokens: list[int] = []
        """All that were generated: what another decode instance needs to go on."""
        self._taken = 0
        """Tokens, from the first, that the text stream has."""
        self._logprobs: list[TokenLogprobs] = []
        self._migrations: list[MigrationTrace] = []
        self._wake = asyncio.Event()
        self._cached_tokens = 0
        self._shown_tokens = 0
        self._ended: Ended | None = None
        self._finish: FinishReason | None = None
        self._error: BatonError | None = None
        self._left = False
        self._over = False

    def deliver(
        self, tokens: Sequence[int], at: float, logprobs: Sequence[TokenLogprobs] = ()
    ) -> None:
        """Take the tokens of one engine step."""
        if self._left:
            return
        if not self._tokens:
            self._first_at = at
            wait_s = at - (self._started if self._sent_at is None else self._sent_at)
            self._spans = self._spans.answered(wait_s, self._decode_spans)
        else:
            self._gaps.append(at - self._last_at)
        self._last_at = at
        if self.received + len(tokens) > self.request.generate.max_tokens:
            raise InternalError(f"{self.lease.route.decode.instance_id} sent too many tokens")
        wanted = 0 if self.request.generate.sampling.logprobs is None else len(tokens)
        if len(logprobs) != wanted:
            name = self.lease.route.decode.instance_id
            raise InternalError(f"{name} sent {len(logprobs)} logprobs, not {wanted}")
        self._tokens.extend(tokens)
        self._logprobs.extend(logprobs)
        self.lease.generated(len(tokens))
        self._wake.set()

    def cached(self, prompt_tokens: int) -> None:
        """Take how many of the prompt's tokens a prefix cache had.

        What it had of a request that moved says nothing of the user's prompt, once that is used.
        """
        if not self._tokens:
            self._cached_tokens = prompt_tokens
        if self._migrations:
            self._migrations[-1] = replace(self._migrations[-1], cached_tokens=prompt_tokens)

    def sent(self) -> None:
        """Note that it is sent to a decode instance now, perhaps for the second time."""
        now, before = self._clock(), self._sent_at
        self._sent_at = now
        if self._tokens:
            return
        if before is None:
            self._spans = replace(self._spans, gateway_queue_s=now - self._started)
        else:
            self._spans = replace(self._spans, lost_s=self._spans.lost_s + now - before)

    def first_token(self, spans: DecodeSpans) -> None:
        """Take where the time went in the decode instance; its first tokens follow."""
        if not self._tokens:
            self._decode_spans = spans

    def moved(self, migration: MigrationTrace) -> None:
        """Note that another decode instance goes on with it."""
        self._migrations.append(migration)

    @property
    def received(self) -> int:
        """Tokens that were generated."""
        return len(self._tokens)

    @property
    def given_up(self) -> bool:
        """Nobody waits for its tokens any more."""
        return self._left or self._error is not None

    def remaining(self) -> GenerateRequest:
        """Return what is to be asked of a decode instance now: to go on after the last token."""
        return self.request.generate.resume(self._tokens)

    def seconds_left(self) -> float:
        """Return how long it may still take; a moment if that is over, for the timer to say so."""
        return max(self._timeout_s - (self._clock() - self._started), _A_MOMENT_S)

    def natural_finish(self) -> FinishReason | None:
        """Return why it is complete with the tokens that came; None if it is not."""
        if not self._tokens:
            return None
        return finish_reason(self.request.generate, len(self._tokens), self._tokens[-1])

    def ended(self, ended: Ended) -> None:
        """Take the end; nothing follows it."""
        self._ended = ended
        self.lease.instances_done()
        self._wake.set()
        self._finish_if_over()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield what becomes certain, until the last piece; raises what ended it otherwise."""
        left_s = max(0.0, self._timeout_s - (self._clock() - self._started))
        timer = asyncio.get_running_loop().call_later(left_s, self._expire)
        try:
            while self._finish is None:
                await self._wake.wait()
                self._wake.clear()
                piece = self._next_piece()
                if piece.text or piece.tokens or piece.finish:
                    yield piece
                if self._finish is None and self._error is not None:
                    raise self._error
        finally:
            timer.cancel()

    def _next_piece(self) -> Piece:
        """Take all that waits; sets `_finish` or `_error` if it is the last."""
        tokens, self._taken = self._tokens[self._taken :], len(self._tokens)
        ended = self._ended
        piece = self._text.push(tokens, _natural(ended))
        if self._logprobs:
            piece = replace(piece, logprobs=tuple(self._logprobs[: len(piece.tokens)]))
            self._logprobs.clear()
        self._shown_tokens += len(piece.tokens)
        self._finish = piece.finish
        if self._finish is not None:
            piece = replace(piece, cached_tokens=self._cached_tokens, ttft=self._spans)
        if self._finish is None and ended is not None and self._error is None:
            self._error = ended.error or Cancelled("the request was cancelled")
        return piece

    def _expire(self) -> None:
        self._error = DeadlineExceeded(f"it took longer than {self._timeout_s:g} s")
        self._wake.set()

    def cancel(self) -> bool:
        """Let its consumer get Cancelled; return whether it was not over yet."""
        if self._left or self._finish is not None or self._error is not None:
            return False
        self._error = Cancelled("the caller asked for it")
        self._wake.set()
        return True

    def leave(self) -> bool:
        """Say that the consumer takes no more; return whether the decode instance still works."""
        self._left = True
        self._logprobs.clear()
        self._finish_if_over()
        return self._ended is None

    def _finish_if_over(self) -> None:
        if self._left and self._ended is not None and not self._over:
            self._over = True
            self.lease.close()
            self._on_over(self, self._trace(self._ended))

    def _trace(self, ended: Ended) -> RequestTrace:
        error = self._error
        finish = self._finish
        if finish is None:
            finish = FinishReason.CANCELLED if error is None else FinishReason.ERROR
        later = self.received - 1
        span = self._last_at - self._first_at
        return RequestTrace(
            request_id=self.request.generate.request_id,
            decode_instance=self.lease.route.decode.instance_id,
            prompt_tokens=len(self.request.generate.prompt),
            output_tokens=self._shown_tokens,
            finish=finish,
            error="" if error is None else error.code,
            tenant=self.request.generate.tenant,
            model=self._model,
            traceparent=self._traceparent,
            span=self.request.generate.traceparent,
            local_prefill=ended.local_prefill,
            cached_tokens=self._cached_tokens,
            handovers=ended.handovers,
            migrations=tuple(self._migrations),
            queue_s=self._waited_s,
            ttft_s=self._before_s + self._first_at - self._started if self._tokens else 0.0,
            ttft_spans=self._spans if self._tokens else TtftSpans(),
            tpot_s=span / later if later > 0 else 0.0,
            e2e_s=(self._last_at if self._finish else self._clock())
            - self._started
            + self._before_s,
            itl_s=tuple(self._gaps),
        )

    def __repr__(self) -> str:
        return (
            f"OpenRequest({self.request.generate.request_id}, received={self.received}, "
            f"ended={self._ended is not None}, left={self._left})"
        )


def _natural(ended: Ended | None) -> FinishReason | None:
    """Return the reason if the request ended as it should."""
    if ended is not None and ended.reason in (FinishReason.STOP, FinishReason.LENGTH):
        return ended.reason
    return None
