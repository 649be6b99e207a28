"""What metrics tell of a control: pools as they are now, and what it has counted."""

from baton.cluster.control import Control
from baton.cluster.fleet import Phase
from baton.core.control_reading import ControlReading, PoolReading

ACTIONS = ("start", "drain", "flip", "stop")
"""As the journal calls them."""


def reading(control: Control) -> ControlReading:
    """Return what is so now; all of one moment."""
    state = control.state
    ready = [seen.desired.pool for seen in state.fleet.values() if seen.phase is Phase.READY]
    return ControlReading(
        pools=tuple(
            PoolReading(name, pool.role.value, state.counts[name], ready.count(name))
            for name, (_, pool) in sorted(state.spec.pools().items())
        ),
        actions={what: control.journal.counts[what] for what in ACTIONS},
        losses=control.losses,
        recoveries=control.recoveries,
        lease_flaps=control.lease_flaps,
    )
