"""Plays one schedule on a cluster of three nodes, and asks the two questions at its end.

1. Did every request end with the tokens of a run without faults?
2. Is the cluster whole again, and does nobody hold anything?
"""

import asyncio
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .agent_link import PATIENCE_S, AgentLink, AgentLost, Prompt, Running
from .faults import Fault, Schedule
from .three_nodes import ThreeNodes

SHAPE = {"prefill": 1, "decode": 2}
"""Instances at the begin of every schedule, and again at its end."""
_STEP_S = 0.05


@dataclass
class Report:
    """What one schedule came to."""

    problems: list[str] = field(default_factory=list)
    """What the oracles found; none: it passed."""
    struck: list[str] = field(default_factory=list)
    """Kinds of faults that really did something."""
    gap_s: float = 0.0
    """The longest wait for a token of any request."""
    moved: int = 0
    """Times that a request went on elsewhere."""
    noticed_s: float | None = None
    """From the first strike until the controller had given somebody up."""
    whole_s: float | None = None
    """From the first strike until the last of those was there again."""
    seconds: float = 0.0
    """The schedule took, both questions included."""
    log: list[str] = field(default_factory=list)


class Play:
    """One run of one schedule."""

    def __init__(
        self,
        schedule: Schedule,
        cluster: ThreeNodes,
        prompts: Sequence[Prompt],
        right: Sequence[list[int]],
    ) -> None:
        self.report = Report()
        self._schedule = schedule
        self._cluster = cluster
        self._prompts = prompts
        self._right = right
        self._sent: list[Running] = []
        self._guest: AgentLink | None = None
        """The gateway that may be killed, if the schedule has that."""
        self._struck_at: float | None = None
        self._started = time.time()

    async def run(self) -> Report:
        """Play it to the end."""
        cluster, guests = self._cluster, self._schedule.guests
        self._guest = await cluster.start_guest() if guests else None
        before = await cluster.instances()
        for index, entry in enumerate(self._schedule.entries):
            agent = self._guest if self._guest and index in guests else cluster.agent
            self._sent.append(agent.submit(entry, self._prompts[entry]))
        async with asyncio.TaskGroup() as group:
            for fault in self._schedule.faults:
                group.create_task(self._strike_when_due(fault, before))
            group.create_task(self._all_ended())
        if self._guest is not None:
            await self._guest.kill()
        for pool, count in SHAPE.items():
            await cluster.ask("scale", pool, count)
        await self._whole()
        await cluster.all_given_back()
        self._note("nothing is held")
        return self.report

    async def _whole(self) -> None:
        found = await self._cluster.whole()
        await self._measure()
        roles = sorted(name.rpartition("-")[0] for name in found)
        if roles != sorted(pool for pool, count in SHAPE.items() for _ in range(count)):
            self.report.problems.append(f"the cluster has another shape: {sorted(found)}")

    async def _measure(self) -> None:
        """Read from the controller's journal when it noticed, and when all was well again."""
        events, _ = await self._cluster.ask("events", 0, 0.0)
        since = self._struck_at or time.time()
        events = [event for event in events if event["at"] >= since]
        for event in events:
            self._note(f"{event['what']} {event['whom']}: {event['reason']}", event["at"])
        if lost := [event["at"] - since for event in events if event["what"] == "lost"]:
            self.report.noticed_s = lost[0]
        back = [event["at"] - since for event in events if event["what"] in ("ready", "adopt")]
        if back:
            self.report.whole_s = back[-1]

    async def _all_ended(self) -> None:
        await asyncio.gather(*(self._ended(k, running) for k, running in enumerate(self._sent)))
        self._note(f"all requests have ended, moved {self.report.moved}")

    async def _ended(self, index: int, running: Running) -> None:
        try:
            answer = await self._answer(running)
        except (AssertionError, TimeoutError) as error:
            self.report.problems.append(f"request {index} (entry {running.entry}): {error}")
            return
        self.report.moved += answer["moved"]
        self.report.gap_s = max(self.report.gap_s, answer["gap_s"])
        right = self._right[running.entry]
        if answer["tokens"] != right:
            same = _common(answer["tokens"], right)
            wrong = f"differs after {same} of {len(right)} tokens, moved {answer['moved']}"
            self.report.problems.append(f"request {index} (entry {running.entry}) {wrong}")

    async def _answer(self, running: Running) -> dict[str, Any]:
        """Wait for the answer; who loses its gateway asks another one, from the beginning."""
        try:
            return await running.task
        except AgentLost:
            if self._guest is None:
                raise
            again = self._cluster.submit(running.entry, self._prompts[running.entry])
            return {**await again.task, "gap_s": 0.0}  # it was no gap in a stream

    # ---- faults ------------------------------------------------------------------------------

    async def _strike_when_due(self, fault: Fault, there: dict[str, dict[str, Any]]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while sum(running.tokens for running in self._sent) < fault.tokens:
                if all(running.task.done() for running in self._sent):
                    return
                await asyncio.sleep(_STEP_S)
        await self._strike(fault, there)

    async def _strike(self, fault: Fault, there: dict[str, dict[str, Any]]) -> None:
        match fault.kind:
            case "blip" | "cut" | "power_cut":
                await self._strike_node(fault)
            case "kill_controller":
                host, pid = await self._cluster.controller()
                await self._cluster.ray.signal(host, pid, signal.SIGKILL)
                self._strikes(fault, host)
            case "stop_controller":
                host, pid = await self._cluster.controller()
                await self._stop(fault, "the controller", host, pid)
            case "kill_gateway":
                assert self._guest is not None, self._schedule
                if self._guest.alive:
                    await self._guest.kill()
                    self._strikes(fault, "the guests' gateway")
            case "scale_up" | "scale_down":
                await self._tell(fault, "scale", "decode", 3 if fault.kind == "scale_up" else 1)
            case "drain" | "flip":
                await self._tell(fault, fault.kind, _one_of(there, "decode", fault.target))
            case _:
                what, _, role = fault.kind.partition("_")
                name = _one_of(there, role, fault.target)
                address, pid = there[name]["address"], there[name]["pid"]
                if what == "stop":
                    await self._stop(fault, name, address, pid)
                else:
                    await self._cluster.ray.signal(address, pid, signal.SIGKILL)
                    self._strikes(fault, name)

    async def _stop(self, fault: Fault, whom: str, address: str, pid: int) -> None:
        """Stop a process, and let it go on after the time of the fault, if it is still there."""
        await self._cluster.ray.signal(address, pid, signal.SIGSTOP)
        self._strikes(fault, f"{whom} for {fault.seconds} s")
        await asyncio.sleep(fault.seconds)
        await self._cluster.ray.signal(address, pid, signal.SIGCONT)

    async def _tell(self, fault: Fault, *order: Any) -> None:
        try:
            await self._cluster.ask(*order)
        except AssertionError as error:
            if "InvalidRequest" not in str(error):
                raise
            # It came too late: the instance is gone, or the last of its pool.
            self._note(f"{fault.kind} was refused: {error}")
        else:
            self._strikes(fault, " ".join(map(str, order)))

    async def _strike_node(self, fault: Fault) -> None:
        cluster, index = self._cluster, 2 + fault.target % 2
        host, _ = await cluster.controller()
        if fault.kind == "power_cut":
            await cluster.ray.power_cut(index)
        else:
            cluster.ray.nodes[index].cut()
        if host == cluster.ray.nodes[index].address:
            self.report.struck.append("the_controllers_node")
        self._strikes(fault, f"node {index}")
        if fault.kind == "power_cut":
            await cluster.given_up(index)
            self._note(f"Ray's head has given up node {index}")
            await cluster.ray.power_on(index)
        elif fault.kind == "cut":
            await cluster.given_up(index)
            self._note(f"Ray's head has given up node {index}")
            await cluster.heal(index)
        else:
            await asyncio.sleep(fault.seconds)
            await cluster.heal(index)
        self._note(f"node {index} is there again")

    def _strikes(self, fault: Fault, whom: str) -> None:
        self._struck_at = self._struck_at or time.time()
        self.report.struck.append(fault.kind)
        self._note(f"{fault.kind} strikes {whom}")

    def _note(self, text: str, at: float | None = None) -> None:
        self.report.log.append(f"{(at or time.time()) - self._started:7.2f} {text}")


def _one_of(there: dict[str, dict[str, Any]], pool: str, target: int) -> str:
    names = sorted(name for name in there if name.startswith(f"{pool}-"))
    return names[target % len(names)]


def _common(one: list[int], other: list[int]) -> int:
    """Return how many tokens two lists begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
