"""What a Control works with: who saves its state, who hears its news, and what it starts."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from baton.api.lease_keeper import Terms
from baton.cluster.fleet import Backoff
from baton.cluster.state import ControlState
from baton.cluster.watch import always
from baton.core.clock import Clock, monotonic
from baton.core.errors import BatonError
from baton.core.ids import InstanceId
from baton.core.topology import Role

FACTORIES: Mapping[Role, str] = {
    Role.PREFILL: "baton.prefill_worker.worker:PrefillWorker",
    Role.DECODE: "baton.decode_worker.worker:DecodeWorker",
    Role.MIXED: "baton.decode_worker.worker:DecodeWorker",
}
"""The class that does each role's work, by name: its libraries are for the instance's process."""


async def _unsaved(state: ControlState) -> None:
    """Keep nothing: what is controlled ends with this process."""


def _unheard(name: InstanceId, error: BatonError | None) -> None:
    """Leave the news to the journal."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a Control works with."""

    log_dir: Path
    """Of the instances' logs, on the node of each."""
    save: Callable[[ControlState], Awaitable[None]] = _unsaved
    """Writes a state where the next controller finds it; raises BatonError if it cannot."""
    on_progress: Callable[[str], None] = lambda line: None
    """Hears of what instances say while they start."""
    on_news: Callable[[InstanceId, BatonError | None], None] = _unheard
    """Hears of each loss, with its reason, and of each instance that is ready, with None."""
    detached: bool = False
    """Instances outlive this process."""
    rules: Callable[[], Awaitable[bool]] = always
    """Asks whether this process is to be believed if it misses somebody: False if it may itself be
    the one that is cut off."""
    terms: Terms | None = None
    """On which instances hold a lease of this controller, which so hears of one that hangs or is
    cut off; None: Ray's answers are all that is known of them."""
    factories: Mapping[Role, str] = field(default_factory=lambda: FACTORIES)
    backoff: Backoff = Backoff()  # noqa: RUF009  (frozen)
    clock: Clock = monotonic
