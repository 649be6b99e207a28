"""Who comes first: a rank for each arriving sequence, the lowest first.

A rank is given once and never changes. It is the number of the arrival plus a handicap, and the
handicap is bounded by `max_overtakes`: so nobody is overtaken by more than that many who came
later, however many keep coming. Whoever waits thereby ages with every arrival, without a clock
and without sorting anything again.
"""

from typing import Protocol

from baton.core.config import EngineConfig
from baton.core.request import GenerateRequest

_DECAY = 1 / 16
"""Weight of the newest observation in a mean."""
_HALF = 256
"""A job of so many steps gets half of the highest handicap."""


class Policy(Protocol):
    """An order of arrivals."""

    def rank(self, request: GenerateRequest, arrival: int, *, hold: bool) -> int:
        """Return the rank of the `arrival`-th sequence; `hold`: it ends after its first token."""
        ...

    def finished(self, request: GenerateRequest, generated: int) -> None:
        """Learn how many tokens a request generated in the end."""
        ...


class FirstComeFirstServed:
    """In order of arrival."""

    def rank(self, request: GenerateRequest, arrival: int, *, hold: bool) -> int:
        """See Policy."""
        return arrival

    def finished(self, request: GenerateRequest, generated: int) -> None:
        """See Policy: nothing to learn."""


class ByPriority:
    """By GenerateRequest.priority; `max_overtakes` for each level between two requests."""

    def __init__(self, max_overtakes: int) -> None:
        self._max_overtakes = max_overtakes

    def rank(self, request: GenerateRequest, arrival: int, *, hold: bool) -> int:
        """See Policy."""
        return arrival + self._max_overtakes * request.priority

    def finished(self, request: GenerateRequest, generated: int) -> None:
        """See Policy: nothing to learn."""


class OutputLengths:
    """An online estimate of how many tokens a request generates.

    Prompts are put together by length, to a power of two; each group has the mean of those that
    finished, the older ones weighing ever less.
    """

    def __init__(self) -> None:
        self._by_group: dict[int, float] = {}
        self._all: float | None = None

    def expect(self, request: GenerateRequest) -> float:
        """Return the estimate: its group's, else everybody's, else max_tokens; never over that.

        Of a request that was resumed: of what is left of it, at least one token.
        """
        mean = self._by_group.get(request.output_start.bit_length(), self._all)
        whole = request.max_tokens if mean is None else min(mean, request.max_tokens)
        return max(whole - request.resumed, 1.0)

    def observe(self, request: GenerateRequest, generated: int) -> None:
        """Take in how many tokens one generated."""
        group = request.output_start.bit_length()
        self._by_group[group] = _towards(self._by_group.get(group), generated)
        self._all = _towards(self._all, generated)


class ShortestJobFirst:
    """By the steps that a request is expected to take: chunks of its prompt, then its output."""

    def __init__(self, max_overtakes: int, max_batch_tokens: int) -> None:
        self._max_overtakes = max_overtakes
        self._max_batch_tokens = max_batch_tokens
        self._lengths = OutputLengths()

    def rank(self, request: GenerateRequest, arrival: int, *, hold: bool) -> int:
        """See Policy."""
        output = 1.0 if hold else self._lengths.expect(request)
        steps = len(request.prompt) / self._max_batch_tokens + output
        return arrival + int(self._max_overtakes * steps / (steps + _HALF))

    def finished(self, request: GenerateRequest, generated: int) -> None:
        """See Policy."""
        self._lengths.observe(request, generated)


def make_policy(config: EngineConfig) -> Policy:
    """Return the policy that the config names."""
    match config.policy:
        case "fcfs":
            return FirstComeFirstServed()
        case "priority":
            return ByPriority(config.max_overtakes)
        case "sjf":
            return ShortestJobFirst(config.max_overtakes, config.max_batch_tokens)


def _towards(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _DECAY * (value - mean)
