"""Who samples a row, device or host, and what the device is told of the sequences it samples.

A sequence is one or the other's for as long as it keeps its seat, as both keep its past. The
device has all but grammars, as long as there is room: `HISTORIES` sequences with penalties,
`CHANGES` biases, bad words and stop tokens under `min_tokens`, bad words of up to `WORD` + 1
tokens, and `TOP` logprobs (gpu_option_tensors.py). What is beyond that the host samples, and the
step is waited for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from baton.core.request import SamplingParams
from baton.engine.step import SamplingContext, ScheduledSequence
from baton.executor.gpu_option_tensors import CHANGES, FIELDS, HISTORIES, PARAMS, TOP, WORD

Ints = NDArray[np.int64]

_ALWAYS = 1 << 62
_FORBIDDEN = float("-inf")


class Extent(IntEnum):
    """How much a step's sampling does; each does all that those before it do."""

    PLAIN = 0
    """Temperature, top-k, top-p and min-p."""
    CHANGED = 1
    """Penalties, biases, bad words and min tokens."""
    TOLD = 2
    """Logprobs."""
    TYPICAL = 3
    """Typical-p; not captured, and by torch, which sorts a few rows at a time."""


CAPTURED = (Extent.PLAIN, Extent.CHANGED, Extent.TOLD)
"""What steps of decodes are captured for."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """A past that the device is to begin: see OptionTensors.begin."""

    seat: int
    history: int
    tokens: tuple[int, ...]
    prompt_len: int


@dataclass(slots=True)
class _Seated:
    """A sequence that samples."""

    extent: Extent | None
    """None if the host samples it."""
    history: int = -1
    changes: Sequence[int] = ()
    """Which of the table's changes are its own."""


class OptionSeats:
    """The host's side: who samples whom, and the table that the device has a copy of."""

    def __init__(self, seats: int, vocabulary: int) -> None:
        self._nobody = seats
        self._top = min(TOP, vocabulary)
        self._seated: dict[int, _Seated] = {}
        self._histories = list(range(min(seats, HISTORIES)))
        self._free = list(range(CHANGES))
        params = PARAMS * (seats + 1)
        self.table: Ints = np.zeros(params + FIELDS * CHANGES, dtype=np.int64)
        """How the sequence of each seat is penalised, and the changes: see OptionTensors."""
        self._params = self.table[:params].reshape(PARAMS, seats + 1)
        self._params[0] = -1
        self._changes = self.table[params:].reshape(FIELDS, CHANGES)
        self._changes[0] = seats
        self.stale = False
        """Whether the table has changed since the device was told; who tells it clears this."""

    def __repr__(self) -> str:
        return f"<OptionSeats: {len(self._free)} changes and {len(self._histories)} histories free>"

    def leave(self, seats: Iterable[int]) -> None:
        """Forget the sequences of seats that are free now."""
        for seat in seats:
            known = self._seated.pop(seat, None)
            if known is None:
                continue
            self._params[0, seat] = -1
            if known.history >= 0:
                self._histories.append(known.history)
            if known.changes:
                self._changes[0, known.changes] = self._nobody
                self._free += known.changes
            self.stale |= known.history >= 0 or bool(known.changes)

    def extent(self, seat: int, sequence: ScheduledSequence) -> Extent | None:
        """Return what sampling `sequence` there takes; None if the host has to."""
        known = self._seated.get(seat)
        if known is None:
            known = self._seated[seat] = self._seat(seat, sequence)
        return known.extent

    def beginning(self, seat: int, sequence: ScheduledSequence) -> Beginning | None:
        """Return the past of a sequence that the device samples, if it does not know it."""
        known, context = self._seated[seat], sequence.context
        if known.extent is None or context is None or context.before is None:
            return None
        tokens = (*context.before, *sequence.tokens)
        return Beginning(seat, known.history, tokens, context.prompt_len)

    def _seat(self, seat: int, sequence: ScheduledSequence) -> _Seated:
        sampling, context = sequence.sampling, sequence.context
        if sampling.grammar is not None:
            return _Seated(None)
        typical = sampling.typical_p < 1
        if context is None:
            return _Seated(Extent.TYPICAL if typical else Extent.PLAIN)
        changes = _changes(sampling, context)
        if (
            (sampling.logprobs or 0) > self._top
            or any(len(word) > WORD + 1 for word in sampling.bad_words)
            or len(changes) > len(self._free)
            or (sampling.penalises and not self._histories)
        ):
            return _Seated(None)
        changed = bool(changes) or sampling.looks_back
        told = sampling.logprobs is not None
        extent = Extent.TOLD if told else Extent.CHANGED if changed else Extent.PLAIN
        extent = Extent.TYPICAL if typical else extent
        seated = _Seated(extent)
        if changes:
            seated.changes = [self._free.pop() for _ in changes]
            self._changes[:, seated.changes] = np.array(
                [(seat, *change) for change in changes], dtype=np.int64
            ).T
            self.stale = True
        if sampling.penalises:
            seated.history = self._histories.pop()
            self._params[:, seat] = (
                seated.history,
                *_bits(
                    sampling.repetition_penalty,
                    sampling.frequency_penalty,
                    sampling.presence_penalty,
                ),
            )
            self.stale = True
        return seated


def _changes(sampling: SamplingParams, context: SamplingContext) -> list[tuple[int, ...]]:
    """Return token, amount, until and after of each change of a sequence's logits."""
    any_ = (-1,) * WORD
    (forbidden,) = _bits(_FORBIDDEN)
    found = [(token, *_bits(bias), _ALWAYS, *any_) for token, bias in sampling.logit_bias]
    found += [
        (word[-1], forbidden, _ALWAYS, *(*any_, *word[:-1])[-WORD:]) for word in sampling.bad_words
    ]
    if sampling.min_tokens:
        until = context.prompt_len + sampling.min_tokens
        found += [(token, forbidden, until, *any_) for token in context.stop_token_ids]
    return found


def _bits(*values: float) -> tuple[int, ...]:
    return tuple(np.array(values, dtype=np.float64).view(np.int64).tolist())
