"""Penalties, changes of logits and logprobs on a device are what they are on the host."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from baton.core.request import GenerateRequest, SamplingParams
from baton.engine.step import SamplingContext, ScheduledSequence
from baton.executor import gpu_option_tensors, gpu_options
from baton.executor.gpu_option_tensors import OptionTensors
from baton.executor.gpu_options import Extent, OptionSeats
from baton.executor.gpu_pass import GpuLimits, GpuPass
from baton.executor.gpu_queue import EagerQueue, GpuQueue
from baton.executor.gpu_runner import GpuRunner
from baton.executor.kv_cache import KVCache
from baton.executor.runner import ModelRunner
from baton.models.decoder import Decoder
from baton.models.loader import load_model
from tests.executor.engine_world import EngineWorld
from tests.executor.option_cases import (
    ON_HOST,
    OPTIONS,
    PLAIN,
    STOP,
    assert_same_logprobs,
    requests_of,
    with_words_that_come,
)

ROWS = 16
MIXED = (*OPTIONS.values(), *PLAIN)


@pytest.fixture(scope="module")
def decoder(tiny_llama_dir: Path) -> Decoder:
    model = load_model(tiny_llama_dir, executor="torch")
    assert isinstance(model, Decoder)
    return model


def world(decoder: Decoder, make: Callable, num_blocks: int, depth: int) -> EngineWorld:
    return EngineWorld(
        decoder,
        make,
        num_blocks=num_blocks,
        depth=depth,
        ahead=depth > 1,
        block_size=8,
        max_batch_tokens=32,
        max_sequences=ROWS,
    )


@pytest.fixture
def serve(decoder: Decoder, queue: GpuQueue):
    """Serve requests on the device, one step ahead; everything it started is ended."""
    worlds: list[EngineWorld] = []

    async def serve(requests: Sequence[GenerateRequest], num_blocks: int = 64) -> EngineWorld:
        def make(kv: KVCache) -> GpuRunner:
            steps = GpuPass(decoder, kv, queue, GpuLimits(ROWS, 32, 16, depth=2))
            steps.capture((4, ROWS), lambda size: None)
            return GpuRunner(steps, queue, kv, None, depth=2)

        worlds.append(world(decoder, make, num_blocks, 2))
        worlds[-1].found = await worlds[-1].serve(requests)
        return worlds[-1]

    yield serve
    for served in worlds:
        served.runner.close()


async def on_host(decoder: Decoder, requests: Sequence[GenerateRequest]) -> EngineWorld:
    plain = world(decoder, lambda kv: ModelRunner(decoder, kv), 64, 1)
    plain.found = await plain.serve(requests)
    return plain


async def forbidding(
    decoder: Decoder, samplings: Sequence[SamplingParams]
) -> tuple[list[GenerateRequest], EngineWorld]:
    """Return requests with bad words that would have come, and what the host makes of them."""
    requests = requests_of(samplings)
    whole = await on_host(decoder, requests)
    requests = with_words_that_come(requests, whole.found)
    known = await on_host(decoder, requests)
    assert known.found != whole.found, "no word was forbidden"
    return requests, known


def assert_same(found: EngineWorld, known: EngineWorld) -> None:
    assert found.found == known.found
    assert_same_logprobs(found, known)


@pytest.mark.parametrize("name", OPTIONS)
async def test_each_alone(decoder: Decoder, serve, name: str) -> None:
    requests = requests_of([OPTIONS[name]])
    assert_same(await serve(requests), await on_host(decoder, requests))


async def test_all_in_one_batch(decoder: Decoder, serve, queue: GpuQueue) -> None:
    requests, known = await forbidding(decoder, MIXED)
    found = await serve(requests)
    assert_same(found, known)
    assert found.most_under_way == 2
    assert isinstance(queue, EagerQueue) or queue.replays, "nothing was captured"


async def test_beside_rows_that_the_host_samples(decoder: Decoder, serve) -> None:
    requests = requests_of((*MIXED, *ON_HOST.values()))
    assert_same(await serve(requests), await on_host(decoder, requests))


async def test_who_is_preempted_is_recomputed(decoder: Decoder, serve) -> None:
    requests, known = await forbidding(decoder, MIXED)
    found = await serve(requests, num_blocks=8)
    assert_same(found, known)
    assert found.scheduler.stats().roster.preemptions


async def test_what_another_instance_generated_counts_as_output(decoder: Decoder, serve) -> None:
    requests, known = await forbidding(decoder, MIXED)
    resumed, rest = [], []
    for request, output in zip(requests, known.found, strict=True):
        half = len(output) // 2
        resumed.append(request.resume(output[:half]))
        rest.append(output[half:])
    assert (await serve(resumed)).found == rest


async def test_what_there_is_no_room_for_the_host_samples(
    decoder: Decoder, serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (gpu_options, gpu_option_tensors):
        monkeypatch.setattr(module, "HISTORIES", 1)
        monkeypatch.setattr(module, "CHANGES", 4)
    requests, known = await forbidding(decoder, MIXED)
    assert_same(await serve(requests), known)


def sequence(number: int, sampling: SamplingParams, *before: int) -> ScheduledSequence:
    context = None if sampling.plain else SamplingContext(1, STOP, before)
    return ScheduledSequence(number, (1,), len(before), (0,), True, sampling, context)


def test_what_who_leaves_had_is_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_options, "HISTORIES", 1)
    monkeypatch.setattr(gpu_options, "CHANGES", 3)
    options = OptionSeats(4, 100)
    everything = replace(OPTIONS["repetition"], min_tokens=2)
    assert options.extent(0, sequence(1, everything)) is Extent.CHANGED
    assert options.extent(1, sequence(2, everything)) is None, "one history"
    assert options.extent(2, sequence(3, OPTIONS["bias"])) is None, "one change is left"
    assert options.extent(3, sequence(4, OPTIONS["logprobs"])) is Extent.TOLD
    options.leave([0, 1, 2, 3])
    options.stale = False
    assert options.extent(2, sequence(5, OPTIONS["bias"])) is Extent.CHANGED
    assert options.stale
    assert options.extent(1, sequence(6, OPTIONS["presence"])) is Extent.CHANGED
    options.leave([2, 1])
    assert not (options.table[4 * 5 :].reshape(-1, 3)[0] != 4).any(), "changes of nobody's are left"


def test_a_past_begins_anew_with_who_takes_the_seat() -> None:
    device = OptionTensors(2, 100, torch.device("cpu"))
    host = OptionSeats(2, 100)
    seat, seats = 1, torch.tensor([1])
    word = SamplingParams(temperature=0.0, bad_words=((8, 9, 10),))

    def forbidden(*said: int) -> list[int]:
        one = sequence(1, word, *said)
        assert host.extent(seat, one) is Extent.CHANGED
        device.take_table(torch.from_numpy(host.table))
        device.begin(seat, -1, torch.tensor(said), prompt_len=1)
        logits = torch.zeros(1, 100)
        device.change_(logits, seats, torch.tensor([len(said)]))
        return logits[0].isinf().nonzero().flatten().tolist()

    assert forbidden(1, 2, 3, 8, 9) == [10]
    assert forbidden(1, 2, 3, 8, 4) == []
    assert forbidden(9) == [], "the 8 before it was another's"
    device.take_tokens(seats, torch.tensor([8]))
    device.take_tokens(seats, torch.tensor([9]))
    logits = torch.zeros(1, 100)
    device.change_(logits, seats, torch.tensor([3]))
    assert logits[0].isinf().nonzero().flatten().tolist() == [10]


@pytest.mark.parametrize("sampling", ON_HOST.values(), ids=ON_HOST)
def test_what_the_device_never_samples(sampling: SamplingParams) -> None:
    assert OptionSeats(4, 100).extent(0, sequence(1, sampling)) is None
    few = replace(PLAIN[0], logprobs=3)
    assert OptionSeats(4, 2).extent(0, sequence(1, few)) is None, "of two tokens"
