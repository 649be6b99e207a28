"""What of a step plan the other ranks do not know yet: plans become differences, and plans again.

    leader     plan ──▶ StepEncoder ── rows ──▶ StepDecoder ──▶ the same plan     every other rank

A row is one sequence of the plan, in the plan's order. One that goes on decoding is a few numbers,
(id, token, new blocks…); any other is sent whole. Both sides remember the sequences of the last
plans, and forget by the same rule those that have been in none of them: nothing is said of the end
of a sequence, and a sequence that was left out of a few plans still need not be sent again.

Rows are lists and numbers only, for any packer that keeps these. With msgpack a decode takes about
7 bytes while ids and tokens are below 65,536, and 11 beyond; a new block adds up to 5.
"""

from dataclasses import astuple, fields, replace
from typing import Any

from baton.core.grammar import Grammar
from baton.core.ids import BlockId, SeqId
from baton.core.request import SamplingParams
from baton.engine.step import BlockCopy, SamplingContext, ScheduledSequence, StepPlan

REMEMBERED = 8
"""Plans whose sequences both sides know; more than are ever under way at once."""

PackedStep = list[Any]
"""[step, rows, swap_out, swap_in], of lists, numbers, booleans and None only."""

_PLAIN = SamplingParams()
_FIELDS = [field.name for field in fields(SamplingParams)]


class StepEncoder:
    """The leader's side."""

    def __init__(self) -> None:
        self._known = _Known()

    def __repr__(self) -> str:
        return f"StepEncoder({self._known!r})"

    def encode(self, plan: StepPlan) -> PackedStep:
        """Return what all ranks need to make this plan, the next after those already encoded."""
        rows = []
        for sequence in plan.sequences:
            known = self._known.get(sequence.seq_id)
            rows.append(_running(known, sequence) or _whole(sequence))
        self._known.take(plan)
        return [plan.step, rows, _pairs(plan.swap_out), _pairs(plan.swap_in)]


class StepDecoder:
    """The side of a rank that follows; it is given every plan, in order."""

    def __init__(self) -> None:
        self._known = _Known()

    def __repr__(self) -> str:
        return f"StepDecoder({self._known!r})"

    def decode(self, packed: PackedStep) -> StepPlan:
        """Return the plan that the leader encoded."""
        step, rows, swap_out, swap_in = packed
        plan = StepPlan(step, tuple(map(self._sequence, rows)), _copies(swap_out), _copies(swap_in))
        self._known.take(plan)
        return plan

    def _sequence(self, row: list[Any]) -> ScheduledSequence:
        if isinstance(row[1], list):
            return _from_whole(row)
        seq_id, token, *blocks = row
        known = self._known.get(seq_id)
        assert known is not None, f"sequence {seq_id} was never sent"
        return ScheduledSequence(
            seq_id,
            (token,),
            known.end,
            (*known.blocks, *blocks) if blocks else known.blocks,
            True,
            known.sampling,
            _later(known.context),
        )


class _Known:
    """The sequences of the last plans, as they were in the last of these."""

    def __init__(self) -> None:
        self._plans = 0
        self._sequences: dict[SeqId, tuple[int, ScheduledSequence]] = {}
        """In the order of the plans that they were last in, by number."""

    def __repr__(self) -> str:
        return f"{len(self._sequences)} sequences known"

    def get(self, seq_id: SeqId) -> ScheduledSequence | None:
        """Return a sequence as it was when it was last planned."""
        found = self._sequences.get(seq_id)
        return None if found is None else found[1]

    def take(self, plan: StepPlan) -> None:
        """Learn a plan, and forget what only older ones had."""
        known = self._sequences
        for sequence in plan.sequences:
            known.pop(sequence.seq_id, None)
            known[sequence.seq_id] = self._plans, sequence
        self._plans += 1
        while known:
            oldest = next(iter(known))
            if self._plans - known[oldest][0] <= REMEMBERED:
                break
            del known[oldest]


def _running(known: ScheduledSequence | None, now: ScheduledSequence) -> list[int] | None:
    """Return the row of a sequence that goes on decoding, if it is one."""
    if known is None or len(now.tokens) != 1 or not now.samples or now.start != known.end:
        return None
    if now.sampling != known.sampling or now.context != _later(known.context):
        return None
    blocks, before = now.blocks, known.blocks
    if blocks is not before and blocks[: len(before)] != before:
        return None
    return [now.seq_id, now.tokens[0], *blocks[len(before) :]]


def _later(context: SamplingContext | None) -> SamplingContext | None:
    """Return the context of a sequence that sampled in the plan before as well."""
    if context is None or context.before is None:
        return context
    return replace(context, before=None)


def _whole(sequence: ScheduledSequence) -> list[Any]:
    context = sequence.context
    return [
        sequence.seq_id,
        list(sequence.tokens),
        sequence.start,
        list(sequence.blocks),
        sequence.samples,
        None if sequence.sampling == _PLAIN else _lists(astuple(sequence.sampling)),
        None if context is None else _lists(astuple(context)),
    ]


def _from_whole(row: list[Any]) -> ScheduledSequence:
    seq_id, tokens, start, blocks, samples, sampling, context = row
    return ScheduledSequence(
        SeqId(seq_id),
        tuple(tokens),
        start,
        tuple(blocks),
        samples,
        _PLAIN if sampling is None else _sampling(_tuples(sampling)),
        None if context is None else SamplingContext(*_tuples(context)),
    )


def _sampling(values: tuple[Any, ...]) -> SamplingParams:
    """Return parameters by the values of their fields, of which one is a dataclass itself."""
    given = dict(zip(_FIELDS, values, strict=True))
    if given["grammar"] is not None:
        given["grammar"] = Grammar(*given["grammar"])
    return SamplingParams(**given)


def _lists(value: Any) -> Any:
    return [_lists(part) for part in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def _pairs(copies: tuple[BlockCopy, ...]) -> list[int]:
    return [block for copy in copies for block in copy]


def _copies(pairs: list[int]) -> tuple[BlockCopy, ...]:
    blocks = map(BlockId, pairs)
    return tuple(BlockCopy(device, host) for device, host in zip(blocks, blocks, strict=True))
