"""How a gateway hears who is there: it asks, again and again, and keeps the last answer.

While nobody answers, the gateway goes on with what it knows. Whatever tells the membership is
behind `Ask`; here that is a call that waits for news (a long poll).
"""

import asyncio
from collections.abc import Awaitable, Callable

from baton.core.errors import BatonError
from baton.core.log import get_logger
from baton.core.topology import Membership, MembershipBoard

Ask = Callable[[int], Awaitable[Membership]]
"""Waits for a membership of a higher version, for some time, and returns the latest; raises
BatonError if nobody can tell."""
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
"""Between tries while nobody answers."""

_log = get_logger("membership")


async def follow(board: MembershipBoard, ask: Ask) -> None:
    """Keep `board` up to date, until cancelled."""
    version, pause = board.current.version, FIRST_PAUSE_S
    while True:
        try:
            membership = await ask(version)
        except BatonError as error:
            _log.warning("nobody tells the membership", version=version, reason=str(error))
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            continue
        pause = FIRST_PAUSE_S
        if membership.version > version:
            version = membership.version
            board.publish(membership)
