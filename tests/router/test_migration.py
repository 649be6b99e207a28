import pytest

from baton.core.errors import (
    Cancelled,
    DeadlineExceeded,
    Draining,
    InstanceLost,
    InternalError,
    Overloaded,
    RankLost,
    Unavailable,
)
from baton.core.ids import Incarnation, InstanceId
from baton.router.migration import Migrations

ONE = (InstanceId("decode-0"), Incarnation(1))
TWO = (InstanceId("decode-1"), Incarnation(1))
LOST = InstanceLost("it was killed")


@pytest.fixture
def migrations() -> Migrations:
    return Migrations(limit=2, wait_s=10.0)


@pytest.mark.parametrize("error", [LOST, RankLost("rank 1"), Draining("it leaves")])
def test_it_goes_on_where_the_instance_is_gone(migrations, error):
    assert migrations.ended(ONE, error, 100.0) is None
    assert migrations.until == 110.0


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("the gateway is shutting down"),
        DeadlineExceeded("too long"),
        Cancelled("by the caller"),
        InternalError("a step failed"),
        Overloaded("full"),
    ],
)
def test_other_errors_end_it(migrations, error):
    assert migrations.ended(ONE, error, 100.0) is error
    assert migrations.until is None


def test_the_last_loss_ends_it_with_one_error_that_says_why(migrations):
    assert migrations.ended(ONE, LOST, 0.0) is None
    assert migrations.ended(TWO, LOST, 1.0) is None
    error = migrations.ended(ONE, LOST, 2.0)
    assert isinstance(error, InstanceLost)
    assert "lost 3 times" in error.message
    assert "it was killed" in error.message
    assert migrations.avoided == {ONE, TWO}


def test_without_migrations_the_error_is_the_instance_s_own():
    assert Migrations(limit=0, wait_s=10.0).ended(ONE, LOST, 0.0) is LOST


def test_draining_counts_as_no_loss_and_is_no_reason_to_avoid(migrations):
    for _ in range(5):
        assert migrations.ended(ONE, Draining("it leaves"), 0.0) is None
    assert not migrations.avoided
    assert migrations.ended(ONE, LOST, 0.0) is None


def test_a_full_instance_ends_only_what_was_not_let_in_before(migrations):
    assert migrations.ended(ONE, LOST, 0.0) is None
    assert migrations.ended(TWO, Overloaded("full"), 1.0) is None
    assert migrations.avoided == {ONE, TWO}


def test_refusals_in_a_row_share_one_deadline(migrations):
    assert migrations.ended(ONE, LOST, 0.0) is None
    full = Overloaded("full")
    assert migrations.ended(TWO, full, 9.9) is None
    assert migrations.until == 10.0
    assert migrations.ended(TWO, full, 10.0) is full


def test_tokens_begin_a_new_deadline(migrations):
    assert migrations.ended(ONE, LOST, 0.0) is None
    migrations.went_on()
    assert migrations.until is None
    assert migrations.ended(TWO, LOST, 50.0) is None
    assert migrations.until == 60.0
