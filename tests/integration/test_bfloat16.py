"""Prefill and decode in bfloat16: the same tokens as one instance alone, and half the bytes."""

import random
from pathlib import Path
from typing import Any

import pytest

from baton.kernels.native.build import NoNativeCode
from baton.kernels.native.library import load_library

NEW = 12
DRAW = random.Random(4)
PROMPTS = [tuple(DRAW.randrange(5, 900) for _ in range(length)) for length in (1, 33, 100, 257)]


@pytest.fixture(autouse=True)
def native() -> None:
    """Only there are logits the same in any batch."""
    try:
        load_library()
    except NoNativeCode as error:
        pytest.skip(str(error))


async def test_the_same_tokens_handed_over(
    start_pair: Any, tools: Any, demo_model_dir: Path
) -> None:
    prefill = {"dtype": "bfloat16", "max_batch_tokens": 40}
    pair = await start_pair(demo_model_dir, prefill=prefill, decode={"dtype": "bfloat16"})
    prompts = [tools.prompt(tokens, NEW) for tokens in PROMPTS]
    handed_over = await pair.session.run(prompts, [pair.ref])
    alone = await start_pair(demo_model_dir, decode={"dtype": "bfloat16", "prefix_cache": False})
    computed = await alone.session.run(prompts)
    layout = pair.decode.instance.layout
    assert layout.dtype == "bfloat16"
    for tokens, answer, expected in zip(PROMPTS, handed_over, computed, strict=True):
        [trace] = answer.finish.handovers
        assert trace.outcome == "ok"
        assert trace.bytes == layout.blocks_for(len(tokens)) * layout.block_bytes
        assert answer.tokens == expected.tokens


async def test_another_dtype_is_refused_by_the_handshake(
    start_pair: Any, tools: Any, demo_model_dir: Path
) -> None:
    pair = await start_pair(demo_model_dir, prefill={"dtype": "bfloat16"})
    prompts = [tools.prompt(tokens, NEW) for tokens in PROMPTS]
    answers = await pair.session.run(prompts, [pair.ref])
    assert [[h.outcome for h in a.finish.handovers] for a in answers] == [["incompatible"]] * 4
    computed = await pair.session.run(prompts)
    assert [a.tokens for a in answers] == [a.tokens for a in computed]
