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

from .faults import Fault, Schedule
from .three_nodes import PATIENCE_S, Prompt, Running, ThreeNodes

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
        self._struck_at: float | None = None
        self._started = time.time()

    async def run(self) -> Report:
        """Play it to the end."""
        cluster = self._cluster
        before = await cluster.instances()
        self._sent = [
            cluster.submit(entry, self._prompts[entry]) for entry in self._schedule.entries
        ]
        async with asyncio.TaskGroup() as group:
            for fault in self._schedule.faults:
                group.create_task(self._strike_when_due(fault, before))
            group.create_task(self._all_ended())
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
        for index, running in enumerate(self._sent):
            try:
                answer = await running.task
            except (AssertionError, TimeoutError) as error:
                self.report.problems.append(f"request {index} (entry {running.entry}): {error}")
                continue
            self.report.moved += answer["moved"]
            self.report.gap_s = max(self.report.gap_s, answer["gap_s"])
            right = self._right[running.entry]
            if answer["tokens"] != right:
                same = _common(answer["tokens"], right)
                wrong = f"differs after {same} of {len(right)} tokens, moved {answer['moved']}"
                self.report.problems.append(f"request {index} (entry {running.entry}) {wrong}")
        self._note(f"all requests have ended, moved {self.report.moved}")

    # ---- faults ------------------------------------------------------------------------------

    async def _strike_when_due(self, fault: Fault, there: dict[str, dict[str, Any]]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while sum(running.tokens for running in self._sent) < fault.tokens:
                if all(running.task.done() for running in self._sent):
                    return
                await asyncio.sleep(_STEP_S)
        try:
            await self._strike(fault, there)
        except AssertionError as error:
            # An order may come too late: the instance it names is gone, or the last of its pool.
            self._note(f"{fault.kind} was refused: {error}")

    async def _strike(self, fault: Fault, there: dict[str, dict[str, Any]]) -> None:
        match fault.kind:
            case "blip" | "cut" | "power_cut":
                await self._strike_node(fault)
            case "kill_controller":
                host, pid = await self._cluster.controller()
                await self._cluster.ray.signal(host, pid, signal.SIGKILL)
                self._strikes(fault, host)
            case "scale_up" | "scale_down":
                count = 3 if fault.kind == "scale_up" else 1
                self._strikes(fault, f"{count} in decode")
                await self._cluster.ask("scale", "decode", count)
            case "drain" | "flip":
                name = _one_of(there, "decode", fault.target)
                self._strikes(fault, name)
                await self._cluster.ask(fault.kind, name)
            case _:
                what, _, role = fault.kind.partition("_")
                name = _one_of(there, role, fault.target)
                number = signal.SIGKILL if what == "kill" else signal.SIGSTOP
                ray, address, pid = self._cluster.ray, there[name]["address"], there[name]["pid"]
                await ray.signal(address, pid, number)
                self._strikes(fault, f"{name} for {fault.seconds} s")
                if what == "stop":
                    await asyncio.sleep(fault.seconds)
                    await ray.signal(address, pid, signal.SIGCONT)

    async def _strike_node(self, fault: Fault) -> None:
        cluster, index = self._cluster, 2 + fault.target % 2
        if fault.kind == "power_cut":
            await cluster.ray.power_cut(index)
        else:
            cluster.ray.nodes[index].cut()
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
