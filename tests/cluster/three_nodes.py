"""A cluster of Baton on three nodes, from outside: its commands, its requests, its two oracles.

node 1: Ray's head, gateways and clients    node 2, node 3: room for instances
(never struck: all answers come to it)      (as on node 1, less)
"""

import asyncio
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .agent_link import PATIENCE_S, AgentLink, Prompt, Running
from .ray_nodes import RayNodes

_LOOK_AGAIN_S = 0.1
_GIVEN_BACK = (
    "blocks_used",
    "blocks_fencing",
    "waiting",
    "running",
    "transfers_open",
    "open_requests",
    "attempts",
    "tasks",
    "tasks_crashed",
    "tickets_open",
    "sessions",
)
"""Counters of an instance that are zero when nothing is open."""
_SPEC = """\
drain_timeout_s: 3
models:
  - name: demo
    dir: MODEL_DIR
    engine: {kv_memory_mib: 128}
    pools:
      prefill: {instances: 1}
      decode: {instances: 2}
    gateways: {count: 0}
"""


def catalogue(size: int = 8, *, longest: int = 1800) -> tuple[Prompt, ...]:
    """Return requests, always the same ones; few enough to know the right answer to each."""
    draw = random.Random(7)
    return tuple(
        Prompt(
            tuple(draw.randrange(1, 4000) for _ in range(draw.choice((5, 40, 90, 130)))),
            longest - draw.randrange(longest // 3),
            draw.choice((0.0, 0.8)),
            index,
        )
        for index in range(size)
    )


class ThreeNodes:
    """`async with ThreeNodes(folder, model_dir) as cluster:` — everything is as its spec says."""

    def __init__(self, folder: Path, model_dir: Path, spec: str = _SPEC) -> None:
        """`spec` has MODEL_DIR where the model's folder belongs."""
        self.ray = RayNodes(3, folder, cpus=2)
        self._spec = spec
        self._folder = folder
        self._model_dir = model_dir
        self.agent: AgentLink
        """Whose gateway is never struck."""
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._stack.enter_async_context(self.ray)
            await self.up(self._spec)
            self.agent = await self._start_agent("gateway")
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def up(self, spec: str) -> None:
        """Bring the cluster to what a spec says."""
        path = self._folder / "cluster.yaml"
        path.write_text(spec.replace("MODEL_DIR", str(self._model_dir)))
        await asyncio.to_thread(self.baton, "up", "-f", str(path))

    def baton(self, *arguments: str) -> str:
        """Run a command of Baton on node 1; returns what it prints."""
        try:
            return self.ray.nodes[1].run(
                sys.executable,
                "-m",
                "baton.cli.main",
                *arguments,
                "--address",
                self.ray.address,
                environment=self.ray.environment,
                timeout=PATIENCE_S,
            )
        except subprocess.CalledProcessError as error:
            raise AssertionError(f"{error}: {error.output}\n{self.logs()}") from None

    def logs(self) -> str:
        """Return the end of every log of an instance or controller, on nodes that have power."""
        found = []
        for k in range(1, len(self.ray.nodes) + 1):
            for log in sorted(self.ray.nodes[k].files.glob("baton-*/*.log")):
                tail = log.read_text(errors="replace").splitlines()[-30:]
                found += [f"--- node {k}, {log.name}", *tail]
        for log in sorted(self._folder.glob("*.log")):
            found += [f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-30:]]
        return "\n".join(found)

    # ---- the controller ----------------------------------------------------------------------

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the controller; see cluster/controller.py."""
        return await self.agent.order("ask", method=method, arguments=arguments)

    async def instances(self) -> dict[str, dict[str, Any]]:
        """Return who is ready, by name."""
        status = await self.ask("status")
        found = [i for pool in status["pools"] for i in pool["instances"]]
        return {i["name"]: i for i in found if i["phase"] == "ready"}

    async def whole(self) -> dict[str, dict[str, Any]]:
        """Wait until everything is as it is wanted; return who is ready then.

        A node that Ray's head has given up for no reason but a busy machine joins again.
        """
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for index in range(2, len(self.ray.nodes) + 1):
                    if not self.ray.running(index):
                        await self.ray.start_ray(index)
                status = await self.ask("status")
                if status["settled"]:
                    found = [i for pool in status["pools"] for i in pool["instances"]]
                    return {i["name"]: i for i in found}
                await asyncio.sleep(_LOOK_AGAIN_S)

    async def until(self, happened: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for an event of the controller that is so; return the first, old ones too."""
        after = 0
        async with asyncio.timeout(PATIENCE_S):
            while True:
                events, _ = await self.ask("events", after, 1.0)
                for event in events:
                    after = event["number"]
                    if happened(event):
                        found: dict[str, Any] = event
                        return found
                after = 0 if not events else after

    async def controller(self) -> tuple[str, int]:
        """Return the controller's host and its pid there."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                pid = (await self.ask("status"))["controller_pid"]
                for node in map(self.ray.node, range(1, len(self.ray.nodes) + 1)):
                    shown = ("sh", "-c", f"cat /proc/{pid}/cmdline; :")
                    if node.up and "ControllerActor" in await asyncio.to_thread(node.run, *shown):
                        return node.address, pid
                await asyncio.sleep(_LOOK_AGAIN_S)  # it has just died

    # ---- nodes -------------------------------------------------------------------------------

    async def known(self, index: int) -> bool:
        """Return whether Ray's head takes a node for alive."""
        return self.ray.nodes[index].address in await self.agent.order("nodes")

    async def given_up(self, index: int) -> None:
        """Wait until Ray's head takes a node for dead."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if not await self.known(index):
                    return
                await asyncio.sleep(_LOOK_AGAIN_S)

    async def heal(self, index: int) -> None:
        """Plug a node in again; Ray is started there again if its head had given it up."""
        self.ray.nodes[index].heal()
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if not self.ray.running(index) or await self.known(index):
                    break
                await asyncio.sleep(_LOOK_AGAIN_S)
        if not self.ray.running(index):
            await self.ray.start_ray(index)

    # ---- requests ----------------------------------------------------------------------------

    def submit(self, entry: int, prompt: Prompt) -> Running:
        """Let the client send a request."""
        return self.agent.submit(entry, prompt)

    async def answers(self, prompts: tuple[Prompt, ...]) -> list[list[int]]:
        """Return the tokens of each, sent at once."""
        sent = [self.submit(entry, prompt) for entry, prompt in enumerate(prompts)]
        return [(await running.task)["tokens"] for running in sent]

    async def start_guest(self) -> AgentLink:
        """Start another gateway with clients of its own, which may be killed."""
        return await self._start_agent("guest")

    async def _start_agent(self, name: str) -> AgentLink:
        with (self._folder / f"{name}.log").open("a") as log:
            agent = await AgentLink.start(self.ray, (name, "demo", str(self._model_dir)), log)
        self._stack.push_async_callback(agent.kill)
        return agent

    # ---- oracles -----------------------------------------------------------------------------

    async def held(self) -> dict[str, Any]:
        """Return what gateway and instances hold that idle ones would not."""
        gateway = await self.agent.order("gateway")
        held: dict[str, Any] = {}
        if gateway["open_requests"]:
            held["gateway"] = gateway
        for name in await self.instances():
            for rank in await self.ask("stats", name):
                if mine := {k: rank[k] for k in _GIVEN_BACK if rank.get(k)}:
                    held[name] = mine
        return held

    async def all_given_back(self) -> None:
        """Wait until nothing is held; AssertionError if that never comes."""
        held: dict[str, Any] = {}
        try:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    if not (held := await self.held()):
                        return
                    await asyncio.sleep(_LOOK_AGAIN_S)
        except TimeoutError:
            raise AssertionError(f"still held: {held}\n{self.logs()}") from None
