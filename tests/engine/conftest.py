"""A model that is a pure function of its prefix, over a memory that knows who wrote what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from baton.core.config import EngineConfig
from baton.core.handover import BlockRef
from baton.core.hashing import hash_bytes
from baton.core.ids import BlockId, RequestId, SeqId
from baton.core.request import FinishReason, GenerateRequest, SamplingParams
from baton.engine.scheduler import Scheduler
from baton.engine.step import PENDING, EngineEvent, ScheduledSequence, StepPlan, StepResult

VOCABULARY = 40
STOP_TOKEN = 7
BLOCK_SIZE = 8


def chain(parent: bytes, token: int) -> bytes:
    """What the model knows after `token`, given what it knew before."""
    return hash_bytes(parent, token.to_bytes(4, "little"))


def sample(state: bytes, seed: int, position: int) -> int:
    """The token at `position`."""
    noise = hash_bytes(state, seed.to_bytes(8, "little"), position.to_bytes(4, "little"))
    return noise[0] % VOCABULARY


def expected(request: GenerateRequest) -> tuple[list[int], FinishReason]:
    """What the request must generate, computed with no engine at all."""
    state, output = b"", []
    for token in request.prompt:
        state = chain(state, token)
    while True:
        token = sample(state, request.sampling.seed, len(request.prompt) + len(output))
        output.append(token)
        if token in request.stop_token_ids:
            return output, FinishReason.STOP
        if len(output) == request.max_tokens:
            return output, FinishReason.LENGTH
        state = chain(state, token)


@dataclass(frozen=True)
class Reader:
    """Who reads a table: a tenant, with the tokens whose KV it expects."""

    tenant: str
    tokens: list[int]


class Memory:
    """(block, slot) → (tenant, position, state): reads prove what prefix they find the KV of.

    The state is the whole prefix's, so that it does not matter which sequence wrote it.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.cells: dict[tuple[BlockId, int], tuple[str, int, bytes]] = {}
        self.host: dict[tuple[BlockId, int], tuple[str, int, bytes] | None] = {}

    def write(self, reader: Reader, table: Sequence[BlockId], start: int, end: int) -> bytes:
        """Compute the tokens from `start` to `end`, after reading all before; return the state."""
        state = self._read(reader, table, start)
        for position in range(start, end):
            state = chain(state, reader.tokens[position])
            cell = table[position // self.block_size], position % self.block_size
            self.cells[cell] = (reader.tenant, position, state)
        return state

    def swap(self, plan: StepPlan) -> None:
        """Copy whole blocks, what they lack included: first out, then in."""
        for copy in plan.swap_out:
            for slot in range(self.block_size):
                self.host[copy.host, slot] = self.cells.get((copy.device, slot))
        for copy in plan.swap_in:
            for slot in range(self.block_size):
                self.cells.pop((copy.device, slot), None)
                if (cell := self.host[copy.host, slot]) is not None:
                    self.cells[copy.device, slot] = cell

    def scribble(self, refs: Sequence[BlockRef]) -> None:
        """A late read lands: the blocks hold bytes of another time."""
        for ref in refs:
            for slot in range(self.block_size):
                self.cells[ref.block, slot] = ("late", -1, b"late")

    def _read(self, reader: Reader, table: Sequence[BlockId], end: int) -> bytes:
        state = b""
        for position in range(end):
            cell = table[position // self.block_size], position % self.block_size
            tenant, at, found = self.cells[cell]
            wanted = (reader.tenant, position)
            assert (tenant, at) == wanted, f"{cell} was written for {tenant!r} at {at}"
            state = chain(state, reader.tokens[position])
            assert found == state, f"{cell} was computed after another prefix"
        return state


class FakeRunner:
    """Executes plans on a Memory."""

    def __init__(self, block_size: int = BLOCK_SIZE) -> None:
        self.memory = Memory(block_size)
        self.last: dict[SeqId, int] = {}
        """The token that each sequence sampled last, which its next step may not name."""
        self.readers: dict[SeqId, Reader] = {}
        """Whoever submits a sequence says whose it is; its tokens grow with it."""

    def arrived(self, seq_id: SeqId, request: GenerateRequest) -> None:
        """Know the sequence; all it can ever generate is known too."""
        tokens = [*request.prompt, *expected(request)[0]]
        self.readers[seq_id] = Reader(request.tenant, tokens)

    def execute(self, plan: StepPlan) -> StepResult:
        self.memory.swap(plan)
        tokens = {}
        for part in plan.sequences:
            if part.tokens == (PENDING,):
                part = part._replace(tokens=(self.last[part.seq_id],))
                tokens_of_it = self.readers[part.seq_id].tokens
                if part.start == len(tokens_of_it):  # it has ended, which the plan did not know
                    tokens_of_it += part.tokens
            token = self._run(part)
            if part.samples:
                tokens[part.seq_id] = self.last[part.seq_id] = token
        return StepResult(plan.step, tokens)

    def _run(self, part: ScheduledSequence) -> int:
        assert part.tokens
        assert len(part.blocks) * self.memory.block_size >= part.end
        reader = self.readers[part.seq_id]
        assert list(part.tokens) == list(reader.tokens[part.start : part.end])
        state = self.memory.write(reader, part.blocks, part.start, part.end)
        return sample(state, part.sampling.seed, part.end)

    def hand_over(
        self, seq_id: SeqId, refs: Sequence[BlockRef], request: GenerateRequest, cached: int = 0
    ) -> int:
        """Write a prompt's KV as a handover does, but for the cached blocks; return a token."""
        table = [ref.block for ref in refs]
        start = cached * BLOCK_SIZE
        state = self.memory.write(self.readers[seq_id], table, start, len(request.prompt))
        return sample(state, request.sampling.seed, len(request.prompt))


class Bench:
    """A scheduler, a runner, and the events so far."""

    def __init__(
        self,
        num_blocks: int,
        *,
        host_blocks: int = 0,
        depth: int = 1,
        partitions: int = 1,
        ahead: bool = False,
        **config: Any,
    ) -> None:
        self.config = EngineConfig(block_size=BLOCK_SIZE, **config)
        self.scheduler = Scheduler(
            self.config,
            num_blocks,
            host_blocks=host_blocks,
            depth=depth,
            partitions=partitions,
            ahead=ahead,
        )
        self.runner = FakeRunner()
        self.events: list[EngineEvent] = []

    def submit(self, request: GenerateRequest, *, hold: bool = False) -> SeqId:
        seq_id = self.scheduler.submit(request, hold=hold)
        self.runner.arrived(seq_id, request)
        return seq_id

    def reserve(self, request: GenerateRequest) -> SeqId:
        seq_id = self.scheduler.reserve(request)
        self.runner.arrived(seq_id, request)
        return seq_id

    def step(self) -> StepPlan | None:
        """Plan, execute and apply one step."""
        plan = self.scheduler.plan()
        if plan is not None:
            self.events += self.scheduler.apply(self.runner.execute(plan))
        self.scheduler.check()
        return plan

    def run(self, limit: int = 1000) -> list[StepPlan]:
        """Step until nothing moves."""
        plans = []
        while (plan := self.step()) is not None:
            plans.append(plan)
            assert len(plans) < limit, "it does not come to an end"
        return plans

    def admit(self, seq_id: SeqId, request: GenerateRequest) -> int:
        """Hand a granted prompt over."""
        token = self.runner.hand_over(seq_id, self.scheduler.blocks(seq_id), request)
        self.events.append(self.scheduler.admit(seq_id, token))
        return token

    def output(self, seq_id: SeqId) -> list[int]:
        """The tokens told of so far."""
        return [e.token for e in self.events if e.seq_id == seq_id and hasattr(e, "token")]

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return self.scheduler.stats().roster.memory.pool.available


def make_request(
    prompt: int,
    max_tokens: int,
    *,
    seed: int = 0,
    stop: tuple[int, ...] = (),
    tenant: str = "",
    priority: int = 0,
    period: int = VOCABULARY,
) -> GenerateRequest:
    """A request of `prompt` tokens that differ from seed to seed and repeat after `period`."""
    ids = tuple((seed * 31 + i % period * 7) % VOCABULARY for i in range(prompt))
    name = RequestId(f"r{seed}")
    return GenerateRequest(name, ids, max_tokens, SamplingParams(seed=seed), stop, tenant, priority)


@pytest.fixture
def bench() -> Callable[..., Bench]:
    return Bench


@pytest.fixture
def request_of() -> Callable[..., GenerateRequest]:
    return make_request


@pytest.fixture(scope="session")
def fake() -> SimpleNamespace:
    """All of the above, for tests that build their own."""
    return SimpleNamespace(
        Bench=Bench, expected=expected, request=make_request, STOP_TOKEN=STOP_TOKEN
    )
