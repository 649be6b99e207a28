"""A plan that goes through its difference is the same plan, whatever came before it."""

from dataclasses import replace
from typing import Any

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from baton.core.grammar import Grammar
from baton.core.ids import BlockId, SeqId
from baton.core.request import SamplingParams
from baton.engine.step import BlockCopy, SamplingContext, ScheduledSequence, StepPlan
from baton.engine.step_diff import REMEMBERED, StepDecoder, StepEncoder

SAMPLING = (
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.9, seed=2**63 - 1),
    SamplingParams(logit_bias=((3, -1.5),), bad_words=((1, 2), (3,)), logprobs=2),
    SamplingParams(grammar=Grammar("choice", '["a", "b"]')),
)
CONTEXTS = (
    None,
    SamplingContext(5, (0, 2), None),
    SamplingContext(5, (0, 2), (1, 2, 3)),
)

tokens = st.lists(st.integers(0, 300_000), min_size=1, max_size=4).map(tuple)
blocks = st.lists(st.integers(0, 100_000).map(BlockId), min_size=1, max_size=6).map(tuple)
anything = st.builds(
    ScheduledSequence,
    seq_id=st.integers(0, 5).map(SeqId),
    tokens=tokens,
    start=st.integers(0, 4096),
    blocks=blocks,
    samples=st.booleans(),
    sampling=st.sampled_from(SAMPLING),
    context=st.sampled_from(CONTEXTS),
)


def later(sequence: ScheduledSequence, token: int, more: tuple[BlockId, ...]) -> ScheduledSequence:
    """Return the sequence in the step after."""
    context = sequence.context and replace(sequence.context, before=None)
    return sequence._replace(
        tokens=(token,),
        start=sequence.end,
        blocks=(*sequence.blocks, *more),
        samples=True,
        context=context,
    )


@st.composite
def streams(draw: st.DrawFn) -> list[StepPlan]:
    """Plans in which sequences begin, go on, pause, change in any way, and end."""
    plans = []
    running: dict[SeqId, ScheduledSequence] = {}
    for step in range(draw(st.integers(1, 2 * REMEMBERED))):
        planned = []
        for seq_id in draw(st.lists(st.sampled_from(range(6)), unique=True, max_size=6)):
            now = draw(anything)._replace(seq_id=SeqId(seq_id))
            if SeqId(seq_id) in running and draw(st.integers(0, 3)):
                more = draw(st.sampled_from([(), (), (BlockId(7),)]))
                now = later(running[SeqId(seq_id)], draw(st.integers(0, 99)), more)
            running[now.seq_id] = now
            planned.append(now)
        copies = draw(st.lists(st.builds(BlockCopy, st.integers(0, 9), st.integers(0, 9))))
        plans.append(StepPlan(step, tuple(planned), tuple(copies), tuple(copies[:1])))
    return plans


def through_the_wire(packed: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(packed))


@given(streams())
def test_plans_arrive_as_they_were(plans: list[StepPlan]) -> None:
    encoder, decoder = StepEncoder(), StepDecoder()
    for plan in plans:
        assert decoder.decode(through_the_wire(encoder.encode(plan))) == plan


def prompt(seq_id: int, **changes: Any) -> ScheduledSequence:
    plain = ScheduledSequence(SeqId(seq_id), (1, 2), 0, (BlockId(5),), True, SamplingParams())
    return plain._replace(**changes)


def test_a_sequence_that_decodes_is_its_id_its_token_and_its_new_blocks() -> None:
    encoder = StepEncoder()
    first = prompt(3, sampling=SAMPLING[1])
    encoder.encode(StepPlan(0, (first,)))
    second = later(first, 9, ())
    third = later(second, 8, (BlockId(6),))
    assert encoder.encode(StepPlan(1, (second,))) == [1, [[3, 9]], [], []]
    assert encoder.encode(StepPlan(2, (third,))) == [2, [[3, 8, 6]], [], []]


def test_a_sequence_that_was_left_out_of_a_few_plans_is_still_known() -> None:
    encoder = StepEncoder()
    encoder.encode(StepPlan(0, (prompt(1),)))
    for step in range(1, REMEMBERED):
        encoder.encode(StepPlan(step, (prompt(2),)))
    [_, [row], *_] = encoder.encode(StepPlan(9, (later(prompt(1), 4, ()),)))
    assert row == [1, 4]


def test_both_sides_forget_what_has_ended() -> None:
    encoder, decoder = StepEncoder(), StepDecoder()
    for step in range(100):
        decoder.decode(encoder.encode(StepPlan(step, (prompt(step), prompt(1000 + step)))))
    assert repr(encoder) == f"StepEncoder({2 * REMEMBERED} sequences known)"
    assert repr(decoder) == f"StepDecoder({2 * REMEMBERED} sequences known)"


def test_other_blocks_or_parameters_are_sent_whole() -> None:
    first = prompt(1, context=CONTEXTS[2])
    same = later(first, 4, ())
    for other in (
        same._replace(blocks=(BlockId(9),)),
        same._replace(start=7),
        same._replace(samples=False),
        same._replace(sampling=SAMPLING[2]),
        same._replace(context=CONTEXTS[2]),
        same._replace(tokens=(4, 4)),
    ):
        encoder = StepEncoder()
        encoder.encode(StepPlan(0, (first,)))
        [_, [row], *_] = encoder.encode(StepPlan(1, (other,)))
        assert row[1] == list(other.tokens)


def test_a_step_of_decodes_takes_eleven_bytes_a_sequence() -> None:
    encoder = StepEncoder()
    base = 1_000_000
    now = [prompt(base + i, blocks=tuple(map(BlockId, range(500)))) for i in range(64)]
    encoder.encode(StepPlan(0, tuple(now)))
    now = [later(s, 150_000, ()) for s in now]
    packed = msgpack.packb(encoder.encode(StepPlan(1, tuple(now))))
    assert len(packed) <= 64 * 11 + 16
