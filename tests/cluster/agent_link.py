"""A node_agent.py on a node, as the test holds it: orders to it, and what it tells."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from .ray_nodes import RayNodes

PATIENCE_S = 240.0


class AgentLost(AssertionError):
    """The agent has ended, and its gateway with it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request of the catalogue."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(eq=False)
class Running:
    """One request on its way."""

    entry: int
    task: "asyncio.Task[dict[str, Any]]"
    tokens: int = 0
    """That have come so far."""
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at each message."""


class AgentLink:
    """One agent, and so one gateway and its clients; made by `start`, ended by `kill`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._running: dict[int, Running] = {}
        self._numbers = itertools.count(1)
        self._ready = self._expected(0)
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, ray: RayNodes, arguments: Sequence[str], log: IO[str]) -> Self:
        """Start it on node 1, and return once its gateway serves; see node_agent.py."""
        node = ray.nodes[1]
        command = (sys.executable, "-m", "tests.cluster.node_agent", ray.address, *arguments)
        process = await asyncio.create_subprocess_exec(
            *node.command(command),
            env=node.environment(ray.environment),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            limit=1 << 24,
            start_new_session=True,
            cwd=Path(__file__).parents[2],
        )
        agent = cls(process)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await agent._ready
        except BaseException:
            await agent.kill()
            raise
        return agent

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.returncode is None

    async def kill(self) -> None:
        """End it as the kernel would; requests under way raise AgentLost. Safe to repeat."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        await self._reader

    def submit(self, entry: int, prompt: Prompt) -> Running:
        """Let the client send a request."""
        values = {"prompt": prompt.prompt, "max_tokens": prompt.max_tokens}
        values |= {"temperature": prompt.temperature, "seed": prompt.seed}
        number = next(self._numbers)
        running = Running(entry, asyncio.create_task(self._sent(number, "generate", values)))
        self._running[number] = running
        return running

    async def order(self, what: str, **values: Any) -> Any:
        """Let it do something else; AssertionError with what it says if it cannot."""
        return await self._sent(next(self._numbers), what, values)

    async def _sent(self, number: int, what: str, values: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        answer = self._expected(number)
        line = json.dumps({"id": number, "do": what, **values}) + "\n"
        self._process.stdin.write(line.encode())
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await answer
        finally:
            self._answers.pop(number, None)
            self._running.pop(number, None)

    def _expected(self, number: int) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        if number and self._reader.done():
            answer.set_exception(AgentLost("the agent has ended"))
        self._answers[number] = answer
        return answer

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self._told(json.loads(line))
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(AgentLost("the agent has ended"))

    def _told(self, message: dict[str, Any]) -> None:
        number = message["id"]
        if "tokens" in message:
            if running := self._running.get(number):
                running.tokens = message["tokens"]
                running.moved.set()
            return
        answer = self._answers.get(number)
        if answer is None or answer.done():
            return  # nobody waits for it any more
        if "error" in message:
            answer.set_exception(AssertionError(message["error"]))
        else:
            answer.set_result(message["result"])
