"""Run a coroutine so that Ctrl-C, SIGTERM or a closed terminal end it in order."""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopping:
    """The first signal cancels the main task, which then closes what it opened; more make haste."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.hurry: Callable[[], None] | None = None
        """Called at each signal after the first."""
        self.expected = False
        """Set once a signal is the ordinary way to end, and not a failure."""
        self._say = say
        self._signal: signal.Signals | None = None
        self._main: asyncio.Task[Any] | None = None

    def run(self, main: Coroutine[Any, Any, None]) -> int:
        """Run `main` to its end; return the exit status: 0, or 128 + the number of a signal."""
        asyncio.run(self._guard(main))
        if self._signal is None or self.expected:
            return 0
        return 128 + self._signal

    def arm(self) -> None:
        """Take the signals, again if somebody has taken them since: Ray does when it starts."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._signalled, number)

    async def _guard(self, main: Coroutine[Any, Any, None]) -> None:
        loop = asyncio.get_running_loop()
        self._main = asyncio.create_task(main)
        self.arm()
        try:
            await self._main
        except asyncio.CancelledError:
            if self._signal is None:
                raise
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _signalled(self, number: signal.Signals) -> None:
        assert self._main is not None
        # Ray's handler, which prints where the process was and then calls ours, has set an alarm
        # that aborts the process three seconds later: less than closing in order may take.
        signal.alarm(0)
        if self._signal is None:
            self._signal = number
            self._say("stopping; once more to stop at once")
            self._main.cancel()
        elif self.hurry is not None:
            self.hurry()
