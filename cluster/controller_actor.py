"""The process of the controller: a named actor that outlives every command, and its own death.

Ray starts it again wherever there is room; see controller.py for what it does then. It has no async
methods: Ray would run the others on one event loop then, and each would hold up the rest.
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.cluster.actor_process import LoopThread, or_exit, write_output_to
from baton.cluster.controller import Controller
from baton.core import log
from baton.core.topology import Role

CALLS_AT_ONCE = 256
"""Threads at most: each gateway waits in one for news, and so does each `events` and `up`."""


class ControllerActor:
    """Hosts one Controller."""

    def __init__(self, log_dir: Path, factories: Mapping[Role, str]) -> None:
        """See Controller."""
        write_output_to(log_dir / "controller.log")
        log.configure()
        self._loop = LoopThread("control-loop")
        self._loop.end_process_if_it_stands_still()
        self._recovered = threading.Event()
        self._controller = Controller(log_dir, factories)
        self._loop.run(or_exit(self._controller.recover())).add_done_callback(
            lambda _: self._recovered.set()
        )

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the controller, once it knows who is there."""
        self._recovered.wait()
        return self._loop.run(getattr(self._controller, method)(*arguments)).result()
