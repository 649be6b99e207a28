"""Where the controller's state lies: in Ray's key-value store, in Redis if the head has one."""

from baton.cluster import ray_calls
from baton.cluster.names import STATE_KEY
from baton.cluster.state import ControlState

_TIMEOUT_S = 5.0


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
