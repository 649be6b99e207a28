"""What ranks tell each other comes back as it was."""

from typing import Any

import msgpack
import pytest

from baton.core.errors import (
    BatonError,
    InternalError,
    InvalidConfig,
    InvalidRequest,
    PeerLost,
    WrongKV,
)
from baton.core.ids import SeqId
from baton.core.request import TokenLogprobs
from baton.engine.step import StepResult
from baton.executor.control_messages import (
    error_from,
    packed_error,
    packed_result,
    result_from,
)


def through_the_wire(packed: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(packed))


def test_results_come_back_equal() -> None:
    told = {SeqId(7): TokenLogprobs(-0.5, ((3, -0.5), (1, -2.0))), SeqId(9): TokenLogprobs(-1.0)}
    for result in (
        StepResult(3, {SeqId(7): 3, SeqId(9): 4}, told),
        StepResult(4, {}),
        StepResult(5, {SeqId(7): 3}, unsound=(SeqId(9), SeqId(8))),
    ):
        assert result_from(through_the_wire(packed_result(result))) == result


def test_so_do_reasons_why_a_sequence_cannot_go_on() -> None:
    why = InvalidRequest("grammar", "a+", "one that can be followed")
    result = StepResult(5, {SeqId(7): 3}, failed={SeqId(7): why})
    back = result_from(through_the_wire(packed_result(result)))
    assert back.tokens == result.tokens
    assert {seq: str(error) for seq, error in back.failed.items()} == {SeqId(7): str(why)}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (WrongKV("block 3"), WrongKV),
        (PeerLost("gone"), PeerLost),
        (InvalidConfig("tp", 3, "1 or 2"), InternalError),
        (ValueError("a bug"), InternalError),
    ],
)
def test_errors_keep_their_class_where_a_message_is_all_they_take(
    error: Exception, kind: type[BatonError]
) -> None:
    back = error_from(through_the_wire(packed_error(error)))
    assert type(back) is kind
    assert (str(error) if isinstance(error, BatonError) else "a bug") in str(back)
