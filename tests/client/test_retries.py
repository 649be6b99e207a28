import pytest

from baton.client.retries import NEVER, Attempts, Retry, RetryBudget
from baton.core.clock import ManualClock
from baton.core.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidConfig,
    InvalidRequest,
    Overloaded,
    Unavailable,
)


def attempts(
    retry: Retry, *, timeout_s: float = 100.0, budget: RetryBudget | None = None
) -> Attempts:
    clock = ManualClock()
    return Attempts(retry, budget or RetryBudget(retry), clock, timeout_s, draw=lambda: 1.0)


def test_pauses_grow_until_the_attempts_are_used_up():
    tried = attempts(Retry(attempts=4, backoff_s=1.0, max_backoff_s=3.0, budget=100))
    pauses = [tried.pause_after(Unavailable("x"), began=False) for _ in range(4)]
    assert pauses == [1.0, 2.0, 3.0, None]


def test_one_attempt_is_one_attempt():
    assert attempts(NEVER).pause_after(Unavailable("x"), began=False) is None


@pytest.mark.parametrize(
    "error",
    [InvalidRequest("a", 1, "b"), Cancelled("x"), DeadlineExceeded("x")],
)
def test_what_would_fail_again_is_not_sent_again(error):
    assert attempts(Retry()).pause_after(error, began=False) is None


def test_what_began_is_not_sent_again():
    assert attempts(Retry()).pause_after(Unavailable("x"), began=True) is None


def test_the_server_says_when_to_come_back():
    tried = attempts(Retry(backoff_s=0.5, max_backoff_s=5.0))
    assert tried.pause_after(Overloaded("x", 2.0), began=False) == 2.5
    assert tried.pause_after(Overloaded("x", 60.0), began=False) is None, "too long to wait"


def test_no_pause_goes_beyond_the_deadline():
    tried = attempts(Retry(backoff_s=2.0), timeout_s=2.0)
    assert tried.pause_after(Unavailable("x"), began=False) is None
    assert tried.seconds_left() == 2.0


def test_the_budget_is_shared_and_successes_fill_it_up():
    retry = Retry(attempts=100, budget=4.0, refill=0.5, backoff_s=0)
    budget = RetryBudget(retry)
    pauses = [
        attempts(retry, budget=budget).pause_after(Unavailable("x"), began=False) for _ in range(6)
    ]
    assert [pause is None for pause in pauses] == [False, True, True, True, True, True]
    tried = attempts(retry, budget=budget)
    for _ in range(7):
        tried.succeeded()
    assert tried.pause_after(Unavailable("x"), began=False) == 0.0
    for _ in range(100):
        tried.succeeded()
    assert repr(budget) == "RetryBudget(4 of 4)"


def test_errors_that_are_no_trouble_of_the_server_cost_nothing():
    retry = Retry(budget=4.0)
    budget = RetryBudget(retry)
    attempts(retry, budget=budget).pause_after(InvalidRequest("a", 1, "b"), began=False)
    assert repr(budget) == "RetryBudget(4 of 4)"


@pytest.mark.parametrize(
    ("field", "value"),
    [("attempts", 0), ("backoff_s", -1.0), ("budget", float("nan")), ("refill", -0.1)],
)
def test_a_bad_policy_is_refused(field: str, value: float):
    with pytest.raises(InvalidConfig) as refused:
        Retry(**{field: value})
    assert refused.value.field == field
