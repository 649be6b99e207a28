"""The grammars that requests ask one process for, compiled before they hold up a step."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from baton.core.errors import DeadlineExceeded, Overloaded
from baton.core.grammar import Grammar
from baton.models.grammar import GrammarCompiler
from baton.models.tokenizer import load_tokenizer

_MAX_WAITING = 64
"""Grammars that may wait to be compiled."""
_LIMIT_S = 30.0
"""From a request's arrival to its grammar being compiled, the first one's tokenizer included."""


class Grammars:
    """One model's compiler, made when it is first wanted; `prepare` from one event loop."""

    def __init__(self, model_dir: Path, vocabulary: int) -> None:
        """`vocabulary` is how many tokens the model has logits of."""
        self._model_dir = model_dir
        self._vocabulary = vocabulary
        self._compiler: GrammarCompiler | None = None
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compiling")
        self._waiting = 0

    def __repr__(self) -> str:
        return f"<Grammars of {self._model_dir}, {self._compiler}>"

    def compiler(self) -> GrammarCompiler:
        """Return the compiler, from any thread; it takes about two seconds the first time.

        Raises InvalidConfig if there is no tokenizer beside the model.
        """
        with self._lock:
            if self._compiler is None:
                tokenizer = load_tokenizer(self._model_dir)
                self._compiler = GrammarCompiler(tokenizer, self._vocabulary)
            return self._compiler

    async def prepare(self, grammar: Grammar | None) -> None:
        """Compile a grammar, if there is one, so that no step has to wait for that.

        Raises InvalidRequest if it cannot be followed, Overloaded if too many wait, and
        DeadlineExceeded.
        """
        if grammar is None:
            return
        if self._waiting >= _MAX_WAITING:
            raise Overloaded(f"{self._waiting} grammars wait to be compiled")
        loop = asyncio.get_running_loop()
        self._waiting += 1
        work = loop.run_in_executor(self._thread, self._compile, grammar)
        work.add_done_callback(self._compiled)
        try:
            async with asyncio.timeout(_LIMIT_S):
                await asyncio.shield(work)
        except TimeoutError:
            raise DeadlineExceeded(f"the grammar was not compiled in {_LIMIT_S:g} s") from None

    def _compile(self, grammar: Grammar) -> None:
        self.compiler().matcher(grammar)

    def _compiled(self, work: asyncio.Future[None]) -> None:
        self._waiting -= 1
        if not work.cancelled():
            work.exception()  # who has stopped waiting does not hear of it
