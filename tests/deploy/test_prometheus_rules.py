"""Alert rules name what a gateway really exports, and each has a section of the runbook."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.utils import floatToGoString

from baton.core import errors
from baton.core.errors import BatonError
from baton.core.metric_table import KV_STATES, METRICS
from baton.core.request import FinishReason

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
SUFFIXES = ("_bucket", "_count", "_sum")
OF_PROMETHEUS = {"up"}


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def alerts(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rule for rule in rules if "alert" in rule]


@pytest.fixture(scope="module")
def exported() -> dict[str, tuple[str, ...]]:
    """Names of series, each with its labels."""
    return {
        f"{metric.full_name}{suffix}": (*metric.labels, *(("le",) if suffix == "_bucket" else ()))
        for metric in METRICS
        for suffix in (SUFFIXES if metric.kind == "histogram" else ("",))
    }


def selectors(expression: str) -> list[tuple[str, dict[str, str]]]:
    """Return each metric of an expression with its label matchers, the operator first."""
    found = re.findall(r"\b(baton_\w+|up)\b(?:\{([^}]*)\})?", expression)
    matcher = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
    return [(name, {m[0]: m[1] + m[2] for m in matcher.findall(text)}) for name, text in found]


def test_every_metric_is_exported_with_its_labels(
    rules: list[dict[str, Any]], exported: dict[str, tuple[str, ...]]
) -> None:
    recorded = {rule["record"] for rule in rules if "record" in rule}
    for rule in rules:
        names = [name for name, _ in selectors(rule["expr"])]
        used = re.findall(r"\bbaton:[\w:]+", rule["expr"])
        assert names or used, rule
        assert set(used) <= recorded, rule
        assert set(names) <= exported.keys() | OF_PROMETHEUS, rule
        for name, labels in selectors(rule["expr"]):
            assert set(labels) <= {*exported.get(name, ()), "job"}, rule


def test_a_state_of_blocks_is_one_that_there_is(rules: list[dict[str, Any]]) -> None:
    found = [labels for rule in rules for _, labels in selectors(rule["expr"]) if "state" in labels]
    assert [labels["state"].removeprefix("=") for labels in found] == ["fencing"]
    assert "fencing" in KV_STATES


def test_every_outcome_is_one_that_there_is(rules: list[dict[str, Any]]) -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    known = {kind.code for kind in kinds if issubclass(kind, BatonError)}
    known |= {"ok", *(reason.value for reason in FinishReason)}
    named: set[str] = set()
    for rule in rules:
        for _, labels in selectors(rule["expr"]):
            for label in ("outcome", "reason"):
                named.update(filter(None, labels.get(label, "").lstrip("=!~").split("|")))
    assert {"wrong_kv", "ok", "overloaded"} <= named
    assert named <= known


def test_a_bound_of_a_histogram_is_one_of_its_buckets(
    rules: list[dict[str, Any]],
) -> None:
    bounds = {
        (f"{metric.full_name}_bucket", floatToGoString(bound))
        for metric in METRICS
        for bound in metric.buckets
    }
    asked = {
        (name, labels["le"].removeprefix("="))
        for rule in rules
        for name, labels in selectors(rule["expr"])
        if "le" in labels
    }
    assert asked == {("baton_ttft_seconds_bucket", "1.0")}
    assert asked <= bounds


def test_every_alert_says_how_bad_it_is_and_where_to_read_on(alerts: list[dict[str, Any]]) -> None:
    runbook = (ROOT / "docs" / "runbooks.md").read_text()
    sections = re.findall(r"^## (\w+)$", runbook, re.MULTILINE)
    assert sections == [rule["alert"] for rule in alerts], "in the same order"
    for rule in alerts:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert {"summary", "description", "runbook_url"} == rule["annotations"].keys()
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert (ROOT / page).is_file()
        assert anchor == rule["alert"].lower()


def test_every_alert_is_shown_to_fire_and_to_be_silent(alerts: list[dict[str, Any]]) -> None:
    tests = yaml.safe_load((FOLDER / "rules_test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in alerts}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == names
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == names


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_the_rules_do_on_sample_series_what_they_are_to_do() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", "rules_test.yaml"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
