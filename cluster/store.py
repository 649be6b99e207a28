"""Where the controller's state lies: in Ray's key-value store, in Redis if the head has one."""

import secrets

from baton.cluster import ray_calls
from baton.cluster.names import OWNER_KEY, STATE_KEY
from baton.cluster.state import ControlState

_TIMEOUT_S = 5.0


_OWNED_TIMEOUT_S = 1.0


async def claim() -> str:
    """Become the owner of the state, whoever was it before; return the name to show."""
    owner = secrets.token_hex(8)
    await ray_calls.put_value(OWNER_KEY, owner, _TIMEOUT_S)
    return owner


async def owned(owner: str) -> bool:
    """Return whether nobody else has claimed the state; Unavailable if Ray's head is not quick."""
    return await ray_calls.get_value(OWNER_KEY, _OWNED_TIMEOUT_S) == owner


async def save(state: ControlState) -> None:
    """Write a state down; raises Unavailable if Ray's head does not answer."""
    await ray_calls.put_value(STATE_KEY, state.to_json(), _TIMEOUT_S)


async def load(now: float) -> ControlState | None:
    """Return the state that was written last; None if there is none."""
    text = await ray_calls.get_value(STATE_KEY, _TIMEOUT_S)
    return None if text is None else ControlState.from_json(text, now)


async def forget() -> None:
    """Let there be no state."""
    await ray_calls.delete_value(STATE_KEY, _TIMEOUT_S)
