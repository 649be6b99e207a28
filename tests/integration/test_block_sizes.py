"""Prefill and decode with blocks of other sizes: the same tokens, and the same things saved."""

import random
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

NEW = 12
DRAW = random.Random(3)
LENGTHS = (1, 7, 8, 33, 64, 100, 257)
PROMPTS = [tuple(DRAW.randrange(5, 900) for _ in range(length)) for length in LENGTHS]
SHARED = PROMPTS[-1][:100]
"""The beginning of a prompt that decode has seen already when it comes."""


@pytest.mark.parametrize(("theirs", "ours"), list(permutations((8, 16, 32), 2)))
async def test_the_same_tokens_layer_by_layer(
    start_pair: Any, tools: Any, demo_model_dir: Path, theirs: int, ours: int
) -> None:
    handover = {"min_read_kib": 0, "offer_cost_s": 0}
    pair = await start_pair(
        demo_model_dir,
        prefill={"block_size": theirs, "max_batch_tokens": 40, "handover": handover},
        decode={"block_size": ours},
    )
    prompts = [tools.prompt(tokens, NEW) for tokens in PROMPTS]
    [seen] = await pair.session.run([tools.prompt(SHARED, NEW)])
    handed_over = await pair.session.run(prompts, [pair.ref])
    alone = await start_pair(demo_model_dir, decode={"prefix_cache": False})
    assert seen.tokens == (await alone.session.run([tools.prompt(SHARED, NEW)]))[0].tokens
    computed = await alone.session.run(prompts)
    assert [a.tokens for a in handed_over] == [a.tokens for a in computed]

    layout = pair.decode.instance.layout
    unit = min(theirs, ours)
    for tokens, answer in zip(PROMPTS, handed_over, strict=True):
        [trace] = answer.finish.handovers
        assert trace.outcome == "ok"
        assert trace.blocks == -(-len(tokens) // theirs)
        cached = 100 // ours * ours if len(tokens) == LENGTHS[-1] else 0
        assert trace.blocks_saved == cached // theirs
        units = -(-(len(tokens) - cached) // unit)
        assert trace.bytes == units * unit * layout.block_bytes // ours
