"""Measures where a decode instance's part of one request's time to first token goes."""

from dataclasses import replace

from baton.core.clock import Clock
from baton.core.spans import DecodeSpans, HandoverWait


class FirstTokenWatch:
    """A stopwatch whose laps are spans: each begins where the last one ended, so none is missed.

    arrived ─decide─▶ { ─failed handovers─▶ } ─(the wait for one that landed)─▶ ─admit─▶ ready
                                              ─local queue─▶ ─local compute─▶ ─admit─▶ ready
    """

    def __init__(self, clock: Clock) -> None:
        """The request has arrived."""
        self._clock = clock
        self._last = clock()
        self._spans = DecodeSpans()

    def __repr__(self) -> str:
        return f"FirstTokenWatch({self._spans})"

    def decided(self) -> None:
        """It is known where the prompt is computed."""
        self._spans = replace(self._spans, decide_s=self._lap())

    def failed(self) -> None:
        """An attempt to have it handed over has failed."""
        failed_s = self._spans.failed_handovers_s + self._lap()
        self._spans = replace(self._spans, failed_handovers_s=failed_s)

    def landed(self, wait: HandoverWait) -> None:
        """A handover has landed; what is left of the time since is admission's."""
        before_s = self._spans.total_s
        self._spans = wait.put_into(self._spans)
        self._last += self._spans.total_s - before_s

    def computing(self) -> None:
        """The first step with the prompt is about to run here."""
        self._spans = replace(self._spans, local_queue_s=self._lap())

    def computed(self) -> None:
        """The prompt has been computed here."""
        self._spans = replace(self._spans, local_compute_s=self._lap())

    def ready(self) -> DecodeSpans:
        """The first token is about to be handed to the outbox; return all spans but that one."""
        self._spans = replace(self._spans, admit_s=self._lap())
        return self._spans

    def _lap(self) -> float:
        last, self._last = self._last, self._clock()
        return max(0.0, self._last - last)
