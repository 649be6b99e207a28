"""What comes back, and when it came."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from baton.core.clock import Clock
from baton.core.errors import Unavailable
from baton.core.request import TokenLogprobs
from baton.proto import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class ServerTiming:
    """Where the time to the first token of a choice went, as the server measured it."""

    ttft_s: float
    """From the request's arrival there."""
    spans_s: Mapping[str, float]
    """Seconds by name (see docs/metrics.md), in the order of time; they add up to `ttft_s`."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What became certain with one message."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """`stop` or `length` in the last chunk of a choice, empty before."""
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int
    """All three are set in the last chunk of a choice, 0 before."""
    index: int = 0
    """Of the choice: with `n` over 1 the choices come interleaved."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One for each of `token_ids`, if they were asked for."""
    timing: ServerTiming | None = None
    """In the last chunk of a choice, if it was asked for."""


def chunk_of(response: pb.GenerateResponse) -> Chunk:
    """Return a message as users see it."""
    return Chunk(
        request_id=response.request_id,
        text=response.text,
        token_ids=tuple(response.token_ids),
        finish_reason=response.finish_reason,
        prompt_tokens=response.usage.prompt_tokens,
        completion_tokens=response.usage.completion_tokens,
        cached_prompt_tokens=response.usage.cached_prompt_tokens,
        index=response.index,
        logprobs=tuple(
            TokenLogprobs(told.logprob, tuple((top.token_id, top.logprob) for top in told.top))
            for told in response.logprobs
        ),
        timing=_timing(response.timing) if response.HasField("timing") else None,
    )


def _timing(told: pb.Timing) -> ServerTiming:
    return ServerTiming(told.ttft_s, {span.name: span.seconds for span in told.spans})


class Resumed:
    """Leaves out what a broken stream of the same answer had told before."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        """Of the messages that were passed on."""
        self._position = 0

    def restart(self) -> None:
        """Go back to the first message."""
        self._position = 0

    def is_new(self, response: pb.GenerateResponse) -> bool:
        """Return whether a message is the next one; raises Unavailable if the answer is another.

        That is one of another run, which may say something else: the server had forgotten the
        first, or it is another server.
        """
        self._position += 1
        if self._position > len(self._ids):
            self._ids.append(response.request_id)
            return True
        if response.request_id != self._ids[self._position - 1]:
            raise Unavailable("the answer broke off, and the server does not know it any more")
        return False

    @property
    def began(self) -> bool:
        """Whether anything was passed on."""
        return bool(self._ids)


class Timing:
    """When a request's chunks came, as its client saw it; retries count as waiting."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._sent_at = clock()
        self._first_at: float | None = None
        self._last_at = 0.0
        self._later_tokens = 0
        self.attempts = 0
        """How often the request was sent."""

    def came(self, chunk: Chunk) -> None:
        """Note a chunk."""
        if not (chunk.token_ids or chunk.text):
            return
        self._last_at = self._clock()
        if self._first_at is None:
            self._first_at = self._last_at
        else:
            self._later_tokens += len(chunk.token_ids)

    def counted(self, tokens: int) -> None:
        """Note how many tokens came in all, of an answer whose chunks do not tell it."""
        self._later_tokens = max(0, tokens - 1)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from sending to the first token; None until it is there."""
        return None if self._first_at is None else self._first_at - self._sent_at

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after those of the first chunk, of all choices; None without any."""
        if self._first_at is None or not self._later_tokens:
            return None
        return (self._last_at - self._first_at) / self._later_tokens

    def __repr__(self) -> str:
        return f"Timing(ttft_s={self.ttft_s}, tpot_s={self.tpot_s}, attempts={self.attempts})"


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """All that came of one prompt."""

    choices: tuple[Choice, ...]
    """As many as were asked for."""
    prompt_tokens: int
    completion_tokens: int
    """Of all choices."""
    timing: Timing

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text


def completion_of(chunks: Iterable[Chunk], timing: Timing) -> Completion:
    """Put the chunks of one request together."""
    by_choice: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        by_choice.setdefault(chunk.index, []).append(chunk)
    told = [by_choice[index] for index in sorted(by_choice)]
    return Completion(
        choices=tuple(_choice(of_one) for of_one in told),
        prompt_tokens=told[0][-1].prompt_tokens,
        completion_tokens=sum(of_one[-1].completion_tokens for of_one in told),
        timing=timing,
    )


def _choice(chunks: list[Chunk]) -> Choice:
    return Choice(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        finish_reason=chunks[-1].finish_reason,
        logprobs=tuple(told for chunk in chunks for told in chunk.logprobs),
    )
