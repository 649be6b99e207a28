"""Where a prompt is computed: handed over by prefill, or here, where that is cheaper.

Both ways are priced in seconds, by what was measured lately:

    here    what waits here + the tokens that this instance lacks, each at its own cost; and for
            every sequence that decodes here the time that it is held up by it, times a weight:
            a pause in a stream is worse than a wait before it
    prefill what we have under way there + the tokens that it lacks + what a handover adds
            (handshake, and reads that compute does not hide)

Prefill's cache is not known here: it is taken to lack what this instance lacks. Before anything
was measured, prefill computes: that is what it is there for. Each prompt that stays here makes
what is known of prefill count a little less, until it is tried again: one bad moment is not for
ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from baton.core.ids import InstanceId
from baton.core.moving_average import MovingAverage
from baton.core.trace import HandoverTrace
from baton.engine.step import Outlook

_FADING = 0.95
"""What is left of an estimate of prefill after a prompt that stayed here because of it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision and its reasons, in seconds; None is what could not be estimated."""

    here: bool
    here_s: float | None = None
    """Until the first token, if the prompt is computed here."""
    disturbance_s: float | None = None
    """By how much that would hold up the sequences that decode here, all together."""
    prefill_s: float | None = None
    """Until the first token, if the prompt is handed over."""

    @property
    def estimate_s(self) -> float | None:
        """What the chosen way was thought to take."""
        return self.here_s if self.here else self.prefill_s


class _Prefill:
    """What is known of one prefill instance."""

    def __init__(self) -> None:
        self.token_s = MovingAverage()
        self.overhead_s = MovingAverage()
        self.under_way = 0


class Placement:
    """Learns from what happened, and decides; no clock, no I/O."""

    def __init__(self, disturbance_weight: float = 1.0) -> None:
        self._weight = disturbance_weight
        self._here = MovingAverage()
        self._decode_step = MovingAverage()
        self._prefill: dict[InstanceId, _Prefill] = {}
        self.computed_here = 0
        """Prompts that were decided to be computed here."""
        self.handed_over = 0

    def __repr__(self) -> str:
        return f"Placement(token here={self._here.value}, {len(self._prefill)} prefill instances)"

    # ---- learn ------------------------------------------------------------------------------

    def stepped(self, seconds: float, prompt_tokens: int) -> None:
        """A step of this instance took so long, with so many tokens of prompts in it."""
        if prompt_tokens == 0:
            self._decode_step.add(seconds)
        else:
            self._here.add(max(0.0, seconds - (self._decode_step.value or 0.0)) / prompt_tokens)

    def sent(self, prefill: InstanceId, tokens: int) -> None:
        """A prompt of `tokens` was sent to a prefill instance; `ended` follows."""
        self._prefill.setdefault(prefill, _Prefill()).under_way += tokens

    def ended(self, prefill: InstanceId, tokens: int, trace: HandoverTrace) -> None:
        """An attempt to have it handed over has ended, well or not."""
        known = self._prefill[prefill]
        known.under_way -= tokens
        assert known.under_way >= 0, f"{prefill}: more has ended than was sent"
        if trace.outcome != "ok":
            return
        computed = tokens - trace.cached_tokens
        if computed > 0:
            known.token_s.add(trace.compute_s / computed)
        known.overhead_s.add(trace.handshake_s + trace.exposed_s)

    def keep_only(self, prefill: Sequence[InstanceId]) -> None:
        """Forget instances that are no longer named and owe nothing."""
        for name in [n for n, known in self._prefill.items() if not known.under_way]:
            if name not in prefill:
                del self._prefill[name]

    # ---- decide -----------------------------------------------------------------------------

    def decide(self, prefill: InstanceId, outlook: Outlook) -> Verdict:
        """Say where a prompt is computed: here, or by the prefill instance that is preferred."""
        verdict = self._weigh(prefill, outlook)
        self.computed_here += verdict.here
        self.handed_over += not verdict.here
        if verdict.here and (known := self._prefill.get(prefill)):
            known.token_s.fade(_FADING)
            known.overhead_s.fade(_FADING)
        return verdict

    def _weigh(self, prefill: InstanceId, outlook: Outlook) -> Verdict:
        known = self._prefill.get(prefill, _Prefill())
        there, overhead_s = known.token_s.value, known.overhead_s.value
        here = self._here.value if self._here.value is not None else there
        if here is None or there is None or overhead_s is None:
            return Verdict(here=False)
        here_s = here * (outlook.waiting + outlook.missing)
        disturbance_s = here * outlook.missing * outlook.running
        prefill_s = there * (known.under_way + outlook.missing) + overhead_s
        stays = here_s + self._weight * disturbance_s < prefill_s
        return Verdict(stays, here_s, disturbance_s, prefill_s)
