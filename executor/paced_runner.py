"""Tells of layers and steps when a device has computed them, not when their kernels were started.

    model thread   layers of group 1 │ group 2 │ … │ end     started, each followed by an event
    device             group 1 ───────▶ group 2 ──▶ …        computes, some time behind
    waiting thread              reached(1)    reached(2)     told once the event has completed

So nobody offers, digests or reads KV that is not there yet, whether kernels are started one by one
or as graphs; and nothing else waits: the host runs ahead, and copies out need not wait for all that
was started meanwhile.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from baton.engine.step import LayerWatch, StepPlan, StepResult
from baton.executor.device import Device, Event
from baton.executor.engine_loop import Runner


class PacedRunner:
    """Implements `Runner` over another whose model computes on `device`, on the current stream."""

    def __init__(self, runner: Runner, device: Device) -> None:
        self._runner = runner
        self._device = device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device-events")

    def __repr__(self) -> str:
        return f"<PacedRunner {self._runner!r} on {self._device!r}>"

    def execute(self, plan: StepPlan, watch: LayerWatch | None = None) -> Future[StepResult]:
        """Start a step; the result comes once its KV is in the pool. Raises what `runner` does."""
        try:
            result = self._runner.execute(plan, watch and self._paced(watch))
        except BaseException:
            self._thread.submit(int).result()  # nobody hears of layers of a step that has ended
            raise
        outcome: Future[StepResult] = Future()
        end = self._after(self._device.record(), lambda: self._hand_on(result, outcome))
        end.add_done_callback(lambda done: _fail(outcome, done.exception()))
        return outcome

    def close(self) -> None:
        """End the thread; every step has ended."""
        self._thread.shutdown()

    def _paced(self, watch: LayerWatch) -> LayerWatch:
        def reached(layers: int) -> None:
            # If the device fails here, it does so at the step's end too.
            self._after(self._device.record(), lambda: watch.reached(layers))

        return LayerWatch(watch.ends, reached)

    def _after(self, event: Event, then: Callable[[], object]) -> Future[None]:
        """Call `then` when `event` has completed; events of one stream do so in order."""

        def wait() -> None:
            event.wait()
            then()

        return self._thread.submit(wait)

    def _hand_on(
        self, result: StepResult | Future[StepResult], outcome: Future[StepResult]
    ) -> None:
        """Set `outcome` to what a step's result is, or will be; in the thread, so that layers which
        are reached before that are told of before.
        """
        if isinstance(result, Future):
            result.add_done_callback(lambda ended: self._thread.submit(_set, outcome, ended))
        else:
            outcome.set_result(result)


def _set(outcome: Future[StepResult], result: Future[StepResult]) -> None:
    error = result.exception()
    if error is None:
        outcome.set_result(result.result())
    else:
        outcome.set_exception(error)


def _fail(outcome: Future[StepResult], error: BaseException | None) -> None:
    if error is not None:
        outcome.set_exception(error)
