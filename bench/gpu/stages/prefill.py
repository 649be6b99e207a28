"""Prompts through the executor: whole ones, in chunks of at most a step's tokens.

Short ones twice, launched kernel by kernel and by captured pieces: what launching costs.
"""

import statistics
import time
from functools import partial
from typing import Any

import torch

from baton.executor.kv_cache import KVCache
from baton.models.decoder import Decoder
from bench.gpu.baton_model import BLOCK_SIZE, decoder
from bench.gpu.drawn import config_of, draw
from bench.gpu.executor import Steps, pool_of, queue_of, tables_of
from bench.gpu.stage_run import StageRun

_REPEATS = 5


def run(stage: StageRun) -> None:
    """Measure every length."""
    scale = stage.scale
    lengths = dict.fromkeys((*scale.pieces, *scale.prefill))
    names = {f"{tokens} tokens": (tokens, False) for tokens in lengths}
    names |= {f"{tokens} tokens by pieces": (tokens, True) for tokens in scale.pieces}
    if stage.known(*names):
        return
    config = config_of(scale.shape)
    model = decoder(config, draw(config, stage.device, stage.dtype))
    pool = pool_of(model, -(-max(scale.prefill) // BLOCK_SIZE), stage.device)
    for name, (tokens, pieces) in names.items():
        stage.case(name, partial(_measure, stage, model, pool, tokens, pieces=pieces))


def _measure(
    stage: StageRun, model: Decoder, pool: KVCache, tokens: int, *, pieces: bool
) -> dict[str, Any]:
    """Time a prompt from its launch until its first token is on the host."""
    most = stage.scale.chunk_tokens
    (table,), _ = tables_of(1, tokens, pool.num_blocks)
    random = torch.Generator().manual_seed(tokens)
    prompt = torch.randint(stage.scale.shape.vocabulary, (tokens,), generator=random).tolist()
    seconds, queue = [], queue_of(stage.device)
    with Steps(model, pool, queue, rows=1, tokens=tokens, step_tokens=most) as engine:
        if pieces:
            engine.passes.capture_pieces([tokens], lambda _: None)
        engine.prefill([(engine.sequence(table), prompt)], most)
        for _ in range(_REPEATS):
            sequence = engine.sequence(table)
            began = time.perf_counter()
            engine.prefill([(sequence, prompt)], most)
            seconds.append(time.perf_counter() - began)
    return {
        "tokens": tokens,
        "pieces": pieces,
        "prompt_s": statistics.median(seconds),
        "low_s": min(seconds),
        "high_s": max(seconds),
    }
