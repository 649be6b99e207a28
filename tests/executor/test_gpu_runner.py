"""The executor for GPUs, with all but the calls of CUDA: real tokens, eager and late."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from baton.core.errors import DeadlineExceeded
from baton.core.request import GenerateRequest, SamplingParams
from baton.engine.step import PENDING, SamplingContext, ScheduledSequence, StepPlan
from baton.executor.gpu_pass import GpuLimits, GpuPass
from baton.executor.gpu_queue import EagerQueue, GpuQueue
from baton.executor.gpu_runner import GpuRunner
from baton.executor.kv_cache import KVCache, make_layout
from baton.executor.runner import ModelRunner
from baton.models.decoder import Decoder
from baton.models.loader import load_model
from tests.executor.engine_world import EngineWorld
from tests.executor.test_run_ahead import SAMPLINGS, mixed_requests

ROWS = 6
SIZES = (1, 2, 4)
TOKENS = (6, 16)
"""Steps with chunks have up to 32."""


@pytest.fixture(scope="module", params=["untied", "demo"])
def decoder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_llama: Callable[..., Path],
    demo_model_dir: Path,
) -> Decoder:
    folder = demo_model_dir
    if request.param == "untied":
        folder = write_llama(tmp_path_factory.mktemp("checkpoint") / "llama")
    model = load_model(folder, executor="torch")
    assert isinstance(model, Decoder)
    return model


@pytest.fixture
def serve(decoder: Decoder, queue: GpuQueue):
    """Serve requests with the executor for GPUs; everything it started is ended."""
    worlds: list[EngineWorld] = []

    async def serve(
        requests: list[GenerateRequest], *, num_blocks: int = 64, depth: int = 2, **extra
    ) -> EngineWorld:
        def make(kv: KVCache) -> GpuRunner:
            limits = GpuLimits(rows=ROWS, tokens=32, blocks=num_blocks, depth=depth)
            steps = GpuPass(decoder, kv, queue, limits)
            steps.capture_pieces(TOKENS, lambda size: None)
            steps.capture(SIZES, lambda size: None)
            return GpuRunner(steps, queue, kv, None, depth=depth)

        world = EngineWorld(
            decoder,
            make,
            num_blocks=num_blocks,
            depth=depth,
            ahead=depth > 1,
            block_size=8,
            max_batch_tokens=32,
            max_sequences=ROWS,
        )
        worlds.append(world)
        world.found = await world.serve(requests, **extra)
        return world

    yield serve
    for world in worlds:
        world.runner.close()


async def reference(
    decoder: Decoder, requests: list[GenerateRequest], num_blocks: int = 64
) -> EngineWorld:
    world = EngineWorld(
        decoder,
        lambda kv: ModelRunner(decoder, kv),
        num_blocks=num_blocks,
        depth=1,
        ahead=False,
        block_size=8,
        max_batch_tokens=32,
        max_sequences=ROWS,
    )
    world.found = await world.serve(requests)
    return world


def plain(requests: list[GenerateRequest]) -> list[GenerateRequest]:
    """The same requests with what the device samples by itself."""
    return [replace(r, sampling=SAMPLINGS[i % 3]) for i, r in enumerate(requests)]


@pytest.mark.parametrize("depth", [1, 2, 3])
async def test_tokens_are_those_of_the_torch_executor(decoder: Decoder, serve, depth: int) -> None:
    requests = plain(mixed_requests(decoder))
    world = await serve(requests, depth=depth)
    assert world.found == (await reference(decoder, requests)).found
    assert world.most_under_way == depth


async def test_who_stops_and_who_is_preempted(decoder: Decoder, serve) -> None:
    requests = [r for r in plain(mixed_requests(decoder)) if len(r.prompt) + r.max_tokens <= 64]
    whole = (await reference(decoder, requests)).found
    stopping = [
        replace(r, stop_token_ids=(o[len(o) // 2],)) for r, o in zip(requests, whole, strict=True)
    ]
    world = await serve(stopping, num_blocks=9)
    assert world.found == [o[: o.index(o[len(o) // 2]) + 1] for o in whole]
    assert world.scheduler.stats().roster.preemptions


@pytest.fixture
def poisoned(decoder: Decoder, queue: GpuQueue) -> Iterator[GpuRunner]:
    """A runner whose block 2 holds what no logits come of."""
    kv = KVCache(make_layout(decoder.spec, 8, decoder.dtype), 8)
    kv.tensor[2] = float("nan")
    steps = GpuPass(decoder, kv, queue, GpuLimits(rows=ROWS, tokens=32, blocks=8, depth=2))
    runner = GpuRunner(steps, queue, kv, None, depth=2)
    yield runner
    runner.close()


def step(number: int, *parts: tuple[int, int, int, int], **sampling: float) -> StepPlan:
    """Return a plan of (sequence, block, position, token)."""
    params = SamplingParams(temperature=0.0, **sampling)
    context = None if params.plain else SamplingContext(1, (), None)
    return StepPlan(
        number,
        tuple(
            ScheduledSequence(seq_id, (token,), start, (block,), True, params, context)
            for seq_id, block, start, token in parts
        ),
    )


@pytest.mark.parametrize(
    "sampling",
    [{}, {"logprobs": 1}, {"typical_p": 0.5}, {"logprobs": 21}],
    ids=["device", "logprobs", "typical", "host"],
)
def test_logits_that_are_not_finite_cost_their_own_sequence_alone(
    poisoned: GpuRunner, sampling: dict[str, float]
) -> None:
    unsound = poisoned.execute(step(1, (1, 2, 3, 5), (2, 3, 0, 6), **sampling))
    after = poisoned.execute(step(2, (1, 2, 4, PENDING), (2, 3, 1, PENDING), **sampling))
    assert unsound.result(20).unsound == (1,)
    assert unsound.result(20).tokens.keys() == {2}, "the other row is none the worse for it"
    assert after.result(20).tokens.keys() == {2}
    assert after.result(20).unsound == (), "it is told once"
    again = poisoned.execute(step(3, (2, 3, 2, PENDING), **sampling))
    assert again.result(20).tokens.keys() == {2}


class Hanging(EagerQueue):
    """A device whose steps do not end before `ends` is set."""

    def __init__(self) -> None:
        self.ends = Event()

    def record(self) -> "Hanging":
        return self

    def wait(self) -> None:
        assert self.ends.wait(60)


def test_a_step_that_the_host_waits_for_has_a_deadline(decoder: Decoder) -> None:
    queue = Hanging()
    kv = KVCache(make_layout(decoder.spec, 8, decoder.dtype), 8)
    steps = GpuPass(decoder, kv, queue, GpuLimits(rows=ROWS, tokens=32, blocks=8, depth=2))
    runner = GpuRunner(steps, queue, kv, None, depth=2, limit_s=0.01)
    try:
        with pytest.raises(DeadlineExceeded, match=r"within 0\.01 s"):
            runner.execute(step(1, (1, 2, 3, 5), logprobs=21))
    finally:
        queue.ends.set()
        runner.close()


def test_the_step_after_one_that_could_not_be_launched_is_without_its_sequences(
    poisoned: GpuRunner,
) -> None:
    long = ScheduledSequence(1, (5,), 0, tuple(range(9)), True, SamplingParams())
    with pytest.raises(AssertionError, match="blocks of a sequence"):
        poisoned.execute(StepPlan(1, (long,)))
    after = poisoned.execute(step(2, (1, 3, 1, PENDING), (3, 4, 0, 7)))
    assert after.result(20).tokens.keys() == {3}
