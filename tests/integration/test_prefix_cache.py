"""Cached prefixes with real workers: the same tokens, less work, and nobody else's blocks."""

import random
from pathlib import Path
from typing import Any

import pytest

from baton.core.moving_average import MovingAverage
from baton.core.request import SamplingParams
from baton.executor.rank_handover import RankHandover

NEW = 20
DRAW = random.Random(11)
PROMPT = tuple(DRAW.randrange(5, 900) for _ in range(100))
HIT = 96
"""Of 100 tokens, those that fill blocks of 16."""

NO_PULL = {"offer_cost_s": 1000.0}


def cached(answer: Any) -> int:
    """What prefill said of its cache."""
    [trace] = answer.finish.handovers
    assert trace.outcome == "ok"
    return int(trace.cached_tokens)


@pytest.fixture
async def plain(start_pair: Any, tools: Any, demo_model_dir: Path) -> Any:
    """What prompts give without any cache."""
    off = {"prefix_cache": False}
    pair = await start_pair(demo_model_dir, prefill=off, decode=off)

    async def tokens(prompt: tuple[int, ...], **options: Any) -> list[int]:
        [answer] = await pair.session.run([tools.prompt(prompt, NEW, **options)])
        assert answer.cached_tokens == 0
        return list(answer.tokens)

    return tokens


@pytest.mark.parametrize("chunk", [32, 512], ids=["small chunks", "one chunk"])
@pytest.mark.parametrize("name", ["xxh3_128", "sha256"])
async def test_the_same_prompt_handed_over_twice(
    start_pair: Any, tools: Any, demo_model_dir: Path, plain: Any, chunk: int, name: str
) -> None:
    pair = await start_pair(
        demo_model_dir,
        prefill={"max_batch_tokens": chunk, "prefix_hash": name},
        decode={"prefix_hash": name},
    )
    prompt = tools.prompt(PROMPT, NEW)
    [first] = await pair.session.run([prompt], [pair.ref])
    [second] = await pair.session.run([prompt], [pair.ref])
    assert first.tokens == second.tokens == await plain(PROMPT)
    assert (cached(first), cached(second)) == (0, HIT)
    assert (first.cached_tokens, second.cached_tokens) == (0, HIT)
    trace = second.finish.handovers[0]
    assert (trace.blocks, trace.blocks_saved) == (7, 6)  # decode has them: they do not travel
    assert trace.bytes == pair.decode.instance.layout.block_bytes
    assert second.finish.handovers[0].chunks == 1
    assert pair.prefill.stats()["prompt_tokens_cached"] == HIT
    [here] = await pair.session.run([prompt])  # decode has cached what was handed over
    assert here.tokens == first.tokens
    assert here.finish.local_prefill
    assert here.cached_tokens == HIT


async def test_a_conversation_computes_only_what_is_new(
    start_pair: Any, tools: Any, demo_model_dir: Path, plain: Any
) -> None:
    pair = await start_pair(demo_model_dir, prefill={"handover": NO_PULL})
    handed, local = PROMPT, PROMPT[::-1]
    hits: list[tuple[int, int]] = []
    saved: list[int] = []
    for turn in range(3):
        [one] = await pair.session.run([tools.prompt(handed, NEW)], [pair.ref])
        [two] = await pair.session.run([tools.prompt(local, NEW)])
        assert one.tokens == await plain(handed)
        assert two.tokens == await plain(local)
        hits.append((one.cached_tokens, two.cached_tokens))
        saved.append(one.finish.handovers[0].blocks_saved)
        handed += (*one.tokens, turn, 7)
        local += (*two.tokens, turn, 7)
    # Prefill knows the prompt of the last turn; whoever decoded it, also its answer: of 100, 122
    # and 144 tokens, 96 and 112 full blocks of prompt, 112 and 128 of prompt and answer.
    assert hits == [(0, 0), (96, 112), (112, 128)]
    # Decode has the answers too: only the last block or two of each turn travel.
    assert saved == [0, 7, 8]


@pytest.mark.parametrize("wrong", [False, True], ids=["good", "wrong KV"])
async def test_prefill_reads_from_decode_what_it_lacks(
    start_pair: Any,
    tools: Any,
    demo_model_dir: Path,
    plain: Any,
    monkeypatch: pytest.MonkeyPatch,
    wrong: bool,
) -> None:
    pair = await start_pair(demo_model_dir)
    [first] = await pair.session.run([tools.prompt(PROMPT, NEW)], [pair.ref])
    prompt = (*PROMPT, *first.tokens, 3, 7)
    # What was measured, were computing very slow: it decides alike on any machine.
    pair.prefill._table.token_s = MovingAverage(weight=1e-9)
    pair.prefill._table.token_s.add(1.0)
    if wrong:
        digest = RankHandover._digest

        def of_other_kv(handover: RankHandover, order: Any) -> list[bytes]:
            digests = digest(handover, order)
            decodes = handover._memory is pair.decode.instance.memory
            return [each[::-1] for each in digests] if decodes else digests

        monkeypatch.setattr(RankHandover, "_digest", of_other_kv)
    [second] = await pair.session.run([tools.prompt(prompt, NEW)], [pair.ref])
    assert second.tokens == await plain(prompt)
    assert not second.finish.local_prefill
    stats = pair.prefill.stats()
    # Prefill knows 96 tokens of the first prompt; decode knows 112, with its answer.
    assert (stats["blocks_pulled"], stats["pulls_wrong"]) == ((0, 1) if wrong else (1, 0))
    assert cached(second) == (96 if wrong else 112)


async def test_a_prompt_that_decode_knows_stays_there_if_that_is_cheaper(
    start_pair: Any, tools: Any, demo_model_dir: Path, plain: Any
) -> None:
    pair = await start_pair(demo_model_dir, decode={"handover": {"local_prefill": "auto"}})
    prompt = tools.prompt(PROMPT, NEW)
    [first] = await pair.session.run([prompt], [pair.ref])
    [second] = await pair.session.run([prompt], [pair.ref])
    assert not first.finish.local_prefill  # nothing had been measured
    assert second.finish.local_prefill  # four tokens to compute, and nobody to disturb
    assert second.cached_tokens == HIT
    assert first.tokens == second.tokens == await plain(PROMPT)
    stats = pair.decode.stats()
    assert (stats["placed_here"], stats["placed_on_prefill"]) == (1, 1)


async def test_choices_of_one_prompt_compute_it_once(
    start_pair: Any, tools: Any, demo_model_dir: Path
) -> None:
    """Three at once in one mixed instance, with a prompt that takes several steps."""
    mixed = await start_pair(demo_model_dir, decode={"max_batch_tokens": 32})
    options = {"temperature": 1.0, "logprobs": 1, "presence_penalty": 1.0}
    prompts = [
        tools.prompt(PROMPT, NEW, sampling=SamplingParams(seed=seed, **options))
        for seed in range(3)
    ]
    answers = await mixed.session.run(prompts)
    assert [answer.cached_tokens for answer in answers] == [0, HIT, HIT]
    assert len({tuple(answer.tokens) for answer in answers}) == 3, "three seeds, one text"
    off = {"prefix_cache": False}
    alone = await start_pair(demo_model_dir, decode=off)
    for prompt, answer in zip(prompts, answers, strict=True):
        [expected] = await alone.session.run([prompt])
        assert answer.tokens == expected.tokens
        assert len(answer.logprobs) == NEW


async def test_tenants_do_not_share(start_pair: Any, tools: Any, demo_model_dir: Path) -> None:
    pair = await start_pair(demo_model_dir)
    for prefill in ([pair.ref], []):
        hits, tokens = [], []
        for tenant in ("a", "b", "a"):
            prompt = tools.prompt((len(prefill) + 5, *PROMPT), NEW, tenant=tenant)
            [answer] = await pair.session.run([prompt], prefill)
            hits.append(answer.cached_tokens)
            tokens.append(answer.tokens)
        assert hits == [0, 0, HIT]
        assert tokens[0] == tokens[1] == tokens[2]


async def test_shared_prefixes_at_the_same_time_in_small_pools(
    start_pair: Any, tools: Any, demo_model_dir: Path, plain: Any
) -> None:
    """Hits, evictions, preemptions and sampling together change no token."""
    small = {"kv_memory_mib": 3}
    pair = await start_pair(demo_model_dir, prefill=small, decode=small)
    asked = [
        (PROMPT[: 40 + 9 * i], {"temperature": 0.8 * (i % 2), "top_k": 40, "seed": i})
        for i in range(6)
    ]
    wanted = [await plain(prompt, **options) for prompt, options in asked]
    prompts = [tools.prompt(prompt, NEW, **options) for prompt, options in asked]
    for prefill in ([pair.ref], []):
        answers = await pair.session.run(prompts * 3, prefill)
        assert [answer.tokens for answer in answers] == wanted * 3
    assert pair.prefill.stats()["prompt_tokens_cached"] > 0
    assert pair.decode.stats()["prompt_tokens_cached"] > 0
