"""Signals end a command in order, whatever Ray makes of them."""

import asyncio
import os
import signal

from baton.cli.stopping import Stopping


def test_the_first_signal_ends_it_in_order_and_stops_the_alarm_that_rays_handler_sets() -> None:
    said: list[str] = []
    stopping = Stopping(said.append)
    closed = False

    async def main() -> None:
        nonlocal closed
        try:
            signal.alarm(60)  # as Ray's handler does before it calls ours
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            closed = signal.alarm(0) == 0

    assert stopping.run(main()) == 128 + signal.SIGTERM
    assert closed
    assert said == ["stopping; once more to stop at once"]


def test_signals_that_somebody_else_took_are_taken_back() -> None:
    stopping = Stopping(lambda line: None)
    taken: list[int] = []

    async def main() -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: taken.append(number))
        stopping.arm()
        stopping.expected = True
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    assert stopping.run(main()) == 0
    assert not taken


def test_more_signals_make_haste() -> None:
    stopping = Stopping(lambda line: None)
    hurried = asyncio.Event()
    stopping.hurry = hurried.set

    async def main() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            await hurried.wait()

    assert stopping.run(main()) == 128 + signal.SIGINT
