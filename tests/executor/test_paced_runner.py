"""What is computed late is told late, in order, and not at all if the device fails."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
import torch

from baton.engine.step import LayerWatch, StepPlan, StepResult
from baton.executor.late_device import LateDevice
from baton.executor.paced_runner import PacedRunner

SOON = 20.0
PLAN = StepPlan(3, ())


@dataclass
class GatedEvent:
    """Completes, or fails, when the test says so."""

    gate: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def wait(self) -> None:
        assert self.gate.wait(SOON)
        if self.error is not None:
            raise self.error


class GatedDevice(LateDevice):
    """Hands its events to the test."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[GatedEvent] = []

    def record(self) -> GatedEvent:  # type: ignore[override]
        self.events.append(GatedEvent())
        return self.events[-1]


class Model:
    """Starts two groups of layers, and returns at once."""

    def __init__(self, later: Future[StepResult] | None = None) -> None:
        self.later = later

    def execute(
        self, plan: StepPlan, watch: LayerWatch | None = None
    ) -> StepResult | Future[StepResult]:
        for layers in watch.ends if watch else ():
            watch.reached(layers)
        return self.later or StepResult(plan.step, {})


def test_layers_and_steps_are_told_when_their_events_are_complete() -> None:
    device, told = GatedDevice(), []
    heard = threading.Semaphore(0)

    def reached(layers: int) -> None:
        told.append(layers)
        heard.release()

    runner = PacedRunner(Model(), device)
    outcome = runner.execute(PLAN, LayerWatch((2, 4), reached))
    first, second, end = device.events
    end.gate.set()  # what comes later on the stream does not overtake
    assert (told, outcome.done()) == ([], False)
    first.gate.set()
    assert heard.acquire(timeout=SOON)
    assert (told, outcome.done()) == ([2], False)
    second.gate.set()
    assert outcome.result(SOON) == StepResult(3, {})
    assert told == [2, 4]
    runner.close()


def test_a_result_that_comes_later_still_is_handed_on() -> None:
    device, later = GatedDevice(), Future[StepResult]()
    runner = PacedRunner(Model(later), device)
    outcome = runner.execute(PLAN)
    later.set_result(StepResult(3, {}))
    assert not outcome.done()
    device.events[0].gate.set()
    assert outcome.result(SOON).step == 3
    later = Future()
    outcome = PacedRunner(Model(later), LateDevice()).execute(PLAN)
    later.set_exception(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        outcome.result(SOON)
    runner.close()


def test_a_device_that_fails_fails_the_step() -> None:
    device, told = GatedDevice(), []
    runner = PacedRunner(Model(), device)
    outcome = runner.execute(PLAN, LayerWatch((2,), told.append))
    for event in device.events:
        event.error = RuntimeError("an illegal address")
        event.gate.set()
    with pytest.raises(RuntimeError, match="an illegal address"):
        outcome.result(SOON)
    assert not told
    runner.close()


def test_layers_are_told_of_before_a_step_that_fails_ends() -> None:
    class Failing(Model):
        def execute(self, plan: StepPlan, watch: LayerWatch | None = None) -> StepResult:
            super().execute(plan, watch)
            raise ZeroDivisionError

    device, told = GatedDevice(), []
    ended = threading.Event()

    class LateEvent(GatedEvent):
        def wait(self) -> None:
            ended.wait(0.3)  # for as long as anybody might take to end a step too early

    device.record = LateEvent  # type: ignore[method-assign]
    runner = PacedRunner(Failing(), device)
    with pytest.raises(ZeroDivisionError):
        runner.execute(PLAN, LayerWatch((2,), told.append))
    told.append("ended")
    ended.set()
    runner.close()
    assert told == [2, "ended"]


def test_what_the_model_has_written_is_hidden_until_its_event() -> None:
    device = LateDevice(hides=True)
    memory = device.allocate(32).view(torch.int64)
    memory[1] = 5
    first = device.record()
    memory[3] = 7
    second = device.record()
    assert memory.tolist() == [0, ~5, 0, ~7]
    assert not first.done
    second.wait()
    assert first.done
    assert memory.tolist() == [0, 5, 0, 7]
    first.wait()
    device.check()
    device.record()
    with pytest.raises(AssertionError, match="1 events"):
        device.check()
