"""What a way through the pools is predicted to take, by coefficients fitted to what was measured.

    TTFT = hop + queue(tokens ahead) + compute(missing tokens) + link(missing bytes) + admission
    TTFT = local(tokens ahead, missing tokens)                if decode computes the prompt itself
    TPOT = step(sequences, tokens of context)

Each term is a sum of features times coefficients (see regression.py), per pool: instances of one
role and compatibility. Times are in seconds; features are arrays over candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from baton.core.moving_average import MovingAverage
from baton.core.trace import HandoverTrace, RequestTrace
from baton.router.regression import Regression, Vector

_MEASURED = 3
"""From so many measurements on a term is more than its prior."""
_BYTES_PER_TOKEN = 1 << 17
"""Of KV, before any was moved: an 8B model's."""
_MOST_S = 10.0
"""For what does not depend on size."""
_MOST_POOLS = 64
"""That are remembered: each new revision of a model makes new ones."""

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class PrefillFeatures:
    """What the candidates of a prefill pool would have to do; an array each, or one number each."""

    queue: Vector
    """Tokens ahead."""
    missing: Vector
    """Tokens of the prompt that the instance lacks; at least one is always computed."""
    tokens: float
    """Of the prompt."""


@dataclass(frozen=True, slots=True)
class DecodeFeatures:
    """Likewise of a decode pool."""

    queue: Vector
    """Tokens of prompts that it computes itself."""
    missing: Vector
    running: Vector
    """Sequences that decode."""
    context: Vector
    """Their tokens."""
    short: Vector
    """Tokens by which its pool has too little room for the request."""
    tokens: float


def _rows(*columns: Vector) -> Vector:
    """Return the rows of a matrix of features, the first of which is always 1."""
    rows: Vector = np.ones((len(columns[0]), 1 + len(columns)))
    for number, column in enumerate(columns, 1):
        rows[:, number] = column
    return rows


def _attention(missing: Vector, tokens: float) -> Vector:
    """Return the pairs of tokens that attention looks at."""
    return missing * (tokens - missing / 2)


class PrefillCosts:
    """The terms that one prefill pool answers for."""

    def __init__(self) -> None:
        self._queue = Regression((1e-3, 1e-4), (_MOST_S, 1.0))
        self._compute = Regression((2e-3, 1e-4, 1e-9), (_MOST_S, 1.0, 1e-3))

    def __repr__(self) -> str:
        return f"PrefillCosts(queue={self._queue!r}, compute={self._compute!r})"

    @property
    def measured(self) -> bool:
        """Whether it is more than a prior."""
        return self._compute.count >= _MEASURED

    def seconds(self, f: PrefillFeatures) -> Vector:
        """Return the seconds from Accepted to the last layer."""
        ahead = self._queue.predict(_rows(f.queue))
        return ahead + self._compute.predict(_rows(f.missing, _attention(f.missing, f.tokens)))

    def wait_s(self, queue: Vector) -> Vector:
        """Return the seconds until so many tokens ahead are done."""
        return self._queue.predict(_rows(queue))

    def learn(self, queue: float, tokens: int, trace: HandoverTrace) -> None:
        """Take in a handover that went well, and how long the queue was thought to be."""
        missing = float(max(1, tokens - trace.cached_tokens))
        self._queue.add((1.0, queue), trace.queue_s)
        pairs = missing * (tokens - missing / 2)
        self._compute.add((1.0, missing, pairs), trace.compute_s)


class DecodeCosts:
    """The terms that one decode pool answers for."""

    def __init__(self) -> None:
        self._link = Regression((2e-3, 1e-9), (_MOST_S, 1e-3))
        self._admission = Regression((1e-3, 1e-4, 1e-4), (_MOST_S, 1.0, 1.0))
        self._local = Regression((2e-3, 1e-4, 1e-4, 1e-9), (_MOST_S, 1.0, 1.0, 1e-3))
        self._step = Regression((5e-3, 1e-4, 1e-8), (_MOST_S, 1.0, 1e-2))
        self._bytes = MovingAverage()
        self._hop = MovingAverage()

    def __repr__(self) -> str:
        return f"DecodeCosts(link={self._link!r}, step={self._step!r})"

    @property
    def measured(self) -> bool:
        """Whether handovers are more than a prior."""
        return self._link.count >= _MEASURED

    @property
    def local_measured(self) -> bool:
        """Whether prompts that it computes itself are."""
        return self._local.count >= _MEASURED

    @property
    def step_measured(self) -> bool:
        """Whether the time per token is."""
        return self._step.count >= _MEASURED

    @property
    def bytes_per_token(self) -> float:
        """Return the KV that a missing token brings over the link."""
        return self._bytes.value or float(_BYTES_PER_TOKEN)

    def handover_s(self, f: DecodeFeatures) -> Vector:
        """Return the seconds of a handover that prefill's compute does not hide."""
        link = self._link.predict(_rows(f.missing * self.bytes_per_token))
        room = self._admission.predict(_rows(f.running, f.short))
        return link + room + (self._hop.value or 0.0)

    def local_s(self, f: DecodeFeatures) -> Vector:
        """Return the seconds to the first token, if it computes the prompt itself."""
        pairs = _attention(f.missing, f.tokens)
        return self._local.predict(_rows(f.queue, f.missing, pairs))

    def disturbance_s(self, f: DecodeFeatures) -> Vector:
        """Return the seconds by which that holds up the sequences that decode, all together."""
        pairs = _attention(f.missing, f.tokens)
        return self._local.predict(_rows(0.0 * f.missing, f.missing, pairs)) * f.running

    def tpot_s(self, f: DecodeFeatures) -> Vector:
        """Return the seconds per token, with the request in the batch."""
        return self._step.predict(_rows(f.running + 1, f.context + f.tokens))

    def least_tpot_s(self, tokens: float) -> float | None:
        """Return the seconds per token of a request alone; None while that is only a prior."""
        if not self.step_measured:
            return None
        return float(self._step.predict(np.array([[1.0, 1.0, tokens]]))[0])

    def learn_handover(self, f: DecodeFeatures, trace: HandoverTrace, ttft_s: float) -> None:
        """Take in a handover that went well at the first try; `f` are single numbers."""
        moved = trace.blocks - trace.blocks_saved
        if moved > 0:
            self._bytes.add(trace.bytes / (f.tokens * moved / trace.blocks))
        link_s = trace.handshake_s + trace.exposed_s
        self._link.add((1.0, float(trace.bytes)), link_s)
        # The wait for a step comes after the first token, which travels with the last offer.
        room_s = trace.allocation_wait_s
        self._admission.add((1.0, float(f.running), float(f.short)), room_s)
        parts_s = trace.queue_s + trace.compute_s + link_s + room_s
        self._hop.add(max(0.0, ttft_s - parts_s))

    def learn_local(self, f: DecodeFeatures, cached: int, ttft_s: float) -> None:
        """Take in a prompt that the instance computed itself."""
        missing = max(1.0, f.tokens - cached)
        pairs = missing * (f.tokens - missing / 2)
        self._local.add((1.0, float(f.queue), missing, pairs), ttft_s)

    def learn_step(self, f: DecodeFeatures, trace: RequestTrace) -> None:
        """Take in the time per token; the request itself grew while it was measured."""
        context = float(f.context) + f.tokens + trace.output_tokens / 2
        self._step.add((1.0, float(f.running) + 1, context), trace.tpot_s)


class Costs:
    """All pools' terms, and how long answers are."""

    def __init__(self) -> None:
        self._prefill: dict[str, PrefillCosts] = {}
        self._decode: dict[str, DecodeCosts] = {}
        self._output = MovingAverage(weight=0.05)
        self._output.add(128.0)

    def __repr__(self) -> str:
        return f"Costs({self._prefill}, {self._decode})"

    def prefill(self, compatibility: str) -> PrefillCosts:
        """Return the terms of a prefill pool."""
        return _of(self._prefill, compatibility, PrefillCosts)

    def decode(self, compatibility: str) -> DecodeCosts:
        """Return the terms of a decode pool."""
        return _of(self._decode, compatibility, DecodeCosts)

    def answered(self, tokens: int) -> None:
        """Note how long an answer was."""
        self._output.add(float(tokens))

    def expected_output(self, max_tokens: int) -> float:
        """Return how many tokens an answer is likely to have, at least one."""
        return max(1.0, min(float(max_tokens), self._output.value or 1.0))


def _of(pools: dict[str, P], compatibility: str, new: Callable[[], P]) -> P:
    """Return a pool's terms; the pool that came first is forgotten if there are too many."""
    found = pools.get(compatibility)
    if found is None:
        found = pools[compatibility] = new()
        if len(pools) > _MOST_POOLS:
            del pools[next(iter(pools))]
    return found
