"""What is kept of a campaign, and what is said of it."""

from pathlib import Path

from .chaos_results import Result, read, summary, table
from .play import Report


def result(seed: int, *struck: str, gap_s: float = 1.0, problem: str = "") -> Result:
    report = Report(struck=list(struck), gap_s=gap_s, seconds=5.0)
    report.problems += [problem] * bool(problem)
    return Result(seed, report, load=1.0)


def test_what_a_file_has_is_read_again(tmp_path: Path) -> None:
    kept = [result(3, "kill_decode"), result(4, "cut", problem="1 request is lost")]
    kept[0].report.noticed_s = 0.25
    path = tmp_path / "results"
    assert read(path) == []
    path.write_text("".join(one.line() for one in kept))
    assert read(path) == kept


def test_the_table_has_what_a_fault_alone_has_cost() -> None:
    results = [result(seed, "kill_decode", gap_s=seed / 10) for seed in range(1, 5)]
    results[0].report.whole_s = 4.0
    results += [
        result(5, "the_controllers_node", "cut", gap_s=3.0),
        result(6, "cut", gap_s=2.0),
        result(7, "drain", "flip"),
        result(8, "drain", gap_s=9.0, problem="other tokens"),
        result(9),
    ]
    assert table(results).splitlines()[2:] == [
        "| cut | 1 | 2.0, 2.0 | - | - |",
        "| cut, controller there | 1 | 3.0, 3.0 | - | - |",
        "| kill decode | 4 | 0.2, 0.4 | - | 4.0, 4.0 |",
    ]


def test_the_summary_counts_every_strike_and_every_failure() -> None:
    results = [result(1, "drain", "flip"), result(2, "drain", problem="other tokens")]
    assert "drain 2, flip 1" in summary(results)
    assert "1 of 2 passed" in summary(results)
    assert "0 of 0 passed" in summary([])
