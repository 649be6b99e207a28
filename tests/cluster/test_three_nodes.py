"""Baton on three nodes: whatever befalls a node or a process, the client sees the same tokens."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from .agent_link import PATIENCE_S, Prompt, Running
from .faults import KINDS, draw_schedule
from .nodes import why_not
from .play import Play
from .three_nodes import ThreeNodes, catalogue

pytestmark = [
    # Three Rays start, each in some twenty seconds on a busy machine.
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]
PROMPTS = catalogue()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(
    tmp_path_factory: pytest.TempPathFactory, demo_model_dir: Path
) -> AsyncIterator[ThreeNodes]:
    async with ThreeNodes(tmp_path_factory.mktemp("three"), demo_model_dir) as cluster:
        yield cluster


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def right(cluster: ThreeNodes) -> list[list[int]]:
    """The tokens of each prompt, from a run that nothing disturbs."""
    return await cluster.answers(PROMPTS)


async def flowing(cluster: ThreeNodes, prompts: tuple[Prompt, ...]) -> list[Running]:
    """Send these, and wait until each has its first token."""
    sent = [cluster.submit(entry, prompt) for entry, prompt in enumerate(prompts)]
    async with asyncio.timeout(PATIENCE_S):
        for running in sent:
            await running.moved.wait()
    return sent


async def test_three_nodes_serve_the_same_tokens_again_and_again(
    cluster: ThreeNodes, right: list[list[int]]
) -> None:
    found = await cluster.instances()
    assert sorted(found) == ["decode-0", "decode-1", "prefill-0"]
    assert len({cluster.ray.index_of(i["address"]) for i in found.values()}) > 1
    assert (await cluster.controller())[0] == cluster.ray.nodes[1].address, "beside Ray's head"
    assert await cluster.answers(PROMPTS) == right
    await cluster.all_given_back()


@pytest.mark.parametrize("seed", range(len(KINDS)))
async def test_each_kind_of_fault_costs_no_token_and_no_block(
    cluster: ThreeNodes, right: list[list[int]], seed: int
) -> None:
    schedule = draw_schedule(seed, len(PROMPTS))
    report = await Play(schedule, cluster, PROMPTS, right).run()
    assert not report.problems, "\n".join([*report.problems, str(schedule), *report.log])


async def test_an_instance_that_is_cut_off_fences_itself_and_never_serves_again(
    cluster: ThreeNodes, right: list[list[int]]
) -> None:
    before = await cluster.whole()
    host, _ = await cluster.controller()
    away = [
        i
        for i in before.values()
        if cluster.ray.index_of(i["address"]) != 1 and i["address"].partition(":")[0] != host
    ]
    if not away:
        pytest.skip("all that may be cut off have the controller on their side of the cut")
    index = cluster.ray.index_of(away[0]["address"])
    cut_off = [i for i in away if cluster.ray.index_of(i["address"]) == index]
    sent = await flowing(cluster, PROMPTS)
    cluster.ray.nodes[index].cut()
    assert [(await running.task)["tokens"] for running in sent] == right
    for gone in cut_off:
        log = next(cluster.ray.nodes[index].files.glob(f"baton-*/{gone['name']}.log"))
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if "fenced: nobody has renewed the lease" in log.read_text():
                    break
                await asyncio.sleep(0.1)
    await cluster.given_up(index)
    await cluster.heal(index)
    after = await cluster.whole()
    old = {i["incarnation"] for i in cut_off}
    assert not old & {i["incarnation"] for i in after.values()}
    assert await cluster.answers(PROMPTS) == right
    await cluster.all_given_back()


async def test_requests_go_on_while_there_is_no_controller(
    cluster: ThreeNodes, right: list[list[int]]
) -> None:
    before = await cluster.whole()
    sent = await flowing(cluster, PROMPTS)
    host, pid = await cluster.controller()
    await cluster.ray.signal(host, pid, signal.SIGKILL)
    assert [(await running.task)["tokens"] for running in sent] == right
    after = await cluster.whole()
    born = {i["incarnation"] for i in before.values()}
    assert {i["incarnation"] for i in after.values()} == born, "the next controller adopts all"
    await cluster.all_given_back()
