"""Grammars on the executor for GPUs, with all but the calls of CUDA: the host follows them."""

import re
from dataclasses import replace
from pathlib import Path

from baton.core.grammar import Grammar
from baton.core.request import GenerateRequest
from baton.executor.engine_loop import Runner
from baton.executor.gpu_pass import GpuLimits, GpuPass
from baton.executor.gpu_queue import GpuQueue
from baton.executor.gpu_runner import GpuRunner
from baton.executor.grammars import Grammars
from baton.executor.kv_cache import KVCache
from baton.executor.runner import ModelRunner
from baton.models.decoder import Decoder
from baton.models.loader import load_model
from baton.models.tokenizer import load_tokenizer
from tests.executor.engine_world import EngineWorld
from tests.executor.test_run_ahead import mixed_requests

ROWS = 6
BLOCKS = 9
WORD = Grammar("regex", "[ab]{5,9}")


def with_grammars(decoder: Decoder) -> list[GenerateRequest]:
    """Rows with a grammar and rows without, drawn and greedy, that do not all have room at once."""
    grammars = (WORD, None, Grammar("json_object", ""))
    return [
        replace(r, sampling=replace(r.sampling, grammar=grammars[i % 3]), stop_token_ids=(0,))
        for i, r in enumerate(mixed_requests(decoder))
        if len(r.prompt) + r.max_tokens <= 64
    ]


async def test_the_host_follows_them_whatever_the_device_samples(
    queue: GpuQueue, demo_model_dir: Path
) -> None:
    """Planned ahead and preempted, the tokens are those of the executor on the CPU."""
    decoder = load_model(demo_model_dir, executor="torch")
    assert isinstance(decoder, Decoder)
    grammars, runners = Grammars(demo_model_dir, decoder.spec.vocab_size), list[GpuRunner]()

    def on_gpu(kv: KVCache) -> Runner:
        limits = GpuLimits(rows=ROWS, tokens=32, blocks=BLOCKS, depth=2)
        steps = GpuPass(decoder, kv, queue, limits)
        steps.capture((1, 2, 4), lambda size: None)
        runners.append(GpuRunner(steps, queue, kv, None, depth=2, compiler=grammars.compiler))
        return runners[0]

    def on_cpu(kv: KVCache) -> Runner:
        return ModelRunner(decoder, kv, compiler=grammars.compiler)

    def world(make: object, depth: int) -> EngineWorld:
        options = {"block_size": 8, "max_batch_tokens": 32, "max_sequences": ROWS}
        ahead = depth > 1
        return EngineWorld(decoder, make, num_blocks=BLOCKS, depth=depth, ahead=ahead, **options)

    requests = with_grammars(decoder)
    expected = await world(on_cpu, 1).serve(requests)
    ahead = world(on_gpu, 2)
    try:
        assert await ahead.serve(requests) == expected
    finally:
        runners[0].close()
    assert ahead.scheduler.stats().roster.preemptions
    text_of = load_tokenizer(demo_model_dir).decode
    for r, output in zip(requests, expected, strict=True):
        if r.sampling.grammar is WORD:
            assert re.fullmatch("[ab]{1,9}", text_of(output))
