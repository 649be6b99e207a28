"""A plan tells sampling the tokens so far, when it cannot know them, and never a word more."""

from dataclasses import replace
from typing import Any

from baton.core.ids import SeqId
from baton.core.request import GenerateRequest, SamplingParams, TokenLogprobs
from baton.engine.step import StepPlan, StepResult, TokenSampled

PENALISED = SamplingParams(presence_penalty=1.0)


class Follower:
    """Keeps the tokens of the last step's sequences, as an executor does."""

    def __init__(self, inner: Any) -> None:
        self.told = 0
        """Tokens sent again."""
        self.seen: dict[SeqId, list[int]] = {}
        self._inner = inner
        self._kept: dict[SeqId, list[int]] = {}

    def arrived(self, seq_id: SeqId, request: GenerateRequest) -> None:
        self._inner.arrived(seq_id, request)

    def execute(self, plan: StepPlan) -> StepResult:
        kept = {}
        for part in plan.sequences:
            if not part.samples or not part.sampling.looks_back:
                continue
            assert part.context is not None
            before = part.context.before
            if before is not None:
                self.told += len(before)
            known = self._kept[part.seq_id] if before is None else list(before)
            kept[part.seq_id] = self.seen[part.seq_id] = [*known, *part.tokens]
            assert len(kept[part.seq_id]) == part.end
        self._kept = kept
        result: StepResult = self._inner.execute(plan)
        return result


def penalised(request: GenerateRequest, params: SamplingParams = PENALISED) -> GenerateRequest:
    return replace(request, sampling=replace(params, seed=request.sampling.seed))


def test_a_sequence_that_stays_is_told_of_its_tokens_once(bench: Any, request_of: Any) -> None:
    world = bench(64, max_batch_tokens=24)
    world.runner = follower = Follower(world.runner)
    requests = [penalised(request_of(50, 12, seed=i)) for i in range(3)]
    seqs = [world.submit(request) for request in requests]
    world.run()
    for seq, request in zip(seqs, requests, strict=True):
        assert follower.seen[seq] == [*request.prompt, *world.output(seq)[:-1]]
    assert follower.told <= 3 * 50


def test_preempted_sequences_are_told_again(bench: Any, request_of: Any, fake: Any) -> None:
    world = bench(8)
    world.runner = follower = Follower(world.runner)
    requests = [penalised(request_of(9, 30, seed=i)) for i in range(4)]
    seqs = [world.submit(request) for request in requests]
    world.run()
    assert world.scheduler.stats().roster.preemptions > 0
    for seq, request in zip(seqs, requests, strict=True):
        assert world.output(seq) == fake.expected(request)[0]
        assert follower.seen[seq] == [*request.prompt, *world.output(seq)[:-1]]


def test_a_sequence_that_comes_back_from_host_memory_is_told_again(
    bench: Any, request_of: Any, fake: Any
) -> None:
    world = bench(8, host_blocks=32, swap_block_cost=0.01, prefix_cache=False)
    world.runner = follower = Follower(world.runner)
    requests = [penalised(request_of(9, 30, seed=i)) for i in range(4)]
    seqs = [world.submit(request) for request in requests]
    plans = world.run()
    back = [s.context.before for p in plans if p.swap_in for s in p.sequences if s.context]
    assert any(before is not None and len(before) > 9 for before in back)
    for seq, request in zip(seqs, requests, strict=True):
        assert world.output(seq) == fake.expected(request)[0]
        assert follower.seen[seq] == [*request.prompt, *world.output(seq)[:-1]]


def test_a_cached_prefix_is_told_to_sampling_too(bench: Any, request_of: Any) -> None:
    world = bench(64)
    request = penalised(request_of(50, 4, seed=3))
    world.submit(request)
    world.run()
    world.runner = follower = Follower(world.runner)
    again = world.submit(request)
    plan = world.step()
    [part] = plan.sequences
    assert part.start > 0, "the cache had nothing"
    assert part.context.before == request.prompt[: part.start]
    world.run()
    assert follower.seen[again] == [*request.prompt, *world.output(again)[:-1]]


def test_a_handed_over_sequence_is_told_of_prompt_and_first_token(
    bench: Any, request_of: Any
) -> None:
    world = bench(16)
    request = penalised(request_of(20, 6, seed=5))
    seq = world.reserve(request)
    world.scheduler.grant()
    world.admit(seq, request)
    world.runner = follower = Follower(world.runner)
    plan = world.scheduler.plan()
    assert plan.sequences[0].context.before == request.prompt
    assert plan.sequences[0].context.prompt_len == 20
    world.events += world.scheduler.apply(follower.execute(plan))
    world.run()
    assert follower.seen[seq] == [*request.prompt, *world.output(seq)[:-1]]
    assert follower.told == 20


def test_only_what_samples_and_asks_has_a_context(bench: Any, request_of: Any) -> None:
    world = bench(64, max_batch_tokens=16)
    plain = request_of(40, 4, seed=1, stop=(2,))
    ask = {
        "logprobs": SamplingParams(logprobs=0),
        "min_tokens": SamplingParams(min_tokens=2),
        "bias": SamplingParams(logit_bias=((1, 1.0),)),
        "bad word": SamplingParams(bad_words=((1,),)),
        "bad words": SamplingParams(bad_words=((1, 2),)),
        "repetition": SamplingParams(repetition_penalty=1.1),
    }
    wanted = {world.submit(plain): None}
    wanted |= {world.submit(penalised(plain, params)): params for params in ask.values()}
    for plan in world.run():
        for part in plan.sequences:
            params = wanted[part.seq_id]
            assert (part.context is not None) == (params is not None and part.samples)
            if part.context is not None:
                assert part.context.stop_token_ids == (2,)
                assert params.looks_back or part.context.before is None


def test_logprobs_come_through_with_their_token(bench: Any, request_of: Any) -> None:
    world = bench(16)
    one = world.scheduler.submit(penalised(request_of(5, 1), SamplingParams(logprobs=1)))
    two = world.scheduler.submit(request_of(5, 1, seed=1))
    plan = world.scheduler.plan()
    told = TokenLogprobs(-0.5, ((3, -0.25),))
    events = world.scheduler.apply(StepResult(plan.step, {one: 4, two: 5}, {one: told}))
    found = {e.seq_id: e.logprobs for e in events if isinstance(e, TokenSampled)}
    assert found == {one: told, two: None}
