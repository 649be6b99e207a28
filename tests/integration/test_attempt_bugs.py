"""Whatever ends an attempt, also a bug, gives back what it had reserved."""

import random
from pathlib import Path
from typing import Any

import pytest

from baton.executor.rank_handover import RankHandover


async def test_a_bug_after_the_reservation_gives_it_back(
    start_pair: Any, demo_model_dir: Path, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = await start_pair(demo_model_dir, prefill={"max_batch_tokens": 64})
    draw = random.Random(5)
    prompts = [
        tools.prompt(tuple(draw.randrange(1, 4000) for _ in range(n)), 8) for n in (20, 300, 65)
    ]
    expected = [answer.tokens for answer in await pair.session.run(prompts)]

    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(RankHandover, "_verify", broken)
    answers = await pair.session.run(prompts, [pair.ref])
    assert [a.tokens for a in answers] == expected
    assert all(a.finish.local_prefill for a in answers)
    await tools.eventually(lambda: pair.decode.stats()["tasks"] == 0, "the attempts have ended")
    crashed = pair.decode._host.tasks.crashed
    assert len(crashed) == pair.decode.stats()["tasks_crashed"] == len(prompts)
    crashed.clear()
    stats = pair.decode.stats()
    assert (stats["attempts"], stats["blocks_used"], stats["blocks_fencing"]) == (0, 0, 0)
