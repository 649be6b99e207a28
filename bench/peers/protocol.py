"""What the driver and an engine's adapter say to each other: JSON lines over stdin and stdout.

An adapter runs under the interpreter of its engine's own virtual environment, so this file needs
nothing but the standard library. Each line in is answered by one line out, until stdin ends:

    {"action": "convert", "checkpoint": …, "converted": …, "engine": …, "precision": …,
     "threads": 2, "cases": [{"prompts": [[id, …], …], "outputs": [n, …], "repeat": 3}, …]}
    {"action": "load", …, as above}   →   {"label": …, "weight_bytes": …, "load_s": …}
    {"action": "run"}                 →   {"runs": [[{"times": …, "tokens": …}, …], …]}

An action that fails is answered by {"error": …}.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

WARM_UP_PROMPT, WARM_UP_OUTPUT = 40, 4


@dataclass(slots=True)
class Run:
    """What an engine gave for the requests of one case, all of them submitted at once."""

    times: list[list[float]] = field(default_factory=list)
    """Per request: seconds from the submission to each of its tokens."""
    tokens: list[list[int]] = field(default_factory=list)
    """Per request: its output, greedy and without regard to an end-of-text token."""


class Job:
    """What to load, and how."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.checkpoint = Path(fields["checkpoint"])
        """A Hugging Face folder."""
        self.converted = Path(fields["converted"])
        """A folder for what this engine makes of the checkpoint at this precision."""
        self.engine: str = fields["engine"]
        self.exact: bool = fields["precision"] == "float32"
        """float32 throughout; otherwise the best that the engine has."""
        self.threads: int = fields["threads"]
        self.cases: list[dict[str, Any]] = fields["cases"]
        self.most_sequences = max((len(case["prompts"]) for case in self.cases), default=1)
        self.kv_tokens = max((_tokens(case) for case in self.cases), default=1)
        """Room that the largest case needs in the KV cache."""


class Engine(Protocol):
    """One loaded engine."""

    label: str
    """Name, version and number formats."""
    weight_bytes: float
    """Bytes read per weight of the model's matrices."""

    def generate(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> Run:
        """Run the requests to their end; nothing is kept of the prompts before."""
        ...


class Waves:
    """Times of engines that give one token to each sequence of a static batch at a time."""

    def __init__(self, outputs: Sequence[int]) -> None:
        self.run = Run([[] for _ in outputs], [[] for _ in outputs])
        self._outputs = outputs
        self._began = time.perf_counter()

    def add(self, request: int, token: int) -> None:
        """Note a token of a request; what it did not ask for is dropped."""
        if len(self.run.tokens[request]) < self._outputs[request]:
            self.run.tokens[request].append(token)
            self.run.times[request].append(time.perf_counter() - self._began)

    @property
    def finished(self) -> bool:
        """Whether every request has all its tokens."""
        done = zip(self.run.tokens, self._outputs, strict=True)
        return all(len(tokens) >= wanted for tokens, wanted in done)


def serve(load: Callable[[Job], Engine], convert: Callable[[Job], None] | None = None) -> None:
    """Answer every line on stdin; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    adapter = _Adapter(load, convert)
    for line in sys.stdin:
        fields = json.loads(line)
        try:
            answer = getattr(adapter, fields["action"])(fields)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    # Some engines wait for threads of their own at exit, which nobody needs any more.
    os._exit(0)


class _Adapter:
    def __init__(
        self, load: Callable[[Job], Engine], convert: Callable[[Job], None] | None
    ) -> None:
        self._load, self._convert = load, convert
        self._engine: Engine | None = None
        self._cases: list[dict[str, Any]] = []

    def convert(self, fields: dict[str, Any]) -> dict[str, Any]:
        job = Job(fields)
        if self._convert is not None and not job.converted.exists():
            job.converted.parent.mkdir(parents=True, exist_ok=True)
            self._convert(job)
        return {}

    def load(self, fields: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        job = Job(fields)
        engine = self._engine = self._load(job)
        self._cases = job.cases
        load_s = time.perf_counter() - began
        self._warm_up(engine)
        return {"label": engine.label, "weight_bytes": engine.weight_bytes, "load_s": load_s}

    def _warm_up(self, engine: Engine) -> None:
        """Let the engine meet every batch size, shortly."""
        for case in self._cases:
            short = [prompt[:WARM_UP_PROMPT] for prompt in case["prompts"]]
            engine.generate(short, [min(n, WARM_UP_OUTPUT) for n in case["outputs"]])

    def run(self, fields: dict[str, Any]) -> dict[str, Any]:
        engine = self._engine
        assert engine is not None, "nothing is loaded"
        runs = []
        for case in self._cases:
            prompts, outputs = case["prompts"], case["outputs"]
            repeats = range(case["repeat"])
            runs.append([asdict(engine.generate(prompts, outputs)) for _ in repeats])
        return {"runs": runs}


def _tokens(case: dict[str, Any]) -> int:
    return sum(map(len, case["prompts"])) + sum(case["outputs"])
