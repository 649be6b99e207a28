"""Finds a pair for one request among what is usable at that moment."""

from collections.abc import Callable

from baton.api.validate import TextRequest
from baton.core.topology import Membership
from baton.router.admission_room import RoomLimits
from baton.router.route import Hint, Plan
from baton.router.router import Lease, Router


class Planner:
    """What the waiting room asks when it is a request's turn."""

    def __init__(
        self,
        router: Router,
        usable: Callable[[], Membership],
        limits: RoomLimits,
        request: TextRequest,
        tpot_slo_s: float | None = None,
    ) -> None:
        self._router = router
        self._usable = usable
        self._limits = limits
        generate = request.generate
        self._prompt_tokens = len(generate.prompt)
        self._max_tokens = generate.max_tokens
        self._hint = Hint(
            generate.request_id, generate.prompt, generate.tenant, request.session, tpot_slo_s
        )

    def __repr__(self) -> str:
        return f"Planner({self._hint.request_id})"

    @property
    def request_id(self) -> str:
        """Whose pair it finds."""
        return self._hint.request_id

    def plan(self, *, with_room: bool) -> Plan | None:
        """Return where it would go, to instances with room or wherever; None: there is no room.

        Raises Unavailable if there can be none.
        """
        return self._router.plan(
            self._usable(),
            prompt_tokens=self._prompt_tokens,
            max_tokens=self._max_tokens,
            hint=self._hint,
            room=self._limits if with_room else None,
        )

    def open(self, plan: Plan) -> Lease:
        """Take it."""
        return self._router.open(
            plan,
            prompt_tokens=self._prompt_tokens,
            max_tokens=self._max_tokens,
            hint=self._hint,
        )

    def expected_output(self) -> float:
        """Return how many tokens its answer is likely to have."""
        return self._router.expected_output(self._max_tokens)
