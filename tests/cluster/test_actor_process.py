"""How long a process of an actor drains when Kubernetes ends its pod."""

import pytest

from baton.cluster.actor_process import sigterm_drain_s
from baton.core.errors import InvalidConfig


def test_the_environment_says_how_long_to_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATON_DRAIN_S", raising=False)
    assert sigterm_drain_s() == 20
    monkeypatch.setenv("BATON_DRAIN_S", "97")
    assert sigterm_drain_s() == 97


@pytest.mark.parametrize("text", ["", "soon", "-1", "nan", "inf"])
def test_what_is_no_time_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_DRAIN_S", text)
    with pytest.raises(InvalidConfig, match="BATON_DRAIN_S"):
        sigterm_drain_s()
