import pytest

from baton.core.errors import InvalidConfig
from baton.core.tenants import ANONYMOUS, ANYBODY, Caller, Tenant


def test_the_anonymous_tenant_has_no_name_and_no_limits():
    limits = ("max_concurrent", "tokens_per_minute", "max_prompt_tokens", "max_output_tokens")
    assert ANONYMOUS.name == ""
    assert [getattr(ANONYMOUS, limit) for limit in limits] == [None] * 4
    assert ANONYMOUS.may_use("any")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "Acme"),
        ("name", "a b"),
        ("name", "x" * 64),
        ("weight", 0),
        ("max_concurrent", 0),
        ("tokens_per_minute", -1),
        ("max_prompt_tokens", 0),
        ("max_output_tokens", 0),
        ("priority_min", -11),
        ("priority_max", 11),
        ("ttft_slo_s", 0),
        ("tpot_slo_s", -1.0),
        ("models", 7),
        ("quota", 1),
    ],
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(InvalidConfig) as refused:
        Tenant.checked(**{field: value})
    assert refused.value.field == field


def test_priorities_must_leave_one():
    with pytest.raises(InvalidConfig, match="priority_min: 3 is not allowed; allowed: at most"):
        Tenant.checked(priority_min=3, priority_max=2)


@pytest.mark.parametrize(("low", "high", "default"), [(-5, 5, 0), (2, 9, 2), (-9, -3, -3)])
def test_the_default_priority_is_the_nearest_to_0(low, high, default):
    assert Tenant(priority_min=low, priority_max=high).default_priority == default


def test_who_sees_whose_requests():
    acme = Caller(Tenant(name="acme"))
    assert acme.sees("acme")
    assert not acme.sees("other")
    assert not acme.sees("")
    assert Caller(Tenant(name="acme"), admin=True).sees("other")
    assert ANYBODY.sees("")


def test_models_that_a_tenant_may_use():
    assert not Tenant(models=("a",)).may_use("b")
    assert Tenant(models=("a",)).may_use("a")
    assert not Tenant(models=()).may_use("a")
