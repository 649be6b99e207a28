"""The tokens that sequences sampled last, for steps that were planned before these were known."""

from collections import deque
from dataclasses import replace

from baton.core.ids import SeqId
from baton.engine.step import PENDING, StepPlan, StepResult


class LastTokens:
    """What the last steps sampled, by sequence and position."""

    def __init__(self, depth: int = 1) -> None:
        """`depth` is how many steps may be under way at once: no plan asks for older tokens."""
        self._steps: deque[dict[tuple[SeqId, int], int]] = deque(maxlen=depth - 1)

    def __repr__(self) -> str:
        return f"<LastTokens of {len(self._steps)} steps>"

    def known(self, plan: StepPlan) -> StepPlan:
        """Return the plan with its tokens in it.

        A sequence whose token was never sampled, because that step failed, has ended with that step
        and is left out: whatever it computed would be wrong, and could fail the others' step too.
        """
        if all(s.tokens[0] != PENDING for s in plan.sequences):
            return plan
        sequences = []
        for sequence in plan.sequences:
            if sequence.tokens[0] != PENDING:
                sequences.append(sequence)
            elif (token := self._find(sequence.seq_id, sequence.start)) is not None:
                sequences.append(sequence._replace(tokens=(token,)))
        return replace(plan, sequences=tuple(sequences))

    def take(self, plan: StepPlan, result: StepResult) -> None:
        """Remember what a step sampled; each step that did not fail is taken, in order."""
        if not self._steps.maxlen:
            return
        tokens = result.tokens
        self._steps.appendleft(
            {(s.seq_id, s.end): tokens[s.seq_id] for s in plan.sequences if s.seq_id in tokens}
        )

    def _find(self, seq_id: SeqId, position: int) -> int | None:
        for step in self._steps:
            if (seq_id, position) in step:
                return step[seq_id, position]
        return None
