"""How anybody changes what is wanted: checked against Ray's nodes, saved, and written down."""

from collections.abc import Callable
from dataclasses import dataclass

from baton.cluster.control import Control
from baton.cluster.state import ControlState
from baton.core.errors import Unavailable


@dataclass(frozen=True, slots=True)
class Order:
    """One change, and why."""

    whom: str
    """An instance or a pool."""
    reason: str
    change: Callable[[ControlState], ControlState]
    by: str = "told"
    """What the journal is to call it: told by somebody, or autoscale."""


async def give(control: Control, order: Order) -> bool:
    """Want something else; return whether that changes anything.

    Raises what the change raises for what is not allowed, and Unavailable if Ray's nodes can never
    hold it, or if it cannot be saved.
    """
    before = control.state.counts, control.state.leaving
    await refuse_impossible(control, order.change(control.state))
    await control.change(order.change)
    changed = before != (control.state.counts, control.state.leaving)
    if changed:
        control.journal.add(order.by, order.whom, order.reason)
    return changed


async def refuse_impossible(control: Control, state: ControlState) -> None:
    """Raise Unavailable, with what is missing, if Ray's nodes can never hold what a state wants."""
    if missing := await control.lacking(state):
        raise Unavailable(f"Ray's nodes lack what this asks for: {missing}")
