"""Real tokens of a real model, planned one step ahead of their being known."""

import random

import pytest

from baton.core.request import GenerateRequest, SamplingParams
from baton.engine.step import PENDING, ScheduledSequence, StepPlan, StepResult
from baton.executor.last_tokens import LastTokens
from baton.executor.runner import ModelRunner
from baton.models.loader import Model
from tests.executor.engine_world import EngineWorld, request

SAMPLINGS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=5),
    SamplingParams(temperature=0.7, seed=6, top_k=20, top_p=0.9),
    SamplingParams(temperature=0.8, seed=7, repetition_penalty=1.3, frequency_penalty=0.4),
    SamplingParams(temperature=0.0, bad_words=((3, 4),), min_tokens=4, logprobs=2),
)


def mixed_requests(model: Model, count: int = 8) -> list[GenerateRequest]:
    """Prompts of all lengths, every kind of sampling."""
    rng = random.Random(11)
    return [
        request(
            number,
            [rng.randrange(1, model.spec.vocab_size) for _ in range(rng.randint(1, 40))],
            rng.randint(2, 24),
            SAMPLINGS[number % len(SAMPLINGS)],
        )
        for number in range(count)
    ]


def engine(model: Model, *, ahead: bool, num_blocks: int = 64) -> EngineWorld:
    depth = 2 if ahead else 1
    return EngineWorld(
        model,
        lambda kv: ModelRunner(model, kv, depth=depth),
        num_blocks=num_blocks,
        depth=depth,
        ahead=ahead,
        block_size=8,
        max_batch_tokens=32,
    )


@pytest.mark.parametrize("num_blocks", [64, 9], ids=["roomy", "with preemption"])
async def test_tokens_are_the_same_with_and_without(model: Model, num_blocks: int) -> None:
    requests = mixed_requests(model)
    if num_blocks == 9:
        requests = [r for r in requests if len(r.prompt) + r.max_tokens <= 64]
    plain = await engine(model, ahead=False, num_blocks=num_blocks).serve(requests)
    stops = [output[len(output) // 2] for output in plain]
    stopping = [
        request(i, r.prompt, r.max_tokens, r.sampling, (stop,))
        for i, (r, stop) in enumerate(zip(requests, stops, strict=True))
    ]
    until_stop = [o[: o.index(stop) + 1] for o, stop in zip(plain, stops, strict=True)]
    # min_tokens moves a stop token away: compare with an engine that is not ahead.
    until_stop = await engine(model, ahead=False, num_blocks=num_blocks).serve(stopping)
    world = engine(model, ahead=True, num_blocks=num_blocks)
    assert await world.serve(requests) == plain
    assert world.most_under_way == 2
    if num_blocks == 9:
        assert world.scheduler.stats().roster.preemptions
    assert await engine(model, ahead=True, num_blocks=num_blocks).serve(stopping) == until_stop


async def test_aborts_leave_the_others_as_they_were(model: Model) -> None:
    requests = mixed_requests(model)
    plain = await engine(model, ahead=False).serve(requests)
    aborts = {index: 1 + index % 2 for index in range(0, len(requests), 2)}
    found = await engine(model, ahead=True).serve(requests, aborts)
    for index, (output, whole) in enumerate(zip(found, plain, strict=True)):
        assert output == whole[: aborts.get(index, len(whole))]


def sequence(seq_id: int, start: int, token: int) -> ScheduledSequence:
    return ScheduledSequence(seq_id, (token,), start, (0,), True, SAMPLINGS[0])


def test_last_tokens_are_found_by_position() -> None:
    last = LastTokens(2)
    first = StepPlan(1, (sequence(1, 4, 7), sequence(2, 9, 8)))
    last.take(first, StepResult(1, {1: 30, 2: 31}))
    plan = last.known(StepPlan(2, (sequence(2, 10, PENDING), sequence(3, 0, 5))))
    assert [s.tokens for s in plan.sequences] == [(31,), (5,)]


def test_who_was_in_a_failed_step_is_left_out() -> None:
    """Step 2, which failed, is not taken: the token of position 6 was never sampled."""
    last = LastTokens(2)
    last.take(StepPlan(1, (sequence(1, 4, 7),)), StepResult(1, {1: 30}))
    plan = last.known(StepPlan(3, (sequence(1, 6, PENDING), sequence(3, 0, 5))))
    assert [s.seq_id for s in plan.sequences] == [3]
