"""From token times to figures, and from the figures of several rounds to tables. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine_work import Case

Times = list[list[float]]


@dataclass(slots=True)
class Outcome:
    """One engine at one precision on one model."""

    engine: str
    label: str = ""
    weight_bytes: float = 0.0
    load_s: float = 0.0
    rounds: list[dict[str, float]] = field(default_factory=list)
    """Per round: tokens per second by the name of the case."""
    tokens: list[list[list[int]]] = field(default_factory=list)
    """Outputs in the first round, per case and request."""
    error: str = ""


def tokens_per_s(case: Case, times: Times) -> float:
    """Return the figure of one run.

    decode: output tokens per second while all sequences decode, from the moment when the last has
    its first token until the first has its last. prefill: prompt tokens per second until the first
    token. mix: tokens in and out per second until the last token.
    """
    if case.kind == "decode":
        seconds, tokens = decode_window(times)
        return tokens / seconds
    end = max(request[-1] for request in times)
    tokens = sum(map(len, case.prompts))
    return (tokens + sum(case.outputs) if case.kind == "mix" else tokens) / end


def decode_window(times: Times) -> tuple[float, int]:
    """Return seconds and tokens of the time in which all sequences decode."""
    began = max(request[0] for request in times)
    ended = min(request[-1] for request in times)
    assert ended > began, "the first sequence ended before the last began"
    return ended - began, sum(began < at <= ended for request in times for at in request)


def figures(cases: Sequence[Case], runs: Sequence[Sequence[Times]]) -> dict[str, float]:
    """Return the figures of a round: of each case, the median of its runs."""
    return {
        case.name: statistics.median(tokens_per_s(case, times) for times in found)
        for case, found in zip(cases, runs, strict=True)
    }


def agreement(ours: list[list[list[int]]], theirs: list[list[list[int]]]) -> float:
    """Return the share of output tokens that come before the first difference of their request."""
    same = total = 0
    for our_case, their_case in zip(ours, theirs, strict=True):
        for our, their in zip(our_case, their_case, strict=True):
            total += len(our)
            pairs = zip(our, their, strict=True)
            same += next((i for i, (a, b) in enumerate(pairs) if a != b), len(our))
    return same / total


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the median and, of several, the range."""
    if len(values) == 1:
        return f"{values[0]:,.{digits}f}"
    low, high = min(values), max(values)
    return f"{statistics.median(values):,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def speed_table(outcomes: Sequence[Outcome], cases: Sequence[Case], limits: "Limits") -> str:
    """Return tokens per second of every engine; decode also in ms per step."""
    header = ["engine", *(case.name for case in cases), "of the bandwidth", "load s"]
    lines = [_row(header), _row(["---"] * len(header))]
    for outcome in outcomes:
        cells = [outcome.label or outcome.engine]
        if outcome.error:
            lines.append(_row([*cells, outcome.error]))
            continue
        cells += [_speed(outcome, case) for case in cases]
        cells += [limits.share(outcome), f"{outcome.load_s:.1f}"]
        lines.append(_row(cells))
    return "\n".join(lines)


def ratio_table(outcomes: Sequence[Outcome], cases: Sequence[Case]) -> str:
    """Return how many times as fast as each of the others the first one is, within a round."""
    ours, *others = [outcome for outcome in outcomes if not outcome.error]
    header = [f"{ours.engine} ÷", *(case.name for case in cases)]
    lines = [_row(header), _row(["---"] * len(header))]
    for other in others:
        cells = [other.engine]
        for case in cases:
            rounds = zip(ours.rounds, other.rounds, strict=True)
            cells.append(spread([a[case.name] / b[case.name] for a, b in rounds], 2))
        lines.append(_row(cells))
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Limits:
    """What memory allows."""

    bytes_per_s: float
    """Plain reads, by as many threads as the engines have."""
    weights_per_token: int

    def share(self, outcome: Outcome) -> str:
        """Return the share of the bandwidth that decoding a batch of 1 uses for weights alone."""
        if "decode 1" not in outcome.rounds[0]:
            return "-"
        used = self.weights_per_token * outcome.weight_bytes / self.bytes_per_s
        return spread([100 * used * row["decode 1"] for row in outcome.rounds]) + " %"


def _speed(outcome: Outcome, case: Case) -> str:
    values = [row[case.name] for row in outcome.rounds]
    text = spread(values, 1 if max(values) < 100 else 0)
    if case.kind == "decode":
        text += f" · {1000 * len(case.prompts) / statistics.median(values):.2f} ms"
    return text


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
