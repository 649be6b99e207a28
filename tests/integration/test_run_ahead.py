"""Instances that run ahead, on the CPU and as on a GPU: the same tokens, all given back."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from baton.core.memory import MIB
from baton.core.topology import Role
from baton.decode_worker.worker import DecodeWorker
from baton.executor.gpu_start import Gpu
from baton.executor.late_device import LateDevice
from baton.executor.late_queue import LateQueue
from baton.prefill_worker.worker import PrefillWorker

from .test_same_tokens import NEW_TOKENS, expected, prompts_for

AHEAD = {"run_ahead": True}


async def test_handed_over_and_not(start_pair: Any, tools: Any, demo_model_dir: Path) -> None:
    prefill = AHEAD | {"max_batch_tokens": 48, "handover": {"min_read_kib": 0, "offer_cost_s": 0}}
    pair = await start_pair(demo_model_dir, prefill=prefill, decode=AHEAD)
    prompts = [tools.prompt(p, NEW_TOKENS) for p in prompts_for(demo_model_dir)]
    for ref in ([pair.ref], []):
        answers = await pair.session.run(prompts, ref)
        assert [a.tokens for a in answers] == expected(demo_model_dir)


async def test_stop_tokens_are_the_last(start_pair: Any, tools: Any, demo_model_dir: Path) -> None:
    pair = await start_pair(demo_model_dir, decode=AHEAD)
    prompts, outputs = prompts_for(demo_model_dir), expected(demo_model_dir)
    stops = [tokens[len(tokens) // 2] for tokens in outputs]
    asked = [tools.prompt(p, NEW_TOKENS, stop=(s,)) for p, s in zip(prompts, stops, strict=True)]
    for ref in ([pair.ref], []):
        answers = await pair.session.run(asked, ref)
        assert [a.reason for a in answers] == ["stop"] * len(asked)
        assert [a.tokens for a in answers] == [
            tokens[: tokens.index(stop) + 1] for tokens, stop in zip(outputs, stops, strict=True)
        ]


async def test_a_small_pool_preempts_to_host_memory_and_aborts_end(
    start_pair: Any, tools: Any, demo_model_dir: Path
) -> None:
    small = {"kv_memory_mib": 3, "host_memory_mib": 16, "swap_block_cost": 0.5}
    pair = await start_pair(demo_model_dir, decode=AHEAD | small | {"prefix_cache": False})
    prompts = [tools.prompt(p, 96, seed=i) for i, p in enumerate(prompts_for(demo_model_dir)[1:])]
    roomy = await start_pair(demo_model_dir)
    whole = [a.tokens for a in await roomy.session.run(prompts * 2)]
    cancelled = []
    for prompt in prompts:
        key, answer = await pair.session.submit_keyed(prompt, [pair.ref])
        cancelled.append((key, answer))
    for key, answer in cancelled[::2]:
        await answer.first.wait()
        await pair.session.cancel(key)
    answers = await pair.session.run(prompts * 2, [pair.ref])
    assert [a.tokens for a in answers] == whole
    assert pair.decode.stats()["preemptions"] > 0


class Meter:
    """A device with room."""

    def total(self) -> int:
        return 152 * MIB

    def used(self) -> int:
        return 8 * MIB

    def peak(self, work: Callable[[], None]) -> int:
        work()
        return 0


@pytest.fixture
async def start(tools: Any, demo_model_dir: Path) -> AsyncIterator[Callable[..., Any]]:
    """Start a worker on a device whose every launch and copy is late."""
    async with AsyncExitStack() as stack:

        async def start_worker(role: Role, *, seed: int, **options: Any) -> Any:
            kind = PrefillWorker if role is Role.PREFILL else DecodeWorker
            config = tools.worker_config(
                role,
                f"{role}-0",
                demo_model_dir,
                kv_memory_mib=None,
                executor="torch",
                max_sequences=8,
                cuda_graph_sizes=(2, 8),
                **options,
            )
            queue, pool = LateQueue(), LateDevice(seed=seed)
            stack.callback(queue.close)
            stack.callback(pool.check)
            return await stack.enter_async_context(
                await kind.start(config, on_progress=lambda _: None, gpu=Gpu(queue, Meter(), pool))
            )

        yield start_worker


async def test_as_on_gpus_with_layers_offered_as_they_are_written(
    start: Callable[..., Any], tools: Any, demo_model_dir: Path
) -> None:
    layerwise = {"min_read_kib": 0, "offer_cost_s": 0}
    prefill = await start(Role.PREFILL, seed=1, max_batch_tokens=64, handover=layerwise)
    decode = await start(Role.DECODE, seed=2)
    prompts = [tools.prompt(p, NEW_TOKENS) for p in prompts_for(demo_model_dir)]
    async with tools.open_session(decode.info.address) as session:
        answers = await session.run(prompts, [tools.ref_of(prefill.info)])
    assert [a.tokens for a in answers] == expected(demo_model_dir)
    assert [t.outcome for a in answers for t in a.finish.handovers] == ["ok"] * len(prompts)
    assert decode.instance.stats()["rank_busy_s"] > 0
