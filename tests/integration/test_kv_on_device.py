"""KV that no transport reaches: out through staging, in through staging, or both; same tokens."""

import ctypes
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from baton.core.errors import TransportError, WrongKV
from baton.core.topology import Role
from baton.decode_worker.worker import DecodeWorker
from baton.executor.late_device import LateDevice
from baton.kv_transfer.cuda_ipc.late_driver import _LateCopy
from baton.kv_transfer.faults import Fault, FaultPlan
from baton.kv_transfer.loopback import LoopbackNetwork, LoopbackTransport
from baton.kv_transfer.transport import Region, Transport
from baton.prefill_worker.worker import PrefillWorker

NEW = 8
DRAW = random.Random(13)
PROMPTS = [tuple(DRAW.randrange(5, 900) for _ in range(n)) for n in (1, 16, 40, 150, 270)]
HARMLESS = {Fault.LATE, Fault.TWICE, Fault.OUT_OF_ORDER}
"""What is offered stays where it is until it is read, however late that is."""
LAYERWISE = {"min_read_kib": 0, "offer_cost_s": 0}


@pytest.fixture
async def start(tools: Any, demo_model_dir: Path) -> AsyncIterator[Callable[..., Any]]:
    """Start a worker; at the end each closes, which checks pools, pages and copies."""
    async with AsyncExitStack() as stack:

        async def start_worker(
            role: Role, device: LateDevice | None, *, open_transport: Any = None, **options: Any
        ) -> Any:
            kind = PrefillWorker if role is Role.PREFILL else DecodeWorker
            config = tools.worker_config(role, f"{role}-0", demo_model_dir, **options)
            chosen = {} if open_transport is None else {"open_transport": open_transport}
            if device is not None:
                stack.callback(device.check)
            return await stack.enter_async_context(
                await kind.start(config, on_progress=lambda _: None, device=device, **chosen)
            )

        yield start_worker


@pytest.fixture
async def alone(start: Any, tools: Any) -> list[list[int]]:
    """The tokens of one process."""
    worker = await start(Role.MIXED, None)
    async with tools.open_session(worker.info.address) as session:
        return [a.tokens for a in await session.run([tools.prompt(p, NEW) for p in PROMPTS])]


async def run(tools: Any, prefill: Any, decode: Any) -> list[Any]:
    async with tools.open_session(decode.info.address) as session:
        prompts = [tools.prompt(p, NEW) for p in PROMPTS]
        answers: list[Any] = await session.run(prompts, [tools.ref_of(prefill.info)])
        return answers


@pytest.mark.parametrize(
    ("out", "into", "blocks"),
    [(True, True, (16, 16)), (True, False, (8, 32)), (False, True, (32, 8))],
    ids=["both", "prefill", "decode"],
)
async def test_the_same_tokens_when_a_pool_lies_on_a_device(
    start: Any, tools: Any, alone: list[list[int]], out: bool, into: bool, blocks: tuple[int, int]
) -> None:
    """Where one side has none, or theirs cannot be shared: through staging."""
    theirs = LateDevice(seed=1, hides=True, shared=not into) if out else None
    ours = LateDevice(seed=2) if into else None
    prefill = await start(
        Role.PREFILL,
        theirs,
        block_size=blocks[0],
        max_batch_tokens=64,
        kv_memory_mib=16,
        handover=LAYERWISE,
    )
    decode = await start(Role.DECODE, ours, block_size=blocks[1])
    for _ in range(2):  # the second time, blocks come from the caches of both
        answers = await run(tools, prefill, decode)
        assert [a.tokens for a in answers] == alone
        assert [t.outcome for a in answers for t in a.finish.handovers] == ["ok"] * len(PROMPTS)
    assert theirs is None or theirs.copies_to_host > len(PROMPTS)
    assert ours is None or ours.copies_from_host >= len(PROMPTS)
    assert decode.stats().get("bytes_read_cuda_ipc", 0) == 0


@pytest.mark.parametrize("blocks", [(16, 16), (8, 32), (32, 8)], ids=str)
async def test_the_same_tokens_from_device_to_device(
    start: Any, tools: Any, alone: list[list[int]], blocks: tuple[int, int]
) -> None:
    """Read where it is computed into where it is used, and digested on both devices."""
    theirs, ours = LateDevice(seed=8, hides=True), LateDevice(seed=9)
    prefill = await start(
        Role.PREFILL,
        theirs,
        block_size=blocks[0],
        max_batch_tokens=64,
        kv_memory_mib=16,
        handover=LAYERWISE,
    )
    decode = await start(Role.DECODE, ours, block_size=blocks[1])
    for _ in range(2):
        answers = await run(tools, prefill, decode)
        assert [a.tokens for a in answers] == alone
        assert [t.outcome for a in answers for t in a.finish.handovers] == ["ok"] * len(PROMPTS)
        transports = {t.transport for a in answers for t in a.finish.handovers}
        assert transports <= {"cuda_ipc", "none"}
    assert (theirs.copies_to_host, ours.copies_from_host) == (0, 0)
    assert ours.memory.copies > len(PROMPTS)
    stats = decode.stats()
    assert stats["bytes_read_cuda_ipc"] > 0
    assert stats["staging_pages"] == stats["staging_pages_free"] > 0


async def test_what_cannot_be_opened_goes_through_staging(
    start: Any, tools: Any, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in containers that share a host and no more: found out once, by the first that tries."""

    def refuse(handle: bytes, length: int) -> Any:
        raise TransportError("another container")

    ours = LateDevice(seed=11)
    monkeypatch.setattr(ours.memory, "open", refuse)
    prefill = await start(Role.PREFILL, LateDevice(seed=10), handover=LAYERWISE)
    decode = await start(Role.DECODE, ours)
    outcomes = []
    for _ in range(2):
        answers = await run(tools, prefill, decode)
        assert [a.tokens for a in answers] == alone
        outcomes.append({t.outcome for a in answers for t in a.finish.handovers})
    assert TransportError.code in outcomes[0]
    assert outcomes[1] == {"ok"}
    assert decode.stats().get("bytes_read_cuda_ipc", 0) == 0


async def test_what_a_device_copies_wrongly_never_reaches_a_token(
    start: Any, tools: Any, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = await start(Role.PREFILL, LateDevice(seed=12, hides=True), kv_memory_mib=16)
    ours = LateDevice(seed=13)
    decode = await start(Role.DECODE, ours)
    run_copy = _LateCopy.run

    def garble(copy: _LateCopy) -> None:
        run_copy(copy)
        target, _, length = copy.runs[-1]
        last = ctypes.c_ubyte.from_address(target + length - 1)
        last.value ^= 4

    monkeypatch.setattr(_LateCopy, "run", garble)
    answers = await run(tools, prefill, decode)
    assert [a.tokens for a in answers] == alone
    assert {t.outcome for a in answers for t in a.finish.handovers} == {WrongKV.code}


async def test_prompts_wait_for_pages_and_those_that_never_fit_are_computed_in_decode(
    start: Any, tools: Any, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Room for the blocks of 150 tokens: one such prompt at a time, and none of 270.
    layout = (await start(Role.MIXED, None)).instance.layout
    monkeypatch.setattr(
        "baton.executor.handover_memory._pages",
        lambda config, layout, on_device: (layout.block_bytes, 10) if on_device else (0, 0),
    )
    prefill = await start(Role.PREFILL, LateDevice(seed=3, shared=False), handover=LAYERWISE)
    decode = await start(Role.DECODE, None)
    answers = await run(tools, prefill, decode)
    assert [a.tokens for a in answers] == alone
    outcomes = [t.outcome for a in answers for t in a.finish.handovers]
    assert outcomes == ["ok", "ok", "ok", "ok", "unavailable"]
    assert answers[-1].finish.local_prefill
    assert prefill.instance.memory.staging.pool.stats().total * layout.block_size == 160


@pytest.mark.parametrize("fault", list(Fault), ids=str)
async def test_faults_of_the_transport_cost_no_token_and_no_page(
    start: Any, tools: Any, alone: list[list[int]], fault: Fault
) -> None:
    network = LoopbackNetwork()
    plan = FaultPlan(script=(None, fault), rates={fault: 0.3}, seed=7)
    opened: dict[str, LoopbackTransport] = {}

    async def faulty(region: Region, config: Any, *, owner: str, **who: Any) -> Transport:
        incarnation = who["incarnation"]
        here = plan if owner == "decode-0" else FaultPlan()
        opened[owner] = LoopbackTransport(
            region, owner=owner, incarnation=incarnation, network=network, plan=here
        )
        return opened[owner]

    patience = {"read_timeout_s": 0.5 if fault is Fault.HANG else 100.0}
    prefill = await start(
        Role.PREFILL, LateDevice(seed=4, shared=False), open_transport=faulty, handover=LAYERWISE
    )
    decode = await start(Role.DECODE, LateDevice(seed=5), open_transport=faulty, handover=patience)
    answers = await run(tools, prefill, decode)
    assert [a.tokens for a in answers] == alone
    assert opened["decode-0"].faults[fault] > 0
    outcomes = {t.outcome for a in answers for t in a.finish.handovers}
    assert (outcomes == {"ok"}) == (fault in HARMLESS)


async def test_an_abort_in_the_middle_gives_every_page_back(start: Any, tools: Any) -> None:
    prefill = await start(
        Role.PREFILL, LateDevice(seed=6, shared=False), max_batch_tokens=16, handover=LAYERWISE
    )
    decode = await start(Role.DECODE, LateDevice(seed=7))
    async with tools.open_session(decode.info.address) as session:
        keys = []
        for prompt in PROMPTS:
            key, _ = await session.submit_keyed(
                tools.prompt(prompt, 200), [tools.ref_of(prefill.info)]
            )
            keys.append(key)
        staging = prefill.instance.memory.staging.pool
        await tools.eventually(lambda: staging.stats().free < staging.stats().total, "pages held")
        for key in keys:
            await session.cancel(key)
        await tools.eventually(lambda: decode.stats()["open_requests"] == 0, "all cancelled")
    for worker in (prefill, decode):
        pool = worker.instance.memory.staging.pool
        await tools.eventually(lambda p=pool: p.stats().free == p.stats().total, "pages back")
