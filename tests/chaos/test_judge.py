"""The oracle sees what it is there to see."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from baton.proto import worker_pb2 as pb

from .gateway import Answer, Gateway
from .judge import Sent, judge
from .schedule import Ask, Fault, Schedule, draw_schedule

RIGHT = [[1, 2, 3]]


def run_with(*kinds: str) -> Schedule:
    drawn = draw_schedule(0)
    assert drawn.world.prefill_keeps_s > 1
    return replace(drawn, faults=tuple(Fault(kind, "read", 1, 0, 0.0, 0) for kind in kinds))


def sent(
    tokens: Sequence[int] = (1, 2, 3),
    *,
    reason: str | None = "length",
    outcome: str = "ok",
    **fields: Any,
) -> Sent:
    trace = pb.HandoverTrace(outcome=outcome)
    finish = pb.Finish(reason=reason, handovers=[trace]) if reason else None
    answer = Answer(list(tokens), finish)
    gateway = Gateway(None, lambda _: None)
    return Sent(Ask(0, (0,), 0.0, guest=False), gateway, answer, **fields)


def verdict(
    schedule: Schedule, request: Sent, *, backups: int = 0, seconds: float = 1.0, **struck: int
) -> str:
    found = judge(
        schedule, {0: request}, Counter(struck), RIGHT, seconds=seconds, wrong_backups=backups
    )
    return "; ".join(found)


def test_a_good_run_has_no_problem() -> None:
    assert verdict(run_with("flip"), sent()) == ""
    assert verdict(run_with("flip"), sent(outcome="wrong_kv"), flip=1) == ""
    assert verdict(run_with("cancel"), sent([1], reason="cancelled", cancelled=True)) == ""


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (sent([1, 2, 4]), "other tokens"),
        (sent([1, 2, 3, 4]), "other tokens"),
        (sent([2], reason="cancelled", cancelled=True), "other tokens"),
        (sent([1, 2]), "after 2 tokens"),
        (sent(reason="error"), "ended as error"),
        (sent([1], reason="cancelled"), "ended as cancelled"),
        (sent(reason=None), "has not ended"),
    ],
)
def test_a_wrong_answer_is_seen(request_: Sent, said: str) -> None:
    assert said in verdict(run_with(), request_)


def test_wrong_kv_is_counted_where_it_was_and_nowhere_else() -> None:
    assert "none was counted" in verdict(run_with("stale"), sent(), stale=1)
    assert "where none was" in verdict(run_with("cut"), sent(outcome="wrong_kv"))
    # Prefill may have given the blocks to others while the read waited.
    assert verdict(run_with("late"), sent(outcome="wrong_kv"), late=1) == ""
    assert verdict(run_with("cut"), sent(outcome="wrong_kv"), seconds=3.0) == ""
    # Decode may have given the read up before it had looked at it.
    assert verdict(run_with("stale"), sent(outcome="deadline_exceeded"), stale=1) == ""


def test_wrong_kv_of_a_backup_counts_as_found() -> None:
    run = run_with("stale")
    backed_up = replace(run, world=replace(run.world, backup="peer"))
    assert verdict(backed_up, sent(), backups=1, stale=1) == ""
    assert "backups saw wrong" in verdict(run_with("cut"), sent(), backups=1)
    # The offer may have been over while it was read.
    assert verdict(run_with("kill_decode"), sent(), backups=1) == ""
