"""A request that another instance began: its output counts as output, wherever it goes on."""

from dataclasses import replace
from typing import Any

import pytest

from baton.core.config import EngineConfig
from baton.core.errors import InvalidRequest
from baton.core.request import FinishReason, SamplingParams
from baton.engine.policy import make_policy
from baton.engine.step import TokenSampled


def finish_of(world: Any, seq: int) -> FinishReason | None:
    return [e.finish for e in world.events if isinstance(e, TokenSampled) and e.seq_id == seq][-1]


@pytest.mark.parametrize("handed_over", [False, True])
@pytest.mark.parametrize("stops", [False, True])
def test_at_every_token_the_rest_is_the_same(
    bench: Any, request_of: Any, fake: Any, handed_over: bool, stops: bool
) -> None:
    request = request_of(21, 20, seed=4)
    output, reason = fake.expected(request)
    if stops:
        late = next(t for i, t in enumerate(output) if i > 9 and t not in output[:i])
        request = replace(request, stop_token_ids=(late,))
        output, reason = fake.expected(request)
    assert reason is (FinishReason.STOP if stops else FinishReason.LENGTH)
    for told in range(len(output)):
        rest, world = request.resume(output[:told]), bench(16, max_batch_tokens=24)
        if handed_over:
            seq = world.reserve(rest)
            world.scheduler.grant()
            world.admit(seq, rest)
        else:
            seq = world.submit(rest)
        world.run()
        assert world.output(seq) == output[told:], told
        assert finish_of(world, seq) is reason


def test_of_a_prompt_that_is_held_one_token_is_sampled(bench: Any, request_of: Any, fake: Any):
    request = request_of(10, 6, seed=2)
    output, _ = fake.expected(request)
    world = bench(16)
    seq = world.submit(request.resume(output[:4]), hold=True)
    world.run()
    assert world.output(seq) == output[4:5]
    assert len(world.scheduler.blocks(seq)) == 2, "blocks for prompt and output so far"
    world.scheduler.release(seq)


def test_preempted_ones_go_on_too(bench: Any, request_of: Any, fake: Any) -> None:
    world = bench(8)
    requests = [request_of(9, 30, seed=i) for i in range(4)]
    outputs = [fake.expected(request)[0] for request in requests]
    seqs = [
        world.submit(request.resume(output[: 3 * i]))
        for i, (request, output) in enumerate(zip(requests, outputs, strict=True))
    ]
    world.run()
    assert world.scheduler.stats().roster.preemptions > 0
    for i, (seq, output) in enumerate(zip(seqs, outputs, strict=True)):
        assert world.output(seq) == output[3 * i :]


def test_penalties_and_min_tokens_know_where_the_output_begins(bench: Any, request_of: Any) -> None:
    request = request_of(20, 6, seed=5)
    request = replace(request, sampling=SamplingParams(presence_penalty=1.0, min_tokens=4, seed=5))
    world = bench(16)
    world.submit(request.resume([1, 2, 3]))
    [part] = world.step().sequences
    assert part.context.prompt_len == 20
    assert part.end == 23
    assert part.context.before == ()
    assert part.tokens == (*request.prompt, 1, 2, 3)


def test_what_fits_does_not_depend_on_how_far_it_has_come(bench: Any, request_of: Any) -> None:
    world, request = bench(4), request_of(20, 13)  # 20 + 13 - 1 tokens in 4 blocks of 8
    world.scheduler.expect_fits(request)
    world.scheduler.expect_fits(request.resume(range(12)))
    for told in (0, 12):
        with pytest.raises(InvalidRequest, match=r"max_tokens: 14 .*at most 13 after 20"):
            world.scheduler.expect_fits(replace(request, max_tokens=14).resume(range(told)))


def test_the_shortest_job_is_what_is_left_of_it(request_of: Any) -> None:
    policy = make_policy(EngineConfig(policy="sjf"))
    request, other = request_of(10, 200), request_of(10, 100)
    rest = request.resume([1] * 150)
    assert policy.rank(rest, 0, hold=False) < policy.rank(other, 0, hold=False)
    policy.finished(rest, 180)  # all its tokens, under the length of its own prompt
    assert policy.rank(request, 0, hold=False) > policy.rank(other, 0, hold=False)
    assert policy.rank(request.resume([1] * 190), 0, hold=False) >= 0


def test_a_request_is_resumed_from_its_beginning(request_of: Any) -> None:
    request = request_of(5, 4)
    assert request.resume(()) == request
    rest = request.resume([8, 9])
    assert (rest.prompt, rest.output_start, rest.max_tokens) == ((*request.prompt, 8, 9), 5, 4)
    with pytest.raises(AssertionError):
        rest.resume([1])
    with pytest.raises(AssertionError):
        request.resume([1, 2, 3, 4])
