"""Any sharding of prefill meets any sharding of decode, and a rank's death is its instance's.

Every rank is a process. Whatever the meshes, the tokens are those of one process.
"""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import pytest

from baton.core.config import HandoverConfig, LeaderRef, ParallelConfig, WorkerConfig
from baton.core.grammar import Grammar
from baton.core.moving_average import MovingAverage
from baton.core.request import SamplingParams
from baton.core.topology import Role
from baton.decode_worker.worker import DecodeWorker
from baton.models.tokenizer import load_tokenizer
from baton.prefill_worker.worker import PrefillWorker

PATIENCE_S = 100.0
SCRIPT = Path(__file__).with_name("rank_process.py")
SECRET = "only this cluster knows it"

MESHES = {
    "tp1": {},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "tp2pp2": {"tp": 2, "pp": 2},
    "dp2": {"dp": 2},
    "ep2": {"ep": 2},
    "ep2 that moves": {"ep": 2, "expert_balance_steps": 2, "spare_experts": 1},
    "cp2": {"cp": 2},
}
QUICK = [("tp2", "pp2"), ("pp2", "tp2")]
"""Together they cut and join heads and layers, and have every rank read from several others."""
PAIRS = [
    *product(("tp1", "tp2", "pp2", "tp2pp2", "ep2"), repeat=2),
    ("cp2", "pp2"),
    ("dp2", "tp2"),
    ("tp2", "dp2"),
]
"""Decode has no long prompts to spread along cp."""
SLOW = [pair for pair in PAIRS if pair not in QUICK]

pytestmark = pytest.mark.timeout(300)


class RankProcesses:
    """An instance whose ranks are all processes; the leader's is started here."""

    def __init__(self, config: WorkerConfig, *options: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), config.model_dump_json(), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.others: list[int] = []
        self.ref: Any = None
        self.address = ""
        self.counters: dict[str, float | int | str] = {}
        """Known once it is closed."""

    async def ready(self, tools: Any) -> "RankProcesses":
        assert self._process.stdout is not None
        line = await asyncio.to_thread(self._process.stdout.readline)
        assert line, "the instance did not start"
        facts = json.loads(line)
        self.others = facts.pop("others")
        self.address = facts["address"]
        self.ref = tools.ref_of(type("Info", (), facts))
        return self

    async def exit_code(self) -> int:
        return await asyncio.to_thread(self._process.wait, PATIENCE_S)

    async def close(self) -> None:
        """Close it in good order: every rank checks that it holds nothing."""
        said, _ = await asyncio.to_thread(self._process.communicate, "close\n", PATIENCE_S)
        assert self._process.returncode == 0
        self.counters = json.loads(said)

    def end(self) -> None:
        """End what is left of it."""
        for pid in self.others:
            try:
                os.kill(pid, signal.SIGKILL)  # one that was stopped does not end by itself
            except ProcessLookupError:
                continue
        self.others.clear()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(timeout=10)


@pytest.fixture(scope="module")
def model_dir(write_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts, whose every matrix can be cut in two."""
    folder = tmp_path_factory.mktemp("parallel") / "mixtral"
    written: Path = write_model(folder, "mixtral", num_local_experts=4)
    return written


def config_of(
    tools: Any,
    role: Role,
    model_dir: Path,
    mesh: str,
    max_batch_tokens: int = 64,
    number: int = 0,
    handover: dict[str, Any] | None = None,
    kv_memory_mib: int | None = 16,
    **options: Any,
) -> WorkerConfig:
    config: WorkerConfig = tools.worker_config(
        role,
        f"{role.value}-{number}",
        model_dir,
        kv_memory_mib=kv_memory_mib,
        max_batch_tokens=max_batch_tokens,
        executor="torch",
        **options,
        handover={
            "secret": SECRET,
            "transport": "shm",
            "min_read_kib": 0,
            "offer_cost_s": 0,
            **(handover or {}),
        },
    )
    return config.model_copy(update={"parallel": ParallelConfig(**MESHES[mesh])})


StartInstance = Callable[..., RankProcesses]


@pytest.fixture
def start_instance(tools: Any, model_dir: Path) -> Any:
    """Start instances as processes; whatever is left of them at the end is killed by its pid."""
    started: list[RankProcesses] = []

    def start(
        role: Role, mesh: str, max_batch_tokens: int = 64, *, late: bool = False, **options: Any
    ) -> RankProcesses:
        config = config_of(tools, role, model_dir, mesh, max_batch_tokens, **options)
        started.append(RankProcesses(config, *(["late"] if late else [])))
        return started[-1]

    yield start
    for instance in started:
        instance.end()


@pytest.fixture
async def alone(tools: Any, model_dir: Path) -> AsyncIterator[Any]:
    """A decode instance of one rank, in this process, and a session with it."""
    config = tools.worker_config(
        Role.DECODE,
        "decode-1",
        model_dir,
        kv_memory_mib=16,
        executor="torch",
        handover=HandoverConfig(secret=SECRET, transport="shm").model_dump(),
    )
    async with AsyncExitStack() as stack:
        worker = await DecodeWorker.start(config, on_progress=lambda line: None)
        await stack.enter_async_context(worker)
        yield await stack.enter_async_context(tools.open_session(worker.info.address))


@pytest.fixture
def prompts(tools: Any) -> list[Any]:
    """Prompts of one block, of several, and of several chunks; some drawn, some greedy."""
    draw = random.Random(3)
    return [
        tools.prompt(
            tuple(draw.randrange(1, 1000) for _ in range(n)), 12, temperature=0.9 * (n % 2), seed=n
        )
        for n in (1, 16, 45, 130)
    ]


@pytest.mark.parametrize(
    ("prefill", "decode"), QUICK + [pytest.param(*p, marks=pytest.mark.slow) for p in SLOW]
)
async def test_any_sharding_meets_any(
    start_instance: StartInstance,
    alone: Any,
    tools: Any,
    prompts: list[Any],
    prefill: str,
    decode: str,
) -> None:
    one, two = start_instance(Role.PREFILL, prefill), start_instance(Role.DECODE, decode)
    expected = [answer.tokens for answer in await alone.run(prompts)]
    await one.ready(tools)
    await two.ready(tools)
    async with tools.open_session(two.address) as session:
        answers = await session.run(prompts, [one.ref])
    assert [answer.tokens for answer in answers] == expected
    for answer in answers:
        [trace] = answer.finish.handovers
        assert trace.outcome == "ok"
        assert sum(rank.bytes for rank in trace.ranks) == trace.bytes, "ranks tell of all reads"
        assert not answer.finish.local_prefill
    await two.close()
    await one.close()
    for instance, mesh in ((one, prefill), (two, decode)):
        moved = {name.split("_")[0] for name in instance.counters if name.endswith("_calls")}
        # Along dp nobody talks, and prompts are too short for cp to.
        assert moved == MESHES[mesh].keys() - {"dp", "cp"}


@pytest.mark.parametrize(
    "mesh", ["tp2", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("pp2", "tp2pp2"))]
)
async def test_ranks_follow_a_grammar_together(
    start_pair: Any, tools: Any, demo_model_dir: Path, mesh: str
) -> None:
    """Tokens are chosen by ranks that have the logits of some each, and are all allowed."""
    samplings = [
        SamplingParams(temperature, top_k, seed=seed, grammar=grammar)
        for seed, grammar in enumerate((Grammar("json_object", ""), Grammar("regex", "[a-d]{9}")))
        for temperature, top_k in ((0.0, 0), (1.2, 0), (1.2, 60))
    ]
    prompts = [
        tools.prompt(tuple(range(5 + i, 30)), 24, stop=(0,), sampling=sampling)
        for i, sampling in enumerate(samplings)
    ]
    one = RankProcesses(config_of(tools, Role.DECODE, demo_model_dir, mesh))
    try:
        pair = await start_pair(demo_model_dir, decode={"executor": "torch"})
        expected = [answer.tokens for answer in await pair.session.run(prompts)]
        await one.ready(tools)
        async with tools.open_session(one.address) as session:
            answers = await session.run(prompts)
            bad = SamplingParams(grammar=Grammar("regex", "("))
            [refused] = await session.run([tools.prompt((5, 6), 4, sampling=bad)])
        await one.close()
    finally:
        one.end()
    assert [answer.tokens for answer in answers] == expected
    assert refused.finish.error.code == "invalid_request"
    text_of = load_tokenizer(demo_model_dir).decode
    for answer in answers[3:]:
        assert re.fullmatch("[a-d]{9}", text_of(answer.tokens))


@pytest.mark.slow
async def test_a_long_prompt_is_spread_over_ranks(
    start_instance: StartInstance, alone: Any, tools: Any
) -> None:
    """Of 600 tokens in one chunk: the pairs above have none that is worth spreading along cp."""
    draw = random.Random(4)
    prompts = [tools.prompt(tuple(draw.randrange(1, 1000) for _ in range(600)), 12)]
    one = start_instance(Role.PREFILL, "cp2", max_batch_tokens=1024)
    two = start_instance(Role.DECODE, "pp2")
    expected = [answer.tokens for answer in await alone.run(prompts)]
    await one.ready(tools)
    await two.ready(tools)
    async with tools.open_session(two.address) as session:
        answers = await session.run(prompts, [one.ref])
    assert [answer.tokens for answer in answers] == expected
    assert not answers[0].finish.local_prefill
    await two.close()
    await one.close()
    moved = {name.split("_")[0] for name in one.counters if name.endswith("_calls")}
    assert moved == {"cp"}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp2", "pp2", "ep2"])
async def test_every_rank_backs_up_to_its_like(
    start_instance: StartInstance, alone: Any, tools: Any, mesh: str
) -> None:
    draw = random.Random(5)
    prompt = tools.prompt(tuple(draw.randrange(1, 1000) for _ in range(60)), 60)
    [right] = await alone.run([prompt])
    backup = {"backup": "peer", "backup_every_blocks": 1}
    one = start_instance(Role.DECODE, mesh, handover=backup)
    two = start_instance(Role.DECODE, mesh, number=2, handover=backup)
    await one.ready(tools)
    await two.ready(tools)
    async with tools.open_session(one.address) as session:
        answer = await session.submit(prompt, backup=two.ref)
        await answer.wait()
    assert answer.tokens == right.tokens
    assert answer.backed_up > 0
    async with tools.open_session(two.address) as session:
        [rest] = await session.run([replace(prompt, output=tuple(answer.tokens[:50]))])
    assert rest.tokens == right.tokens[50:]
    assert rest.cached_tokens >= min(answer.backed_up, 96)
    await two.close()
    await one.close()
    assert int(two.counters["backup_blocks_taken"]) * 16 >= answer.backed_up


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [("tp2", "pp2"), pytest.param("ep2", "tp2", marks=pytest.mark.slow)]
    + [pytest.param(*p, marks=pytest.mark.slow) for p in (("pp2", "tp2"), ("tp2pp2", "ep2"))],
)
async def test_prefill_reads_from_decode_what_it_lacks(
    tools: Any, model_dir: Path, alone: Any, prefill: str, decode: str
) -> None:
    """Of the second turn of a conversation decode knows the answer, and prefill does not."""
    async with AsyncExitStack() as stack:
        one = await lead_here(stack, tools, PrefillWorker, model_dir, prefill)
        two = await lead_here(stack, tools, DecodeWorker, model_dir, decode)
        # What was measured, were computing slow and reading fast: it decides alike on any machine.
        one._table.token_s = MovingAverage(weight=1e-9)
        one._table.token_s.add(1.0)
        two._host.bandwidth.add(1e9)
        session = await stack.enter_async_context(tools.open_session(two.info.address))
        draw = random.Random(5)
        prompt, ref = tuple(draw.randrange(1, 1000) for _ in range(45)), tools.ref_of(one.info)
        [first] = await session.run([tools.prompt(prompt, 12)], [ref])
        more = (*prompt, *first.tokens, 3, 7)
        [second] = await session.run([tools.prompt(more, 12)], [ref])
        assert not second.finish.local_prefill
        # Prefill knows 32 tokens of the first turn; decode 48, with its answer.
        stats = one.stats()
        assert (stats["blocks_pulled"], stats["pulls_wrong"]) == (1, 0)
        await tools.eventually(lambda: pulled(one) == kv_bytes(one, 1), "counted on all ranks")
        expected = [answer.tokens for answer in await alone.run([tools.prompt(more, 12)])]
        assert [second.tokens] == expected


def pulled(worker: PrefillWorker) -> int:
    return int(worker.stats().get("bytes_read_shm", 0))


def kv_bytes(worker: PrefillWorker, blocks: int) -> int:
    """Return what all ranks together read of some blocks."""
    return blocks * worker.instance.layout.block_bytes


Leader = TypeVar("Leader", PrefillWorker, DecodeWorker)


async def lead_here(
    stack: AsyncExitStack, tools: Any, kind: type[Leader], model_dir: Path, mesh: str
) -> Leader:
    """Start an instance whose leader is in this process, where a test can see into it."""
    role = Role.PREFILL if kind is PrefillWorker else Role.DECODE
    config = config_of(tools, role, model_dir, mesh)
    others: list[subprocess.Popen[bytes]] = []

    def start_others(leader: LeaderRef) -> None:
        for rank in range(1, config.parallel.size):
            other = config.model_copy(update={"rank": rank, "leader": leader})
            command = [sys.executable, str(SCRIPT), other.model_dump_json()]
            others.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))

    def end_others() -> None:
        for other in others:
            other.kill()
            other.wait(timeout=10)

    stack.callback(end_others)
    worker = await kind.start(config, on_progress=lambda line: None, on_listening=start_others)
    return await stack.enter_async_context(worker)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp2", "ep2"])
async def test_ranks_run_ahead_together(
    start_instance: StartInstance, alone: Any, tools: Any, prompts: list[Any], mesh: str
) -> None:
    """Each rank puts in the tokens that it sampled itself; stop tokens are learned a step late."""
    instance = await start_instance(Role.DECODE, mesh, run_ahead=True).ready(tools)
    whole = [answer.tokens for answer in await alone.run(prompts)]
    stopping = [
        replace(prompt, stop=(tokens[5],)) for prompt, tokens in zip(prompts, whole, strict=True)
    ]
    async with tools.open_session(instance.address) as session:
        for asked in (prompts, stopping):
            expected = [answer.tokens for answer in await alone.run(asked)]
            answers = await session.run(asked)
            assert [answer.tokens for answer in answers] == expected
    await instance.close()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tp2", "pp2"])
async def test_as_on_gpus_ranks_hand_over_what_each_has(
    start_instance: StartInstance, alone: Any, tools: Any, prompts: list[Any], mesh: str
) -> None:
    """Every rank has a late queue and a late pool of its own, which staging alone reaches."""
    options = {"late": True, "max_sequences": 4, "cuda_graph_sizes": (2, 4)}
    one = start_instance(Role.PREFILL, mesh, kv_memory_mib=None, **options)
    two = start_instance(Role.DECODE, "tp2", kv_memory_mib=None, run_ahead=True, **options)
    expected = [answer.tokens for answer in await alone.run(prompts)]
    await one.ready(tools)
    await two.ready(tools)
    async with tools.open_session(two.address) as session:
        answers = await session.run(prompts, [one.ref])
    assert [answer.tokens for answer in answers] == expected
    for answer in answers:
        assert [trace.outcome for trace in answer.finish.handovers] == ["ok"]
        assert not answer.finish.local_prefill
    await two.close()
    await one.close()
    assert two.counters["staging_pages"] == two.counters["staging_pages_free"] > 0


async def test_experts_move_while_requests_run(
    start_instance: StartInstance, alone: Any, tools: Any, prompts: list[Any]
) -> None:
    spread = await start_instance(Role.DECODE, "ep2 that moves").ready(tools)
    expected = [answer.tokens for answer in await alone.run(prompts)]
    async with tools.open_session(spread.address) as session:
        answers = await session.run(prompts)
    assert [answer.tokens for answer in answers] == expected
    await spread.close()
    assert int(spread.counters["expert_moves"]) > 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hung"])
async def test_the_death_of_a_rank_is_that_of_its_instance(
    start_instance: StartInstance,
    alone: Any,
    tools: Any,
    prompts: list[Any],
    number: signal.Signals,
) -> None:
    doomed = await start_instance(Role.PREFILL, "tp2").ready(tools)
    expected = [answer.tokens for answer in await alone.run(prompts)]
    os.kill(doomed.others[0], number)
    answers = await alone.run(prompts, [doomed.ref])
    assert [answer.tokens for answer in answers] == expected
    assert all(answer.finish.local_prefill for answer in answers)
    assert await doomed.exit_code() == 70
    doomed.end()  # or whoever closes waits for what was stopped
