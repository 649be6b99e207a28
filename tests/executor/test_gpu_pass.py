"""Steps on their way: what is written where, and how long results can be read."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from baton.core.request import SamplingParams
from baton.engine.step import PENDING, LayerWatch, SamplingContext, ScheduledSequence
from baton.executor.gpu_pass import GpuLimits, GpuPass
from baton.executor.kv_cache import KVCache, make_layout
from baton.executor.late_queue import LateQueue
from baton.models.decoder import Decoder
from baton.models.loader import load_model

BLOCK = 8
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture
def queue() -> Iterator[LateQueue]:
    queue = LateQueue()
    yield queue
    queue.close()


@pytest.fixture(scope="module")
def model(tiny_llama_dir: Path) -> Decoder:
    loaded = load_model(tiny_llama_dir, executor="torch")
    assert isinstance(loaded, Decoder)
    return loaded


@pytest.fixture
def kv(model: Decoder) -> KVCache:
    return KVCache(make_layout(model.spec, BLOCK, model.dtype), 8)


@pytest.fixture(params=[(), (8, 16)], ids=["whole", "pieces"])
def tokens(request: pytest.FixtureRequest) -> tuple[int, ...]:
    """For which steps with chunks all but attention is captured."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def steps(model: Decoder, kv: KVCache, queue: LateQueue, tokens: tuple[int, ...]) -> GpuPass:
    steps = GpuPass(model, kv, queue, GpuLimits(rows=4, tokens=32, blocks=8, depth=2))
    steps.capture_pieces(tokens, lambda size: None)
    steps.capture((2, 4), lambda size: None)
    return steps


def part(seq_id: int, block: int, start: int, *tokens: int) -> ScheduledSequence:
    return ScheduledSequence(seq_id, tokens, start, (block,), True, GREEDY)


def written(kv: KVCache) -> set[tuple[int, int]]:
    """Return the (block, offset) of every slot that is not as it was, zero."""
    changed = (kv.tensor != 0).any(dim=-1).any(dim=3).any(dim=2).any(dim=1)
    return {(int(block), int(offset)) for block, offset in changed.nonzero()}


def test_capturing_writes_nothing(steps: GpuPass, kv: KVCache) -> None:
    assert written(kv) == set()


@pytest.mark.parametrize("count", [1, 3])
def test_rows_that_are_padding_write_nothing(
    steps: GpuPass, kv: KVCache, queue: LateQueue, count: int
) -> None:
    before = queue.replays
    steps.launch([part(i, 7 - i, 0, 5 + i) for i in range(count)]).done.wait()
    assert queue.replays == before + 1
    assert written(kv) == {(7 - i, 0) for i in range(count)}


def test_a_step_with_a_chunk_writes_its_tokens_alone(
    steps: GpuPass, kv: KVCache, queue: LateQueue, tokens: tuple[int, ...]
) -> None:
    before = queue.replays
    launched = steps.launch([part(1, 5, 0, *range(2, 8)), part(2, 3, 0, 9)])
    launched.done.wait()
    assert queue.replays - before == (kv.layout.layers if tokens else 0)
    assert written(kv) == {(3, 0), *((5, offset) for offset in range(6))}
    assert [s.seq_id for s in launched.sampled] == [2, 1], "decodes come first"


def test_steps_beyond_the_largest_size_are_launched_whole(
    steps: GpuPass, kv: KVCache, queue: LateQueue
) -> None:
    before = queue.replays
    long = ScheduledSequence(1, tuple(range(2, 19)), 0, (5, 6, 1), True, GREEDY)
    steps.launch([long]).done.wait()
    assert queue.replays == before
    assert len(written(kv)) == 17


def test_padding_samples_nothing(steps: GpuPass, kv: KVCache) -> None:
    """Only the last tokens of those that sample have logits, of however many rows."""
    first = part(1, 5, 0, *range(2, 5))._replace(samples=False)
    launched = steps.launch([first, part(2, 3, 0, 9, 8)])
    launched.done.wait()
    assert [s.seq_id for s in launched.sampled] == [2]
    assert launched.found.shape[1] == 1


def test_results_can_be_read_until_as_many_more_are_launched(steps: GpuPass) -> None:
    alone = []
    for token in (3, 4, 5):
        launched = steps.launch([part(10 + token, 1, 0, token)])
        launched.done.wait()
        alone.append(int(launched.found[0, 0]))
    assert len(set(alone)) > 1
    several = [steps.launch([part(20 + token, 1, 0, token)]) for token in (3, 4, 5)]
    several[-1].done.wait()
    assert [int(launched.found[0, 0]) for launched in several] == alone


def test_the_token_sampled_last_is_the_next_input(steps: GpuPass) -> None:
    first = steps.launch([part(1, 2, 0, 7)])
    second = steps.launch([part(1, 2, 1, PENDING)])
    second.done.wait()
    token = int(first.found[0, 0])
    known = steps.launch([part(2, 3, 0, 7, token)])
    known.done.wait()
    assert second.found[0, 0] == known.found[0, 0]


def test_tokens_sampled_on_the_host_are_the_next_input_too(steps: GpuPass) -> None:
    many = SamplingParams(0.0, logprobs=21)
    curious = part(1, 2, 0, 7)._replace(sampling=many, context=SamplingContext(1, (), None))
    launched = steps.launch([part(2, 4, 0, 6), curious])
    launched.done.wait()
    (logits,) = launched.logits
    assert launched.on_host == (1,)
    assert logits.shape[0] == 1
    steps.take_tokens([curious], [9])
    second = steps.launch([part(1, 2, 1, PENDING)])
    known = steps.launch([part(3, 3, 0, 7, 9)])
    known.done.wait()
    assert second.found[0, 0] == known.found[0, 0]


def test_logits_that_are_not_finite_are_told(steps: GpuPass, kv: KVCache, queue: LateQueue) -> None:
    steps.launch([part(1, 2, 0, 7, 8)]).done.wait()
    kv.tensor[2, :, :, :, 0] = float("nan")
    launched = steps.launch([part(1, 2, 2, PENDING), part(3, 4, 0, 6)])
    launched.done.wait()
    assert launched.found[1].tolist() == [0, 1]


def test_layers_are_told_of_when_they_are_written(steps: GpuPass, kv: KVCache) -> None:
    told: list[tuple[int, bool]] = []

    def reached(layers: int) -> None:
        told.append((layers, bool((kv.tensor[5, layers - 1] != 0).any())))

    watch = LayerWatch((1, 2), reached)
    launched = steps.launch([part(1, 5, 0, *range(2, 8))], watch)
    assert told == []
    launched.done.wait()
    assert told == [(1, True), (2, True)]
    assert torch.isfinite(kv.tensor).all()
