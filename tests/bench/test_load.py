import itertools
import json
import random

import pytest


def test_events_are_found_however_the_bytes_are_cut(bench):
    parser_of = bench("measure").EventParser
    text = 'data: {"a": 1}\n\n: a comment\n\ndata: \u00e9\r\n\r\ndata: [DONE]\n\n'.encode()
    expected = ['{"a": 1}', "\u00e9", "[DONE]"]
    for seed in range(50):
        rng = random.Random(seed)
        parser, found, rest = parser_of(), [], text
        while rest:
            size = rng.randint(1, 9)
            found += parser.feed(rest[:size])
            rest = rest[size:]
        assert found == expected


def test_percentiles_are_by_nearest_rank(bench):
    row = bench("report").percentiles([n / 1000 for n in range(1, 101)])
    assert (row.p50, row.p90, row.p99) == pytest.approx((50, 90, 99))
    assert row.mean == pytest.approx(50.5)
    assert bench("report").percentiles([]) is None
    assert bench("report").percentiles([0.5]).p99 == 500


def test_figures_of_known_outcomes(bench):
    measure, report, workload = bench("measure"), bench("report"), bench("workload")
    job = workload.Job(0, 0.0, 10, 3)
    fast = measure.Outcome(job, 0.0, [0.1, 0.2, 0.4], 1.0, 10, 3)
    slow = measure.Outcome(job, 1.0, [3.0, 3.1], 4.0, 20, 2)
    failed = measure.Outcome(job, 0.0, [], 2.0, error="overloaded")
    silent = measure.Outcome(job, 0.0, [], 2.0)
    found = report.summarise([fast, slow, failed, silent], slo_ttft_ms=500, slo_tpot_ms=200)
    assert (found.requests, found.succeeded) == (4, 2)
    assert found.errors == {"overloaded": 1, "no text": 1}
    assert found.seconds == 4.0
    assert found.input_tokens_per_s == pytest.approx(30 / 4)
    assert found.output_tokens_per_s == pytest.approx(5 / 4)
    assert found.goodput_per_s == pytest.approx(1 / 4), "the slow one misses its TTFT"
    assert found.ttft_ms.p50 == pytest.approx(100)
    assert found.ttft_ms.p99 == pytest.approx(2000)
    assert fast.tpot == pytest.approx(0.15)
    assert fast.itl == pytest.approx([0.1, 0.2])
    text = report.table(found)
    assert "2 of 4" in text
    assert "1 x overloaded" in text


def test_a_workload_is_the_same_for_the_same_seed_and_within_its_limits(bench):
    workload = bench("workload")
    inputs, outputs = workload.Lengths(100, 1.0, 10, 300), workload.Lengths(20, 0.5, 1, 40)
    pairs = workload.drawn(500, inputs, outputs, seed=3)
    assert pairs == workload.drawn(500, inputs, outputs, seed=3)
    assert pairs != workload.drawn(500, inputs, outputs, seed=4)
    assert all(10 <= i <= 300 and 1 <= o <= 40 for i, o in pairs)
    assert 80 < sorted(i for i, _ in pairs)[250] < 125
    job = workload.jobs(pairs, None, 3)[7]
    assert job.prompt(50, 1) == job.prompt(50, 1) != job.prompt(50, 2)
    assert len(job.prompt(50, 1)) == job.input_length
    assert set(job.prompt(50, 1)) <= set(range(1, 50))


def test_poisson_arrivals_have_the_rate_asked_for(bench):
    workload = bench("workload")
    jobs = workload.jobs([(1, 1)] * 4000, 8.0, seed=1)
    gaps = [b.at - a.at for a, b in itertools.pairwise(jobs)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 8, rel=0.1)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.15), "exponential: as wide as its mean"


def test_traces_are_replayed(bench, tmp_path):
    workload = bench("workload")
    lengths = workload.Lengths(1, 1.0, 2, 50)
    csv = tmp_path / "trace.csv"
    csv.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nx,30,7\nx,900,1\n")
    assert workload.replayed(csv, 2, lengths, lengths) == [(30, 7), (50, 2)]
    lines = tmp_path / "trace.jsonl"
    rows = [{"input_length": 5, "output_length": 6}, {"input_length": 7, "output_length": 8}]
    lines.write_text("\n".join(json.dumps(row) for row in rows))
    assert workload.replayed(lines, 1, lengths, lengths) == [(5, 6)]
    with pytest.raises(SystemExit, match="2 rows"):
        workload.replayed(lines, 3, lengths, lengths)
    csv.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="columns"):
        workload.replayed(csv, 1, lengths, lengths)


def test_ratios_are_taken_within_a_round(bench):
    run, report = bench("run"), bench("report")
    row = report.Percentiles(1.0, 1.0, 1.0, 1.0)

    def made(speed: float) -> object:
        return report.Report(1, 1, {}, 1.0, 1.0, 1.0, speed, 0.0, 1.0, 1.0, row, None, None)

    reports = {"ours": [made(20), made(2)], "base": [made(10), made(1)]}
    line = next(line for line in run.ratios(reports).splitlines() if "output tokens" in line)
    assert line.endswith("2.00 (2.00 to 2.00)")
