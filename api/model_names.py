"""Finds a model by a name that somebody asks for, among those that he may use."""

from collections.abc import Iterable, Iterator

from baton.api.model_lane import ModelLane
from baton.core.errors import InvalidRequest, UnknownModel
from baton.core.tenants import Caller

_SHOWN = 64
"""Names that an error lists at most."""


class ModelNames:
    """The lanes of a gateway, each by the name of its model and by each alias.

    For a caller whose tenant is limited to some models the others do not exist. Naming one of a
    model's names allows the model, by all of them.
    """

    def __init__(self, lanes: Iterable[ModelLane]) -> None:
        self.lanes = tuple(lanes)
        """In the order in which they were given; at least one."""
        self._by_name = {name: lane for lane in self.lanes for name in lane.front.names}

    def __repr__(self) -> str:
        return f"ModelNames({', '.join(self._by_name)})"

    def by_name(self, name: str) -> ModelLane:
        """Return the lane of a model that is known to be served; "" is the first."""
        return self._by_name[name] if name else self.lanes[0]

    def of(self, caller: Caller, name: str | None) -> ModelLane:
        """Return the lane of the model that a caller asks for; None: the only one that there is.

        Raises UnknownModel if there is none of that name, or none at all, for this caller, and
        InvalidRequest if none is named and there are several.
        """
        if name is not None:
            lane = self._by_name.get(name)
            if lane is None or not _may_use(caller, lane):
                raise UnknownModel("model", name, self._shown(caller))
            return lane
        usable = [lane for lane in self.lanes if _may_use(caller, lane)]
        if not usable:
            raise UnknownModel("model", None, self._shown(caller))
        if len(usable) > 1:
            raise InvalidRequest("model", None, f"one of: {self._shown(caller)}")
        return usable[0]

    def listed(self, caller: Caller) -> Iterator[tuple[str, ModelLane]]:
        """Yield each name and alias that a caller may ask for, with its lane."""
        return ((n, lane) for n, lane in self._by_name.items() if _may_use(caller, lane))

    def _shown(self, caller: Caller) -> str:
        names = [name for name, _ in self.listed(caller)]
        more = len(names) - _SHOWN
        listed = ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
        return listed or "nothing: this key may use no model that is served here"


def _may_use(caller: Caller, lane: ModelLane) -> bool:
    return any(caller.tenant.may_use(name) for name in lane.front.names)
