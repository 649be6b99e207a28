"""Steps of an instance whose ranks compute on GPUs: launched on all, and not waited for.

    leader     engine loop ── plan ──▶ its own queue        result of its own: the engine's
                              └─────▶ the other ranks
    follower   control link ── plan ─▶ its own queue        result of its own: has ended, or why not

Every rank chooses all tokens by itself, the same (gpu_model.py), so that none crosses a link.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial

from baton.engine.step import LayerWatch, StepPlan, StepResult
from baton.executor.device import Device
from baton.executor.gpu_runner import GpuRunner
from baton.executor.paced_runner import PacedRunner
from baton.executor.rank_group import RankGroup


class GpuMeshRunner:
    """Implements the engine loop's Runner, on the leader."""

    def __init__(self, own: GpuRunner, group: RankGroup) -> None:
        self._own = own
        self._group = group

    def __repr__(self) -> str:
        return f"<GpuMeshRunner {self._own!r}, {self._group!r}>"

    def execute(self, plan: StepPlan, watch: LayerWatch | None = None) -> Future[StepResult]:
        """Let all ranks launch a step; the result is the leader's own.

        Logits that are not finite all ranks find alike, and go on. What goes wrong otherwise ends
        the instance, since it leaves ranks waiting for each other.
        """
        future = self._group.begin(plan, () if watch is None else watch.ends)
        try:
            own = self._own.execute(plan, watch and self._watched(plan.step, watch))
        except BaseException as error:
            self._lose(plan.step, error)
            raise
        own.add_done_callback(partial(self._ended, plan.step))
        return future

    def _ended(self, step: int, own: Future[StepResult]) -> None:
        error = own.exception()
        if error is None:
            self._group.tell(step, own.result())
        else:
            self._lose(step, error)

    def _lose(self, step: int, error: BaseException) -> None:
        self._group.lose(f"its leader failed in step {step}: {error!r}")

    def _watched(self, step: int, watch: LayerWatch) -> LayerWatch:
        """Other ranks are to have computed, before they digest, what is launched here now."""

        def reached(layers: int) -> None:
            self._group.reached((step, layers))
            watch.reached(layers)

        return LayerWatch(watch.ends, reached)


class GpuFollowing:
    """Launches the steps that a rank which follows is given; `close` it. One thread calls it."""

    def __init__(
        self,
        own: GpuRunner,
        device: Device | None,
        depth: int,
        on_end: Callable[[int, BaseException | None], None],
    ) -> None:
        """`device` is where the pool is that others read, if that is not in host memory.

        `on_end` is told in any thread, step by step, that a step has been computed, or why not.
        """
        self._paced = None if device is None else PacedRunner(own, device)
        self._runner: GpuRunner | PacedRunner = self._paced or own
        self._depth = depth
        self._on_end = on_end
        self._under_way: deque[Future[StepResult]] = deque()

    def __repr__(self) -> str:
        return f"<GpuFollowing {self._runner!r}, {len(self._under_way)} steps under way>"

    def launch(self, plan: StepPlan, watch: LayerWatch | None) -> None:
        """Launch a step; first wait until there are fewer under way than there may be.

        The leader has ended those before that; this rank, which follows, perhaps not yet.
        """
        while len(self._under_way) >= self._depth:
            wait([self._under_way.popleft()])
        future = self._runner.execute(plan, watch)
        self._under_way.append(future)
        future.add_done_callback(partial(self._ended, plan.step))

    def close(self) -> None:
        """Wait for what was launched."""
        wait(self._under_way)
        if self._paced is not None:
            self._paced.close()

    def _ended(self, step: int, future: Future[StepResult]) -> None:
        self._on_end(step, future.exception())
