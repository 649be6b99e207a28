"""The executor on a GPU: its tokens are transformers', captured or launched."""

from collections.abc import Callable, Sequence

import pytest
import torch

from baton.core.ids import BlockId
from baton.engine.step import StepPlan
from baton.executor.kv_cache import KVCache
from baton.models.decoder import Decoder
from bench.gpu.baton_model import BLOCK_SIZE, decoder
from bench.gpu.drawn import config_of, draw
from bench.gpu.executor import Running, Steps, queue_of, scheduled, tables_of
from bench.gpu.floors import ModelShape
from bench.gpu.hf_model import hf_model

SHAPE = ModelShape(
    layers=4, hidden=512, heads=8, kv_heads=2, head_dim=64, intermediate=1024, vocabulary=2048
)
LENGTHS = [5, 33, 70, 64]
OUTPUT = 24
LONGEST = max(LENGTHS) + OUTPUT
STEP_TOKENS = 48
MOST_ROWS = 8


@pytest.fixture
def weights(device: torch.device) -> dict[str, torch.Tensor]:
    return draw(config_of(SHAPE), device, torch.float32)


@pytest.fixture
def model(weights: dict[str, torch.Tensor]) -> Decoder:
    return decoder(config_of(SHAPE), weights)


@pytest.fixture
def prompts() -> list[list[int]]:
    random = torch.Generator().manual_seed(3)
    return [torch.randint(2048, (n,), generator=random).tolist() for n in LENGTHS]


@pytest.fixture
def engine(model: Decoder, device: torch.device) -> Callable[[], tuple[Steps, list[Running]]]:
    """A function that returns an executor on a fresh pool of NaN, and sequences for the prompts."""

    def make() -> tuple[Steps, list[Running]]:
        layout = model.spec.kv_layout(BLOCK_SIZE, model.dtype)
        pool = KVCache(layout, len(LENGTHS) * (-(-LONGEST // BLOCK_SIZE)), str(device))
        pool.tensor.fill_(float("nan"))
        steps = Steps(
            model,
            pool,
            queue_of(device),
            rows=MOST_ROWS,
            tokens=LONGEST,
            step_tokens=STEP_TOKENS,
        )
        tables, _ = tables_of(len(LENGTHS), LONGEST, pool.num_blocks)
        return steps, [steps.sequence(table) for table in tables]

    return make


def generated(
    steps: Steps, sequences: Sequence[Running], prompts: list[list[int]]
) -> list[list[int]]:
    """Return each prompt's first tokens, greedily."""
    firsts = steps.prefill(list(zip(sequences, prompts, strict=True)), STEP_TOKENS)
    rest = steps.decode(sequences, firsts, [len(p) for p in prompts], OUTPUT - 1)
    return [[first, *more] for first, more in zip(firsts, rest, strict=True)]


def test_tokens_are_those_of_transformers(engine, weights, prompts, device) -> None:
    steps, sequences = engine()
    with steps:
        found = generated(steps, sequences, prompts)
    peer = hf_model(config_of(SHAPE), weights, torch.float32, device)
    for prompt, tokens in zip(prompts, found, strict=True):
        text = torch.tensor([prompt], device=device)
        out = peer.generate(
            text, attention_mask=torch.ones_like(text), do_sample=False, max_new_tokens=OUTPUT
        )
        assert tokens == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("captured", "count"), [(4, 4), (8, 4), (4, 2)])
def test_replays_give_what_launches_do(captured: int, count: int, engine, prompts) -> None:
    """With rows to spare in the graph as well: they are nobody's."""
    launched, sequences = engine()
    with launched:
        expected = generated(launched, sequences[:count], prompts[:count])
    replayed, sequences = engine()
    with replayed:
        replayed.capture(captured)
        assert generated(replayed, sequences[:count], prompts[:count]) == expected


def test_decodes_and_chunks_share_steps(engine, prompts) -> None:
    """A prompt is computed in chunks while another sequence decodes; neither notices."""
    alone, sequences = engine()
    with alone:
        expected = generated(alone, sequences, prompts)
    steps, sequences = engine()
    with steps:
        decoding, arriving = sequences[0], sequences[2]
        (token,) = steps.prefill([(decoding, prompts[0])], STEP_TOKENS)
        found, place = [token], 0
        for step in range(5):
            chunk = tuple(prompts[2][place : place + 16])
            parts = [scheduled(decoding, (token,), LENGTHS[0] + step, samples=True)]
            if chunk:
                last = place + len(chunk) == LENGTHS[2]
                parts.append(scheduled(arriving, chunk, place, samples=last))
                place += len(chunk)
            result = steps.runner.execute(StepPlan(1000 + step, tuple(parts))).result()
            token = result.tokens[decoding.seq_id]
            found.append(token)
        assert found == expected[0][:6]
        assert result.tokens[arriving.seq_id] == expected[2][0]


def test_a_step_reads_no_block_of_another(engine, prompts) -> None:
    steps, sequences = engine()
    with steps:
        expected = generated(steps, sequences, prompts)
    steps, sequences = engine()
    turned = [Running(s.seq_id, tuple(BlockId(b) for b in reversed(s.blocks))) for s in sequences]
    with steps:
        assert generated(steps, turned, prompts) == expected
