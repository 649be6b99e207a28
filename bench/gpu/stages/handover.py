"""Prefill and decode in two processes of one GPU: KV is read by CUDA IPC, tokens must be the same.

The other process computes the prompts and exports its pool once; this one opens it, copies the
prompts' blocks into its own by a stream beside the model's, and decodes. Then it computes the same
prompts itself. Two processes share one GPU in turns, so nothing here speaks of the speed of
serving: only of the bytes a second of the copies, while nothing else runs, and of the tokens.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from bench.gpu.baton_model import BLOCK_SIZE, decoder
from bench.gpu.clock import synchronize
from bench.gpu.devices import PoolMemory
from bench.gpu.drawn import config_of, draw
from bench.gpu.executor import Steps, pool_of, queue_of, tables_of
from bench.gpu.prefill_process import blocks_of, prompts_of
from bench.gpu.stage_run import StageRun

_REPEATS = 5


def run(stage: StageRun) -> None:
    """Hand over by whole blocks and by layers of blocks, and decode after each."""
    names = {"whole blocks": "whole", "one layer at a time": "by layer"}
    if stage.known(*names):
        return
    scale = stage.scale
    config = config_of(scale.shape)
    with _other_process(scale.name) as told:
        model = decoder(config, draw(config, stage.device, stage.dtype))
        for name, how in names.items():
            stage.case(name, partial(_hand_over, stage, model, told, how))


@contextmanager
def _other_process(scale: str) -> Iterator[dict[str, Any]]:
    """Start the process that computes prompts; it ends when its standard input does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.gpu.prefill_process", "--scale", scale],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the prefill process ended with status {process.wait()}")
        yield json.loads(line)
    finally:
        process.communicate()


def _hand_over(stage: StageRun, model: Any, told: dict[str, Any], how: str) -> dict[str, Any]:
    scale = stage.scale
    count, tokens, more = scale.handed_over
    layout = model.spec.kv_layout(BLOCK_SIZE, model.dtype)
    memory = PoolMemory(stage.device, blocks_of(scale) * layout.block_bytes)
    pool = pool_of(model, blocks_of(scale), stage.device, memory.bytes)
    tables, _ = tables_of(count, tokens + more, pool.num_blocks)
    tables.reverse()  # so that no block has the same place in both pools by chance
    needed = -(-tokens // BLOCK_SIZE)
    pairs = [
        (ours, theirs)
        for own, other in zip(tables, told["tables"], strict=True)
        for ours, theirs in zip(own[:needed], other[:needed], strict=True)
    ]
    # What nobody has written must not be seen, in the last block neither.
    pool.tensor.fill_(float("nan"))
    seconds = _copy(stage, memory, told, np.array(pairs), layout.block_bytes, layout.layers, how)
    queue = queue_of(stage.device)
    with Steps(
        model, pool, queue, rows=count, tokens=tokens + more, step_tokens=scale.chunk_tokens
    ) as engine:
        engine.capture(count)
        sequences = [engine.sequence(table) for table in tables]
        handed = engine.decode(sequences, told["firsts"], [tokens] * count, more - 1)
        asked = [(engine.sequence(t), p) for t, p in zip(tables, prompts_of(scale), strict=True)]
        firsts = engine.prefill(asked, scale.chunk_tokens)
        own = engine.decode([s for s, _ in asked], firsts, [tokens] * count, more - 1)
    moved = len(pairs) * layout.block_bytes
    same = (told["firsts"], handed) == (firsts, own)
    assert same, "the tokens are not those of one process alone"
    return {
        "bytes": moved,
        "bytes_s": moved / seconds,
        "median_s": seconds,
        "runs": len(pairs) * (1 if how == "whole" else layout.layers),
        "identical": True,
        "tokens": count * more,
    }


def _copy(
    stage: StageRun,
    memory: PoolMemory,
    told: dict[str, Any],
    pairs: "np.ndarray[Any, np.dtype[np.int64]]",
    block_bytes: int,
    layers: int,
    how: str,
) -> float:
    """Copy blocks (ours, theirs) from the other process's pool; return the median seconds."""
    runs = layers if how == "by layer" else 1
    length = block_bytes // runs
    within = np.arange(runs) * length
    opened = memory.driver.open(bytes.fromhex(told["handle"]), told["length"])
    try:
        ours, theirs = (
            (base + pairs[:, side, None] * block_bytes + within).ravel()
            for side, base in enumerate((memory.bytes.data_ptr(), opened.address))
        )
        lengths = np.full(len(ours), length)
        lane, seconds = memory.driver.open_lane(), []
        try:
            synchronize(stage.device)
            for _ in range(_REPEATS):
                began = time.perf_counter()
                lane.copy(ours, theirs, lengths).wait()
                seconds.append(time.perf_counter() - began)
        finally:
            lane.close()
    finally:
        opened.close()
    return sorted(seconds)[len(seconds) // 2]
