"""Outcomes become figures: percentiles, throughput, goodput; as a table and as JSON."""

import math
from collections import Counter
from dataclasses import asdict, dataclass

from measure import Outcome


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of one quantity, in milliseconds."""

    p50: float
    p90: float
    p99: float
    mean: float


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one run."""

    requests: int
    succeeded: int
    errors: dict[str, int]
    seconds: float
    """From the first arrival to the last answer."""
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    goodput_per_s: float
    """Requests per second that met both SLOs."""
    slo_ttft_ms: float
    slo_tpot_ms: float
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    itl_ms: Percentiles | None

    def as_dict(self) -> dict[str, object]:
        """Return plain values, ready for JSON."""
        return asdict(self)


def percentiles(seconds: list[float]) -> Percentiles | None:
    """Return the percentiles by nearest rank: each is a value that was really measured."""
    if not seconds:
        return None
    ranked = sorted(seconds)

    def at(share: float) -> float:
        return 1000 * ranked[max(math.ceil(share * len(ranked)) - 1, 0)]

    return Percentiles(at(0.5), at(0.9), at(0.99), 1000 * sum(ranked) / len(ranked))


def summarise(outcomes: list[Outcome], slo_ttft_ms: float, slo_tpot_ms: float) -> Report:
    """Return the figures of a run with at least one outcome."""
    good = [outcome for outcome in outcomes if not outcome.error and outcome.arrivals]
    errors = Counter(outcome.error for outcome in outcomes if outcome.error)
    if silent := len(outcomes) - len(good) - sum(errors.values()):
        errors["no text"] = silent
    seconds = max(o.ended for o in outcomes) - min(o.started for o in outcomes)
    met = [
        outcome
        for outcome in good
        if 1000 * outcome.ttft <= slo_ttft_ms and 1000 * (outcome.tpot or 0) <= slo_tpot_ms
    ]
    return Report(
        requests=len(outcomes),
        succeeded=len(good),
        errors=dict(errors),
        seconds=seconds,
        requests_per_s=len(good) / seconds,
        input_tokens_per_s=sum(o.input_tokens for o in good) / seconds,
        output_tokens_per_s=sum(o.output_tokens for o in good) / seconds,
        goodput_per_s=len(met) / seconds,
        slo_ttft_ms=slo_ttft_ms,
        slo_tpot_ms=slo_tpot_ms,
        ttft_ms=percentiles([outcome.ttft for outcome in good]),
        tpot_ms=percentiles([o.tpot for o in good if o.tpot is not None]),
        itl_ms=percentiles([gap for outcome in good for gap in outcome.itl]),
    )


def table(report: Report) -> str:
    """Return the figures as text to read."""
    errors = ", ".join(f"{count} x {code}" for code, count in sorted(report.errors.items()))
    lines = [
        f"requests    {report.succeeded} of {report.requests} in {report.seconds:.1f} s"
        + (f"; errors: {errors}" if errors else ""),
        f"throughput  {report.requests_per_s:.2f} requests/s, "
        f"{report.input_tokens_per_s:.0f} tokens/s in, "
        f"{report.output_tokens_per_s:.0f} tokens/s out",
        f"goodput     {report.goodput_per_s:.2f} requests/s with TTFT <= "
        f"{report.slo_ttft_ms:g} ms and TPOT <= {report.slo_tpot_ms:g} ms",
        f"{'ms':10} {'p50':>9} {'p90':>9} {'p99':>9} {'mean':>9}",
    ]
    rows = {"TTFT": report.ttft_ms, "TPOT": report.tpot_ms, "ITL": report.itl_ms}
    for name, row in rows.items():
        if row is not None:
            lines.append(f"{name:10} {row.p50:9.1f} {row.p90:9.1f} {row.p99:9.1f} {row.mean:9.1f}")
    return "\n".join(lines)
