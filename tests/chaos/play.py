"""Plays one schedule on a cluster, and asks the two questions at its end.

1. Did every request end in exactly one outcome, with the tokens of a run without faults?
   (judge.py)
2. Has every process given back every block, lease, task, transfer and session?
"""

import asyncio
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .cluster import Cluster
from .gateway import Gateway, open_gateway
from .judge import Sent, judge, outcomes_of
from .process import PATIENCE_S, WorkerProcess
from .schedule import (
    FROM_OUTSIDE,
    IN_PREFILL,
    IN_PULLS,
    IN_READS,
    LINK,
    ON_DECODE,
    Ask,
    Fault,
    Schedule,
)
from .schedule import catalogue as requests

_LOOK_AGAIN_S = 0.02


@dataclass
class Report:
    """What one run came to."""

    problems: list[str] = field(default_factory=list)
    """What the oracles found; none: it passed."""
    struck: Counter[str] = field(default_factory=Counter)
    """How often each kind of fault really did something."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Of the attempts to hand a prompt over."""
    migrations: Counter[str] = field(default_factory=Counter)
    """Of requests from one decode instance to the other, by why."""
    backed_up: int = 0
    """Blocks that a decode instance has read from the other one."""
    log: list[str] = field(default_factory=list)
    """What happened, in order, with seconds since the start."""


class Play:
    """One run of one schedule."""

    def __init__(self, schedule: Schedule, cluster: Cluster, right: list[list[int]]) -> None:
        self.report = Report()
        self._schedule = schedule
        self._cluster = cluster
        self._right = right
        self._counts: Counter[str] = Counter()
        inside = {*IN_READS, *IN_PULLS, *IN_PREFILL}
        self._waiting = [fault for fault in schedule.faults if fault.kind not in inside]
        self._sent: dict[int, Sent] = {}
        self._gateways: tuple[Gateway, ...] = ()
        """The one that stays, and the guest."""
        self._dying: set[WorkerProcess] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._started = time.monotonic()

    def told(self, message: dict[str, Any]) -> None:
        """Hear of an event or a strike inside a process."""
        if "struck" in message:
            self._strikes(message["struck"], f"in {message['name']}: {message['what']}")
        elif message["name"].startswith("decode"):
            self._happened(message["event"])

    async def run(self) -> Report:
        """Play it to the end; raises only where a process cannot even be asked."""
        before = await self._backups()
        self._arm()
        try:
            await self._run()
        finally:
            for task in self._tasks:
                task.cancel()
        await self._all_given_back()
        seconds = time.monotonic() - self._started
        # A process that was replaced has forgotten what it counted.
        backups = await self._backups() - before
        self.report.backed_up = backups["backup_blocks_taken"]
        self._judge(seconds, backups["backups_wrong"])
        return self.report

    async def _backups(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for process in self._cluster.decodes:
            stats = await process.stats()
            found.update({name: stats[name] for name in ("backup_blocks_taken", "backups_wrong")})
        return found

    async def _run(self) -> None:
        board = self._cluster.board
        async with (
            open_gateway(board, self._happened) as main,
            open_gateway(board, self._happened) as guest,
        ):
            self._gateways = main, guest
            for fault in [fault for fault in self._waiting if fault.event == "delay"]:
                self._start(self._strike_later(fault))
            async with asyncio.TaskGroup() as arrivals:
                for index, ask in enumerate(self._schedule.asks):
                    arrivals.create_task(self._arrive(index, ask, guest if ask.guest else main))
            await self._all_ended()
            await self._faults_over()

    def _arm(self) -> None:
        faults = self._schedule.faults
        for decode in self._cluster.decodes:
            decode.arm([fault for fault in faults if fault.kind in IN_READS])
        for index, prefill in enumerate(self._cluster.prefills):
            prefill.arm(
                [f for f in faults if f.kind in (*IN_PULLS, *IN_PREFILL) and f.target == index]
            )
        for kind in self._schedule.beforehand:
            self._strikes(kind, "in the requests")

    async def _arrive(self, index: int, ask: Ask, gateway: Gateway) -> None:
        await asyncio.sleep(ask.after_s)
        if gateway.hung_up:
            return
        prefill = [self._cluster.prefill(number) for number in ask.prefill]
        answer = gateway.submit(requests()[ask.entry], prefill)
        self._sent[index] = Sent(ask, gateway, answer)
        self._note(f"request {index} sent")

    # ---- faults -----------------------------------------------------------------------------

    def _happened(self, event: str) -> None:
        self._counts[event] += 1
        count = self._counts[event]
        if event != "token":
            self._note(f"{event} {count}")
        for fault in [f for f in self._waiting if (f.event, f.count) == (event, count)]:
            self._start(self._strike(fault))

    def _start(self, strike: Any) -> None:
        task = asyncio.create_task(strike)
        self._tasks.add(task)

    async def _strike_later(self, fault: Fault) -> None:
        await asyncio.sleep(fault.count / 1000)
        await self._strike(fault)

    async def _strike(self, fault: Fault) -> None:
        if fault not in self._waiting:
            return  # all is over
        self._waiting.remove(fault)
        if fault.kind in FROM_OUTSIDE:
            await self._strike_prefill(fault)
        elif fault.kind in ON_DECODE:
            await self._strike_decode(fault)
        elif fault.kind == "hang_up":
            still = await self._gateways[1].hang_up()
            self._strikes("hang_up", f"{still} requests of the guest were open")
        else:
            sent = self._sent.get(fault.target)
            if sent and not sent.answer.done.is_set():
                sent.cancelled = True
                sent.gateway.cancel(sent.answer)
                self._strikes("cancel", f"request {fault.target}")

    async def _strike_prefill(self, fault: Fault) -> None:
        process = self._cluster.prefills[fault.target]
        if fault.kind in LINK:
            await self._strike_link(fault, process)
        elif fault.kind == "kill":
            await self._kill(process, fault)
        elif fault.kind == "drain":
            await self._drain(process, fault)
        else:
            await self._pause(process, fault)

    async def _strike_link(self, fault: Fault, process: WorkerProcess) -> None:
        link = self._cluster.link_to(process)
        if link.connections:
            what = f"{process!r}, {link.connections} connections, for {fault.seconds} s"
            self._strikes(fault.kind, what)
        match fault.kind:
            case "cut" | "cut_decode":
                link.cut()
            case "freeze":
                link.freeze()
            case "slow":
                link.slow(fault.seconds / 5)
        await asyncio.sleep(fault.seconds)
        link.mend()
        self._note(f"the link to {process!r} is mended")

    async def _strike_decode(self, fault: Fault) -> None:
        process = self._cluster.decodes[fault.target]
        match fault.kind:
            case "kill_decode":
                await self._kill(process, fault)
            case "drain_decode":
                await self._drain(process, fault)
            case "cut_decode":
                await self._strike_link(fault, process)
            case _:
                await self._pause(process, fault)

    async def _pause(self, process: WorkerProcess, fault: Fault) -> None:
        self._strikes(fault.kind, f"{process!r}, for {fault.seconds} s")
        process.signal(signal.SIGSTOP)
        await asyncio.sleep(fault.seconds)
        process.signal(signal.SIGCONT)
        self._note(f"{fault.kind} of {process!r} is over")

    async def _kill(self, process: WorkerProcess, fault: Fault) -> None:
        if process in self._dying:
            return
        self._dying.add(process)
        self._strikes(fault.kind, f"{process!r}, for {fault.seconds} s")
        process.signal(signal.SIGKILL)
        await asyncio.sleep(fault.seconds)
        self._note(f"restarted {await self._cluster.replace(process)!r}")

    async def _drain(self, process: WorkerProcess, fault: Fault) -> None:
        """Let it leave in good order, which checks its books, and come back."""
        if process in self._dying:
            return
        self._dying.add(process)
        self._strikes(fault.kind, f"{process!r}, with {fault.seconds} s to end what is open")
        self._note(f"{process!r} handed over {await process.drain(fault.seconds)}")
        self._note(f"restarted {await self._cluster.replace(process, gently=True)!r}")

    async def _faults_over(self) -> None:
        """Call off what will not strike any more, and see the rest through."""
        self._waiting.clear()
        await asyncio.gather(*self._tasks)

    # ---- oracles ----------------------------------------------------------------------------

    async def _all_ended(self) -> None:
        done = [asyncio.create_task(sent.answer.done.wait()) for sent in self._sent.values()]
        if done:
            _, late = await asyncio.wait(done, timeout=PATIENCE_S)
            for task in late:
                task.cancel()

    async def _all_given_back(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        for process in self._cluster.processes:
            try:
                while held := await process.held():
                    if time.monotonic() > deadline or "tasks_crashed" in held:
                        self._problem(f"{process!r} still holds {held}\n{process.log_tail()}")
                        break
                    await asyncio.sleep(_LOOK_AGAIN_S)
            except AssertionError as death:
                self._problem(str(death))
        self._note("looked at what the processes hold")

    def _judge(self, seconds: float, wrong_backups: int) -> None:
        for index, sent in self._sent.items():
            answer = sent.answer
            self.report.migrations.update(answer.migrations)
            if answer.finish is not None:
                outcomes = outcomes_of(answer.finish)
                self.report.outcomes.update(outcomes)
                moved = f", moved: {answer.migrations}" if answer.migrations else ""
                said = f"{answer.finish.reason}, handed over: {outcomes}{moved}"
                self._note(f"request {index}: {said}")
        for problem in judge(
            self._schedule,
            self._sent,
            self.report.struck,
            self._right,
            seconds=seconds,
            wrong_backups=wrong_backups,
        ):
            self._problem(problem)

    # ---- report -----------------------------------------------------------------------------

    def _note(self, text: str) -> None:
        self.report.log.append(f"{time.monotonic() - self._started:7.3f}  {text}")

    def _strikes(self, kind: str, what: str) -> None:
        self.report.struck[kind] += 1
        self._note(f"FAULT {kind}: {what}")

    def _problem(self, text: str) -> None:
        self.report.problems.append(text)
        self._note(f"PROBLEM: {text}")
