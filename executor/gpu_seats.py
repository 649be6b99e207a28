"""What the device keeps of each sequence from step to step, so that steps need not send it again.

A sequence that takes part in steps has a *seat*: a row of tensors on the device.

    seat     blocks of its table          how it is sampled        the token that it sampled last
    0        17  4  9  –  –               0.8, 50, 0.95 …          1031
    1        3   –  –  –  –               0.0 …                    88
    …
    last     nobody's: rows that are padding sit here, and what is written here nobody reads

A step then says for each row: seat, position, and the token unless it is the one sampled last. The
host remembers what it has sent, and with each step sends what has changed.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton.core.ids import BlockId, SeqId
from baton.core.request import SamplingParams
from baton.engine.step import ScheduledSequence
from baton.executor.device_sampler import RowSampling

Ints = NDArray[np.int64]

_PARAMS = 6  # top_k, seed, and the bits of temperature, top_p, min_p and typical_p as float64


class SeatTensors:
    """The device's side; only launched work reads and writes it."""

    def __init__(self, seats: int, blocks: int, device: torch.device) -> None:
        self.nobody = seats
        """The seat of padding."""
        self.tables = torch.zeros(seats + 1, blocks, dtype=torch.int32, device=device)
        """[seats + 1, blocks]: which block; cells after the last one hold any."""
        self._last = torch.zeros(seats + 1, dtype=torch.int64, device=device)
        self._params = torch.zeros(_PARAMS, seats + 1, dtype=torch.int64, device=device)

    def take_params(self, params: Tensor) -> None:
        """Take the host's `Seats.params`, flat."""
        self._params.copy_(params.view_as(self._params))

    def take_cells(self, cells: Tensor, blocks: Tensor) -> None:
        """Take what cells [n] of `tables`, counted through all rows, hold now."""
        self.tables.view(-1).index_copy_(0, cells, blocks.to(torch.int32))

    def take_tokens(self, seats: Tensor, tokens: Tensor) -> None:
        """Take the tokens that were sampled for seats [n]."""
        self._last.index_copy_(0, seats, tokens)

    def known(self, tokens: Tensor, seats: Tensor) -> Tensor:
        """Return tokens [n] with the last ones of their seats in place of those under 0."""
        return torch.where(tokens < 0, self._last[seats], tokens)

    def sampling(self, seats: Tensor, positions: Tensor) -> RowSampling:
        """Return how rows [n] are sampled whose new tokens stand at `positions` [n]."""
        top_k, seed, *floats = self._params[:, seats]
        temperature, top_p, min_p, typical_p = (bits.view(torch.float64).float() for bits in floats)
        return RowSampling(
            temperature, top_k.to(torch.int32), top_p, min_p, seed, positions, typical_p
        )


class SeatChanges(NamedTuple):
    """What a plan has changed."""

    seats: list[int]
    """Of the plan's sequences."""
    cells: list[int]
    """Of tables, counted through all rows."""
    blocks: list[int]
    """What these hold now."""
    params: bool
    """Whether `Seats.params` has changed."""
    vacated: list[int]
    """Seats that nobody had any more before the plan."""


class Seats:
    """The host's side: who sits where, and what the device has not been told yet."""

    def __init__(self, seats: int, blocks: int, *, depth: int) -> None:
        """Sequences have up to `blocks` blocks; `depth` steps may be under way at once.

        A seat is free again when its sequence has been in none of the last `depth` plans: then the
        token that it sampled last is known, whenever it comes back.
        """
        self._blocks = blocks
        self._depth = depth
        self._free = list(range(seats))
        self._seat: dict[SeqId, int] = {}
        self._seen: dict[SeqId, int] = {}
        """The last plan that each was in, by number; the oldest first."""
        self._tables: dict[SeqId, tuple[BlockId, ...]] = {}
        self._plans = 0
        self.params: Ints = np.zeros((_PARAMS, seats + 1), dtype=np.int64)
        """How the sequence of each seat is sampled: see SeatTensors."""

    def __repr__(self) -> str:
        return f"<Seats: {len(self._seat)} taken, {len(self._free)} free>"

    def of(self, sequences: Iterable[ScheduledSequence]) -> list[int]:
        """Return the seats of sequences of the last plans."""
        return [self._seat[s.seq_id] for s in sequences]

    def take_plan(self, sequences: Iterable[ScheduledSequence]) -> "SeatChanges":
        """Seat everybody in a plan; return where, and what the device must be told."""
        self._plans += 1
        vacated = self._vacate()
        seats: list[int] = []
        cells: list[int] = []
        blocks: list[int] = []
        newcomers = False
        for sequence in sequences:
            seat = self._seat.get(sequence.seq_id)
            if seat is None:
                newcomers = True
                seat = self._seat[sequence.seq_id] = self._free.pop()
                self.params[:, seat] = _packed(sequence.sampling)
            seats.append(seat)
            self._seen.pop(sequence.seq_id, None)
            self._seen[sequence.seq_id] = self._plans
            before, now = self._tables.get(sequence.seq_id, ()), sequence.blocks
            if now is not before:
                assert len(now) <= self._blocks, f"{len(now)} blocks of a sequence"
                self._tables[sequence.seq_id] = now
                same = len(before) if now[: len(before)] == before else 0
                cells += range(seat * self._blocks + same, seat * self._blocks + len(now))
                blocks += now[same:]
        return SeatChanges(seats, cells, blocks, newcomers, vacated)

    def _vacate(self) -> list[int]:
        vacated: list[int] = []
        while self._seen:
            seq_id = next(iter(self._seen))
            if self._plans - self._seen[seq_id] <= self._depth:
                break
            del self._seen[seq_id], self._tables[seq_id]
            vacated.append(self._seat.pop(seq_id))
        self._free += vacated
        return vacated


def seats_needed(rows: int, depth: int) -> int:
    """Return how many seats are enough for plans of up to `rows` sequences."""
    return rows * (depth + 1)


def _packed(sampling: SamplingParams) -> Ints:
    floats = np.array([sampling.temperature, sampling.top_p, sampling.min_p, sampling.typical_p])
    return np.array([sampling.top_k, sampling.seed, *floats.view(np.int64)], dtype=np.int64)
