"""The seam over llguidance: which tokens may come next if the output is to be of a grammar.

A grammar is compiled for one tokenizer. What it costs is bounded by counts of the library's own
steps, and never by a clock: so every process that compiles a grammar, or follows it through the
same tokens, finds the same masks or the same error.
"""

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import llguidance
import numpy as np
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray

from baton.core.errors import InvalidRequest
from baton.core.grammar import MAX_GRAMMAR_BYTES, Grammar
from baton.models.tokenizer import Tokenizer

Bits = NDArray[np.int32]
"""[…, words]: one bit for each token, 32 to the word, the lowest first."""

_KEPT = 64
"""Compiled grammars of one tokenizer that are kept,"""
_KEPT_BYTES = 1 << 20
"""as long as their sources have no more bytes: compiled, they take some hundred times as many."""
_MAX_CHOICES = 1024
_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))

# A run of white space in JSON is at most this long: a model that likes nothing better would else
# fill its output with it.
_JSON: Any = {"whitespace_pattern": r"[ \t\r\n]{1,64}", "lenient": False}

# By the library's own figures at most 20 ms to build the lexer, 3.5 + 1 ms for a mask, and 40 MB of
# lexer states for one sequence. Schemas with 200 properties, ten formats, patterns, 500 names or 64
# tools, on 128,000 tokens, needed less than half of what a mask may take.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_items_in_row=2_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class Matcher:
    """How far one output has come in its grammar; a pure function of the output's tokens."""

    def __init__(
        self, grammar: Grammar, state: llguidance.LLMatcher, eos_token_ids: tuple[int, ...]
    ) -> None:
        """`state` is the library's matcher."""
        self.grammar = grammar
        self.state = state
        self._eos_token_ids = eos_token_ids

    def __repr__(self) -> str:
        return f"<Matcher of a {self.grammar.kind}, {self.state.stop_reason()}>"

    def advance(self, tokens: Sequence[int]) -> None:
        """Take the tokens that the output goes on with; ends of a text are no part of it."""
        self.state.consume_tokens([t for t in tokens if t not in self._eos_token_ids])

    def copy(self) -> "Matcher":
        """Return one that has come as far."""
        return Matcher(self.grammar, self.state.deep_copy(), self._eos_token_ids)

    @property
    def accepts(self) -> bool:
        """Whether the output may end here."""
        accepting: bool = self.state.is_accepting()
        return accepting

    def expect_sound(self, field: str = "grammar") -> None:
        """Raise InvalidRequest if no token can come next, or it takes too much to know."""
        if self.state.is_error() or (self.state.is_stopped() and not self.accepts):
            why = self.state.get_error() or str(self.state.stop_reason())
            raise _refusal(self.grammar, why, field)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps those that were asked for last. Any thread."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int | None = None) -> None:
        """`vocabulary` is how many tokens there are logits of: the tokenizer's, and perhaps more.

        Raises InvalidRequest if the model has no token to end a text with.
        """
        self.eos_token_ids = tokenizer.eos_token_ids
        if not self.eos_token_ids:
            raise InvalidRequest("grammar", "a grammar", "none: this model cannot end a text")
        self.vocabulary = vocabulary or tokenizer.vocab_size
        self._tokenizer = llguidance.LLTokenizer(
            tokenizer.definition, n_vocab=self.vocabulary, eos_token=list(self.eos_token_ids)
        )
        self._threads = llguidance.LLExecutor(_THREADS)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, Matcher] = OrderedDict()
        self._bytes = 0

    def __repr__(self) -> str:
        return f"<GrammarCompiler for {self.vocabulary} tokens, {len(self._compiled)} kept>"

    def matcher(self, grammar: Grammar, field: str = "grammar") -> Matcher:
        """Return a matcher of an output that is yet to begin.

        Raises InvalidRequest that names `field`: the source is no such grammar, is too large, asks
        for what cannot be followed, or leaves nothing to say.
        """
        with self._lock:
            known = self._compiled.get(grammar)
            if known is not None:
                self._compiled.move_to_end(grammar)
        if known is None:
            known = self._compile(grammar, field)
            self._keep(known)
        return known.copy()

    def masks(self, matchers: Sequence[Matcher]) -> Bits:
        """Return the tokens [matchers, words] that may come next, by each matcher.

        An end-of-text token may where the output may end. The interpreter's lock is not held.
        """
        bits = np.zeros((len(matchers), (self.vocabulary + 31) // 32), dtype=np.int32)
        numbered = [(matcher.state, i) for i, matcher in enumerate(matchers)]
        fill_next_token_bitmask_par(self._threads, numbered, bits)
        return bits

    def _compile(self, grammar: Grammar, field: str) -> Matcher:
        try:
            if len(grammar.source.encode()) > MAX_GRAMMAR_BYTES:
                raise InvalidRequest(field, grammar.source, f"up to {MAX_GRAMMAR_BYTES} bytes")
            source = _library_source(grammar)
        except (ValueError, RecursionError) as error:
            raise _refusal(grammar, str(error), field) from None
        state = llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=_LIMITS)
        matcher = Matcher(grammar, state, self.eos_token_ids)
        matcher.expect_sound(field)
        begun = matcher.copy()
        self.masks([begun])
        begun.expect_sound(field)  # that there is no text in the language is found only now
        return matcher

    def _keep(self, matcher: Matcher) -> None:
        with self._lock:
            if matcher.grammar in self._compiled:
                return
            self._compiled[matcher.grammar] = matcher
            self._bytes += len(matcher.grammar.source)
            while len(self._compiled) > _KEPT or self._bytes > _KEPT_BYTES:
                oldest, _ = self._compiled.popitem(last=False)
                self._bytes -= len(oldest.source)


def check_grammar(
    grammar: Grammar, tokenizer: Tokenizer, *, field: str = "response_format"
) -> None:
    """Raise InvalidRequest that names `field` unless outputs can be made to follow the grammar.

    It takes milliseconds, and up to a second for the largest sources, or for the first grammar of a
    tokenizer: call it in a thread.
    """
    _compiler_of(tokenizer).matcher(grammar, field)


@lru_cache(maxsize=16)
def _compiler_of(tokenizer: Tokenizer) -> GrammarCompiler:
    """Return the one compiler of a tokenizer; a process serves few models."""
    return GrammarCompiler(tokenizer)


def _library_source(grammar: Grammar) -> str:
    """Return the grammar as llguidance has it; whether it makes sense is seen when it is compiled.

    Raises ValueError or RecursionError if it is not even JSON where it should be.
    """
    matcher, source = llguidance.LLMatcher, grammar.source
    text: str
    match grammar.kind:
        case "json_schema":
            text = matcher.grammar_from_json_schema(source, overrides=_JSON)
        case "json_object":
            text = matcher.grammar_from_json_schema('{"type": "object"}', overrides=_JSON)
        case "regex":
            text = matcher.grammar_from_regex(source)
        case "lark":
            text = matcher.grammar_from_lark(source)
        case "choice":
            texts = [json.dumps(choice) for choice in _choices(source)]
            text = matcher.grammar_from_lark("start: " + " | ".join(texts))
    return text


def _choices(source: str) -> list[str]:
    choices = json.loads(source)
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("not a list of texts, none of them empty")
    if not 1 <= len(choices) <= _MAX_CHOICES:
        raise ValueError(f"{len(choices)} choices, where there may be 1 to {_MAX_CHOICES}")
    return choices


def _refusal(grammar: Grammar, why: str, field: str) -> InvalidRequest:
    first = why.split("\n<non-verbose")[0].strip().replace("\n", " ")
    allowed = f"a {grammar.kind} that can be followed ({first[:300]})"
    return InvalidRequest(field, grammar.source, allowed)
