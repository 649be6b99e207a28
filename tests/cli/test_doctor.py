"""Every check of `baton doctor` has a section in the documentation, and says so."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from baton.cli import doctor
from baton.cli.doctor import Finding, Verdict

ROOT = Path(__file__).resolve().parents[2]


def sections() -> list[str]:
    text = (ROOT / doctor.PAGE).read_text()
    return re.findall(r"^## (.+)$", text, re.MULTILINE)


def test_every_check_has_a_section_and_every_section_a_check() -> None:
    assert sections() == list(doctor._CHECKS)
    assert doctor.page_of("/dev/shm") == "docs/doctor.md#devshm"
    assert doctor.page_of("CPU cores") == "docs/doctor.md#cpu-cores"


@pytest.mark.parametrize(("verdict", "usable"), [(Verdict.NOTE, True), (Verdict.BAD, False)])
def test_what_is_not_as_it_should_be_tells_its_page(
    monkeypatch: pytest.MonkeyPatch, verdict: Verdict, usable: bool
) -> None:
    checks = {"memory": lambda: Finding("[none]", "free some", verdict)}
    monkeypatch.setattr(doctor, "_CHECKS", checks)
    console = Console(record=True, width=120, file=io.StringIO())
    assert doctor.report(console) is usable
    said = console.export_text()
    assert "[none]" in said
    assert "→ docs/doctor.md#memory" in said


def test_a_check_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise OSError("no such library")

    monkeypatch.setattr(doctor, "_CHECKS", {"UCX": broken})
    [(what, found)] = doctor.examine()
    assert (what, found.verdict) == ("UCX", Verdict.BAD)
    assert found.here == "OSError: no such library"
