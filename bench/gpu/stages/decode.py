"""Decode through the executor, as an instance decodes: captured steps, launched one ahead.

What is timed is the host's clock over many steps, the choice of tokens and their way back to the
host included; only the scheduler and the network are left out. Beside it stands the device's own
time of such a step, from replays with no host between them: what is missing between the two is the
time in which the device waits for the host.
"""

import time
from functools import partial
from typing import Any

import torch

from baton.executor.gpu_model import GpuModel
from baton.executor.gpu_seats import SeatTensors
from baton.executor.kv_cache import KVCache
from baton.models.decoder import Decoder
from bench.gpu.baton_model import BLOCK_SIZE, decoder
from bench.gpu.clock import synchronize, time_replays
from bench.gpu.drawn import config_of, draw
from bench.gpu.executor import Steps, pool_of, queue_of, tables_of
from bench.gpu.stage_run import StageRun

_WARM_UP = 4
"""Steps before those that are timed."""


def run(stage: StageRun) -> None:
    """Measure every batch at every context, on one pool."""
    scale = stage.scale
    names = {f"batch {b} at {c}": (b, c) for b, c in scale.decode}
    if stage.known(*names):
        return
    config = config_of(scale.shape)
    model = decoder(config, draw(config, stage.device, stage.dtype))
    tokens = [b * (c + _WARM_UP + scale.decode_steps + BLOCK_SIZE) for b, c in scale.decode]
    pool = pool_of(model, -(-max(tokens) // BLOCK_SIZE), stage.device)
    for name, (batch, context) in names.items():
        stage.case(name, partial(_measure, stage, model, pool, batch, context))


def _measure(
    stage: StageRun, model: Decoder, pool: KVCache, batch: int, context: int
) -> dict[str, Any]:
    steps, length = stage.scale.decode_steps, context + _WARM_UP + stage.scale.decode_steps
    tables, distinct = tables_of(batch, length, pool.num_blocks)
    queue = queue_of(stage.device)
    with Steps(model, pool, queue, rows=batch, tokens=length, step_tokens=batch) as engine:
        engine.capture(batch)
        sequences = [engine.sequence(table) for table in tables]
        found = engine.decode(sequences, [1] * batch, [context - 1] * batch, _WARM_UP)
        synchronize(stage.device)
        began = time.perf_counter()
        lasts = [own[-1] for own in found]
        engine.decode(sequences, lasts, [context - 1 + _WARM_UP] * batch, steps)
        step = (time.perf_counter() - began) / steps
    device = _device_time(stage, model, pool, tables, context)
    figures: dict[str, Any] = {
        "batch": batch,
        "context": context,
        "step_s": step,
        "distinct": distinct,
    }
    if device is not None:
        figures |= {"device_s": device, "overhead": max(0.0, 1 - device / step)}
    return figures


def _device_time(
    stage: StageRun, model: Decoder, pool: KVCache, tables: list[list[int]], context: int
) -> float | None:
    """Return the seconds of one captured step of the same rows; None where nothing is captured."""
    if stage.device.type != "cuda":
        return None
    batch, device = len(tables), stage.device
    state = SeatTensors(batch, len(tables[0]), device)
    state.tables[:batch] = torch.tensor(tables, dtype=torch.int32, device=device)
    rows = torch.stack(
        [
            torch.ones(batch, dtype=torch.int64),
            torch.full((batch,), context - 1 + _WARM_UP),
            torch.arange(batch),
        ]
    ).to(device)
    step = partial(GpuModel(model, pool, state, rows).decode, batch)
    with torch.inference_mode():
        return time_replays([step], device, stage.scale.figure_s).median_s
