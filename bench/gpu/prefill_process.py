"""The process that computes prompts, and keeps their KV until its standard input ends.

It writes one line of JSON: where its pool can be opened, which blocks have whose KV, and what the
first tokens are.
"""

import argparse
import json
import sys
from typing import Any

import torch

from bench.gpu.baton_model import BLOCK_SIZE, decoder
from bench.gpu.devices import PoolMemory
from bench.gpu.drawn import config_of, draw
from bench.gpu.executor import Steps, pool_of, queue_of, tables_of
from bench.gpu.scale import SCALES, Scale


def prompts_of(scale: Scale) -> list[list[int]]:
    """Return the prompts that are handed over."""
    count, tokens, _ = scale.handed_over
    random = torch.Generator().manual_seed(count)
    found = torch.randint(scale.shape.vocabulary, (count, tokens), generator=random)
    return [row.tolist() for row in found]


def blocks_of(scale: Scale) -> int:
    """Return how many blocks the prompts and their outputs need."""
    count, tokens, more = scale.handed_over
    return count * -(-(tokens + more) // BLOCK_SIZE)


def main() -> None:
    """Compute, tell, and wait."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", choices=SCALES, required=True)
    scale = SCALES[parser.parse_args().scale]
    device = torch.device(scale.device)
    config = config_of(scale.shape)
    model = decoder(config, draw(config, device, getattr(torch, scale.dtype)))
    layout = model.spec.kv_layout(BLOCK_SIZE, model.dtype)
    memory = PoolMemory(device, blocks_of(scale) * layout.block_bytes)
    told = _compute(scale, model, memory, device) | {
        "handle": memory.export().hex(),
        "length": memory.bytes.nbytes,
    }
    print(json.dumps(told), flush=True)
    sys.stdin.read()


def _compute(scale: Scale, model: Any, memory: PoolMemory, device: torch.device) -> dict[str, Any]:
    prompts = prompts_of(scale)
    count, tokens, more = scale.handed_over
    pool = pool_of(model, blocks_of(scale), device, memory.bytes)
    tables, _ = tables_of(count, tokens + more, pool.num_blocks)
    queue = queue_of(device)
    with Steps(
        model, pool, queue, rows=count, tokens=tokens + more, step_tokens=scale.chunk_tokens
    ) as engine:
        asked = [(engine.sequence(t), p) for t, p in zip(tables, prompts, strict=True)]
        firsts = engine.prefill(asked, scale.chunk_tokens)
    return {"tables": tables, "firsts": firsts}


if __name__ == "__main__":
    main()
