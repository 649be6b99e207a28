"""Every transport hands over the same KV, and what a pair uses can be chosen and is told."""

from pathlib import Path
from typing import Any

import pytest

SECRET = "the secret of the test cluster"
SENTENCE = list(range(5, 75))


@pytest.mark.parametrize(
    ("handover", "carrier", "fallbacks"),
    [
        ({"transport": "shm"}, "shm", 0),
        ({"transport": "tcp"}, "tcp", 0),
        ({"transport": "auto"}, "shm", 0),
        ({"transport": "auto", "ucx_options": {"TLS": "none-such"}}, "shm", 0),
        ({"transport": "ucx"}, "cma", 0),
        ({"transport": "ucx", "ucx_options": {"TLS": "tcp,self"}}, "tcp", 1),
    ],
    ids=["shm", "tcp", "auto", "auto without UCX", "UCX", "UCX over TCP"],
)
async def test_the_same_tokens_by_every_transport(
    start_pair: Any,
    tools: Any,
    demo_model_dir: Path,
    handover: dict[str, Any],
    carrier: str,
    fallbacks: int,
) -> None:
    config = {"handover": {"secret": SECRET} | handover}
    pair = await start_pair(demo_model_dir, prefill=config, decode=config)
    prompt = tools.prompt(SENTENCE, 8)
    [alone] = await pair.session.run([prompt])
    [handed] = await pair.session.run([tools.prompt(SENTENCE, 8)], [pair.ref])
    assert handed.tokens == alone.tokens
    [trace] = handed.finish.handovers
    assert (trace.outcome, trace.transport) == ("ok", carrier)
    stats = pair.decode.stats()
    assert stats[f"bytes_read_{carrier}"] == trace.bytes > 0
    assert stats["transport_fallbacks"] == fallbacks


async def test_a_pair_with_two_secrets_computes_the_prompt_in_decode(
    start_pair: Any, tools: Any, demo_model_dir: Path
) -> None:
    one, two = (
        {"handover": {"transport": "tcp", "secret": SECRET + end}} for end in ("", " of another")
    )
    pair = await start_pair(demo_model_dir, prefill=one, decode=two)
    [alone] = await pair.session.run([tools.prompt(SENTENCE, 8)])
    [handed] = await pair.session.run([tools.prompt(SENTENCE, 8)], [pair.ref])
    assert handed.tokens == alone.tokens
    assert handed.finish.local_prefill
    [trace] = handed.finish.handovers
    assert trace.outcome == "transport_failed"
