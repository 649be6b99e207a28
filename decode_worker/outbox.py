"""What one gateway is still to be told: the updates of a step, sent as one message."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from baton.core.clock import Clock, monotonic
from baton.core.spans import DecodeSpans
from baton.proto import worker_pb2 as pb
from baton.proto.convert import spans_proto


class Outbox:
    """Gathers updates until the writer takes them all as one frame.

    A gateway that reads slowly gets fewer and larger frames; what may pile up is bounded by the
    tokens of its open requests.
    """

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._first_tokens: dict[int, tuple[float, DecodeSpans]] = {}
        self._tokens: dict[int, list[int]] = {}
        self._logprobs: dict[int, list[pb.TokenLogprobs]] = {}
        self._finished: dict[int, pb.Finish] = {}
        self._cached: dict[int, int] = {}
        self._backed_up: dict[int, int] = {}
        self._filled = asyncio.Event()

    def token(self, key: int, token: int, logprobs: pb.TokenLogprobs | None = None) -> None:
        """Add a token of request `key`; goes out with the next frame.

        Of one request either all tokens come with logprobs or none does.
        """
        self._tokens.setdefault(key, []).append(token)
        if logprobs is not None:
            self._logprobs.setdefault(key, []).append(logprobs)

    def cached(self, key: int, tokens: int) -> None:
        """Say how much of request `key`'s prompt was cached; goes out with its first token."""
        self._cached[key] = tokens

    def first_token(self, key: int, spans: DecodeSpans) -> None:
        """Say where request `key`'s time to first token went; goes out with that token."""
        self._first_tokens[key] = (self._clock(), spans)

    def backed_up(self, key: int, tokens: int) -> None:
        """Say how much of request `key` its peer has; goes out with its next token.

        Not to be called after `finish`.
        """
        self._backed_up[key] = tokens

    def finish(self, key: int, finish: pb.Finish) -> None:
        """Add the last word about request `key`."""
        self._tokens.setdefault(key, [])
        self._finished[key] = finish

    def flush(self) -> None:
        """Wake the writer if there is something; called once per step."""
        if self._tokens:
            self._filled.set()

    async def next_frame(self) -> pb.DecodeFrame:
        """Wait for a flush and return everything gathered by then."""
        await self._filled.wait()
        self._filled.clear()
        now = self._clock()
        updates: Sequence[pb.Update] = [
            pb.Update(
                key=key,
                tokens=tokens,
                finish=self._finished.get(key),
                logprobs=self._logprobs.get(key),
                cached_tokens=self._cached.pop(key, 0),
                backed_up_tokens=self._backed_up.pop(key, 0),
                first_token=self._left_at(key, now),
            )
            for key, tokens in self._tokens.items()
        ]
        self._tokens.clear()
        self._logprobs.clear()
        self._finished.clear()
        return pb.DecodeFrame(updates=updates)

    def _left_at(self, key: int, now: float) -> pb.DecodeSpans | None:
        if key not in self._first_tokens:
            return None
        since, spans = self._first_tokens.pop(key)
        return spans_proto(replace(spans, outbox_s=max(0.0, now - since)))
