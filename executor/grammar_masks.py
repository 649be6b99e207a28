"""Follows the outputs that have a grammar, in a thread beside the model's.

    model's thread     begin(rows) ── forward pass ── result() ── sampling
    this one's               └── take the last tokens, what may come next ──┘

Nothing here is state of its own: how far an output has come follows from its tokens, and is found
again from the plan whenever a sequence did not sample in the step before (see history.py).
"""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from baton.core.errors import InvalidRequest
from baton.core.grammar import Grammar
from baton.core.ids import SeqId
from baton.engine.step import SamplingContext, ScheduledSequence
from baton.executor.batch import SampledRow
from baton.executor.grammar_mask import GrammarMask

if TYPE_CHECKING:  # at run time only who has a grammar needs its library
    from baton.models.grammar import GrammarCompiler, Matcher


@dataclass(frozen=True, slots=True)
class StepMasks:
    """What the grammars of a step allow."""

    masks: dict[SeqId, GrammarMask] = field(default_factory=dict)
    failed: dict[SeqId, InvalidRequest] = field(default_factory=dict)
    """Those that cannot be followed any further."""


class GrammarMasks:
    """The matchers of the sequences of the last steps; used from one thread."""

    def __init__(self, compiler: "Callable[[], GrammarCompiler]", depth: int = 1) -> None:
        """`compiler` is asked in the thread here, once there is a grammar.

        `depth` is how many steps may be under way at once.
        """
        self._compiler = compiler
        self._kept: deque[dict[SeqId, Matcher | InvalidRequest]] = deque(maxlen=depth)
        self._depth = self._quiet = depth
        """For so many steps there has been no grammar."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")

    def __repr__(self) -> str:
        return f"<GrammarMasks, {sum(map(len, self._kept))} matchers>"

    def begin(self, sequences: Iterable[ScheduledSequence]) -> Future[StepMasks] | None:
        """Begin to follow a step, whose tokens are known; None if there is nothing to do.

        Called for every step, in order.
        """
        rows = [
            SampledRow(s.seq_id, s.end, s.sampling, s.tokens, s.context)
            for s in sequences
            if s.samples and s.sampling.grammar is not None
        ]
        self._quiet = 0 if rows else self._quiet + 1
        if self._quiet > self._depth:
            return None
        return self._thread.submit(self._follow, rows)

    def _follow(self, rows: list[SampledRow]) -> StepMasks:
        found = {row.seq_id: self._advanced(row) for row in rows}
        self._kept.appendleft(found)
        failed = {i: found_ for i, found_ in found.items() if isinstance(found_, InvalidRequest)}
        step = StepMasks(failed=failed)
        if matchers := {i: m for i, m in found.items() if not isinstance(m, InvalidRequest)}:
            self._allow(matchers, step)
        return step

    def _allow(self, matchers: "dict[SeqId, Matcher]", step: StepMasks) -> None:
        compiler = self._compiler()
        table = compiler.masks(list(matchers.values()))
        for (seq_id, matcher), bits in zip(matchers.items(), table, strict=True):
            try:
                matcher.expect_sound()
            except InvalidRequest as error:
                step.failed[seq_id] = error
                continue
            step.masks[seq_id] = GrammarMask(
                bits, matcher.accepts, compiler.eos_token_ids, compiler.vocabulary
            )

    def _advanced(self, row: SampledRow) -> "Matcher | InvalidRequest":
        """Return the row's matcher at its position, or why there is none."""
        grammar, context = row.sampling.grammar, row.context
        assert grammar is not None, row
        assert context is not None, row
        before = row.position - len(row.tokens)
        try:
            matcher = self._matcher(row.seq_id, grammar, context, before)
        except InvalidRequest as error:
            return error
        matcher.advance(row.tokens[max(0, context.prompt_len - before) :])
        return matcher

    def _matcher(
        self, seq_id: SeqId, grammar: Grammar, context: SamplingContext, before: int
    ) -> "Matcher":
        """Return the matcher of a sequence's first `before` tokens: the one that is kept, or new.

        Raises the InvalidRequest that it has led to.
        """
        if context.before is not None:
            assert len(context.before) == before, f"{len(context.before)} tokens before {before}"
            matcher = self._compiler().matcher(grammar)
            matcher.advance(context.before[context.prompt_len :])
            return matcher
        kept = next(matchers[seq_id] for matchers in self._kept if seq_id in matchers)
        if isinstance(kept, InvalidRequest):
            raise kept
        return kept
