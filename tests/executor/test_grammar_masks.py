"""Outputs are followed from step to step, or found again from their tokens, with the same masks."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from baton.core.errors import InvalidConfig, InvalidRequest, Overloaded
from baton.core.grammar import Grammar
from baton.core.ids import BlockId, SeqId
from baton.core.request import SamplingParams
from baton.engine.step import SamplingContext, ScheduledSequence
from baton.executor.grammar_masks import GrammarMasks, StepMasks
from baton.executor.grammars import Grammars

PROMPT = (5, 6, 7)
OBJECT = Grammar("json_object", "")


@pytest.fixture(scope="module")
def grammars(demo_model_dir: Path) -> Grammars:
    return Grammars(demo_model_dir, 4096)


def part(
    seq_id: int, said: tuple[int, ...], new: int, grammar: Grammar | None, *, told: bool
) -> ScheduledSequence:
    """A sequence whose last `new` tokens are of this step; with `told`, the plan has the others."""
    start = len(said) - new
    context = SamplingContext(len(PROMPT), (0,), said[:start] if told else None)
    sampling = SamplingParams(grammar=grammar)
    return ScheduledSequence(
        SeqId(seq_id), said[start:], start, (BlockId(0),), True, sampling, context
    )


def run(masks: GrammarMasks, *parts: ScheduledSequence) -> StepMasks:
    begun = masks.begin(parts)
    return StepMasks() if begun is None else begun.result(60)


def test_followed_or_found_again_it_is_the_same(grammars: Grammars) -> None:
    chosen, said = random.Random(3), PROMPT
    followed = GrammarMasks(grammars.compiler)
    for step in range(40):
        new = len(PROMPT) if step == 0 else 1
        found = run(followed, part(1, said, new, OBJECT, told=step == 0))
        mask = found.masks[SeqId(1)]
        again = GrammarMasks(grammars.compiler)
        for cut in (1, 2, len(said)):
            fresh = run(again, part(1, said, cut, OBJECT, told=True)).masks[SeqId(1)]
            assert (fresh.bits == mask.bits).all()
            assert fresh.accepts == mask.accepts
        allowed = np.flatnonzero(mask.allowed((), ()))
        said = (*said, int(chosen.choice(allowed)))


def test_a_sequence_that_was_left_out_of_a_step_is_still_known(grammars: Grammars) -> None:
    masks = GrammarMasks(grammars.compiler, depth=3)
    first = run(masks, part(1, PROMPT, 3, Grammar("regex", "}+"), told=True))
    assert first.masks[SeqId(1)].bits.any()
    for _ in range(2):
        assert not run(masks, part(2, PROMPT, 3, None, told=True)).masks
    assert "1 matchers" in repr(masks)
    token = int(np.flatnonzero(first.masks[SeqId(1)].allowed((), ()))[0])
    said = (*PROMPT, token)
    assert run(masks, part(1, said, 1, Grammar("regex", "}+"), told=False)).masks
    for _ in range(4):
        run(masks)
    assert "0 matchers" in repr(masks)
    assert masks.begin(()) is None


def test_what_cannot_be_followed_fails_alone_and_again(grammars: Grammars) -> None:
    """A step may be planned before it is known that the sequence has failed."""
    masks = GrammarMasks(grammars.compiler, depth=2)
    bad = Grammar("regex", "(")
    for new, told in ((3, True), (1, False)):
        said = PROMPT if told else (*PROMPT, 9)
        found = run(
            masks,
            part(1, said, new, bad, told=told),
            part(2, PROMPT, 3, OBJECT, told=True),
        )
        assert isinstance(found.failed[SeqId(1)], InvalidRequest)
        assert set(found.masks) == {SeqId(2)}


def test_an_output_that_is_not_of_its_grammar_fails(grammars: Grammars) -> None:
    masks = GrammarMasks(grammars.compiler)
    found = run(masks, part(1, (*PROMPT, 11, 12), 1, Grammar("choice", '["zzz"]'), told=True))
    assert set(found.failed) == {SeqId(1)}


async def test_preparing_refuses_what_cannot_be_followed(grammars: Grammars) -> None:
    await grammars.prepare(None)
    await grammars.prepare(OBJECT)
    with pytest.raises(InvalidRequest, match="grammar"):
        await grammars.prepare(Grammar("json_schema", '{"type": 3}'))


async def test_no_tokenizer_beside_the_model(tmp_path: Path, write_llama: Callable) -> None:
    with pytest.raises(InvalidConfig, match=r"tokenizer\.json"):
        await Grammars(write_llama(tmp_path / "llama"), 512).prepare(OBJECT)


async def test_only_so_many_wait_to_be_compiled(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.executor.grammars._MAX_WAITING", 0)
    with pytest.raises(Overloaded, match="wait to be compiled"):
        await grammars.prepare(OBJECT)
