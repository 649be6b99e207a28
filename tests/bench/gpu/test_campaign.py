"""A stage that fails takes neither its figures nor the next stage with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import campaign
from bench.gpu.campaign import STAGES, Stage, run_stages
from bench.gpu.records import Records, cases, figures, is_complete

POOR = "tests.bench.gpu.poor_stages"
ROOT = Path(__file__).resolve().parents[3]


def run(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, budget_s: float = 200
) -> Records:
    """Run a poor stage, and then one that goes well."""
    monkeypatch.setenv("POOR_STAGE", how)
    monkeypatch.setattr(campaign, "GRACE_S", 0.0)
    out = tmp_path / "found.jsonl"
    records = Records(out)
    poor = Stage("poor", POOR, budget_s, "goes wrong")
    run_stages((poor,), records, out, "tiny", minutes=10)
    monkeypatch.setenv("POOR_STAGE", "well")
    run_stages((Stage("next", POOR, 200, "goes well"),), records, out, "tiny", minutes=10)
    assert is_complete(records.read(), "next")
    return records


def test_an_error_costs_its_case_and_is_tried_again(tmp_path, monkeypatch):
    records = run(tmp_path, "raise", monkeypatch)
    assert list(figures(records.read(), "poor")) == ["first", "third"]
    assert cases(records.read(), "poor")["second"]["error"] == "ValueError: a plain mistake"
    lines = len(records.read())
    out = tmp_path / "found.jsonl"
    run_stages((Stage("poor", POOR, 200, ""),), records, out, "tiny", minutes=10)
    assert is_complete(records.read(), "poor")
    assert len(records.read()) == lines + 2, "the case that failed, and the stage's end"
    run_stages((Stage("poor", POOR, 200, ""),), records, out, "tiny", minutes=10)
    assert len(records.read()) == lines + 2, "what is complete is not run again"


def test_a_missing_module_is_named(tmp_path, monkeypatch):
    records = run(tmp_path, "import", monkeypatch)
    found = cases(records.read(), "poor")["second"]["error"]
    assert found == "skipped: no module nowhere_to_be_found"
    assert "third" in figures(records.read(), "poor")


@pytest.mark.parametrize(("how", "budget_s"), [("die", 200), ("hang", 6)])
def test_a_process_that_dies_or_hangs_leaves_what_it_measured(how, budget_s, tmp_path, monkeypatch):
    records = run(tmp_path, how, monkeypatch, budget_s)
    end = records.read()
    assert not is_complete(end, "poor")
    last = next(r["ended"] for r in end if r["stage"] == "poor" and "ended" in r)
    assert last == ("exit status -11" if how == "die" else "killed after 6 s")


def test_a_stage_that_has_no_time_left_is_not_begun(tmp_path):
    out = tmp_path / "found.jsonl"
    records = Records(out)
    run_stages((Stage("late", POOR, 200, ""),), records, out, "tiny", minutes=0)
    assert records.read() == [
        {"stage": "late", "ended": "not begun: the 0 minutes were spent"},
    ]


def test_all_stages_fit_ten_minutes():
    assert sum(stage.budget_s for stage in STAGES) + campaign.GRACE_S <= 600


def test_the_command_measures_and_does_not_mix_machines(tmp_path):
    out = tmp_path / "found.jsonl"
    command = [sys.executable, "-m", "bench.gpu", "--scale", "tiny", "--only", "ceilings"]
    command += ["--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "| read |" in found.stdout
    assert is_complete(Records(out).read(), "ceilings")
    out.write_text(out.read_text().replace('"torch": "', '"torch": "other '))
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 1
    assert "give another --out" in found.stderr
