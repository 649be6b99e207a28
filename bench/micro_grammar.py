"""What following a JSON schema costs a step: beside the model, and what of it the step waits for.

    python bench/micro_grammar.py --rows 1 8 32

The same sequences decode with and without a schema, step by step in turn, on the native executor
where there is one. `masks` is what the thread beside the model computes for a step; `waits` is what
of that the step still waits for when its logits are there.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path

from rich.console import Console
from rich.table import Table

from baton.core.grammar import Grammar
from baton.core.ids import BlockId, SeqId
from baton.core.request import SamplingParams
from baton.engine.step import SamplingContext, ScheduledSequence, StepPlan
from baton.executor.grammar_masks import GrammarMasks, StepMasks
from baton.executor.grammars import Grammars
from baton.executor.kv_cache import KVCache, make_layout
from baton.executor.runner import ModelRunner
from baton.models.loader import Model, load_model

DEMO_MODEL = Path(__file__).parents[1] / "demo_model" / "main"
PROMPT = 64
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "size": {"type": "integer", "minimum": 0, "maximum": 4096},
        "kind": {"enum": ["file", "folder", "link"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 1000}
"""Of outputs that do not end while they are measured."""


class Timed(GrammarMasks):
    """Remembers what the masks of each step took, and what was waited for them."""

    def __init__(self, grammars: Grammars) -> None:
        super().__init__(grammars.compiler)
        self.masks: list[float] = []
        self.waits: list[float] = []

    def begin(self, sequences: Iterable[ScheduledSequence]) -> Future[StepMasks] | None:
        """See GrammarMasks."""
        began, ended = time.perf_counter(), list[float]()
        found = super().begin(sequences)
        if found is None:
            return None
        found.add_done_callback(lambda _: ended.append(time.perf_counter()))
        inner = found.result

        def result(timeout: float | None = None) -> StepMasks:
            asked = time.perf_counter()
            masks = inner(timeout)
            self.waits.append(time.perf_counter() - asked)
            self.masks.append(ended[0] - began if ended else self.waits[-1])
            return masks

        found.result = result  # type: ignore[method-assign]
        return found


class Decoding:
    """Sequences that decode, step after step."""

    def __init__(
        self, model: Model, rows: int, grammars: Grammars, grammar: Grammar | None
    ) -> None:
        layout = make_layout(model.spec, 16, model.dtype)
        self._each = layout.blocks_for(2048)
        self._runner = ModelRunner(model, KVCache(layout, rows * self._each))
        self.timed = Timed(grammars)
        self._runner._grammars = self.timed  # in place of its own, which is not timed
        # Warm: sequences of one grammar draw apart.
        self._sampling = [SamplingParams(0.8, 50, seed=i, grammar=grammar) for i in range(rows)]
        self._texts = [[(7 * i + row) % 500 + 1 for i in range(PROMPT)] for row in range(rows)]
        self._steps = 0
        self.step(PROMPT)

    def step(self, new: int = 1) -> float:
        """Compute the last `new` tokens of each and sample; return the seconds."""
        parts = tuple(self._part(row, new) for row in range(len(self._texts)))
        began = time.perf_counter()
        result = self._runner.execute(StepPlan(self._steps, parts))
        took = time.perf_counter() - began
        assert not result.failed, result.failed
        for row, text in enumerate(self._texts):
            text.append(result.tokens[SeqId(row)])
        self._steps += 1
        return took

    def _part(self, row: int, new: int) -> ScheduledSequence:
        text, sampling = self._texts[row], self._sampling[row]
        start = len(text) - new
        table = tuple(BlockId(row * self._each + i) for i in range(self._each))
        context = None
        if not sampling.plain:
            context = SamplingContext(PROMPT, (0,), tuple(text[:start]) if new > 1 else None)
        new_tokens = tuple(text[start:])
        return ScheduledSequence(SeqId(row), new_tokens, start, table, True, sampling, context)


def main() -> None:
    """Measure and print the tables."""
    options = _arguments()
    model = load_model(options.model, threads=1)
    grammars = Grammars(options.model, model.spec.vocab_size)
    grammar = Grammar("json_schema", json.dumps(SCHEMA))
    began = time.perf_counter()
    compiler = grammars.compiler()
    told = time.perf_counter()
    compiler.matcher(grammar)
    compiled = time.perf_counter() - told
    head = f"tokenizer {(told - began) * 1e3:.0f} ms, schema {compiled * 1e3:.1f} ms, once"
    table = Table(
        *("sequences", "", "step ms", "with schema ms", "ratio", "masks ms", "waits ms"),
        title=head,
    )
    for rows in options.rows:
        plain = Decoding(model, rows, grammars, None)
        schema = Decoding(model, rows, grammars, grammar)
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(options.repeat):
            for decoding, taken in zip((plain, schema), times, strict=True):
                taken.append(decoding.step())
        shown = (*times, schema.timed.masks, schema.timed.waits)
        for name, figure in (("best", min), ("median", statistics.median)):
            one, two, masks, waits = (figure(seconds) * 1e3 for seconds in shown)
            cells = f"{one:.2f}", f"{two:.2f}", f"{two / one:.2f}", f"{masks:.2f}", f"{waits:.3f}"
            table.add_row(str(rows), name, *cells)
    Console().print(f"{model.executor}, vocabulary {model.spec.vocab_size}", table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeat", type=int, default=400)
    return parser.parse_args()


if __name__ == "__main__":
    main()
