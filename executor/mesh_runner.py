"""The leader's runner: what all ranks of an instance compute together, as the engine loop sees it.

engine loop ── plan ──▶ MeshRunner ──▶ the leader's own share of the step
                            └── step diff ──▶ every other rank's share
engine loop ◀─ result ── the last stage, wherever it is
"""

from concurrent.futures import Future

from baton.core.errors import InternalError
from baton.engine.step import LayerWatch, StepPlan, StepResult
from baton.executor.rank_group import RankGroup
from baton.executor.runner import ModelRunner


class MeshRunner:
    """Implements the engine loop's Runner."""

    def __init__(self, own: ModelRunner, group: RankGroup, *, last_stage: bool) -> None:
        """`last_stage`: whether the leader is in it, and has the results of steps itself."""
        self._own = own
        self._group = group
        self._last_stage = last_stage

    def __repr__(self) -> str:
        return f"<MeshRunner {self._own!r}, {self._group!r}>"

    def execute(
        self, plan: StepPlan, watch: LayerWatch | None = None
    ) -> StepResult | Future[StepResult]:
        """Let all ranks compute a plan, and compute the leader's share of it.

        Returns a future if the last stage is elsewhere, which then goes on with the step.

        Raises InternalError if no token of the step is right: all ranks know it, and go on. What
        else goes wrong ends the instance, since it leaves ranks waiting for each other.
        """
        future = self._group.begin(plan, result_elsewhere=not self._last_stage)
        try:
            result = self._own.compute(plan, watch)
        except InternalError:
            self._group.completed = plan.step
            raise
        except BaseException as error:
            self._group.lose(f"its leader failed in step {plan.step}: {error!r}")
            raise
        if result is not None:
            self._group.completed = plan.step
            return result
        assert future is not None, "a result that nobody has"
        return future
