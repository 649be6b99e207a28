"""Where a conversation goes: real workers tell a real gateway what their caches have."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from baton.api.gateway import Gateway
from baton.api.serve import FrontDoor
from baton.api.validate import TextRequest
from baton.core.config import GatewayConfig
from baton.core.ids import RequestId
from baton.core.metrics import GatewayMetrics
from baton.core.request import GenerateRequest, SamplingParams
from baton.core.served_model import FrontModel
from baton.core.topology import Membership, MembershipBoard, Role
from baton.core.trace import RequestTrace
from baton.decode_worker.worker import DecodeWorker
from baton.models.tokenizer import load_tokenizer
from baton.prefill_worker.worker import PrefillWorker
from baton.router import state as columns
from baton.router.load import key_of

DRAW = random.Random(5)
NEW = 12


@dataclass
class House:
    gateway: Gateway
    door: FrontDoor
    board: MembershipBoard
    workers: list[Any]

    async def turn(self, name: str, prompt: tuple[int, ...]) -> tuple[list[int], RequestTrace]:
        request = GenerateRequest(RequestId(name), prompt, NEW, SamplingParams(temperature=0.0))
        tokens: list[int] = []
        async for piece in self.gateway.generate(TextRequest(request)):
            tokens += piece.tokens
        trace = self.gateway.trace(name)
        assert trace is not None
        return tokens, trace

    def settled(self, prompt: tuple[int, ...], *names: str) -> bool:
        """Whether these are known to have most of a prompt, and all to have nothing to do."""
        state = self.gateway.models.by_name("demo")._follower._state
        known = state.known_tokens(prompt, "")
        instances = self.board.current.instances
        rows = {str(i.instance_id): state.row(key_of(i)) for i in instances}
        busy = [columns.QUEUED, columns.RUNNING, columns.SENT_TOKENS, columns.SENT_REQUESTS]
        load = state.loads(np.array(list(rows.values())))
        told = load[:, columns.SEEN].all() and not load[:, busy].any()
        return bool(told) and all(known[rows[name]] >= 96 for name in names)


@pytest.fixture
async def house(demo_model_dir: Path, tools: Any) -> AsyncIterator[House]:
    """Two prefill and two decode instances, and a front door."""
    async with AsyncExitStack() as stack:
        workers: list[Any] = []
        for number in range(2):
            for role, kind in ((Role.PREFILL, PrefillWorker), (Role.DECODE, DecodeWorker)):
                config = tools.worker_config(role, f"{role}-{number}", demo_model_dir)
                worker = await kind.start(config, on_progress=lambda line: None)
                workers.append(await stack.enter_async_context(worker))
        board = MembershipBoard(Membership(1, tuple(worker.info for worker in workers)))
        gateway = Gateway(
            GatewayConfig(http_port=0, grpc_port=0),
            {FrontModel(name="demo", expects_prefill=True): load_tokenizer(demo_model_dir)},
            board,
            GatewayMetrics(),
        )
        await gateway.start()
        door = await FrontDoor.start(gateway)
        yield House(gateway, door, board, workers)
        await door.close()
        gateway.check()
        gateway.models.by_name("demo")._follower._state.check()


async def test_the_second_turn_goes_where_its_blocks_are(house: House, tools: Any) -> None:
    """Two conversations at once begin on different pairs, and each stays with its own."""
    await tools.eventually(lambda: house.settled(()), "all instances are heard of")
    prompts = [tuple(DRAW.randrange(5, 900) for _ in range(100)) for _ in range(2)]
    first = await asyncio.gather(*(house.turn(f"first-{n}", p) for n, p in enumerate(prompts)))
    assert len({trace.decode_instance for _, trace in first}) == 2
    for number, (tokens, trace) in enumerate(first):
        pair = trace.handovers[0].prefill_instance, trace.decode_instance
        prompt = (*prompts[number], *tokens, 7, 9)
        await tools.eventually(
            lambda prompt=prompt, pair=pair: house.settled(prompt, *pair), "the blocks are known"
        )
        _, second = await house.turn(f"second-{number}", prompt)
        assert (second.handovers[0].prefill_instance, second.decode_instance) == pair
        assert second.cached_tokens >= 96
        assert second.handovers[0].blocks_saved >= 6

    async with httpx.AsyncClient(base_url=house.door.http_url, trust_env=False) as http:
        told = (await http.get("/v1/requests/second-1/explain")).json()
        missing = await http.get("/v1/requests/nobody/explain")
    [decision] = told["decisions"]
    other, mine = decision["decode"][1], decision["decode"][0]
    assert (mine["instance"], decision["chosen"]["decode"]) == (pair[1], pair[1])
    assert mine["cached_tokens"] >= 96 > other["cached_tokens"]
    assert decision["prefill"][0]["cached_tokens"] >= 96
    assert (told["measured"]["decode"], told["measured"]["prefill"]) == (pair[1], pair[0])
    assert told["measured"]["ttft_s"] > 0
    assert missing.status_code == 404
    assert "forgotten" in missing.text


async def test_an_instance_that_tells_nothing_is_used_all_the_same(
    house: House, tools: Any
) -> None:
    await tools.eventually(lambda: house.settled(()), "all instances are heard of")
    for worker in house.workers:
        worker._feed.close()  # as if its streams broke, and none could be opened any more
    state = house.gateway.models.by_name("demo")._follower._state
    await tools.eventually(lambda: state.index.stats().holders == 0, "nothing is known any more")
    prompt = tuple(DRAW.randrange(5, 900) for _ in range(40))
    tokens, trace = await house.turn("blind", prompt)
    assert len(tokens) == NEW
    assert trace.handovers[0].outcome == "ok"
