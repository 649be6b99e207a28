"""Prefill and decode with KV of other dtypes: the tokens of one process that rounds alike."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.ids import BlockId, SeqId
from baton.core.request import SamplingParams
from baton.engine.step import ScheduledSequence, StepPlan
from baton.executor.kv_cache import KVCache, make_layout
from baton.executor.runner import ModelRunner
from baton.models.decoder import Decoder
from baton.models.loader import load_model

NEW = 12
DRAW = random.Random(5)
LENGTHS = (1, 8, 33, 100, 257)
PROMPTS = [tuple(DRAW.randrange(5, 900) for _ in range(length)) for length in LENGTHS]
GREEDY = SamplingParams(temperature=0.0)
ROOM = 384
"""Tokens in a pool of the reference."""


def in_one_process(
    model_dir: Path, prompt: tuple[int, ...], dtypes: tuple[str, str], blocks: tuple[int, int]
) -> list[int]:
    """Compute a prompt on KV of one dtype, round it to the other, and decode on that.

    With the blocks of either side, since torch adds up in another order where they are others.
    """
    model = load_model(model_dir, executor="torch")
    assert isinstance(model, Decoder)
    pools = [
        KVCache(make_layout(model.spec, size, dtype), ROOM // size)
        for dtype, size in zip(dtypes, blocks, strict=True)
    ]
    first, then = (ModelRunner(model, pool) for pool in pools)

    def step(runner: ModelRunner, start: int, tokens: tuple[int, ...]) -> int:
        size = blocks[runner is then]
        table = tuple(BlockId(block) for block in range(-(-(start + len(tokens)) // size)))
        sequence = ScheduledSequence(SeqId(0), tokens, start, table, True, GREEDY)
        return runner.execute(StepPlan(0, (sequence,))).tokens[SeqId(0)]

    output = [step(first, 0, prompt)]
    rounded = pools[1].tensor.movedim(4, 1)
    rounded.copy_(pools[0].tensor.movedim(4, 1).flatten(0, 1).view(rounded.shape))
    while len(output) < NEW:
        output.append(step(then, len(prompt) + len(output) - 1, (output[-1],)))
    return output


@pytest.mark.parametrize(
    ("theirs", "ours", "blocks"),
    [
        ("float32", "bfloat16", (16, 16)),
        ("bfloat16", "float32", (8, 32)),
        ("bfloat16", "float32", (32, 8)),
    ],
)
async def test_the_tokens_of_one_process_that_rounds_alike(
    start_pair: Any,
    tools: Any,
    demo_model_dir: Path,
    theirs: str,
    ours: str,
    blocks: tuple[int, int],
) -> None:
    handover = {"min_read_kib": 0, "offer_cost_s": 0}
    pair = await start_pair(
        demo_model_dir,
        prefill={
            "kv_dtype": theirs,
            "block_size": blocks[0],
            "executor": "torch",
            "handover": handover,
        },
        decode={"kv_dtype": ours, "block_size": blocks[1], "executor": "torch"},
    )
    for prompt in PROMPTS:  # one at a time, since torch rounds by what is computed together
        [answer] = await pair.session.run([tools.prompt(prompt, NEW)], [pair.ref])
        [trace] = answer.finish.handovers
        assert trace.outcome == "ok"
        assert answer.tokens == in_one_process(demo_model_dir, prompt, (theirs, ours), blocks)
    assert pair.decode.stats()["blocks_cached"] > 0


async def test_a_decode_instance_without_staging_computes_the_prompt_itself(
    start_pair: Any, tools: Any, demo_model_dir: Path
) -> None:
    pair = await start_pair(
        demo_model_dir,
        prefill={"kv_dtype": "bfloat16"},
        decode={"handover": {"staging_mib": 0}},
    )
    [alone] = await pair.session.run([tools.prompt(PROMPTS[2], NEW)])
    [answer] = await pair.session.run([tools.prompt(PROMPTS[2], NEW)], [pair.ref])
    [trace] = answer.finish.handovers
    assert (trace.outcome, answer.finish.local_prefill) == ("incompatible", True)
    assert answer.tokens == alone.tokens


async def test_many_prompts_through_a_single_page(
    start_pair: Any, tools: Any, demo_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.executor.handover_memory._PAGES", 1)
    config = {"kv_dtype": "bfloat16", "handover": {"min_read_kib": 0, "offer_cost_s": 0}}
    pair = await start_pair(
        demo_model_dir,
        prefill=config,
        decode={"handover": {"staging_mib": 1, "read_timeout_s": 100}},
    )
    staging = pair.decode.instance.memory.staging
    assert staging.pool.stats().total == 1
    answers = await pair.session.run([tools.prompt(p, NEW) for p in PROMPTS], [pair.ref])
    assert [len(answer.tokens) for answer in answers] == [NEW] * len(PROMPTS)
    assert [t.outcome for a in answers for t in a.finish.handovers] == ["ok"] * len(PROMPTS)
    staging.pool.check(idle=True)
    assert torch.isfinite(pair.decode.instance.kv.tensor).all()
