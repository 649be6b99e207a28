"""The leader's runner: what all ranks of an instance compute together, as the engine loop sees it.

engine loop ── plan ──▶ MeshRunner ──▶ the leader's own share of the step
                            └── step diff ──▶ every other rank's share
engine loop ◀─ result ── the last stage, wherever it is
"""

from concurrent.futures import Future

from baton.core.errors import BatonError, InternalError
from baton.engine.step import LayerWatch, StepPlan, StepResult
from baton.executor.rank_group import RankGroup
from baton.executor.runner import ModelRunner


class MeshRunner:
    """Implements the engine loop's Runner."""

    def __init__(self, own: ModelRunner, group: RankGroup, *, tells: bool) -> None:
        """`tells`: whether the leader has the result of a step, for its place along dp and ep."""
        self._own = own
        self._group = group
        self._tells = tells

    def __repr__(self) -> str:
        return f"<MeshRunner {self._own!r}, {self._group!r}>"

    def execute(self, plan: StepPlan, watch: LayerWatch | None = None) -> Future[StepResult]:
        """Let all ranks compute a plan, and compute the leader's share of it.

        The result may come later, from the last stage or from another place for sequences. It is an
        InternalError if no token of the step is right: all ranks know it, and go on. What else goes
        wrong ends the instance, since it leaves ranks waiting for each other.
        """
        future = self._group.begin(plan, () if watch is None else watch.ends)
        told: StepResult | BatonError | None
        try:
            told = self._own.compute(plan, watch and self._watched(plan.step, watch))
        except InternalError as error:
            told = error
        except BaseException as error:
            self._group.lose(f"its leader failed in step {plan.step}: {error!r}")
            raise
        if self._tells:
            assert told is not None, "a result that nobody has"
            self._group.tell(plan.step, told)
        return future

    def _watched(self, step: int, watch: LayerWatch) -> LayerWatch:
        def reached(layers: int) -> None:
            self._group.reached((step, layers))
            watch.reached(layers)

        return LayerWatch(watch.ends, reached)
