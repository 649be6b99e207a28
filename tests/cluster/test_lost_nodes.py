"""What a node takes along that had more than instances: a gateway, or Ray's head."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import pytest_asyncio

from .nodes import why_not
from .ray_nodes import RayNodes

pytestmark = [
    # Three Rays start, and three more after the head is lost.
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),
]
PATIENCE_S = 240.0
PORTS = (8000, 8002, 8004)
SPEC = """\
drain_timeout_s: 3
models:
  - name: demo
    dir: MODEL_DIR
    engine: {kv_memory_mib: 64}
    pools:
      prefill: {instances: 1}
      decode: {instances: 2}
    gateways: {count: 3, host: 0.0.0.0}
"""
ASK = """
import json, sys, urllib.request
body = {"model": "demo", "prompt": "def add(a, b):", "max_tokens": 1500, "temperature": 0,
        "stream": True}
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
header = {"Content-Type": "application/json"}
request = urllib.request.Request(sys.argv[1], json.dumps(body).encode(), header)
with opener.open(request, timeout=120) as lines:
    for line in lines:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            print(json.dumps(event.get("error") or event["choices"][0]["text"]), flush=True)
"""
HEALTHY = """
import sys, urllib.request
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
for address in sys.argv[1:]:
    try:
        opener.open(f"http://{address}/health", timeout=2).close()
    except OSError:
        continue
    print(address)
"""


class Served:
    """Three nodes with a gateway for each, and clients on any of them."""

    def __init__(self, folder: Path, model_dir: Path) -> None:
        self.ray = RayNodes(3, folder, cpus=2)
        self._folder = folder
        self._spec = folder / "cluster.yaml"
        self._spec.write_text(SPEC.replace("MODEL_DIR", str(model_dir)))
        self._asked = 0

    async def up(self) -> None:
        """Bring everything up."""
        await self.baton(1, "up", "-f", str(self._spec))

    async def baton(self, index: int, *arguments: str) -> str:
        """Run a command of Baton on a node; AssertionError, with what it said, if it fails."""
        command = (sys.executable, "-m", "baton.cli.main", *arguments)
        try:
            return await asyncio.to_thread(
                self.ray.nodes[index].run,
                *command,
                "--address",
                self.ray.address,
                environment=self.ray.environment,
                timeout=PATIENCE_S,
            )
        except subprocess.CalledProcessError as error:
            raise AssertionError(error.output) from None

    async def gateways(self, asking: int) -> dict[int, int]:
        """Return on which node each gateway answers, by its port, as one node sees it."""
        nodes = [node for k in range(1, 4) if (node := self.ray.nodes[k]).up]
        addresses = [f"{node.address}:{port}" for node in nodes for port in PORTS]
        told = await asyncio.to_thread(
            self.ray.nodes[asking].run, sys.executable, "-c", HEALTHY, *addresses
        )
        found = (address.split(":") for address in told.split())
        return {int(port): self.ray.index_of(host) for host, port in found}

    async def gateway_off_head(self) -> tuple[int, int]:
        """Return port and node of a gateway that is not on the head's: they are spread."""
        found = await self.gateways(1)
        assert sorted(found) == list(PORTS)
        off = [(port, index) for port, index in found.items() if index != 1]
        assert off, found
        return off[0]

    async def answer_of(self, index: int, port: int, cut: int = 0) -> str:
        """Ask the gateway of a node there; once an answer begins, take the power of node `cut`."""
        self._asked += 1
        log = self._folder / f"answer-{self._asked}.log"
        url = f"http://127.0.0.1:{port}/v1/completions"
        with ExitStack() as stack:
            output = stack.enter_context(log.open("w"))
            asking = self.ray.nodes[index].spawn(sys.executable, "-c", ASK, url, output=output)
            async with asyncio.timeout(PATIENCE_S):
                while not log.read_text() and asking.poll() is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            if cut:
                await self.ray.power_cut(cut)
            await asyncio.to_thread(asking.wait, PATIENCE_S)
        events = [json.loads(line) for line in log.read_text().splitlines()]
        assert all(isinstance(event, str) for event in events), f"{events[-1]}\n{self.logs(index)}"
        return "".join(events)

    def logs(self, index: int) -> str:
        """Return the end of every log of ours on a node."""
        found = sorted(self.ray.nodes[index].files.glob("baton-*/*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in found)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(
    tmp_path_factory: pytest.TempPathFactory, demo_model_dir: Path
) -> AsyncIterator[Served]:
    served = Served(tmp_path_factory.mktemp("lost"), demo_model_dir)
    async with served.ray:
        await served.up()
        yield served


async def test_what_runs_serves_on_without_rays_head_and_up_starts_afresh(served: Served) -> None:
    port, host = await served.gateway_off_head()
    right = await served.answer_of(host, port)
    assert await served.answer_of(host, port, cut=1) == right
    assert await served.answer_of(host, port) == right, "a new request"
    with pytest.raises(AssertionError, match="Error: Ray") as caught:
        await served.baton(host, "status")
    assert "Traceback" not in str(caught.value)

    for index in (2, 3):
        await served.ray.power_cut(index)
    for index in (1, 2, 3):
        await served.ray.power_on(index)
    await served.up()
    port, host = next(iter((await served.gateways(1)).items()))
    assert await served.answer_of(host, port) == right


async def test_a_gateway_whose_node_is_lost_comes_back_on_another(served: Served) -> None:
    port, lost = await served.gateway_off_head()
    right = await served.answer_of(lost, port)
    assert right
    await served.ray.power_cut(lost)
    async with asyncio.timeout(PATIENCE_S):
        while port not in (now := await served.gateways(1)):  # noqa: ASYNC110
            await asyncio.sleep(0.5)
    assert now[port] != lost
    assert await served.answer_of(now[port], port) == right
    await served.ray.power_on(lost)
    assert "nothing changes" in await served.baton(1, "up", "-f", str(served._spec))
